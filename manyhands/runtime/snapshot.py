"""What modules were made of at one moment: to know later, cheaply, whether any of it was replaced or is listened to."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as modules

from manyhands.layers.attention import Attention
from manyhands.layers.feed_forward import FeedForward
from manyhands.layers.latent_attention import LatentAttention
from manyhands.layers.linear import Linear
from manyhands.layers.norm import RMSNorm
from manyhands.layers.packed_linear import RecordLinear
from manyhands.models.decoder import Block
from manyhands.moe import ExpertBank, Experts, MoELayer, Router
from manyhands.moe.packed import RecordExperts

_KINDS = (
    Block,
    Attention,
    LatentAttention,
    FeedForward,
    MoELayer,
    Router,
    Experts,
    RecordExperts,
    Linear,
    RecordLinear,
    RMSNorm,
)
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {kind: kind.forward for kind in _KINDS}
_GLOBAL_HOOKS = (modules._global_forward_hooks, modules._global_forward_pre_hooks)


_LAYOUT: tuple[Callable[[Tensor], Any], ...] = (Tensor.data_ptr, attrgetter("dtype"))
"""What `is_set_to` does not compare: a storage may move (`share_memory_`), and be read as another type."""


class Snapshot:
    """Every module below some, with its class, hooks, settings, children, parameters and where these lie in memory.

    What changes *in* a tensor is not seen here: whoever holds a snapshot must read tensors where they lie, and copy
    nothing. The memory is held, so that its addresses are given to nobody else.
    """

    def __init__(self, roots: Iterable[nn.Module], called: Sequence[nn.Module] = ()) -> None:
        """`called`: parts that are called as modules. Of these only children and listeners are watched."""
        apart = set(map(id, called))
        found: dict[int, nn.Module] = {}
        stack = list(roots)
        while stack:
            if id(module := stack.pop()) not in apart and id(module) not in found:
                found[id(module)] = module
                stack.extend(child for child in module._modules.values() if child is not None)
        self._found = list(found.values())
        watched = list(dict.fromkeys(chain.from_iterable(part.modules() for part in called)))
        self._kinds = [type(m) for m in self._found]
        self._forwards = [(kind, kind.forward) for kind in set(self._kinds)]
        # every way into a module: its settings, and what PyTorch keeps beside them
        inside = [(m._modules, m._parameters, m._buffers) for m in self._found]
        listening = [(m._forward_hooks, m._forward_pre_hooks) for m in self._found]
        others = [(m._modules, m._forward_hooks, m._forward_pre_hooks) for m in watched]
        beside = chain.from_iterable((*inside, *listening, *others))
        self._dicts: list[dict[Any, Any]] = [*map(vars, self._found), *beside, *_GLOBAL_HOOKS]
        self._empty = [d for d in self._dicts if not d]
        self._held = [d for d in self._dicts if d]
        self._lengths = list(map(len, self._held))
        self._filled = [d for d in self._dicts[len(self._found) :] if d]
        self._values = list(chain.from_iterable(map(dict.values, self._filled)))
        self._readers = [self._reader(m) for m in self._found]
        self._settings = list(map(call, self._readers, self._dicts))
        banks = [(m, m.fetched_experts()) for m in self._found if isinstance(m, ExpertBank)]
        self._fetched = [(bank, fetched) for bank, fetched in banks if fetched is not None]
        self._tensors = [t for t in self._values if isinstance(t, Tensor)]
        self._tensors += [fetched.table for _, fetched in self._fetched]
        self._memory = [t.detach() for t in self._tensors]
        self._places = [list(map(look, self._tensors)) for look in _LAYOUT]

    @staticmethod
    def _reader(module: nn.Module) -> "itemgetter[Any]":
        """Reads the attributes that are neither PyTorch's own nor tensors or modules, `training` among them."""
        return itemgetter(*(name for name in vars(module) if not name.startswith("_")), "_modules", "_parameters")

    def holds(self) -> bool:
        """Whether everything is as it was."""
        try:
            return (
                not any(self._empty)
                and list(map(len, self._held)) == self._lengths
                and all(map(is_, chain.from_iterable(map(dict.values, self._filled)), self._values))
                and list(map(type, self._found)) == self._kinds
                and list(map(call, self._readers, self._dicts)) == self._settings  # which begin with every vars(m)
                and all(map(Tensor.is_set_to, self._tensors, self._memory))  # storage, offset, shape, strides
                and all(list(map(look, self._tensors)) == was for look, was in zip(_LAYOUT, self._places, strict=True))
                and all(was.same(bank.fetched_experts()) for bank, was in self._fetched)
                and all(kind.forward is forward for kind, forward in self._forwards)
            )
        except (KeyError, RuntimeError, ValueError):  # an attribute is gone, a tensor has no memory any more
            return False


def heard(module: nn.Module, below: bool = True) -> bool:
    """Whether somebody listens to calls of `module`, or of anything below it.

    That is a hook, a method put in its place, or a class whose `forward` is not what it was when claims were written.
    """
    return any(_GLOBAL_HOOKS) or any(
        m._forward_hooks
        or m._forward_pre_hooks
        or "forward" in vars(m)
        or type(m).forward is not _FORWARDS.get(type(m), type(m).forward)
        for m in (module.modules() if below else [module])
    )
