"""Our backends as experts implementations of transformers.

E experts, K experts per token, T tokens, D model width, F expert width.
"""

from collections.abc import Iterator
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from manyhands.config.activation import GATED, Activation
from manyhands.errors import ConfigError
from manyhands.kernels import ExpertWeights, backend_names, run_experts
from manyhands.kernels.experts import activate

_PROBE = (-1e4, -30.0, -7.5, -6.5, -3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0, 6.5, 7.5, 30.0, 1e4)


def unwrap(experts: nn.Module) -> nn.Module:
    """The experts themselves: PEFT's wrappers hold what they wrap as `base_layer`."""
    while isinstance(inner := experts._modules.get("base_layer"), nn.Module):
        experts = inner
    return experts


def expert_weights(experts: Any, activation: str | None = None) -> ExpertWeights:
    """The weights of a transformers experts module as our backends take them: views, except that interleaved
    gate and up rows (gpt-oss) are copied apart.

    `activation` saves finding it. Raises `ConfigError` naming the class and what no backend of ours can do.
    """
    who = type(experts).__name__
    if not hasattr(experts, "is_transposed"):
        raise ConfigError(f"{who} does not take experts implementations: transformers runs it its own way")
    if experts.has_post_expert_norm:
        raise ConfigError(f"{who} normalises each expert's output: no backend of manyhands does")
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    up, up_bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    down, down_bias = experts.down_proj, getattr(experts, "down_proj_bias", None)
    if any(not isinstance(w, Tensor) or w.dim() != 3 or w.dtype.itemsize < 2 for w in (up, down)):
        raise ConfigError(f"{who} holds quantised or unstacked weights: manyhands needs {name} [E, ., .] in 16 bits up")
    activation = find_activation(experts) if activation is None else activation
    if experts.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if experts.has_gate and not experts.is_concatenated:
        up = torch.cat((up[:, 0::2], up[:, 1::2]), dim=1)
        up_bias = None if up_bias is None else torch.cat((up_bias[:, 0::2], up_bias[:, 1::2]), dim=1)
    return ExpertWeights(up, down, up_bias, down_bias, activation)


@torch.no_grad()
def find_activation(experts: Any) -> str:
    """The name under which `activate` computes what this module computes between its two products, found by
    comparing the two on a grid: clamps, scales and layouts are part of the comparison. `ConfigError` if none does."""
    x = torch.tensor(_PROBE, dtype=torch.float64)
    gate, up = torch.cartesian_prod(x, x).unbind(1)
    ours = torch.cat((gate, up)) if experts.has_gate else x
    theirs = ours if not experts.has_gate or experts.is_concatenated else torch.stack((gate, up), dim=1).flatten()
    between = experts._apply_gate if experts.has_gate else experts.act_fn
    expected = between(theirs[None])[0].double()
    for name in get_args(Activation):
        if (name in GATED) == experts.has_gate and torch.allclose(activate(ours[None], name)[0], expected, rtol=1e-6):
            return str(name)
    act = getattr(experts, "act_fn", None)
    kind = "its own gate" if act is None else type(act).__name__
    raise ConfigError(f"{type(experts).__name__} computes {kind} between its products: no activation of manyhands does")


class _Runner:
    """An experts implementation as transformers calls it: `forward(module, x_TD, ids_TK, weights_TK) -> y_TD`."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._activations: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # grouped_mm cannot be traced in float32 on a CPU
    def __call__(self, experts: nn.Module, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if experts not in self._activations:
            self._activations[experts] = find_activation(experts)
        weights = expert_weights(experts, self._activations[experts])
        kept_TK = (ids_TK >= 0) & (ids_TK < weights.down.shape[0])  # E stands for an expert on another rank
        weights_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
        return run_experts(self.backend, x_TD, ids_TK.long().where(kept_TK, 0), weights_TK, kept_TK, weights)


def register_experts() -> list[str]:
    """Make our backends known to transformers: `manyhands` (chosen automatically) and `manyhands:<backend>`.

    Returns the names, for `model.set_experts_implementation` or `from_pretrained(experts_implementation=…)`. Harmless
    when repeated. Experts that no backend of ours can run raise `ConfigError` in their first forward; transformers
    itself ignores the setting, silently, for a model whose experts it cannot switch: `use_experts` does not.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    names = {"manyhands": "auto"} | {f"manyhands:{name}": name for name in backend_names()}
    for name, backend in names.items():
        ALL_EXPERTS_FUNCTIONS.register(name, _Runner(backend))
    return list(names)


def use_experts(model: Any, name: str = "manyhands") -> None:
    """Register our backends and run all of `model`'s experts on one; `ConfigError` at once if any cannot be."""
    names = register_experts()
    if name not in names:
        raise ConfigError(f"experts implementation {name!r}: manyhands registers {', '.join(names)}")
    modules = list(_experts_of(model))
    if not modules:
        raise ConfigError(f"{type(model).__name__} has no experts")
    for module in modules:
        expert_weights(module)
    model.set_experts_implementation(name)


def _experts_of(model: nn.Module) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if hasattr(module, "is_transposed") or name.rpartition(".")[2] == "experts":
            yield unwrap(module)
