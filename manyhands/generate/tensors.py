"""`model.generate` as transformers has it: token ids [B, S] in, [B, S + N] out; the engine does the work.

B rows asked for, S tokens of the longest prompt, N new tokens of the row that got most, V vocabulary.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from manyhands.config import SamplingConfig, parse
from manyhands.config.nearest import suggest
from manyhands.engine.adjust import LogitsProcessor
from manyhands.engine.engine import Engine, check_errors
from manyhands.engine.refuse import context_field
from manyhands.engine.request import Request
from manyhands.errors import ManyhandsError, UserError
from manyhands.files import GENERATION
from manyhands.generate.defaults import NEUTRAL, published_sampling
from manyhands.models import Decoder
from manyhands.models.inputs import mask_of
from manyhands.text import Tokenizer

StoppingCriterion = Callable[[Tensor, None], Any]
"""`(input_ids [1, n], None)` -> whether the row ends there: a bool or a tensor of one."""
_USUAL: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
"""What transformers samples with where nobody says otherwise."""
_CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "early_stopping": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_logits": (False,),
    "output_scores": (False,),
    "return_dict_in_generate": (False,),
    "use_cache": (True,),
}
_INSTEAD = {
    "generation_config": "give its fields as arguments",
    "input_ids": "give it first",
    "inputs": "it is input_ids here",
    "inputs_embeds": "token ids are continued; call the model step by step with a cache",
    "output_scores": "SamplingConfig(logprobs=…) with mh.Engine has log-probabilities",
    "return_dict_in_generate": "the ids come as a tensor; mh.Engine has routing and log-probabilities",
    "stop_strings": "SamplingConfig(stop=…) with mh.generate has them",
}


class Streamer(Protocol):
    """transformers' streamers: given the prompts [B, S], then each column of new tokens [B], then the end."""

    def put(self, value: Tensor) -> None:
        """More tokens, on the CPU."""
        ...

    def end(self) -> None:
        """There are no more."""
        ...


def generate_ids(
    model: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    max_new_tokens: int | None,
    max_length: int | None,
    num_return_sequences: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    logits_processor: Sequence[LogitsProcessor] | LogitsProcessor | None,
    stopping_criteria: Sequence[StoppingCriterion] | StoppingCriterion | None,
    streamer: Streamer | None,
    sampling: Mapping[str, Any],
    others: Mapping[str, Any],
) -> Tensor:
    """See `Decoder.generate`. `sampling` are its arguments that choose tokens, `others` those that it has not."""
    _refuse(others, sampling)
    prompts = _prompts(input_ids, attention_mask)
    tokenizer: Tokenizer | None = getattr(model, "tokenizer", None)
    published = {} if tokenizer is None else tokenizer.files.generation
    if eos_token_id is None:
        ends = frozenset() if tokenizer is None else tokenizer.eos_token_ids
    else:
        ends = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    S = input_ids.shape[1]
    if max_length is not None and max_new_tokens is None:
        max_new_tokens = max_length - S
        if max_new_tokens < 1:
            raise UserError(f"max_length = {max_length}, and the prompt has {S} tokens already: give max_new_tokens")
    room = model.config.longest_continued - max(map(len, prompts))
    if max_new_tokens is None:
        max_new_tokens = max(1, min(published.get("max_new_tokens") or 20, room))
    elif max_new_tokens > room > 0:
        raise UserError(
            f"a prompt of {max(map(len, prompts))} tokens and max_new_tokens = {max_new_tokens} do not fit: "
            f"{context_field(model.config)} = {model.config.longest_continued}; at most {room} may follow"
        )
    how = _sampling(sampling, published, max_new_tokens, ends)
    if num_return_sequences < 1 or (num_return_sequences > 1 and how.temperature == 0):
        raise UserError(
            f"num_return_sequences = {num_return_sequences}: it is 1 at least, and 1 without do_sample=True, since "
            "greedy answers are all the same"
        )
    prompts = [prompt for prompt in prompts for _ in range(num_return_sequences)]
    criteria = _as_list(stopping_criteria)
    if pad_token_id is None:
        pad_token_id = getattr(tokenizer, "pad_token_id", None)
        pad_token_id = min(ends, default=None) if pad_token_id is None else pad_token_id
    if pad_token_id is None and criteria and len(prompts) > 1:
        raise UserError("rows may end at different lengths: give pad_token_id, which the shorter are filled up with")

    failed = _Failed()
    engine = Engine(model, max_sequences=len(prompts), prefix_caching=False)
    requests: list[Request] = []
    try:
        for row, prompt in enumerate(prompts):
            own = how.model_copy(update={"choice": row})
            processors = [failed.watching(processor) for processor in _as_list(logits_processor)]
            requests.append(engine.add(prompt, own, logits_processor=processors))
        begun = input_ids.repeat_interleave(num_return_sequences, 0).long()
        if streamer is not None:
            streamer.put(begun.cpu())
        _run(engine, requests, criteria, streamer, pad_token_id or 0, begun.device)
    except ManyhandsError as error:
        raise (failed.error or error) from None
    finally:
        for request in requests:
            engine.abort(request)
    rows = [request.token_ids for request in requests]
    N = max(map(len, rows))
    new = torch.tensor([row + [pad_token_id or 0] * (N - len(row)) for row in rows], device=begun.device)
    return torch.cat([begun, new], 1)


def _run(
    engine: Engine,
    requests: list[Request],
    criteria: list[StoppingCriterion],
    streamer: Streamer | None,
    pad: int,
    device: torch.device,
) -> None:
    """Until each has ended; the streamer gets a column as soon as no row can still change it."""
    sent = 0
    while engine.busy:
        for token in engine.step():
            request = token.request
            if criteria and request.finish_reason is None:
                ids_1N = torch.tensor([[*request.prompt_ids, *request.token_ids]], device=device)
                if any(bool(torch.as_tensor(ends(ids_1N, None)).any()) for ends in criteria):
                    engine.abort(request)
        check_errors(requests)
        if streamer is not None:
            going = [len(r.token_ids) for r in requests if r.finish_reason is None]
            ready = min(going, default=max(len(r.token_ids) for r in requests))
            for n in range(sent, ready):
                column = [r.token_ids[n] if n < len(r.token_ids) else pad for r in requests]
                streamer.put(torch.tensor(column))
            sent = ready
    if streamer is not None:
        streamer.end()


def _sampling(
    given: Mapping[str, Any], published: Mapping[str, Any], max_new_tokens: int, ends: Collection[int]
) -> SamplingConfig:
    """What is given, else what the model's publisher says, else what transformers takes."""
    asked = {name: value for name, value in given.items() if value is not None}
    if asked.get("top_k") == 0:
        asked["top_k"] = None
    do_sample = asked.pop("do_sample", bool(published.get("do_sample", False)))
    penalty = published.get("repetition_penalty") or 1.0
    common = {
        "repetition_penalty": asked.pop("repetition_penalty", penalty),
        "min_new_tokens": asked.pop("min_new_tokens", 0),
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": tuple(sorted(ends)),
    }
    _warn(published, given)
    if not do_sample:
        for name, value in asked.items():
            if value not in (_USUAL[name], None) and not (name == "temperature" and value == 0):
                raise UserError(f"{name} = {value} does nothing without do_sample=True")
        return parse(SamplingConfig, {"temperature": 0.0, **common})
    found = {**_USUAL, **published_sampling(published), **asked}
    seed = int(torch.randint(1 << 62, ()))  # torch.manual_seed decides, as there
    return parse(SamplingConfig, {**found, **common, "seed": seed})


def _warn(published: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Of what the publisher asks for and is not done."""
    ignored = [
        f"{name} = {published[name]}"
        for name, neutral in NEUTRAL.items()
        if name not in given and published.get(name) is not None and published[name] not in neutral
    ]
    if ignored:
        warnings.warn(f"{GENERATION} of this model has what is not done here: {', '.join(ignored)}", stacklevel=5)


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The rows without their padding, which is on the left."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        what = type(input_ids).__name__
        if isinstance(input_ids, Tensor):
            what = f"{list(input_ids.shape)} of {input_ids.dtype}"
        raise UserError(f"input_ids is {what}; a tensor [B, S] of whole numbers is right")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise UserError(f"attention_mask is {list(attention_mask.shape)}, the ids are {list(input_ids.shape)}")
    real = mask_of(attention_mask, input_ids)
    assert real is not None
    for row, found in enumerate(real):
        if not bool(found.any()):
            raise UserError(f"row {row} of input_ids has no token that is not padding")
        if bool((found[1:] < found[:-1]).any()):
            raise UserError(
                f"attention_mask: row {row} has padding behind a token, and what is new would stand behind that; pad "
                'on the left (padding_side="left")'
            )
    return [ids[found].tolist() for ids, found in zip(input_ids, real, strict=True)]


def _refuse(others: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises `UserError` for an argument that would be ignored."""
    for name, value in others.items():
        if value is None or (name in _CHANGES_NOTHING and value in _CHANGES_NOTHING[name]):
            continue
        names = [*known, "attention_mask", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id"]
        names += ["num_return_sequences", "logits_processor", "stopping_criteria", "streamer"]
        instead = _INSTEAD.get(name)
        raise UserError(f"generate: {name} is not done here; {suggest(name, names) if instead is None else instead}")


def _as_list(found: Any) -> list[Any]:
    """transformers' lists of such things can be called themselves; their members are taken one by one."""
    if found is None:
        return []
    return list(found) if isinstance(found, Sequence) else [found]


class _Failed:
    """What a caller's processor raised, so that it is raised as it was."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def watching(self, processor: LogitsProcessor) -> LogitsProcessor:
        def watched(ids_1N: Tensor, scores_1V: Tensor) -> Tensor:
            try:
                return processor(ids_1N, scores_1V)
            except Exception as error:
                self.error = error
                raise

        return watched
