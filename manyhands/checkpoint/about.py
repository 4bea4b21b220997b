"""A loaded model in one line: how large it is, what it is made of, how its numbers are stored."""

from typing import TYPE_CHECKING

from manyhands.moe import MoELayer
from manyhands.moe.crew import CrewExperts

if TYPE_CHECKING:
    from manyhands.checkpoint.model import LoadedModel


def about(model: "LoadedModel") -> str:
    """`6.92B parameters, 16 layers, 16 mixtures of 64 experts and 8 per token; experts int4, linear int8`."""
    where = ", experts on disk" if model.budget is not None else ""
    if any(isinstance(moe.experts, CrewExperts) for moe in model.modules() if isinstance(moe, MoELayer)):
        where = ", with the experts of this process alone"
    return f"{model.extra_repr()}; {stored_as(model)}{where}"


def stored_as(model: "LoadedModel") -> str:
    """The number format of its weights: of packed ones by kind, else the dtype."""
    packed = None if model.origin is None or not model.records else model.origin.packed
    if packed is None:
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        return f"packed, beside {dtype}" if model.records else dtype
    kinds = {"experts": packed.experts, "linear": packed.linear}
    return ", ".join(f"{kind} {how.format}" for kind, how in kinds.items() if how is not None)
