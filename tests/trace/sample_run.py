"""A made-up run, in the journal's schema."""

import numpy as np
import torch

from manyhands.trace.tokens import TokenShare

VOCAB = ["def", " return", "\n", "    ", "<script>alert(1)</script>", "x"]


def records(steps: int, layers: tuple[int, ...] = (1, 3), num_experts: int = 4, dead: int | None = None) -> list[dict]:
    """start, `steps` steps, two evals, end. Expert `dead` of every layer gets nothing."""
    rng = np.random.default_rng(0)
    out: list[dict] = [
        {"kind": "start", "step": 0, "time": "2026-05-04T10:00:00+00:00", "version": "0.1.0", "parameters": 9_312_000}
        | {"active_parameters": 3_104_000, "num_experts": num_experts, "num_experts_per_tok": 2}
        | {"sparse_layers": list(layers)}
    ]
    for step in range(1, steps + 1):
        moe = {}
        for layer in layers:
            load = np.exp(rng.normal(0, 0.2, num_experts))
            if dead is not None:
                load[dead] = 0
            load /= load.sum()
            moe[str(layer)] = {"load": load.tolist(), "max_vio": float(load.max() * num_experts - 1), "cv2": 0.04}
            moe[str(layer)] |= {"entropy": 0.98, "dead": int((load == 0).sum()), "dropped": 0.0, "top1_weight": 0.6}
        loss = 2 + 6 * 0.9**step + float(rng.normal(0, 0.02))
        out.append(
            {"kind": "step", "step": step, "loss": loss, "bits_per_byte": loss * 0.6, "lr": 1e-3, "grad_norm": 0.7}
            | {"aux_loss": 1.02 if layers else None, "tokens": 4096 * step, "tokens_per_s": 6200.0}
            | {"elapsed": 0.66 * step, "skipped": step == 7, "moe": moe}
        )
        if step in (steps // 2, steps):
            out.append(
                {"kind": "eval", "step": step, "valid_loss": 3.0, "valid_bits_per_byte": 1.875}
                | {"valid_perplexity": 20.086, "tokens": 9999}
            )
    out.append({"kind": "end", "step": steps, "reason": "finished", "elapsed": 0.66 * steps})
    return out


def token_share(layers: tuple[int, ...] = (1, 3), num_experts: int = 4) -> TokenShare:
    """Token id i goes to experts i and i + 1, modulo E, always."""
    share = TokenShare(num_experts, len(VOCAB))
    ids = torch.arange(600) % len(VOCAB)
    for layer in layers:
        share.add(layer, ids, torch.stack([ids % num_experts, (ids + 1) % num_experts], dim=1))
    return share
