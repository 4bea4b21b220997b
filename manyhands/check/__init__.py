"""`manyhands check`: a model, shrunk if large, against a float64 oracle that evaluates every expert for every token.

Start with `oracle.py` (what is right), then `model.py` (what is compared), `compare.py` (what counts as equal).
"""

from manyhands.check.render import render
from manyhands.check.report import CheckReport, Row, Situation
from manyhands.check.routers import ROUTERS
from manyhands.check.run import check_routers, run_check
from manyhands.check.shrink import shrink

__all__ = ["ROUTERS", "CheckReport", "Row", "Situation", "check_routers", "render", "run_check", "shrink"]
