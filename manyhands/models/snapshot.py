"""What modules were made of at one moment: to know later, cheaply, whether any of it was replaced or is listened to."""

from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as modules

_GLOBAL_HOOKS = (modules._global_forward_hooks, modules._global_forward_pre_hooks)


_LAYOUT: tuple[Callable[[Tensor], Any], ...] = (Tensor.data_ptr, Tensor.stride, Tensor.size, attrgetter("dtype"))


class Snapshot:
    """Every module below some, with its class, hooks, settings, children, parameters and where these lie in memory.

    What changes *in* a tensor is not seen here: whoever holds a snapshot must read tensors where they lie, and copy
    nothing. The memory is held, so that its addresses are given to nobody else.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        found = list(dict.fromkeys(chain.from_iterable(root.modules() for root in roots)))
        self._found = found
        self._kinds = [type(m) for m in found]
        self._forwards = [(kind, kind.forward) for kind in set(self._kinds)]
        # every way into a module: its settings, and what PyTorch keeps beside them
        inside = [(m._modules, m._parameters, m._buffers) for m in found]
        listening = [(m._forward_hooks, m._forward_pre_hooks) for m in found]
        beside = chain.from_iterable((*inside, *listening))
        self._dicts: list[dict[Any, Any]] = [*map(vars, found), *beside, *_GLOBAL_HOOKS]
        self._lengths = list(map(len, self._dicts))
        self._filled = [d for d in self._dicts[len(found) :] if d]
        self._values = list(chain.from_iterable(map(dict.values, self._filled)))
        self._readers = [self._reader(m) for m in found]
        self._settings = list(map(call, self._readers, self._dicts))
        self._tensors = [t for t in self._values if isinstance(t, Tensor)]
        self._places = [list(map(look, self._tensors)) for look in _LAYOUT]
        self._memory = [t.detach() for t in self._tensors]

    @staticmethod
    def _reader(module: nn.Module) -> "itemgetter[Any]":
        """Reads the attributes that are neither PyTorch's own nor tensors or modules, `training` among them."""
        return itemgetter(*(name for name in vars(module) if not name.startswith("_")), "_modules", "_parameters")

    @property
    def heard(self) -> bool:
        """Whether somebody listened already."""
        return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in self._found) or any(
            _GLOBAL_HOOKS
        )

    def holds(self) -> bool:
        """Whether everything is as it was."""
        try:
            return (
                list(map(len, self._dicts)) == self._lengths
                and all(map(is_, chain.from_iterable(map(dict.values, self._filled)), self._values))
                and list(map(type, self._found)) == self._kinds
                and list(map(call, self._readers, self._dicts)) == self._settings  # which begin with every vars(m)
                and all(list(map(look, self._tensors)) == was for look, was in zip(_LAYOUT, self._places, strict=True))
                and all(kind.forward is forward for kind, forward in self._forwards)
            )
        except (KeyError, RuntimeError, ValueError):  # an attribute is gone, a tensor has no memory any more
            return False
