"""The engine: prompts in, one new token per sequence and step out, with the routing that made it.

The prompts are padded on the left and run through the model once (prefill); then each step runs one token per
sequence on the cache. A sequence that has ended is padding from then on.

B sequences, S prompt length, T tokens of a forward pass, D model width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from manyhands.config import SamplingConfig
from manyhands.engine.mode import evaluating, one_thread
from manyhands.engine.sampling import sample
from manyhands.engine.stream import TextStream
from manyhands.errors import UserError
from manyhands.generate.prefix import Prefix
from manyhands.models import Decoder
from manyhands.moe import Routing
from manyhands.text import Tokenizer

FinishReason = Literal["stop", "length"]
"""stop: a token that ends an answer, or a stop string. length: `max_new_tokens`, or the context is full."""


@dataclass(frozen=True, slots=True)
class Step:
    """One new token for each of the B sequences."""

    token_ids: list[int | None]
    """None for a sequence that had ended before."""
    texts: list[str]
    """The text that became certain with this token, never half a character. Empty without a tokenizer."""
    finish_reasons: list[FinishReason | None]
    """Why the sequence ended, in the step in which it did."""
    routings: dict[int, Routing]
    """Per sparse layer, T = B: the routing of the forward pass the token was drawn from."""


def generate(
    model: Decoder,
    prompts: Tensor | Sequence[Sequence[int]],
    sampling: SamplingConfig,
    tokenizer: Tokenizer | None = None,
    prefix: Prefix | None = None,
) -> Iterator[Step]:
    """Continue B prompts, token ids [B, S] or lists of different lengths, until each has ended.

    Computes in the dtype of the weights. An empty prompt starts from the end-of-text token, which stands between
    documents. A sequence ends at any of `tokenizer.eos_token_ids`; without a `tokenizer` there is neither text nor a
    token to end at. With a `prefix`, for one prompt, what an earlier call with it has computed is not computed again,
    and what this one computes is kept in it; the tokens are the same, up to rounding. The model's training mode is put
    back after every step; the steps' tensors are inference tensors, to be read only.

    Raises `UserError`, on the call, for a model that cannot generate and for prompts that are not in the vocabulary
    or leave no room in the context; `ManyhandsError`, in a step, if the logits are not finite.
    """
    _check_causal(model)
    if sampling.stop and tokenizer is None:
        raise UserError("stop strings are text: generating with them needs a tokenizer")
    rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    checked = [_check_prompt(model, list(row), tokenizer) for row in rows]
    assert prefix is None or len(checked) == 1
    return _steps(model, checked, sampling, tokenizer, prefix) if checked else iter(())


@dataclass(frozen=True, slots=True)
class Completion:
    """What one prompt was continued with."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason


def complete(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig
) -> list[Completion]:
    """Continue texts, all at once, each from the model's beginning-of-text token if it has one.

    Raises what `generate` does.
    """
    token_ids: list[list[int]] = [[] for _ in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    reasons: list[FinishReason] = ["length"] * len(prompts)
    ids = tokenizer.encode_batch(prompts, add_special_tokens=True)
    for step in generate(model, ids, sampling, tokenizer):
        for b, token in enumerate(step.token_ids):
            if token is not None:
                token_ids[b].append(token)
                texts[b].append(step.texts[b])
                reasons[b] = step.finish_reasons[b] or reasons[b]
    return [Completion("".join(texts[b]), token_ids[b], reasons[b]) for b in range(len(prompts))]


@dataclass(slots=True)
class _Sequence:
    """What one of the B sequences may still do, and its text."""

    room: int
    """New tokens that it may have."""
    ends: frozenset[int]
    stream: TextStream | None
    alive: bool = True

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that `token` made certain, and why the sequence ends with it."""
        self.room -= 1
        text = self.stream.push(token) if self.stream and token not in self.ends else ""
        stopped = token in self.ends or (self.stream is not None and self.stream.stopped)
        reason: FinishReason | None = "stop" if stopped else "length" if not self.room else None
        if reason is not None:
            self.alive = False
            text += self.stream.finish() if self.stream else ""
        return text, reason


def _steps(
    model: Decoder,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    tokenizer: Tokenizer | None,
    prefix: Prefix | None,
) -> Iterator[Step]:
    device, limit = model.embed_tokens.weight.device, model.config.max_position_embeddings
    modules = list(model.modules())
    generator = torch.Generator(device).manual_seed(sampling.seed)
    sequences = [
        _Sequence(
            room=min(sampling.max_new_tokens, limit - len(prompt)),
            ends=tokenizer.eos_token_ids if tokenizer else frozenset(),
            stream=TextStream(tokenizer.stream_decoder(), sampling.stop) if tokenizer else None,
        )
        for prompt in prompts
    ]
    cache = model.new_cache() if prefix is None else prefix.begin(model, prompts[0])
    if prefix is not None:
        prompts = [prompts[0][len(prefix.ids) :]]
    ids_BS, mask_BS = _pad_left(prompts, device)
    while True:
        with torch.inference_mode(), evaluating(modules), _remembering(prefix, ids_BS):
            hidden = model.hidden(ids_BS, mask_BS, cache)
            last_BD = hidden.states[:, -1]
            logits_BV = model.head(last_BD)
            with one_thread():
                ids_B = sample(logits_BV, sampling, generator)
            routings = {layer: _last(routing, ids_BS.shape[1]) for layer, routing in hidden.routings.items()}
        tokens = [token if s.alive else None for s, token in zip(sequences, ids_B.tolist(), strict=True)]
        pushed = [("", None) if t is None else s.push(t) for s, t in zip(sequences, tokens, strict=True)]
        yield Step(tokens, [text for text, _ in pushed], [reason for _, reason in pushed], routings)
        alive = [s.alive for s in sequences]
        if not any(alive):
            return
        ids_BS = ids_B[:, None]
        mask_BS = None if all(alive) else torch.tensor(alive, device=device)[:, None]


@contextlib.contextmanager
def _remembering(prefix: Prefix | None, ids_BS: Tensor) -> Iterator[None]:
    """`ids_BS` go through the model inside the block. Ctrl-C can come in the middle of it."""
    try:
        yield
    except BaseException:
        if prefix is not None:
            prefix.clear()
        raise
    if prefix is not None:
        prefix.ids += ids_BS[0].tolist()


def _pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids [B, S], and a mask [B, S] that is false for padding, or None where there is none."""
    S = max(map(len, prompts))
    ids_BS = torch.tensor([[0] * (S - len(p)) + p for p in prompts], device=device)
    if all(len(p) == S for p in prompts):
        return ids_BS, None
    lengths_B1 = torch.tensor([[len(p)] for p in prompts], device=device)
    return ids_BS, torch.arange(S, device=device) >= S - lengths_B1


def _last(routing: Routing, S: int) -> Routing:
    """The routing of each sequence's last token: T = B·S -> T = B."""
    if S == 1:
        return routing
    rows = slice(S - 1, None, S)
    return replace(
        routing,
        expert_ids=routing.expert_ids[rows],
        weights=routing.weights[rows],
        scores=routing.scores[rows],
        logits=routing.logits[rows],
        kept=routing.kept[rows],
        token_mask=routing.token_mask[rows],
    )


def _check_causal(model: Decoder) -> None:
    moe = model.config.moe
    if moe is None or moe.router.causal_safe:
        return
    if moe.router.select == "expert_choice":
        why = "its experts choose tokens (select = 'expert_choice'), so a token's experts depend on the tokens after it"
    else:
        why = (
            f"its experts have a limited capacity in evaluation (eval_capacity_factor = "
            f"{moe.router.eval_capacity_factor:g}), so a token may be dropped because of the tokens beside it; "
            "set eval_capacity_factor to null"
        )
    raise UserError(f"this model cannot generate: {why}")


def _check_prompt(model: Decoder, ids: list[int], tokenizer: Tokenizer | None) -> list[int]:
    """The ids to start from."""
    limit, V = model.config.max_position_embeddings, model.config.vocab_size
    if not ids:
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise UserError("the prompt is empty, and there is no end-of-text token to start from; give some text")
        ids = [tokenizer.eos_token_id]
    if len(ids) >= limit:
        raise UserError(
            f"the prompt has {len(ids)} tokens; with max_position_embeddings = {limit} it may have at most "
            f"{limit - 1}, so that one can follow"
        )
    if min(ids) < 0 or max(ids) >= V:
        raise UserError(f"the prompt holds token id {min(ids) if min(ids) < 0 else max(ids)}; vocab_size = {V}")
    return ids
