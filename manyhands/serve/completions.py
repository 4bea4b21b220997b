"""`/v1/completions`: prompts continued.

await create(served, body)             a text_completion object
async for chunk in stream(served, body)
"""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from manyhands.engine.answer import Token
from manyhands.engine.asked import Asked
from manyhands.engine.ledger import Ledger
from manyhands.serve.choices import Asking, Head, Reading, arguments, new_head, push, reason_of
from manyhands.serve.entries import legacy, of_prompt
from manyhands.serve.errors import ApiError, wrong
from manyhands.serve.forms import form_of
from manyhands.serve.protocol import MOST_SEQUENCES, CompletionBody, parse
from manyhands.serve.served import Served, aside

DEFAULT_MAX_TOKENS = 16
_TOKENS_AT_ONCE = 1 << 22
"""Token ids in all prompts of a request."""


async def create(served: Served, body: Mapping[str, Any]) -> dict[str, Any]:
    """The whole answer. Raises `ApiError`."""
    asking, request, echoes = await _read(served, body)
    reading = Reading(served, asking, await served.ask(asking.asked))
    choices = [_Choice(reading, number, request, echoes[number // request.n]) for number in range(len(asking.asked))]
    async for number, token in reading.steps():
        choices[number].push(token)
    return {
        **new_head("cmpl", "text_completion", served.name).fields(),
        "choices": [choice.whole() for choice in choices],
        "usage": reading.usage(),
        **reading.ledger(),
    }


async def stream(served: Served, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """Chunk by chunk. Raises `ApiError`, for what is wrong with the request before the first chunk."""
    asking, request, echoes = await _read(served, body)
    reading = Reading(served, asking, await served.ask(asking.asked))
    head = new_head("cmpl", "text_completion", served.name)
    choices = [_Choice(reading, number, request, echoes[number // request.n]) for number in range(len(asking.asked))]
    begun: set[int] = set()
    async for number, token in reading.steps():
        chunk = choices[number].push(token)
        first = number not in begun
        begun.add(number)
        if first and request.echo:
            chunk["text"] = choices[number].echo + chunk["text"]
            if request.logprobs is not None:
                both = (choices[number].echoed(), chunk["logprobs"])
                chunk["logprobs"] = {name: [*both[0][name], *both[1][name]] for name in both[0]}
        extras = reading.shown(token)
        if token.finish_reason is not None:
            chunk |= reading.extras(number)
            closing = reading.closing(token)
            extras = (
                {"manyhands": {**extras["manyhands"], **closing["manyhands"]}}
                if extras and closing
                else closing or extras
            )
        if chunk["text"] or chunk["finish_reason"] or extras or (chunk["logprobs"] or {}).get("tokens"):
            yield _chunk(head, request, [chunk]) | extras
    for number, choice in enumerate(choices):  # of no new token
        if number not in begun:
            yield _chunk(head, request, [choice.whole()])
    if request.usage_chunk:
        yield {**head.fields(), "choices": [], "usage": reading.usage()}


def _chunk(head: Head, request: CompletionBody, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {**head.fields(), "choices": choices, **({"usage": None} if request.usage_chunk else {})}


class _Choice:
    """One of the answers, as it grows."""

    def __init__(self, reading: Reading, number: int, request: CompletionBody, echo: str) -> None:
        self.reading, self.number, self.request = reading, number, request
        self.echo = echo if request.echo else ""
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._entries = reading.entries(len(self.echo))

    def push(self, token: Token) -> dict[str, Any]:
        """The chunk's choice for a token."""
        self._text.append(token.text)
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = legacy(self.reading.served.tokenizer, push(self._entries, token))
            self._logprobs.append(logprobs)
        return {"index": self.number, "text": token.text, "logprobs": logprobs, "finish_reason": token.finish_reason}

    def echoed(self) -> dict[str, Any]:
        """Log-probabilities of the prompt. It has run when there is a token."""
        served, submission = self.reading.served, self.reading.submission(self.number)
        ids = self.reading.asking.prompts[self.number // self.request.n]
        found = submission.prompt_logprobs()
        return legacy(served.tokenizer, of_prompt(served.tokenizer, ids, found, _hidden(served, ids, self.request)))

    def whole(self) -> dict[str, Any]:
        """All of it."""
        logprobs = None
        if self.request.logprobs is not None:
            parts = ([self.echoed()] if self.request.echo else []) + self._logprobs
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            logprobs = {name: [x for part in parts for x in part[name]] for name in names}
        return {
            "index": self.number,
            "text": self.echo + "".join(self._text),
            "logprobs": logprobs,
            "finish_reason": reason_of(self.reading.submission(self.number)),
            **self.reading.extras(self.number),
        }


def _hidden(served: Served, ids: list[int], request: CompletionBody) -> int:
    """Tokens in front of a prompt that its text does not have."""
    front = served.tokenizer.front_ids
    is_text = isinstance(request.prompt, str) or (bool(request.prompt) and isinstance(request.prompt[0], str))
    return len(front) if is_text and ids[: len(front)] == front else 0


async def _read(served: Served, body: Mapping[str, Any]) -> tuple[Asking, CompletionBody, list[str]]:
    """The request, checked; and each prompt's text where it is to be echoed."""
    request = parse(CompletionBody, body)
    if request.suffix:
        raise wrong("suffix", "this model continues a text and does not fill one in: leave it out")
    if request.best_of is not None and request.best_of != request.n:
        raise wrong("best_of", f"{request.best_of} with n = {request.n}: answers are not ranked here, leave it out")
    if request.prompt_embeds is not None:
        raise wrong("prompt_embeds", "prompts are text or token ids here")
    if request.stream_options is not None and not request.stream:
        raise wrong("stream_options", "only with stream: true")
    prompts = _prompts(request.prompt)
    if len(prompts) * request.n > MOST_SEQUENCES:
        raise wrong("prompt", f"{len(prompts)} prompts with n = {request.n}: at most {MOST_SEQUENCES} answers at once")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    for text in texts:
        served.check_text(text, "prompt")
    try:
        special = {"add_special_tokens": True, "parse_special": True}  # a prompt is whole: who asks wrote its marks
        made = iter(await aside(served.tokenizer.encode_batch, texts, **special) if texts else [])
    except ApiError as error:
        error.param = error.param or "prompt"
        raise
    ids = [next(made) if isinstance(prompt, str) else prompt for prompt in prompts]
    new = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    end = served.tokenizer.eos_token_id
    ids = [own or ([] if end is None else [end]) for own in ids]
    for own in ids:
        served.check_ids(own, "prompt", new)
        if not own:
            raise wrong("prompt", "it is empty, and this model has no token to start a text from")
    echoed = request.logprobs if request.echo else None
    form = await form_of(served.tokenizer, request)
    asked: list[Asked] = []
    ledger = Ledger() if request.return_expert_ledger else None
    for own in ids:
        sampling = served.sampling(
            request,
            max_new_tokens=min(new, served.room - len(own)),
            logprobs=request.logprobs,
            prompt_logprobs=echoed,
        )
        for choice in range(request.n):
            how = sampling.model_copy(update={"choice": choice})
            asked.append(Asked(own, how, arguments(request, form and form.new()), ledger))
    echoes = [p if isinstance(p, str) else served.tokenizer.decode(p) if request.echo else "" for p in prompts]
    return Asking(request, asked, ids, request.logprobs is not None), request, echoes


def _prompts(prompt: str | list[Any]) -> list[Any]:
    """Each a text or a list of ids. Raises `ApiError` for anything else."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise wrong("prompt", "an empty list")
    if all(isinstance(one, str) for one in prompt):
        return prompt
    if not isinstance(prompt[0], list):
        _check_ids(prompt, "prompt")
        return [prompt]
    if sum(len(one) if isinstance(one, list) else 1 for one in prompt) > _TOKENS_AT_ONCE:
        raise ApiError(400, "prompt: too many tokens", param="prompt")
    for at, one in enumerate(prompt):
        place = f"prompt[{at}]"
        if not isinstance(one, list) or not one:
            raise wrong(place, "expected a list of token ids that is not empty, as the others are")
        _check_ids(one, place)
    return prompt


def _check_ids(ids: list[Any], place: str) -> None:
    for at, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 1 << 32:
            raise wrong(f"{place}[{at}]", "prompts are a text, a list of texts, token ids, or a list of lists of ids")
