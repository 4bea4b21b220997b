"""Round to nearest, with the scale that minimises the weighted squared error.

N outputs, K inputs, G groups of inputs with one scale each.
"""

import torch
from torch import Tensor

from manyhands.config.packing import TRAITS, Format
from manyhands.errors import ConfigError
from manyhands.quant.record import Matrix

CANDIDATES = 24
"""Scales tried per group, besides the least-squares refinement of the best."""
RANGE: dict[Format, tuple[int, int]] = {"int8": (-127, 127), "int4": (-8, 7), "q8_0": (-127, 127), "q4_0": (-8, 7)}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALES: dict[Format, torch.dtype] = {name: DTYPES[t.scale] for name, t in TRAITS.items() if t.scale is not None}
"""What a format's scales are stored as."""
MXFP4 = (1, 2, 3, 4, 6, 8, 12)
"""Twice the absolute values of MXFP4: with the right one as its largest integer, q8_0 holds such a block exactly."""
_CHUNK_VALUES = 1 << 17  # temporaries of half a megabyte stay in the caches


@torch.no_grad()
def quantize(w_NK: Tensor, matrix: Matrix, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integers [N, K] int8 and scales [N, G] float32 (already rounded to their stored format) for a padded matrix.

    `importance_K` weights the squared error input by input (calibration: the mean square of each input).
    `ConfigError` for weights that are not finite.
    """
    assert matrix.groups and w_NK.shape[-1] == matrix.depth
    group = matrix.depth // matrix.groups
    if not torch.isfinite(w_NK).all():
        raise ConfigError(f"{matrix.format} cannot hold weights that are not finite")
    if float(w_NK.detach().abs().max()) > -RANGE[matrix.format][0] * torch.finfo(SCALES[matrix.format]).max:
        raise ConfigError(f"{matrix.format} cannot hold weights as large as {float(w_NK.detach().abs().max()):.4g}")
    importance = torch.ones(matrix.depth) if importance_K is None else importance_K.float()
    importance_Gg = importance.view(-1, group)
    rows = max(1, _CHUNK_VALUES // matrix.depth)
    chunks = torch.split(w_NK, rows)
    parts = [_search(chunk.float().view(len(chunk), -1, group), importance_Gg, matrix) for chunk in chunks]
    return torch.cat([q.flatten(-2) for q, _ in parts]), torch.cat([s for _, s in parts])


def _search(v_NGg: Tensor, importance_Gg: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Four bits have one more step below zero than above: the largest value may be reached with a negative scale.

    What came from GGUF's Q8_0, Q4_0 or MXFP4 is found again exactly: the first candidates are its own scales.
    """
    low, _ = RANGE[matrix.format]
    largest = v_NGg.gather(-1, v_NGg.abs().argmax(-1, keepdim=True)).squeeze(-1)
    base = largest / low
    narrowest, widest = (0.7, 8 / 7) if TRAITS[matrix.format].bits == 4 else (0.85, 1.0)
    best_q, best_s, best_error = _round(v_NGg, base, importance_Gg, matrix)
    for q_of_largest in MXFP4 if matrix.format == "q8_0" else ():
        best_q, best_s, best_error = _better(
            (best_q, best_s, best_error), _round(v_NGg, largest / q_of_largest, importance_Gg, matrix)
        )
    for i in range(CANDIDATES):
        factor = narrowest + (widest - narrowest) * i / (CANDIDATES - 1)
        best_q, best_s, best_error = _better(
            (best_q, best_s, best_error), _round(v_NGg, base * factor, importance_Gg, matrix)
        )
    q = best_q.float()
    fitted = (importance_Gg * v_NGg * q).sum(-1) / (importance_Gg * q * q).sum(-1).clamp(min=1e-30)
    best_q, best_s, _ = _better((best_q, best_s, best_error), _round(v_NGg, fitted, importance_Gg, matrix))
    return best_q, best_s


Rounded = tuple[Tensor, Tensor, Tensor]


def _round(v_NGg: Tensor, scale_NG: Tensor, importance_Gg: Tensor, matrix: Matrix) -> Rounded:
    low, high = RANGE[matrix.format]
    scale_NG = scale_NG.to(SCALES[matrix.format]).float()
    s = scale_NG[..., None]
    q = torch.where(s == 0, 0.0, v_NGg / torch.where(s == 0, 1.0, s)).round_().clamp_(low, high)
    error = (importance_Gg * (v_NGg - q * s).square()).sum(-1)
    return q.to(torch.int8), scale_NG, error


def _better(old: Rounded, new: Rounded) -> Rounded:
    wins = new[2] < old[2]
    return (
        torch.where(wins[..., None], new[0], old[0]),
        torch.where(wins, new[1], old[1]),
        torch.where(wins, new[2], old[2]),
    )
