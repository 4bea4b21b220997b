"""Training throughput against transformers, in turn, on the same weights and tokens: `python benchmarks/train.py`.

The work is `train-66M`: 6 layers, d 384, 6 heads of 64, 32 experts, top-4, F 256, renormalised, vocabulary 8,192;
forward, backward and AdamW on 8 × 512 tokens. Both systems run in float32 and in bfloat16 (ours with float32 master
weights, transformers' under autocast), each with weights of its own that begin as the same numbers. Steps alternate
between them, so that a change of the machine's speed meets all. Prints the losses side by side, the ratio of tokens
per second to transformers' fastest (median of pairwise ratios), how far each loss went from transformers' in float32,
and the share of this machine's float32 matrix rate, measured in the same run.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands.config import RunConfig
from manyhands.config.load import parse_run
from manyhands.models import Decoder
from manyhands.text import PackedBatches, TokenFile, Tokenizer, read_documents, write_tokens
from manyhands.train.guard import SpikeGuard
from manyhands.train.memory import keep_freed_memory
from manyhands.train.optim import build_optimizers
from manyhands.train.state import count_parameters
from manyhands.train.step import train_step

VOCAB, D, LAYERS, HEADS, E, K, F, B, S = 8192, 384, 6, 6, 32, 4, 256, 8, 512
LR = 3e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SYSTEMS = [f"{name} {dtype}" for dtype in DTYPES for name in ("manyhands", "transformers")]

RUN = f"""
model:
  vocab_size: {VOCAB}
  hidden_size: {D}
  num_hidden_layers: {LAYERS}
  max_position_embeddings: {S}
  attention: {{num_attention_heads: {HEADS}, head_dim: {D // HEADS}, qk_norm: head}}
  moe:
    moe_intermediate_size: {F}
    router: {{num_experts: {E}, num_experts_per_tok: {K}}}
balance: {{aux_loss_coef: 0}}
optim: {{name: adamw, lr: {LR}, weight_decay: 0, betas: [0.9, 0.95], grad_clip: null}}
guard: {{spike_sigma: null}}
train: {{sequence_length: {S}, batch_size: {B}}}
"""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--default-allocator", action="store_true", help="leave glibc's memory thresholds alone")
    parser.add_argument("--experts", default="auto", help="our expert backend: auto, grouped_mm, native, eager")
    parser.add_argument("--peer-experts", default="grouped_mm", help="transformers' expert implementation")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.default_allocator:
        keep_freed_memory()  # the process is shared: it serves both systems
    try:
        import transformers
    except ImportError:
        sys.exit("this benchmark compares with transformers: pip install transformers")

    run = parse_run(RUN, "train-66M")
    first = build_peer(transformers, arguments.peer_experts)
    total, active = count_parameters(ours_from(first, run, arguments.experts))
    systems: dict[str, Callable[[Tensor], float]] = {}
    for system in arguments.systems:
        name, dtype = system.split()
        build = ours if name == "manyhands" else theirs
        systems[system] = build(first, run, arguments.experts, DTYPES[dtype])
    losses: dict[str, list[float]] = {name: [] for name in systems}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    batches = token_batches()
    for step in range(arguments.steps):
        batch = next(batches)
        order = list(systems) if step % 2 == 0 else list(systems)[::-1]
        for name in order:
            started = time.perf_counter()
            losses[name].append(systems[name](batch))
            seconds[name].append(time.perf_counter() - started)
        if not arguments.json:
            print(
                f"step {step + 1:3}  "
                + "  ".join(
                    f"{name} {losses[name][-1]:.5f} {B * S / seconds[name][-1]:6.0f} tok/s" for name in systems
                ),
                flush=True,
            )
    warm = 2
    speed = {name: B * S / statistics.median(values[warm:]) for name, values in seconds.items()}
    best = max((name for name in systems if name.startswith("transformers")), key=speed.__getitem__, default=None)
    ratios = {
        name: [theirs / mine for theirs, mine in zip(seconds[best][warm:], seconds[name][warm:], strict=True)]
        for name in systems
        if best is not None
    }
    exact = losses.get("transformers float32")
    differences = {
        name: max(abs(mine - theirs) / theirs for mine, theirs in zip(losses[name], exact, strict=True))
        for name in systems
        if exact is not None
    }
    flops = 6 * (active - VOCAB * D) * max(v for name, v in speed.items())  # the embedding is a look-up
    roof = matrix_rate()
    result = {
        "experts": arguments.experts,
        "parameters": total,
        "active_parameters": active,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "tokens_per_s": {name: round(value) for name, value in speed.items()},
        "best_peer": best,
        "ratio": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "ratio_range": {name: [round(min(v), 3), round(max(v), 3)] for name, v in ratios.items()},
        "largest_relative_loss_difference": differences,
        "last_loss": {name: round(values[-1], 5) for name, values in losses.items()},
        "share_of_matrix_rate": round(flops / roof, 3),
        "matrix_rate_gflops": round(roof / 1e9),
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name}: {value}" for name, value in result.items()))


def ours(first: Any, run: RunConfig, experts: str, dtype: torch.dtype) -> Callable[[Tensor], float]:
    """A step of ours, with weights of its own that begin as `first`'s."""
    model = ours_from(first, run, experts)
    optimizers, guard = build_optimizers(model, run.optim), SpikeGuard(run.guard)
    return lambda batch: train_step(model, optimizers, guard, batch, run, 1, LR, dtype).loss


def theirs(first: Any, run: RunConfig, experts: str, dtype: torch.dtype) -> Callable[[Tensor], float]:
    """A step of transformers'."""
    peer = copy.deepcopy(first)
    optimizer = torch.optim.AdamW(peer.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(batch: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = peer(input_ids=batch[:, :-1], labels=batch[:, :-1], shift_labels=batch[:, 1:].contiguous()).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def ours_from(first: Any, run: RunConfig, experts: str) -> Decoder:
    """Our model with the peer's weights."""
    model = Decoder(run.model, experts)
    copy_weights(first, model)
    return model


def build_peer(transformers: Any, experts: str) -> Any:
    """transformers' Qwen3-MoE at the same sizes."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=D // HEADS,
        num_experts=E,
        num_experts_per_tok=K,
        moe_intermediate_size=F,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=S,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    return transformers.Qwen3MoeForCausalLM(config).train()


@torch.no_grad()
def copy_weights(peer: Any, model: Decoder) -> None:
    """The peer's initial weights into ours; every tensor must find its place."""
    named = {name.removeprefix("model."): tensor for name, tensor in peer.state_dict().items()}
    renamed = {name.replace("mlp.gate.weight", "mlp.router.weight"): tensor for name, tensor in named.items()}
    model.load_state_dict(renamed)


def token_batches() -> PackedBatches:
    """The standard library's sources as packed batches."""
    documents = read_documents(["stdlib"])[:400]
    tokenizer = Tokenizer.train((document.text for document in documents), VOCAB)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tokens.npy"
        write_tokens(path, documents, tokenizer)
        return PackedBatches(TokenFile.open(path, VOCAB).ids[:].copy(), S, B, seed=0)


def matrix_rate() -> float:
    """Best float32 FLOP/s of a 2048³ product on this machine."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
