"""One row of the parity table: a family's reference against ours, from the same files."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from manyhands.checkpoint.model import Model, load_model, save
from manyhands.families import FAMILIES, canonical
from manyhands.moe.balance import load_balancing_loss, pool_layers

from .references import Reference, lm_loss  # type: ignore[import-not-found,unused-ignore]

B, S, SPLIT = 2, 24, 10
IDS = torch.randint(0, 96, (B, S), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(B, S, dtype=torch.long)
MASK[1, :9] = 0


@dataclass
class Row:
    """What the table shows; the bars are 1e-4, 1, 1e-4, true."""

    family: str
    prefill: float
    """Largest absolute difference of a real token's logits, with padding in the batch."""
    decode: float
    """The same, token by token on a cache."""
    routing: float
    """Share of (token, choice) pairs with the same expert."""
    gradient: float
    """Largest over tensors of ‖ours − theirs‖∞ / ‖theirs‖∞ (at least a thousandth of the largest gradient)."""
    router_loss: float | None
    """Relative difference of the balance loss, after its scale; None where the reference has none."""
    round_trip: bool
    """Ours written back is theirs, bit for bit, and the reference loads it without complaint to the same logits."""
    logits_std: float
    """Of the reference's logits: a comparison of zeros would prove nothing."""


def measure(name: str, reference: Reference, workspace: Path, tied_experts: bool = False) -> Row:
    """Compare. `tied_experts`: experts 0 and 1 are the same, and either may be chosen."""
    model = load_model(reference.directory, dtype=torch.float32)
    real = MASK.bool()
    theirs, chosen = reference.run(IDS, MASK)
    with torch.no_grad():
        out = model(IDS, MASK)
    prefill = float((out.logits - theirs)[real].abs().max())
    assert sorted(out.routings) == sorted(chosen)
    same = total = 0
    for layer, ids in chosen.items():
        ours, ids = out.routings[layer].expert_ids[real.flatten()], ids.view(B * S, -1)[real.flatten()]
        if tied_experts:
            ours, ids = ours.clamp(min=1), ids.clamp(min=1)
        same += int((ours.sort(-1).values == ids.sort(-1).values).sum())
        total += ids.numel()
    router_loss = None
    scale = FAMILIES[model.family].aux_loss_scale
    if scale is not None and reference.router_loss is not None and out.routings:
        expected = reference.router_loss(IDS, MASK)
        found = float(load_balancing_loss(pool_layers(out.routings.values()))) * scale(model.config)
        router_loss = abs(found - expected) / abs(expected)
    return Row(
        name,
        prefill,
        _decode(model, reference, theirs, real),
        same / total if total else 1.0,
        _gradient(model, reference, tied_experts),
        router_loss,
        _round_trip(reference, workspace, theirs, real),
        float(theirs[real].std()),
    )


def _decode(model: Model, reference: Reference, theirs: Tensor, real: Tensor) -> float:
    cache = model.new_cache()
    with torch.no_grad():
        steps = [model(IDS[:, :SPLIT], MASK[:, :SPLIT], cache).logits]
        steps += [model(IDS[:, i : i + 1], MASK[:, i : i + 1], cache).logits for i in range(SPLIT, S)]
    expected = theirs if reference.decode is None else reference.decode(IDS, MASK, SPLIT)
    return float((torch.cat(steps, 1) - expected)[real].abs().max())


def _gradient(model: Model, reference: Reference, tied_experts: bool) -> float:
    theirs = reference.gradients(IDS, MASK)
    model.zero_grad()
    lm_loss(model(IDS, MASK).logits, IDS, MASK).backward()
    ours = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    expected = {name: torch.zeros_like(g) for name, g in ours.items()}
    for piece in FAMILIES[model.family].pieces(model.config):
        if piece.ours in expected:  # not a buffer: the selection bias has no gradient
            part = theirs[piece.theirs][piece.theirs_index]
            expected[piece.ours][piece.ours_index] = part.transpose(-2, -1) if piece.transpose else part
    largest = max(float(g.abs().max()) for g in expected.values())
    worst = 0.0
    for name, found in ours.items():
        right = expected[name]
        if tied_experts and (".experts." in name or ".router." in name):  # whichever of the two was chosen has it
            found, right = (torch.cat((g[:1] + g[1:2], g[2:])) for g in (found, right))
        # a gradient that is zero but for rounding (a router whose only weight is 1) is measured by the others
        worst = max(worst, float((found - right).abs().max()) / max(float(right.abs().max()), 1e-3 * largest))
    return worst


def _round_trip(reference: Reference, workspace: Path, theirs: Tensor, real: Tensor) -> bool:
    model = load_model(reference.directory)
    model.save(workspace / "back")
    original = reference.unquantised or reference.directory
    before, after = (load_file(path / "model.safetensors") for path in (original, workspace / "back"))
    equal = before.keys() == after.keys() and all(
        before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before
    )
    if equal and reference.reload is not None:
        logits, _ = reference.reload(workspace / "back")(IDS, MASK)
        if reference.unquantised is not None:
            theirs, _ = reference.reload(reference.unquantised)(IDS, MASK)
        equal = float((logits[real] - theirs[real]).abs().max()) < 1e-6
    again = load_model(workspace / "back")
    return equal and canonical(again.config) == canonical(model.config) and _same_state(again, model)


def _same_state(a: Model, b: Model) -> bool:
    b_state = b.state_dict()
    return all(torch.equal(t, b_state[n]) for n, t in a.state_dict().items())


def as_json(rows: list[Row]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1)


__all__ = ["IDS", "MASK", "Row", "as_json", "measure", "save"]
