"""What a recurrent model remembers of a rectangle of B sequences: the states of its LSTM layers, whatever the length.

B batch, D width.
"""

from manyhands.layers.lstm import State


class RecurrentCache:
    """One state per layer; None before the first token. It cannot go back: a state forgets what it was."""

    def __init__(self, num_layers: int) -> None:
        self.states: list[State | None] = [None] * num_layers
        self.length = 0
        """Tokens read, padding included."""
