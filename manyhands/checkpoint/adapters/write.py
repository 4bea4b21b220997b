"""An adapter as PEFT reads it: an expert at a time, or all of a layer together.

    form         read by
    per-expert   PEFT ≥ 0.20 on transformers 5, vLLM, SGLang, llama.cpp's convert_lora_to_gguf: the widest reach
    fused        PEFT ≥ 0.19.1 on transformers 5; two thirds of the bytes, since gate and up need not repeat one A

One r and one alpha for all: ranks are padded with zeros, and what scales differ by goes into B. rsLoRA's scale is
written as alpha = s·r, since PEFT's reader doubles r where it joins gate and up.

E experts, r rank.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from manyhands.checkpoint.adapters.fields import CONFIG
from manyhands.checkpoint.adapters.file import WEIGHTS
from manyhands.checkpoint.adapters.names import PREFIX, Names, written_as
from manyhands.checkpoint.adapters.read import Adapter
from manyhands.checkpoint.files import building
from manyhands.config import BuiltConfig
from manyhands.errors import ConfigError
from manyhands.families import Family
from manyhands.kernels.low_rank import LowRankWeights
from manyhands.models.adapted import low_ranks
from manyhands.parallel.shards import whole

Form = Literal["per-expert", "fused"]
FORMS: tuple[Form, ...] = get_args(Form)
_AS_OF = "0.19.1"
"""The PEFT whose order of rows and columns the fused form has."""


def save_adapter(model: nn.Module, directory: str | Path, *, form: Form | None = None, overwrite: bool = False) -> None:
    """Write the adapter of `model` as a directory that PEFT loads on the model it came from; see `write_adapter`.

    Raises `ConfigError` for a model without adapters, or with one that PEFT's files cannot say.
    """
    origin = getattr(model, "origin", None)
    config: BuiltConfig = model.config  # type: ignore[assignment]
    family = None if origin is None else origin.family
    write_adapter(adapter_of(model), directory, config, family, form=form, overwrite=overwrite)


def adapter_of(model: nn.Module) -> Adapter:
    """What LoRA adds to `model`. Collective where it is sharded over processes: each gets the whole.

    Raises `ConfigError` for a model without adapters.
    """
    lows = low_ranks(model)
    if not lows:
        raise ConfigError("save_adapter: the model has no adapter; adapt(model, …) puts one there")
    pairs = {part: [whole(t.detach()) for t in (low.lora_A, low.lora_B)] for part, low in lows.items()}
    origin = getattr(model, "origin", None)
    matrices = {part: LowRankWeights(A, B, lows[part].scale) for part, (A, B) in pairs.items()}
    return Adapter(matrices, None if origin is None else str(origin.path))


def write_adapter(
    adapter: Adapter,
    directory: str | Path,
    config: BuiltConfig,
    family: Family | None = None,
    *,
    form: Form | None = None,
    overwrite: bool = False,
    sources: Collection[str | Path] = (),
) -> None:
    """Write `directory`, complete or not at all, for a model of this description and family.

    `form` None: per expert, where the family's files have experts one by one, else fused. What exists stays, unless
    `overwrite` is given and this program wrote it; `sources` are what is read meanwhile.

    Raises `ConfigError` for a form that the family has no names for, `UserError` for a target that may not be written,
    `StorageError` if the disk refuses.
    """
    names = written_as(family, config)
    chosen: Form = form or ("per-expert" if _by_expert(names) else "fused")
    if chosen not in FORMS:
        raise ConfigError(f"form = {form!r}: allowed are {', '.join(FORMS)}")
    one = _uniform(adapter.matrices)
    if chosen == "per-expert":
        one = _with_down(names, one)
    tensors = dict(_tensors(names, one, chosen))
    fields = _fields(names, one, chosen) | {"base_model_name_or_path": adapter.base}
    with building(directory, overwrite=overwrite, sources=sources) as partial:
        (partial / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})


def _by_expert(names: Names) -> bool:
    return any(place.expert is not None for place in names.modules.values())


def _uniform(matrices: Mapping[str, LowRankWeights]) -> dict[str, LowRankWeights]:
    """The same with one rank and one scale, float32."""
    r = max(pair.A.shape[-2] for pair in matrices.values())
    scale = next(iter(matrices.values())).scale
    found = {}
    for part, pair in matrices.items():
        more = r - pair.A.shape[-2]
        B = pair.B.float() if pair.scale == scale else pair.B.float() * (pair.scale / scale)
        A, B = F.pad(pair.A.float(), (0, 0, 0, more)), F.pad(B, (0, more))
        found[part] = LowRankWeights(A.cpu().contiguous(), B.cpu().contiguous(), scale)
    return found


def _with_down(names: Names, matrices: Mapping[str, LowRankWeights]) -> dict[str, LowRankWeights]:
    """Zeros for `down_proj` where experts have LoRA on gate and up alone, which PEFT joins as if they had both."""
    found: dict[str, LowRankWeights] = {}
    for part, pair in matrices.items():
        found[part] = pair
        bank, _, matrix = part.rpartition(".")
        down = f"{bank}.down_proj"
        if matrix == "gate_up_proj" and down not in matrices:
            E, out, inputs = names.shapes[down]
            r = pair.A.shape[-2]
            found[down] = LowRankWeights(torch.zeros(E, r, inputs), torch.zeros(E, out, r), pair.scale)
    return found


def _tensors(names: Names, matrices: Mapping[str, LowRankWeights], form: Form) -> Iterator[tuple[str, Tensor]]:
    """By their names in the file."""
    for part, (A, B, _) in matrices.items():
        if A.dim() == 2:
            (module,) = names.modules_of(part)
            yield from _pair(module, A, B)
        elif form == "fused":
            yield from _stacked(names, matrices, part, A, B)
        else:
            yield from _experts(names, part, A, B)


def _pair(module: str, A: Tensor, B: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"{PREFIX}{module}.lora_A.weight", A.clone()  # two names of one tensor are refused
    yield f"{PREFIX}{module}.lora_B.weight", B.contiguous().clone()


def _experts(names: Names, part: str, A: Tensor, B: Tensor) -> Iterator[tuple[str, Tensor]]:
    modules = names.modules_of(part)
    if not modules:
        raise ConfigError(f"form = 'per-expert': files of {names.family.model_type} have no expert alone; use 'fused'")
    for module, place in modules.items():
        assert place.expert is not None
        yield from _pair(module, A[place.expert], B[place.expert, place.rows])


def _stacked(
    names: Names, matrices: Mapping[str, LowRankWeights], part: str, A: Tensor, B: Tensor
) -> Iterator[tuple[str, Tensor]]:
    found = names.stack_of(part)
    if found is None:
        raise ConfigError(f"form = 'fused': {names.family.model_type} has no name for {part} of all experts together")
    stack, parameter = found
    both = all(other in matrices for other in names.stacks[stack].values())
    inner = ".base_layer" if both and parameter != "down_proj" else ""
    if part in names.order:
        B = B[:, names.order[part]]
    E, r, inputs = A.shape
    yield from _pair(f"{stack}{inner}", A.reshape(E * r, inputs), B.permute(1, 2, 0).reshape(B.shape[1], r * E))


def _fields(names: Names, matrices: Mapping[str, LowRankWeights], form: Form) -> dict[str, Any]:
    """`adapter_config.json`."""
    A, _, scale = next(iter(matrices.values()))
    r = A.shape[-2]
    alpha = scale * r
    modules, parameters = _targets(names, matrices, form)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "peft_version": _AS_OF,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": modules,
        "target_parameters": parameters or None,
    }


def _targets(names: Names, matrices: Mapping[str, LowRankWeights], form: Form) -> tuple[list[str], list[str]]:
    """`target_modules` and `target_parameters`.

    On transformers 5 PEFT takes `gate_proj`, `up_proj` and `down_proj` of a mixture for its routed experts, whatever
    stands before them: dense networks and shared experts are named as parameters, by their weights.
    """
    modules: dict[str, None] = {}
    parameters: dict[str, None] = {}
    mixture = bool(names.stacks)
    for part in matrices:
        if len(names.shapes[part]) == 2:
            (module,) = names.modules_of(part)
            if mixture and ".self_attn." not in module:
                parameters[f"{module}.weight"] = None
            else:
                modules[module] = None
        elif form == "fused":
            found = names.stack_of(part)
            assert found is not None
            parameters[".".join(found)] = None
        else:
            modules |= dict.fromkeys(module.rpartition(".")[2] for module in names.modules_of(part))
    return _shortened(names, modules), list(parameters)


def _shortened(names: Names, modules: Collection[str]) -> list[str]:
    """`q_proj` where every q_proj of the model is among them."""
    short: dict[str, None] = {}
    for module in modules:
        leaf = module.rpartition(".")[2]
        every = [other for other in names.modules if other.rpartition(".")[2] == leaf]
        short[leaf if all(other in modules for other in every) else module] = None
    return list(short)
