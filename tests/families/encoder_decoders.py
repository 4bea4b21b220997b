"""Small random encoder-decoders, made and run by transformers, against ours from the same files.

B batch, S positions of the input, T of the output.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from manyhands.checkpoint.model import load_model
from manyhands.families import FAMILIES, canonical
from manyhands.moe.balance import load_balancing_loss, z_loss
from manyhands.moe.routing import Routing

from .parity import Row  # type: ignore[import-not-found,unused-ignore]

B, S, T = 3, 26, 11
V, D = 96, 24
SIZES: dict[str, Any] = {
    "vocab_size": V, "d_model": D, "d_kv": 10, "d_ff": 40, "num_heads": 3, "num_layers": 4, "num_decoder_layers": 2,
    "dropout_rate": 0.0, "layer_norm_epsilon": 0.02, "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 20, "decoder_start_token_id": 0, "attn_implementation": "eager",
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 5, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1, "router_jitter_noise": 0.0,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", SIZES),
    "t5, gated and untied": ("T5", SIZES | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "switch_transformers": ("SwitchTransformers", SIZES | EXPERTS),
    "switch_transformers, capacity 2": (
        "SwitchTransformers", SIZES | EXPERTS | {"expert_capacity": 2, "router_bias": True},
    ),
    "switch_transformers, untied": (
        "SwitchTransformers", SIZES | EXPERTS | {"tie_word_embeddings": False, "num_sparse_encoder_layers": 4},
    ),
}  # fmt: skip
REAL: dict[str, Any] = {
    "vocab_size": 32128, "d_kv": 64, "dropout_rate": 0.0, "decoder_start_token_id": 0, "attn_implementation": "eager",
}  # fmt: skip
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "t5, sizes of T5-Small": ("T5", REAL | {"d_model": 512, "d_ff": 2048, "num_heads": 8, "num_layers": 6}),
    "switch_transformers, sizes of Switch-Base-8": (
        "SwitchTransformers",
        REAL | EXPERTS | {
            "d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12,
            "num_experts": 8, "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6,
        },
    ),
}  # fmt: skip
"""For the benchmark: 60 and 620 million random weights, which take 10 GB to compare."""
_random = torch.Generator().manual_seed(0)
IDS = torch.randint(2, V, (B, S), generator=_random)
OUT = torch.randint(2, V, (B, T + 1), generator=_random)
MASK = torch.ones(B, S, dtype=torch.long)
MASK[1, -9:] = 0
IDS[1, -9:] = 0


@dataclass(frozen=True)
class Seq2Seq:
    """A reference and where it is stored."""

    directory: Path
    model: Any

    def run(self, ids: Tensor, mask: Tensor | None, out: Tensor) -> Any:
        """Their forward; router logits where they have them."""
        more = {"output_router_logits": True} if hasattr(self.model.config, "num_experts") else {}
        return self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=out, use_cache=False, **more)


def make(case: str, directory: Path) -> Seq2Seq:
    """Random weights at which each matters: norms away from 1, biases away from 0, logits of about 1."""
    import transformers

    name, fields = (CASES | LARGE)[case]
    generator = torch.Generator().manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**fields)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    if name == "T5" and not fields.get("tie_word_embeddings", True):  # transformers 5 ties it until a file has its own
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(generator=generator)
            if name.endswith("norm.weight"):
                p.mul_(0.2).add_(1.0)
            elif name.endswith("bias") or "embed_tokens" in name or name == "shared.weight":
                p.mul_(0.7)
            elif "router" not in name:
                p.mul_(p.shape[-1] ** -0.5 * (0.3 if name.endswith("Attention.q.weight") else 1.0))
    model.save_pretrained(directory)
    return Seq2Seq(directory, model)


def chosen_of(reference: Seq2Seq, theirs: Any) -> dict[int, Tensor]:
    """[B, S or T] by layer number: the expert each token chose, whether or not there was room."""
    if not hasattr(theirs, "encoder_router_logits"):
        return {}
    c = reference.model.config
    found: dict[int, Tensor] = {}
    for first, count, step, logits in (
        (0, c.num_layers, c.encoder_sparse_step, theirs.encoder_router_logits),
        (c.num_layers, c.num_decoder_layers, c.decoder_sparse_step, theirs.decoder_router_logits),
    ):
        sparse = [layer for layer in range(count) if step == 1 or layer % step == 1]
        found |= {first + layer: of.argmax(-1) for layer, of in zip(sparse, logits, strict=True)}
    return found


def measure(case: str, reference: Seq2Seq, workspace: Path) -> Row:
    """A row of the parity table."""
    model = load_model(reference.directory, dtype=torch.float32)
    real = MASK.bool()
    with torch.no_grad():
        theirs = reference.run(IDS, MASK, OUT[:, :-1])
        ours = model(IDS, OUT[:, :-1], MASK)
    chosen = chosen_of(reference, theirs)
    assert sorted(chosen) == sorted(ours.routings)
    same = total = 0
    for layer, ids in chosen.items():
        keep = real.flatten() if layer < model.config.num_hidden_layers else torch.ones(B * T, dtype=torch.bool)
        same += int((ours.routings[layer].expert_ids[:, 0] == ids.flatten())[keep].sum())
        total += int(keep.sum())
    return Row(
        case,
        float((ours.logits - theirs.logits).abs().max()),
        _decode(model, reference, theirs.logits),
        same / total if total else 1.0,
        _gradient(model, reference),
        _router_loss(model, reference) if chosen else None,
        _round_trip(reference, workspace, theirs.logits),
        float(theirs.logits.std()),
    )


def _decode(model: Any, reference: Seq2Seq, theirs: Tensor) -> float:
    """Token by token on a cache. Where experts overflow, each call of transformers counts afresh, as ours do."""
    cache, steps = model.new_cache(), []
    with torch.no_grad():
        for t in range(T):
            first = t == 0
            ids, mask = (IDS, MASK) if first else (None, None)
            steps.append(model(ids, OUT[:, t : t + 1], mask, cache=cache).logits)
    router = model.config.router
    if router is not None and router.capacity_tokens < T:
        theirs = _their_decode(reference)
    return float((torch.cat(steps, 1) - theirs).abs().max())


def _their_decode(reference: Seq2Seq) -> Tensor:
    from transformers.modeling_outputs import MoEModelOutput

    steps, past = [], None
    with torch.no_grad():
        encoded = reference.model.encoder(input_ids=IDS, attention_mask=MASK)
        encoded = MoEModelOutput(last_hidden_state=encoded.last_hidden_state)
        for t in range(T):
            found = reference.model(
                encoder_outputs=encoded,
                attention_mask=MASK,
                decoder_input_ids=OUT[:, t : t + 1],
                past_key_values=past,
                use_cache=True,
            )
            past = found.past_key_values
            steps.append(found.logits)
    return torch.cat(steps, 1)


def _loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), OUT[:, 1:].flatten())


def _gradient(model: Any, reference: Seq2Seq) -> float:
    reference.model.zero_grad()
    _loss(reference.run(IDS, MASK, OUT[:, :-1]).logits).backward()
    theirs = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in reference.model.named_parameters()}
    model.zero_grad()
    _loss(model(IDS, OUT[:, :-1], MASK).logits).backward()
    ours = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    expected = {name: torch.zeros_like(g) for name, g in ours.items()}
    for piece in FAMILIES[model.family].pieces(model.config):
        expected[piece.ours][piece.ours_index] = theirs[piece.theirs]
    largest = max(float(g.abs().max()) for g in expected.values())
    return max(
        float((found - expected[name]).abs().max()) / max(float(expected[name].abs().max()), 1e-3 * largest)
        for name, found in ours.items()
    )


def _router_loss(model: Any, reference: Seq2Seq) -> float:
    """Both stacks' f·P and z-loss: theirs pool the layers of a stack within each row, and count padding."""
    with torch.no_grad():
        labelled = reference.model(
            input_ids=IDS, decoder_input_ids=OUT[:, :-1], labels=OUT[:, 1:].contiguous(), output_router_logits=True
        )
        ours = model(IDS, OUT[:, :-1])
    worst = 0.0
    for decoder, aux, z in (
        (False, labelled.encoder_aux_loss, labelled.encoder_z_loss),
        (True, labelled.decoder_aux_loss, labelled.decoder_z_loss),
    ):
        layers = [r for layer, r in ours.routings.items() if (layer >= model.config.num_hidden_layers) == decoder]
        n = T if decoder else S
        rows = [Routing.cat([r.rows(slice(b * n, (b + 1) * n)) for r in layers]) for b in range(B)]
        mine = torch.stack([load_balancing_loss(row) for row in rows]).mean()
        mine_z = torch.stack([z_loss(r) for r in layers]).mean()
        if isinstance(aux, int):  # a stack in which every layer is sparse: transformers leaves its losses out
            assert aux == 0 and z == 0 and len(layers) > 1
            continue
        worst = max(worst, abs(float(mine / aux) - 1.0), abs(float(mine_z / z) - 1.0))
    return worst


def _round_trip(reference: Seq2Seq, workspace: Path, theirs: Tensor) -> bool:
    model = load_model(reference.directory)
    model.save(workspace / "back")
    before, after = (load_file(path / "model.safetensors") for path in (reference.directory, workspace / "back"))
    equal = before.keys() == after.keys() and all(
        before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before
    )
    again, info = type(reference.model).from_pretrained(
        workspace / "back", output_loading_info=True, attn_implementation="eager"
    )
    complete = not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = Seq2Seq(workspace, again.eval()).run(IDS, MASK, OUT[:, :-1]).logits
    mine = load_model(workspace / "back")
    state = mine.state_dict()
    ours = all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    same = canonical(mine.config) == canonical(model.config)
    return equal and complete and ours and same and float((logits - theirs).abs().max()) < 1e-6
