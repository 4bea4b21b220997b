"""What an answer may be, token by token: a grammar, say. Who compiles one is the caller's business."""

from typing import Protocol

from torch import Tensor


class Constraint(Protocol):
    """The state of one answer. The engine asks before each token and tells after it."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing may follow: the engine ends it there."""
        ...

    def allowed(self) -> Tensor | None:
        """The tokens that may come next, [V] bool on the CPU; None: any."""
        ...

    def accept(self, token_id: int) -> None:
        """This one came."""
        ...
