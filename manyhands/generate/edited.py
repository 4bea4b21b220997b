"""What an edit of the routing does to an answer: the text beside the original's, and what the original's then costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from manyhands.config import SamplingConfig
from manyhands.engine.answer import Completion
from manyhands.engine.edited import Recorded
from manyhands.engine.engine import Engine, Prompt, check_errors
from manyhands.engine.request import Request
from manyhands.moe.edit import Edits


@dataclass(frozen=True, slots=True)
class Effect:
    """One prompt, answered by the model as it is and as it is told to route."""

    prompt_ids: list[int]
    original: Completion
    edited: Completion
    tokens: int
    """Of the judged text, those that are predicted."""
    original_loss: float
    """Nats per token of the judged text; NaN without a token to predict."""
    edited_loss: float
    same_tokens: int
    """New tokens until the answers part."""


def effect(
    engine: Engine,
    prompt: Prompt,
    sampling: SamplingConfig,
    edit: Edits | Recorded,
    judged: Sequence[int] | None = None,
) -> Effect:
    """Answers of both, and the loss of both on one text: token ids `judged`, or the prompt with the original's answer.

    Raises what `Engine.add` does, and `ManyhandsError` where logits are not finite.
    """
    requests = [engine.add(prompt, sampling), engine.add(prompt, sampling, edit=edit)]
    _run(engine, requests)
    ids = list(requests[0].prompt_ids)
    original, edited = map(engine.completion, requests)
    text = (list(judged) if judged is not None else ids + original.token_ids)[: engine.model.config.longest_continued]
    score = SamplingConfig(max_new_tokens=0, prompt_logprobs=0, temperature=0.0)
    both = [engine.add(text, score), engine.add(text, score, edit=edit)]
    _run(engine, both)
    plain, told = (_loss(engine.completion(request)) for request in both)
    pairs = zip(original.token_ids, edited.token_ids, strict=False)
    shorter = min(len(original.token_ids), len(edited.token_ids))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    return Effect(ids, original, edited, len(text) - 1, plain, told, same)


def _run(engine: Engine, requests: list[Request]) -> None:
    try:
        while any(request.finish_reason is None for request in requests):
            engine.step()
            check_errors(requests)
    finally:
        for request in requests:
            engine.abort(request)


def _loss(scored: Completion) -> float:
    found = [said.logprob for said in scored.prompt_logprobs or [] if said is not None]
    return -sum(found) / len(found) if found else float("nan")
