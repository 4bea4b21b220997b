"""What is said of a picture that was drawn."""

from pathlib import Path

from manyhands.terminal import shown


def drawn(plot: Path) -> str:
    """The line that says where the picture is, asked for before it is drawn: it knows whether its folder is new."""
    made = "" if plot.parent.exists() else f" (the folder {shown(plot.parent)} was made for it)"
    return f"\ndrawn: {shown(plot)}{made}"
