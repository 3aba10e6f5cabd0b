"""Studies: many trainings that are compared, side by side on one device.

    studies.py  what a study is: forms, tasks, sizes, learning rates and seeds, and the `fit` command of each cell
    runs.py     starts what is missing, and ends it at a deadline; child.py is the process of one command
    figures.py  what a finished run has logged, and how large its model is
    results.py  the file that all of it ends in
    report.py   the report: tables.py and plots.py, which show what comparisons.py and masks.py find in records

`python -m benchmarks.evidence --help` says how; docs/evidence.md what for.
"""
