"""Experts through `torch.nn.functional.grouped_mm`: sort by expert, two grouped products, combine."""

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.kernels.experts import Bank, ExpertWeights, activate
from manyhands.kernels.low_rank import AdaptedWeights, low_rank_experts
from manyhands.kernels.permute import combine, gather, sort_pairs


def supports_grouped_mm(x: Tensor, experts: Bank) -> bool:
    """grouped_mm takes float32, bfloat16 and float16, with rows that are whole multiples of 16 bytes.

    Of weights that are not stacked yet only the tokens' width is known. Beside LoRA all sizes and dtypes have a way.
    """
    if isinstance(experts, AdaptedWeights):
        return True
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    lie = experts.in_memory()
    widths: tuple[int, ...] = (experts.hidden_size,)
    if isinstance(lie, ExpertWeights):
        widths = (lie.up.shape[1], lie.up.shape[2], lie.down.shape[2])
    return all(width * x.element_size() % 16 == 0 for width in widths)


def grouped_mm(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: Bank) -> Tensor:
    """The fast path of plain PyTorch: work grows with the number of pairs, not with the number of experts.

    Weights that are not stacked yet are asked for at once: those of all experts that some token chose.
    """
    if isinstance(experts, AdaptedWeights):
        return low_rank_experts(x_TD, ids_TK, weights_TK, kept_TK, experts)
    lie = experts.in_memory()
    if isinstance(lie, ExpertWeights):
        return _stacked(x_TD, ids_TK, weights_TK, kept_TK, lie)
    if not bool(kept_TK.any()):
        return torch.zeros_like(x_TD)
    ids_TK = ids_TK.where(kept_TK, ids_TK[kept_TK][0])  # an expert that is there anyway, not -1
    chosen, new_ids = ids_TK.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return _stacked(x_TD, new_ids, weights_TK, kept_TK, experts.stacked(chosen.tolist()))


def _stacked(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: ExpertWeights) -> Tensor:
    if not supports_grouped_mm(x_TD, experts):
        raise ConfigError(
            f"experts_implementation = 'grouped_mm' takes float32, bfloat16 and float16 with rows of whole multiples "
            f"of 16 bytes, not {x_TD.dtype} with widths {tuple(experts.up.shape[1:])}: use 'eager' or 'auto'"
        )
    up, down, up_bias, down_bias, activation = experts.cast(x_TD.dtype)
    p = sort_pairs(ids_TK, kept_TK, up.shape[0])
    h_N = F.grouped_mm(gather(x_TD, p), up.transpose(-2, -1), offs=p.offsets_E)
    if up_bias is not None:
        h_N = h_N + _rows(up_bias, ids_TK, p.pair_N)
    y_ND = F.grouped_mm(activate(h_N, activation), down.transpose(-2, -1), offs=p.offsets_E)
    if down_bias is not None:  # before combining: the bias belongs to the expert and is weighted with it
        y_ND = y_ND + _rows(down_bias, ids_TK, p.pair_N)
    return combine(y_ND, weights_TK, p)


def _rows(bias_E: Tensor, ids_TK: Tensor, pair_N: Tensor) -> Tensor:
    return bias_E.index_select(0, ids_TK.flatten().index_select(0, pair_N))
