"""What a decoder may be given besides token ids, and the loss of its labels, with the meanings of transformers.

B batch, S sequence, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.config import ModelConfig
from manyhands.errors import ConfigError

IGNORED = -100
"""The label of a token that no loss counts."""


def ids_of(config: ModelConfig, ids_BS: Tensor | None, embeds_BSD: Tensor | None) -> Tensor:
    """[B, S] ids: those given, or zeros in their place beside embeddings [B, S, D].

    Raises `ConfigError` for both or neither, for embeddings of another shape, and where a router needs the ids.
    """
    if (ids_BS is None) == (embeds_BSD is None):
        raise ConfigError("give input_ids or inputs_embeds: one of the two")
    if ids_BS is not None:
        return ids_BS
    assert embeds_BSD is not None
    if embeds_BSD.dim() != 3 or embeds_BSD.shape[-1] != config.hidden_size:
        raise ConfigError(f"inputs_embeds is {list(embeds_BSD.shape)}, not [B, S, hidden_size = {config.hidden_size}]")
    if config.moe is not None and config.moe.router.select == "hash":
        raise ConfigError('router.select = "hash" chooses by token ids: inputs_embeds has none')
    return torch.zeros(embeds_BSD.shape[:2], dtype=torch.int64, device=embeds_BSD.device)


def check_position_ids(config: ModelConfig, position_ids: Tensor, ids_BS: Tensor, plain: bool) -> Tensor:
    """The positions [B or 1, S] that tokens are turned by, as they are. `plain`: there is neither mask nor cache.

    They turn, and nothing else: who sees whom is for the mask and the cache to say. transformers takes a step other
    than +1 without a mask for the beginning of another packed text; here that is said with `documents`, and refused.

    Raises `ConfigError` for another shape, numbers that are not whole or below 0, and with LongRoPE.
    """
    B, S = ids_BS.shape
    if position_ids.shape not in ((B, S), (1, S)) or position_ids.is_floating_point() or position_ids.is_complex():
        raise ConfigError(
            f"position_ids is {list(position_ids.shape)} of {position_ids.dtype}; whole numbers [{B} or 1, {S}] are "
            "right"
        )
    if config.rope.rope_type == "longrope":
        raise ConfigError("position_ids: LongRoPE turns by the length of the whole text too; give a mask instead")
    if bool((position_ids < 0).any()):
        raise ConfigError("position_ids holds a number below 0; the first position is 0")
    if plain and bool((position_ids.diff(dim=1) != 1).any()):
        raise ConfigError(
            "position_ids does not go up by one: of texts packed into a row give documents (Decoder.hidden), of one "
            "text with gaps an attention_mask too"
        )
    return position_ids


def mask_of(mask_BS: Tensor | None, ids_BS: Tensor) -> Tensor | None:
    """[B, S] bool, True where a token is real; None where there is no mask.

    Raises `ConfigError` for another shape, and for numbers other than 0 and 1: a mask that is added to scores (0 and
    -inf) would be taken for its opposite, one that numbers texts for a mask without padding.
    """
    if mask_BS is None:
        return None
    if mask_BS.shape != ids_BS.shape:
        raise ConfigError(f"the mask is {list(mask_BS.shape)}, the ids are {list(ids_BS.shape)}")
    unseen = mask_BS.dtype == torch.bool or mask_BS.is_meta or torch.compiler.is_compiling()
    if not unseen and bool(((mask_BS != 0) & (mask_BS != 1)).any()):
        raise ConfigError("the mask holds other numbers than 1, of a token that is read, and 0, of padding")
    return mask_BS.bool()


def next_token_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """[] float32 at least: the mean of −log p(label of token s+1) over labels that are not −100, in nats.

    NaN if all are. The labels are the ids themselves: they are moved by one here.

    Raises `ConfigError` for another shape.
    """
    if labels_BS.shape != logits_BSV.shape[:2]:
        raise ConfigError(f"labels is {list(labels_BS.shape)}, not {list(logits_BSV.shape[:2])} as the ids are")
    logits, labels = logits_BSV[:, :-1], labels_BS[:, 1:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
