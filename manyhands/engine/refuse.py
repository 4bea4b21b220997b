"""What cannot be continued, said in one line before anything runs."""

from collections.abc import Sequence
from operator import index

from manyhands.config import ModelConfig, SamplingConfig
from manyhands.errors import UserError
from manyhands.text import Tokenizer


def check_causal(config: ModelConfig) -> None:
    """Raises `UserError` for a model whose experts look at other tokens: it would say something else one by one."""
    moe = config.moe
    if moe is None or moe.router.causal_safe:
        return
    if moe.router.select == "expert_choice":
        why = "its experts choose tokens (select = 'expert_choice'), so a token's experts depend on the tokens after it"
    else:
        field = "eval_capacity_factor" if moe.router.capacity_tokens is None else "capacity_tokens"
        beside = "the tokens before it" if moe.router.prefix_causal else "the tokens beside it"
        why = (
            f"its experts have a limited capacity in evaluation ({field} = {getattr(moe.router, field):g}), so a token "
            f"may be dropped because of {beside}; set {field} to null"
        )
    raise UserError(f"this model cannot generate: {why}")


def as_ids(prompt: Sequence[int]) -> list[int]:
    """Token ids as Python's integers, of whatever kind of integer. Raises `UserError` for anything else."""
    try:
        return [index(token) for token in prompt]
    except TypeError:
        raise UserError("a prompt is text or a list of token ids: it holds something that is no integer") from None


def context_field(config: ModelConfig) -> str:
    """Which field says how long a sequence may become that is continued."""
    shorter = config.longest_continued < config.max_position_embeddings
    return "rope.original_max_position_embeddings (LongRoPE)" if shorter else "max_position_embeddings"


def check_prompt(
    config: ModelConfig, ids: list[int], tokenizer: Tokenizer | None, sampling: SamplingConfig
) -> list[int]:
    """The ids to start from. Raises `UserError` if they are not in the vocabulary or fill the context."""
    limit, V = config.longest_continued, config.vocab_size
    if not ids:
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise UserError("the prompt is empty, and there is no end-of-text token to start from; give some text")
        ids = [tokenizer.eos_token_id]
    if len(ids) >= limit + (not sampling.max_new_tokens):
        raise UserError(
            f"the prompt has {len(ids)} tokens; with {context_field(config)} = {limit} it may have at most "
            f"{limit - 1}, so that one can follow"
        )
    if min(ids) < 0 or max(ids) >= V:
        raise UserError(f"the prompt holds token id {min(ids) if min(ids) < 0 else max(ids)}; vocab_size = {V}")
    return ids
