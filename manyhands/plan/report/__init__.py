"""What the planner says: sections of figures, each with its unit, its formula and the numbers that went in."""

from manyhands.plan.report.ask import Ask
from manyhands.plan.report.figure import Figure, Formula, Section, Table
from manyhands.plan.report.sections import build_sections

__all__ = ["Ask", "Figure", "Formula", "Section", "Table", "build_sections"]
