"""Studies: many trainings that are compared, side by side on one device.

    studies.py  what a study is: forms, tasks, sizes, learning rates and seeds, and the `fit` command of each cell
    runs.py     starts what is missing, and ends it at a deadline; child.py is the process of one command
    figures.py  what a finished run has logged, and how large its model is
    results.py  the file that all of it ends in
    report.py   tables; comparisons.py is what they say, plots.py the curves and heat maps

`python -m benchmarks.evidence --help` says how; docs/evidence.md what for.
"""
