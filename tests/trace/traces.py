"""Small traces for tests."""

from pathlib import Path

import numpy as np
import torch

from manyhands.moe import Routing
from manyhands.trace.recording import Phase, Recorder


def routing(T: int, E: int, K: int, seed: int) -> Routing:
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    scores = logits.softmax(-1)
    weights, ids = scores.topk(K)
    return Routing(ids, weights, scores, logits, torch.ones(T, K).bool(), torch.ones(T).bool())


def record(path: Path, T: int = 20, layers=(1, 3), E: int = 8, K: int = 2, **settings) -> list[dict[int, Routing]]:
    """A prompt of T tokens and then T single ones; what was recorded, pass by pass."""
    passes = [{layer: routing(T, E, K, layer) for layer in layers}]
    passes += [{layer: routing(1, E, K, 100 * t + layer) for layer in layers} for t in range(T)]
    with Recorder(path, layers=layers, num_experts=E, num_experts_per_tok=K, **settings) as recorder:
        recorder.add(passes[0], torch.arange(T), sequence=0, position=np.arange(T), phase=Phase.PREFILL, step=0)
        for t, one in enumerate(passes[1:]):
            recorder.add(one, [T + t], sequence=0, position=T + t, phase=Phase.DECODE, step=1 + t)
    return passes
