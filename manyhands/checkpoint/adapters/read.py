r"""An adapter in PEFT's files -> A and B of each of our matrices. Three layouts of routed experts are read:

    per expert       ….experts.7.gate_proj.lora_A [r, in], lora_B [out, r]
    fused            ….experts.base_layer.lora_A [E·r, in], lora_B [out, r·E]   gate and up   (PEFT ≥ 0.19.1)
                     ….experts.lora_A,          lora_B                          down
    fused, before    the same with in and out changed over: A [E·r, out], B [in, r·E]         (PEFT ≤ 0.19.0)

A is expert-major; in B's columns the expert is fastest. Which of the two fused layouts a tensor has is decided by its
shape; where in = out (OLMoE's gate and up, gpt-oss's down) by another tensor of the file, else by `peft_version`, else
it is refused. Where only one parameter of the experts is adapted there is no `base_layer`, and only the config says
which it is.

E experts, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from manyhands.checkpoint.adapters.file import AdapterFile
from manyhands.checkpoint.adapters.names import PREFIX, Names, Place, candidates
from manyhands.config import BuiltConfig
from manyhands.config.adapter import MOST_RANK
from manyhands.config.base import suggest
from manyhands.errors import CheckpointError
from manyhands.families import FAMILIES, Family
from manyhands.kernels.low_rank import LowRankWeights
from manyhands.models.adapted import low_ranks, put, refuse_adapted

_FLIPPED_UNTIL = (0, 19, 0)
"""The last PEFT that wrote in and out changed over; of parameters [E, in, out] (gpt-oss) the only one."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What LoRA adds to a model, whatever file it came from."""

    matrices: Mapping[str, LowRankWeights]
    """By part (`manyhands.models.adapted`): A [r, in] or [E, r, in], B, and s. Float32."""
    base: str | None = None
    """The model it was trained on, as the file says."""


def read_adapter(directory: str | Path, config: BuiltConfig, family: Family | None = None) -> Adapter:
    """The adapter in `directory` for a model of this description, from this family's files (None: from none).

    Raises `CheckpointError` naming the file, and the field or tensor: what is missing or malformed, adapts something
    that the model does not have or that takes no adapter here (routers, the head), or could mean two things.
    """
    file = AdapterFile(Path(directory))
    names = _best(file, candidates(FAMILIES["manyhands"] if family is None else family, config))
    taken: dict[str, LowRankWeights] = {}
    of_experts: dict[str, dict[str, Place]] = {}
    for module in file.pairs:
        place = names.modules.get(module)
        if place is None:
            part, pair = _stacked(file, names, module)
            taken[part] = pair
        elif place.expert is None:
            taken[place.part] = _linear(file, names, module, place)
        else:
            of_experts.setdefault(place.part, {})[module] = place
    for part in of_experts:
        if part in taken:
            raise CheckpointError(f"{file.path}: {part} is adapted twice, expert by expert and all together")
        taken[part] = _experts(file, names, part)
    empty = [part for part, pair in taken.items() if not pair.A.any() and not pair.B.any()]  # as `write` fills up
    ordered = {part: taken[part] for part in names.shapes if part in taken and part not in empty}
    if not ordered:
        raise CheckpointError(f"{file.path}: every tensor is zero")
    return Adapter(ordered, file.fields.base)


def load_adapter(model: nn.Module, directory: str | Path) -> Adapter:
    """Put the adapter in `directory` on `model`, and freeze the rest of it.

    Raises what `read_adapter` does, and `ConfigError` for a model that has an adapter already (see `models.adapted`).
    """
    refuse_adapted(model, "load_adapter")
    origin = getattr(model, "origin", None)
    config: BuiltConfig = model.config  # type: ignore[assignment]
    adapter = read_adapter(directory, config, None if origin is None else origin.family)
    attach(model, adapter)
    return adapter


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter on a model of the same description."""
    put(model, {part: (pair.A.shape[-2], pair.scale) for part, pair in adapter.matrices.items()})
    lows = low_ranks(model)
    with torch.no_grad():
        for part, pair in adapter.matrices.items():
            lows[part].lora_A.copy_(pair.A)
            lows[part].lora_B.copy_(pair.B)


def _best(file: AdapterFile, found: list[Names]) -> Names:
    """The naming that knows most of the file's modules."""
    return max(found, key=lambda names: sum(_known(names, module) for module in file.pairs))


def _known(names: Names, module: str) -> bool:
    return module in names.modules or module.removesuffix(".base_layer") in names.stacks


def _linear(file: AdapterFile, names: Names, module: str, place: Place) -> LowRankWeights:
    out, inputs = names.shapes[place.part]
    a, b = file.shapes(module)
    r = a[0]
    if r > MOST_RANK or a != (r, inputs) or b != (out, r):
        raise file.bad_shapes(module, f"[r, {inputs}] and [{out}, r]")
    return LowRankWeights(*file.pair(module), file.fields.scale([module], r))


def _experts(file: AdapterFile, names: Names, part: str) -> LowRankWeights:
    """One expert at a time: gate and up become one matrix.

    They have A in common, as we write them, or get the ranks of both, side by side.
    """
    E, out, inputs = names.shapes[part]
    pieces: list[list[tuple[slice, Tensor, Tensor]]] = [[] for _ in range(E)]
    ranks: dict[int, int] = {}
    scale: float | None = None
    for module, place in names.modules_of(part).items():
        if module not in file.pairs:
            raise CheckpointError(f"{file.path}: {PREFIX}{module}.lora_A.weight is missing; other experts have it")
        rows = len(range(*place.rows.indices(out)))
        a, b = file.shapes(module)
        r = ranks.setdefault(place.rows.start or 0, a[0])  # the same for all experts
        if r > MOST_RANK or a != (r, inputs) or b != (rows, r):
            raise file.bad_shapes(module, f"[{r}, {inputs}] and [{rows}, {r}], as of other experts")
        A, B = file.pair(module)
        own = file.fields.scale([module], r)
        scale = own if scale is None else scale
        assert place.expert is not None
        pieces[place.expert].append((place.rows, A, B if own == scale else B * (own / scale)))
    shared = all(
        A.shape == of_one[0][1].shape and torch.equal(A, of_one[0][1]) for of_one in pieces for _, A, _ in of_one
    )
    r = max(ranks.values()) if shared else sum(ranks.values())
    A_Eri, B_Eor = torch.zeros(E, r, inputs), torch.zeros(E, out, r)
    for e, of_one in enumerate(pieces):
        first = 0
        for rows_of, A, B in of_one:
            A_Eri[e, first : first + len(A)] = A
            B_Eor[e, rows_of, first : first + len(A)] = B
            first += 0 if shared else len(A)
    assert scale is not None
    return LowRankWeights(A_Eri, B_Eor, scale)


def _stacked(file: AdapterFile, names: Names, module: str) -> tuple[str, LowRankWeights]:
    """All experts of a layer together."""
    inner = module.endswith(".base_layer")
    stack = module.removesuffix(".base_layer")
    if stack not in names.stacks:
        raise _unknown(file, names, module)
    parameter = _parameter(file, stack, inner, names.stacks[stack])
    part = names.stacks[stack][parameter]
    E, out, inputs = names.shapes[part]
    a, b = file.shapes(module)
    r, rest = divmod(a[0], E)
    if rest or not 0 < r <= MOST_RANK:
        raise file.bad_shapes(module, f"[r·{E}, {inputs}] and [{out}, r·{E}]")
    flipped = _flipped(file, names, module, part)
    expected = ((r * E, out), (inputs, r * E)) if flipped else ((r * E, inputs), (out, r * E))
    if (a, b) != expected:
        raise file.bad_shapes(module, f"[r·{E}, {inputs}] and [{out}, r·{E}]")
    first, second = file.pair(module)
    if flipped:  # the delta is [E, out, in] all the same: rows are what A's columns are
        A = second.view(inputs, r, E).permute(2, 1, 0)
        B = first.view(E, r, out).transpose(1, 2)
    else:
        A, B = first.view(E, r, inputs), second.view(out, r, E).permute(2, 0, 1)
    if part in names.order:
        B = B[:, names.order[part].argsort()]
    return part, LowRankWeights(A.contiguous(), B.contiguous(), file.fields.scale([f"{stack}.{parameter}"], r))


def _parameter(file: AdapterFile, stack: str, inner: bool, parameters: Mapping[str, str]) -> str:
    """Which parameter of the experts: the first is innermost where both are adapted."""
    up = next(name for name in parameters if name != "down_proj")
    if inner:
        return up
    if f"{stack}.base_layer" in file.pairs:
        return "down_proj"
    said = [name for name in (up, "down_proj") if any(p.rpartition(".")[2] == name for p in file.fields.parameters)]
    if len(said) != 1:
        raise CheckpointError(
            f"{file.fields.path}: target_parameters must say whether {stack} adapts {up} or down_proj; it says "
            f"{list(file.fields.parameters)[:4]}"
        )
    return said[0]


def _layout(file: AdapterFile, names: Names, module: str, part: str) -> bool | None:
    """Whether in and out are changed over, by the shapes alone; None where both would fit, or neither does."""
    E, out, inputs = names.shapes[part]
    a, b = file.shapes(module)
    if a[0] % E or a[0] != b[1]:
        return None
    as_now, as_before = (a[1], b[0]) == (inputs, out), (a[1], b[0]) == (out, inputs)
    return None if as_now == as_before else as_before


def _flipped(file: AdapterFile, names: Names, module: str, part: str) -> bool:
    """The same, decided."""
    if (own := _layout(file, names, module, part)) is not None:
        return own
    others = set()
    for other in file.pairs:
        stack = other.removesuffix(".base_layer")
        if other not in names.modules and stack in names.stacks:
            of = names.stacks[stack][_parameter(file, stack, other != stack, names.stacks[stack])]
            others.add(_layout(file, names, other, of))
    others.discard(None)
    if len(others) == 1:
        return bool(others.pop())
    if file.fields.version is None:
        raise CheckpointError(
            f"{file.path}: {module}: its inputs and outputs are as many, so that it may be in the order of PEFT up to "
            f"0.19.0 or of later ones; peft_version in {file.fields.path.name} would say which, and is missing"
        )
    if part in names.transposed:
        return file.fields.version == _FLIPPED_UNTIL
    return file.fields.version <= _FLIPPED_UNTIL


def _unknown(file: AdapterFile, names: Names, module: str) -> CheckpointError:
    leaves = {name.rpartition(".")[2] for name in (*names.modules, *(p for s in names.stacks.values() for p in s))}
    near = suggest(module.rpartition(".")[2][:80], sorted(leaves))
    return CheckpointError(
        f"{file.path}: it adapts {module[:160]!r}, which this model does not have, or which takes no adapter here (a "
        f"router, the head, embeddings); {near}"
    )
