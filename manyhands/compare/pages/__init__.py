"""Pages of HTML that load nothing: `one_run.py` of a past run, `side_by_side.py` (`page.html`) of several."""
