"""Which experts stay, and a layer of those alone.

A layer keeps N of its E experts: a group for each, which is the expert that stays and, where experts are merged, those
that are put into it. A router in groups of experts (DeepSeek-V3) keeps as many in each of them.

E experts, N of them kept, K experts per token, G groups of the router.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from manyhands.checkpoint.experts import ExpertReader
from manyhands.checkpoint.source import Source
from manyhands.config import ModelConfig, RouterConfig, parse
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import UserError
from manyhands.moe.routing import top_k_stable
from manyhands.tune.derived import Change, Computed, read_by


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """An expert and its part in a kept one."""

    expert: int
    share: float = 1.0
    order: Tensor | None = None
    """[F] int64: channel f of the kept expert is this expert's channel order[f]; None: the same."""


Group = tuple[Member, ...]
"""The expert that stays comes first."""
PARTS = ("router.", "experts.", "average_outputs")
"""Of a sparse layer: what may have a row for each expert."""


def parse_keep(text: str, num_experts: int) -> int:
    """How many experts `--keep` means: 48, 0.75 or 75%. Raises `UserError`."""
    try:
        percent = text.strip().endswith("%")
        number = Fraction(text.strip().removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--keep {text}: a number of experts (48), or a share of them (0.75, 75%)") from None
    if percent:
        number /= 100
    share = percent or "." in text
    count = number * num_experts if share else number
    if count.denominator != 1 or not 1 <= count <= num_experts:
        which = f"{float(count):.4g} of {num_experts} experts" if share else f"a layer has {num_experts} experts"
        raise UserError(f"--keep {text}: {which}; a whole number from 1 to {num_experts} can stay")
    return int(count)


def check_prunable(config: ModelConfig) -> None:
    """Raises `UserError` for a model whose experts cannot be taken away, saying why."""
    if config.moe is None:
        raise UserError("the model is dense: it has no experts to take away")
    router = config.moe.router
    if router.select != "topk":
        why = {
            "hash": "its table from tokens to experts is made for all of them",
            "expert_choice": "its experts choose their tokens",
            "soft": "every expert works for every token",
            "hierarchical": "its gate has a level above the experts",
        }.get(router.select, "it does not pick the K best scores in evaluation")
        raise UserError(f"router.select = {router.select!r}: {why}; only top-k routers are pruned")


def fewer(config: ModelConfig, num_experts: int) -> ModelConfig:
    """The model with so many experts in each sparse layer. Raises `UserError` for too few."""
    check_prunable(config)
    assert config.moe is not None
    r = config.moe.router
    G, K = r.n_group, r.num_experts_per_tok
    if num_experts % G:
        raise UserError(f"--keep {num_experts}: the router has {G} groups, which keep equally many: a multiple of {G}")
    each = max(-(-K // r.topk_group), 2 if G > 1 and r.group_score == "top2_sum" else 1)
    if num_experts // G < each and each == 2 > -(-K // r.topk_group):
        raise UserError(f"--keep {num_experts}: a group is scored by its two best experts; at least {2 * G} must stay")
    if num_experts // G < each:
        least = each * G
        of = "" if G == 1 else f" of {r.topk_group} of {G} groups"
        raise UserError(f"--keep {num_experts}: a token goes to {K} experts{of}; at least {least} must stay")
    router = parse(RouterConfig, r.model_dump() | {"num_experts": num_experts}, f"--keep {num_experts}")
    return config.model_copy(update={"moe": config.moe.model_copy(update={"router": router})})


def best(score_E: Tensor, num_experts: int, num_groups: int = 1) -> list[int]:
    """The N experts of the highest score, equally many of each group, ascending; ties to the lower number."""
    size = len(score_E) // num_groups
    found = top_k_stable(score_E.view(num_groups, size), num_experts // num_groups)
    return sorted((found + torch.arange(num_groups)[:, None] * size).flatten().tolist())


def alone(experts: list[int]) -> list[Group]:
    """They stay as they are, and the others go."""
    return [(Member(expert),) for expert in experts]


def by_expert(config: ModelConfig, layer: int) -> list[str]:
    """Our tensors of a layer that have a row for each expert."""
    E = config.moe.router.num_experts if config.moe is not None else 0
    mlp, parts = f"layers.{layer}.mlp.", ("router.", "experts.", "average_outputs")
    return [
        n for n, s in tensor_shapes(config).items() if n.startswith(tuple(mlp + p for p in parts)) and s[:1] == (E,)
    ]


def shrunk(name: str, groups: list[Group], read: Callable[[int], Tensor]) -> Tensor:
    """[N, …]: one of our tensors of the kept experts alone; `read(expert)` gives a row [...] of it.

    Merged in float32, rounded once.
    """
    merged = ".experts." in name
    rows = []
    for group in groups:
        row = read(group[0].expert)
        if merged and len(group) > 1:
            parts = (m.share * reordered(name, read(m.expert).float(), m.order) for m in group)
            row = sum(parts, torch.zeros_like(row, dtype=torch.float32)).to(row.dtype)
        rows.append(row)
    return torch.stack(rows)


def reordered(name: str, row: Tensor, order: Tensor | None) -> Tensor:
    """An expert's part of a stacked tensor, its channels in another order."""
    leaf = name.rpartition(".")[2]
    if order is None or leaf == "down_proj_bias":
        return row
    if leaf == "down_proj":
        return row[:, order]
    return row[torch.cat((order, order + len(order)))] if leaf.startswith("gate_up") else row[order]


def shrunk_tensors(source: Source, groups: Mapping[int, list[Group]]) -> dict[str, Change]:
    """What changes in the files: of experts that are stored one by one and not merged, the pieces that stay."""
    config = source.decoder("pruning")
    shapes, changes = tensor_shapes(config), dict[str, Change]()
    for layer, of_layer in groups.items():
        merged = any(len(group) > 1 for group in of_layer)
        kept = {group[0].expert: n for n, group in enumerate(of_layer)}
        for name in by_expert(config, layer):
            pieces = source.pieces[name]
            if all(p.ours_index and isinstance(p.ours_index[0], int) for p in pieces) and not merged:
                of_kept = ((p, kept.get(p.ours_index[0])) for p in pieces)  # type: ignore[arg-type]
                changes[name] = [replace(p, ours_index=(n, *p.ours_index[1:])) for p, n in of_kept if n is not None]
                continue
            reader = ExpertReader(source, name, shapes[name])

            def fill(out: Tensor, name: str = name, reader: ExpertReader = reader, of: list[Group] = of_layer) -> None:
                for n, group in enumerate(of):
                    out[n] = shrunk(name, [group], reader.read)[0]

            changes[name] = Computed(fill, reader.dtype, read_by(source, [name]))
    return changes
