"""Training: the loop, optimisers, schedule, guard and journal.

The room's name is a function's as well: `manyhands.train(run, …)` is `own.train`.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """Python sets `manyhands.train` to this module on its first import; so the module must be what people call."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from manyhands.train.own import train

        return train(*arguments, **named)

    @property
    def __signature__(self) -> Any:
        import inspect

        from manyhands.train.own import train

        return inspect.signature(train)


sys.modules[__name__].__class__ = _Room
