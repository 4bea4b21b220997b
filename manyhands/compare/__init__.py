"""Verdicts, what experts are worth, runs side by side.

verdict.py   `judge`: findings, each with its figure, its limit and a remedy; whether the run is worth keeping
limits.py    every threshold of a verdict, once
history.py   a run as a verdict reads it: its records and its settings
learning.py  what the losses say: over-fitting, divergence, chance, the learning rate, whether it was done
routers.py   what the experts' load says: collapse, dead experts, uneven use
ending.py    what ended it, what it waited for, what it skipped
alike.py     experts that say nothing, or the same as another
worth.py     what each expert is worth on a text

comparison.py  runs side by side: `run.py` reads one, `groups.py` says which differ in their seed alone
interval.py    how much better one configuration is, with an interval over seeds and documents (`student.py`)
pages/         one_run.py, side_by_side.py: what is drawn of them as HTML
sweep.py       the runs that a file asks for (`sweep_file.py`), trained one after the other or side by side
"""
