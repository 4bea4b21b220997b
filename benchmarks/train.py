"""Training throughput against transformers, in turn, on the same weights and tokens: `python benchmarks/train.py`.

The work is `train-66M`: 6 layers, d 384, 6 heads of 64, 32 experts, top-4, F 256, renormalised, vocabulary 8,192;
forward, backward and AdamW on 8 × 512 tokens. Steps alternate between the two systems, so that a change of the
machine's speed meets both. Prints the losses side by side, the ratio of tokens per second (median of pairwise
ratios), and the share of this machine's float32 matrix rate, measured in the same run.
"""

import argparse
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
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.default_allocator:
        keep_freed_memory()  # the process is shared: it serves both systems
    try:
        import transformers
    except ImportError:
        sys.exit("this benchmark compares with transformers: pip install transformers")

    run = parse_run(RUN, "train-66M")
    peer = build_peer(transformers)
    model = Decoder(run.model, arguments.experts)
    copy_weights(peer, model)
    total, active = count_parameters(model)
    optimizers = build_optimizers(model, run.optim)
    peer_optimizer = torch.optim.AdamW(peer.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    guard = SpikeGuard(run.guard)

    def ours(batch: Tensor) -> float:
        return train_step(model, optimizers, guard, batch, run, 1, LR, torch.float32).loss

    def theirs(batch: Tensor) -> float:
        peer_optimizer.zero_grad(set_to_none=True)
        loss = peer(input_ids=batch[:, :-1], labels=batch[:, :-1], shift_labels=batch[:, 1:].contiguous()).loss
        loss.backward()
        peer_optimizer.step()
        return float(loss.detach())

    systems: dict[str, Callable[[Tensor], float]] = {"manyhands": ours, "transformers": theirs}
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
    ratios = [t / o for o, t in zip(seconds["manyhands"][warm:], seconds["transformers"][warm:], strict=True)]
    difference = max(abs(a - b) / b for a, b in zip(losses["manyhands"], losses["transformers"], strict=True))
    speed = {name: B * S / statistics.median(values[warm:]) for name, values in seconds.items()}
    flops = 6 * (active - VOCAB * D) * speed["manyhands"]  # the embedding is a look-up
    roof = matrix_rate()
    result = {
        "experts": arguments.experts,
        "parameters": total,
        "active_parameters": active,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "tokens_per_s": {name: round(value) for name, value in speed.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "largest_relative_loss_difference": difference,
        "share_of_matrix_rate": round(flops / roof, 3),
        "matrix_rate_gflops": round(roof / 1e9),
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name}: {value}" for name, value in result.items()))


def build_peer(transformers: Any) -> Any:
    """transformers' Qwen3-MoE at the same sizes, with its fastest expert implementation."""
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
        experts_implementation="grouped_mm",
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
