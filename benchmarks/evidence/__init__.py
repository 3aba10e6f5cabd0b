"""Studies: many trainings, run side by side and compared.

    studies.py  what a study is: forms, tasks, sizes, learning rates and seeds; each combination of these is a cell,
                which is one training with one `fit` command
    runs.py     starts the cells that are missing, and stops them at a deadline; child.py runs one command as a process
    figures.py  collects what a finished run has logged, and the size of its model
    results.py  the file with a record of each finished cell
    report.py   writes the report; tables.py and plots.py show what comparisons.py and masks.py find in the records

`python -m benchmarks.evidence --help` explains how to run them, docs/evidence.md what they are for.
"""
