"""A dense model as a mixture of experts that computes the same, to be trained on (sparse upcycling, Komatsuzaki et al.
2022, arXiv 2212.05055; virtual groups: He et al. 2024, arXiv 2410.07524; drop-upcycling: Nakamura et al. 2025, arXiv
2502.19261).

Every feed-forward network of width F is cut along F into G pieces; E/G copies of each piece are the experts, expert e
being piece e mod G of copy ⌊e/G⌋. The G experts of a copy have the same row of the router, so that a token's K best are
K/G whole copies; their weights, divided by their sum, give each piece of a copy 1/G of the copy's share, which W₂ · G
makes up for. All copies being equal, the mixture is the network, whatever the router says.

E experts, K experts per token, G granularity, F the dense width, D model width.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from manyhands.checkpoint.assemble import our_tensor, stored_dtype
from manyhands.checkpoint.source import Source
from manyhands.config import ModelConfig, MoEConfig, RouterConfig
from manyhands.config.activation import GATED
from manyhands.config.decoder import INITIALIZER_RANGE
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import UserError
from manyhands.tune.derived import Change, Computed, read_by

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Upcycling:
    """What is asked for."""

    num_experts: int = 8
    top_k: int = 2
    granularity: int = 1
    """G: pieces that each network is cut into."""
    drop: float = 0.0
    """Share of each expert's channels that start afresh, drawn from a normal of the mean and deviation of what they
    replace (drop-upcycling's r). Not 0: another function, by design."""
    noise: float = 0.0
    """Added to each expert's weights, as a multiple of their deviation. Not 0: another function."""
    seed: int = 0

    @property
    def exact(self) -> bool:
        """Whether the mixture is to compute what the dense model does."""
        return not self.drop and not self.noise


def upcycled_config(config: ModelConfig, asked: Upcycling) -> ModelConfig:
    """The mixture's description. Raises `UserError` for what cannot be, saying what could."""
    E, K, G, F = asked.num_experts, asked.top_k, asked.granularity, config.intermediate_size
    if config.moe is not None:
        raise UserError(f"it is a mixture of {config.moe.router.num_experts} experts already; upcycle a dense model")
    if G < 1 or F % G:
        raise UserError(f"--granularity {G} does not divide the width {F} of the model's feed-forward networks")
    if E % G or K % G:
        raise UserError(
            f"--granularity {G} makes {G} experts of each copy: --experts {E} and --top-k {K} must be multiples of it"
        )
    if K < 2:
        raise UserError(
            "--top-k 1: the mixture is the dense model only if the one expert has weight 1 whatever the router says, "
            "and then the router never learns; give at least 2"
        )
    if not 0.0 <= asked.drop <= 1.0 or not 0.0 <= asked.noise < float("inf"):
        raise UserError(f"--drop {asked.drop} --noise {asked.noise}: a share from 0 to 1, and a multiple from 0")
    if K > E:
        raise UserError(f"--top-k {K} of --experts {E}: a token cannot go to more experts than there are")
    router = RouterConfig(num_experts=E, num_experts_per_tok=K, norm_topk_prob=True)
    moe = MoEConfig(router=router, moe_intermediate_size=F // G, hidden_act=config.hidden_act)
    return config.model_copy(update={"moe": moe})


def upcycled_tensors(source: Source, asked: Upcycling, dtype: torch.dtype | None = None) -> dict[str, Change]:
    """Router and experts of every layer of `upcycled_config`, computed from the dense model's when they are read.

    `dtype` is the experts' (None: as the dense matrices are stored).
    """
    dense = source.decoder("upcycling")
    shapes = tensor_shapes(dense)
    changes: dict[str, Change] = {}
    for layer in range(dense.num_hidden_layers):
        mlp = f"layers.{layer}.mlp"
        read = _Network(source, mlp, shapes)
        changes[f"{mlp}.router.weight"] = Computed(partial(_router, asked=asked, layer=layer), torch.float32)
        up = ("gate_proj", "up_proj") if dense.hidden_act in GATED else ("up_proj",)
        stacked = "gate_up_proj" if dense.hidden_act in GATED else "up_proj"
        for name, parts, fill in ((stacked, up, _up), ("down_proj", ("down_proj",), _down)):
            names = [f"{mlp}.{part}.weight" for part in parts]
            changes[f"{mlp}.experts.{name}"] = Computed(
                partial(fill, parts=parts, read=read, asked=asked, layer=layer),
                stored_dtype(source, names[0]) if dtype is None else dtype,
                read_by(source, names),
            )
    return changes


class _Network:
    """A layer's dense matrices, as they are stored."""

    def __init__(self, source: Source, mlp: str, shapes: dict[str, tuple[int, ...]]) -> None:
        self.source, self.mlp, self.shapes = source, mlp, shapes

    def __call__(self, part: str) -> Tensor:
        name = f"{self.mlp}.{part}.weight"
        return our_tensor(self.source, name, self.shapes[name], None, CPU)


def _router(out_ED: Tensor, asked: Upcycling, layer: int) -> None:
    """N(0, 0.02²), the same row for the experts of a copy."""
    draw = _generator(asked.seed, layer, asked.num_experts)
    copies = torch.randn(asked.num_experts // asked.granularity, out_ED.shape[1], generator=draw) * INITIALIZER_RANGE
    out_ED.copy_(copies.repeat_interleave(asked.granularity, 0))


def _up(out_ERD: Tensor, parts: tuple[str, ...], read: _Network, asked: Upcycling, layer: int) -> None:
    F = out_ERD.shape[1] // len(parts)
    for number, part in enumerate(parts):
        dense_FD = read(part)
        for e in range(asked.num_experts):
            piece = e % asked.granularity
            rows = dense_FD[piece * F : (piece + 1) * F]
            out_ERD[e, number * F : (number + 1) * F] = _changed(rows, 0, asked, layer, e, part)


def _down(out_EDF: Tensor, parts: tuple[str, ...], read: _Network, asked: Upcycling, layer: int) -> None:
    dense_DF, F, G = read(parts[0]), out_EDF.shape[2], asked.granularity
    for e in range(asked.num_experts):
        columns = dense_DF[:, e % G * F : (e % G + 1) * F]
        out_EDF[e] = _changed(columns, 1, asked, layer, e, parts[0]).float() * G


def _changed(w: Tensor, dim: int, asked: Upcycling, layer: int, expert: int, part: str) -> Tensor:
    """An expert's matrix, its channels along `dim`: the dense one's, or with some afresh, or with noise."""
    if asked.exact:
        return w
    w = w.float().clone()
    F = w.shape[dim]
    which = {"gate_proj": 1, "up_proj": 2, "down_proj": 3}[part]
    if count := round(asked.drop * F):  # the same channels in all three matrices
        channels = torch.randperm(F, generator=_generator(asked.seed, layer, expert))[:count]
        old = w.index_select(dim, channels)
        new = torch.randn(old.shape, generator=_generator(asked.seed, layer, expert, which))
        w.index_copy_(dim, channels, new * old.std(unbiased=False) + old.mean())
    if asked.noise:
        random = torch.randn(w.shape, generator=_generator(asked.seed, layer, expert, which, 1))
        w += random * w.std(unbiased=False) * asked.noise
    return w


def dropped_channels(asked: Upcycling, layer: int, expert: int, width: int) -> list[int]:
    """The channels of an expert that start afresh, ascending."""
    count = round(asked.drop * width)
    return sorted(torch.randperm(width, generator=_generator(asked.seed, layer, expert))[:count].tolist())


def _generator(*of: int) -> torch.Generator:
    """The same numbers for a layer and an expert, in whatever order they are written."""
    state = np.random.SeedSequence(of).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
