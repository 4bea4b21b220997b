"""Which parameter is trained by which optimiser, and with what rate and decay.

    group              parameters                                           optimiser         rate            decay
    hidden             matrices of attention, dense FFN, experts, shared    Muon              lr              yes
    gate_up            experts' fused gate_up_proj                          Muon, split in 2  lr              yes
    router             router matrices                                      `router_optim`    router_lr_scale yes
    embed              embedding and output head                            AdamW             embed_lr_scale  yes
    shared_expert_gate the gate of the shared experts                       AdamW             lr              yes
    vector             norms, biases, relative positions, other vectors     AdamW             lr              no

With `name = "adamw"` or `"adafactor"` the groups are the same and one optimiser trains them all. Kimi K2 (arXiv
2507.20534) trains embeddings, head and norms with AdamW and does not say what trains the router: hence the option.

Adafactor (arXiv 1804.04235) is torch's, which does what T5 and Switch were trained with: no momentum, second moments
factored into rows and columns (of each expert by itself), updates clipped to an RMS of 1, and steps relative to the RMS
of the parameter (a stack of experts is one parameter there). `lr` is that relative step; torch takes min(lr, 1/√t), so
0.01 is T5's 1/√max(t, 10⁴). What differs: T5 factors only matrices of at least 128 rows and columns, and adds 10⁻³⁰ to
squared gradients, which torch bounds from below instead.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from manyhands.config.optim_groups import optim_group
from manyhands.config.run import OptimConfig
from manyhands.errors import CheckpointError
from manyhands.parallel.shards import Reader, Rows, held_rows, laid_out, local, take
from manyhands.train.adafactor_sharded import ShardedAdafactor, lies_like, state_shapes
from manyhands.train.muon import Muon

FUSED_DEVICES = {"cpu", "cuda"}
ADAFACTOR_EPS = (1e-15, 1e-3)
"""Least gradient (its square is T5's 1e-30) and least RMS of a parameter. With torch's own 1e-7 an expert whose squared
gradients are smaller than that on average, as in any small model, would move the further the smaller they are."""


class Optimizers:
    """The optimisers of one model, used as one.

    Every group carries `name`, `param_names` and `lr_scale`, beside what its optimiser keeps there.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """All parameter groups."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_lr(self, lr: float) -> None:
        """Give every group `lr` times its `lr_scale`."""
        for group in self.groups:
            group["lr"] = lr * group["lr_scale"]

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as `{parameter}.{momentum_buffer | exp_avg | row_var | … | step}` → tensor; not copies.

        Flat, so that it goes into a safetensors file, and in the same order on every process; what belongs to a
        sharded parameter is sharded (`parallel.shards.whole` gathers it). Rates and decays are the config's.
        """
        return {
            f"{name}.{key}": tensor
            for optimizer, name, param in self._parameters()
            for key, tensor in optimizer.state.get(param, {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the whole state by copies of `state`, on the devices of the parameters; each tensor is whole, or lies
        as this model does. Raises as `load` does."""

        def read(entry: str, rows: Rows) -> Tensor:
            tensor = state[entry]
            return local(tensor) if isinstance(tensor, DTensor) else take(tensor, rows)

        self.load({entry: tensor.shape for entry, tensor in state.items()}, read)

    def load(self, shapes: Mapping[str, Sequence[int]], read: Reader) -> None:
        """Replace the whole state by what `read` finds, only the rows of it that this process holds.

        Args:
            shapes: each entry of `state_dict` and the shape of the whole tensor.
            read: gives the rows of an entry, at any device; they are copied.

        Raises:
            CheckpointError: an entry belongs to no parameter here, or is missing, or has another shape. Nothing is
                changed then.
        """
        slots = {
            f"{name}.{key}": (optimizer, param, key, slot)
            for optimizer, name, param in self._parameters()
            for key, slot in _slots(optimizer, param).items()
        }
        for entry, shape in shapes.items():
            if entry not in slots:
                raise CheckpointError(f"optimiser state {entry} has no place in this model with this optim section")
            expected = slots[entry][-1].shape
            if list(shape) != list(expected):
                raise CheckpointError(
                    f"optimiser state {entry} has shape {list(shape)}; the model needs {list(expected)}"
                )
        stems = {entry.rpartition(".")[0] for entry in shapes}
        for entry in slots:
            if entry.rpartition(".")[0] in stems and entry not in shapes:
                raise CheckpointError(f"optimiser state {entry} is missing")
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for entry in shapes:
            optimizer, param, key, slot = slots[entry]
            found = read(entry, held_rows(param) if slot.cut else None).to(param.device, copy=True)
            optimizer.state[param][key] = laid_out(found, param, slot.shape) if slot.cut else found

    def _parameters(self) -> Iterator[tuple[torch.optim.Optimizer, str, Tensor]]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for name, param in zip(group["param_names"], group["params"], strict=True):
                    yield optimizer, name, param


class _Slot(NamedTuple):
    """A tensor that an optimiser keeps for a parameter that it has trained."""

    shape: torch.Size
    cut: bool
    """Whether it lies on the processes as the parameter does; else each has it whole."""


def _slots(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, _Slot]:
    if isinstance(optimizer, Muon):
        return {"momentum_buffer": _Slot(param.shape, True)}
    if isinstance(optimizer, torch.optim.Adafactor | ShardedAdafactor):
        return {key: _Slot(shape, lies_like(param, key)) for key, shape in state_shapes(param).items()}
    moment = _Slot(param.shape, True)
    return {"step": _Slot(torch.Size(), False), "exp_avg": moment, "exp_avg_sq": moment}


def build_optimizers(model: nn.Module, config: OptimConfig) -> Optimizers:
    """Put every trainable parameter of `model` into exactly one group of the table above.

    Args:
        model: a decoder; parameters are told apart by name and number of dimensions.
        config: names, rates and decays.
    """
    by_group: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            by_group.setdefault(group_of(name, param), []).append((name, param))
    by_muon = {"hidden", "gate_up"} | ({"router"} if config.router_optim == "muon" else set())
    lr_scale = {"embed": config.embed_lr_scale, "router": config.router_lr_scale}
    muon: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for name, params in by_group.items():
        scale = lr_scale.get(name, 1.0)
        decay = 0.0 if name == "vector" else config.weight_decay
        group = {"name": name, "params": params, "lr": config.lr * scale, "lr_scale": scale, "weight_decay": decay}
        if config.name == "muon" and name in by_muon:
            muon.append(group | {"split": 2 if name == "gate_up" else 1})
        else:
            others.append(group)
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(
            Muon(muon, config.lr, momentum=config.momentum, nesterov=config.nesterov, ns_steps=config.ns_steps)
        )
    if others and config.name == "adafactor":
        sharded = any(isinstance(param, DTensor) for group in others for _, param in group["params"])
        adafactor = ShardedAdafactor if sharded else torch.optim.Adafactor
        optimizers.append(adafactor(others, config.lr, eps=ADAFACTOR_EPS))
    elif others:
        fused = {param.device.type for group in others for _, param in group["params"]} <= FUSED_DEVICES
        optimizers.append(
            torch.optim.AdamW(others, config.lr, config.betas, config.eps, fused=fused, foreach=not fused)
        )
    return Optimizers(optimizers)


def group_of(name: str, param: Tensor) -> str:
    """The group of the table above that parameter `name` belongs to."""
    return optim_group(name, param.ndim)
