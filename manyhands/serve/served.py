"""A model as it is served: its engine's thread, its tokenizer, and what a request's settings become for it.

V vocabulary.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from manyhands.config import ModelConfig, SamplingConfig
from manyhands.engine.answer import Token
from manyhands.engine.answers import Answers
from manyhands.engine.asked import Asked
from manyhands.engine.service import Service
from manyhands.errors import ManyhandsError
from manyhands.generate.defaults import published_sampling
from manyhands.serve.errors import ApiError, as_api_error, wrong
from manyhands.serve.protocol import Generating
from manyhands.text import Tokenizer

P = ParamSpec("P")
R = TypeVar("R")
FALLBACK_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For a model without a chat template: it continues a written dialogue."""
FALLBACK_STOP = "\nUser:"
_POOL = ThreadPoolExecutor(4, "manyhands-text")
"""Text that takes its time, off the event loop: long prompts, chat templates, grammars."""


async def aside(what: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call it in a thread of the pool. Raises `ApiError` for what it raises of ours."""
    try:
        return await asyncio.get_running_loop().run_in_executor(_POOL, partial(what, *args, **kwargs))
    except ManyhandsError as error:
        raise as_api_error(error) from None


@dataclass(eq=False)
class Served:
    """One model behind its name."""

    name: str
    service: Service
    tokenizer: Tokenizer
    config: ModelConfig
    timeout: float | None = None
    """Seconds a request may take."""
    on_token: Callable[[float, bool], None] = lambda seconds, first: None
    """Told how long each token took to come, and whether it was a request's first."""
    has_template: bool = True

    def __post_init__(self) -> None:
        self.has_template = self.tokenizer.chat_template is not None
        if not self.has_template:
            self.tokenizer = self.tokenizer.with_chat_template(FALLBACK_TEMPLATE)
        inner = self.tokenizer.inner
        names = [len(token.content.encode()) for token in inner.get_added_tokens_decoder().values()]
        longest = max([1, int(self.tokenizer.byte_lengths().max()), *names])
        self._longest = longest if inner.normalizer is None else 1 << 30  # what is normalised may have fewer bytes
        self._published = published_sampling(self.tokenizer.files.generation)

    @property
    def room(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        blocks = self.service.engine.scheduler.blocks
        return min(self.config.longest_continued, blocks.num_blocks * blocks.block_size)

    def check_ids(self, ids: Sequence[int], param: str, new: int | None) -> None:
        """Raises `ApiError` for a prompt that is not in the vocabulary or leaves no room for a token."""
        if ids and max(ids) >= self.config.vocab_size:
            raise wrong(param, f"token id {max(ids)} is not in the vocabulary of {self.config.vocab_size}")
        most = self.room - (0 if new == 0 else 1)
        if len(ids) > most:
            asked = f" and you ask for {new} more" if new else ""
            raise ApiError(
                400,
                f"this model's maximum context length is {self.room} tokens, and your prompt has {len(ids)}{asked}: "
                f"it may have at most {most}",
                param=param,
                code="context_length_exceeded",
            )

    def check_text(self, text: str, param: str) -> None:
        """Raises `ApiError` for a text so long that no tokens could be few enough: it need not be cut into them."""
        least = -(-len(text.encode("utf-8", "replace")) // self._longest)
        if least > self.room:
            raise ApiError(
                400,
                f"this model's maximum context length is {self.room} tokens, and your prompt has at least {least}",
                param=param,
                code="context_length_exceeded",
            )

    def sampling(self, body: Generating, **others: Any) -> SamplingConfig:
        """The request's settings; where it says nothing, those that the model was published with.

        `others` are further fields. Raises `ApiError` for token ids that the vocabulary does not have.
        """
        top_k = body.top_k if body.top_k is None or body.top_k > 0 else 0
        asked = {"temperature": body.temperature, "top_p": body.top_p, "top_k": top_k, "min_p": body.min_p}
        values = {"temperature": 1.0, **self._published} | {k: v for k, v in asked.items() if v is not None}
        if not values.get("top_k"):
            values.pop("top_k", None)
        same = ("repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos")
        values |= {name: value for name in same if (value := getattr(body, name)) is not None}
        values["seed"] = secrets.randbits(63) if body.seed is None else body.seed
        values["logit_bias"] = self._bias(body)
        values["stop_token_ids"] = tuple(body.stop_token_ids or ())
        values["min_new_tokens"] = min(body.min_tokens or 0, 1 << 24)
        for token in values["stop_token_ids"]:
            if token >= self.config.vocab_size:
                raise wrong("stop_token_ids", f"{token} is not in the vocabulary of {self.config.vocab_size}")
        try:
            return SamplingConfig(**{"stop": body.stops, **values, **others})
        except ManyhandsError as error:
            raise as_api_error(error) from None

    def _bias(self, body: Generating) -> tuple[tuple[int, float], ...]:
        found: dict[int, float] = {}
        for name, bias in (body.logit_bias or {}).items():
            if not (name.isascii() and name.isdigit()) or len(name) > 12 or int(name) >= self.config.vocab_size:
                raise wrong("logit_bias", f"{name[:40]!r} is no token id below {self.config.vocab_size}")
            found[int(name)] = bias
        return tuple(found.items())

    async def ask(self, asked: Sequence[Asked]) -> Answers:
        """Have the engine take them. Raises `ApiError`."""
        try:
            return await self.service.submit_all(asked)
        except ManyhandsError as error:
            raise as_api_error(error) from None

    async def tokens(self, answers: Answers) -> AsyncGenerator[tuple[int, Token], None]:
        """Of all of them, as they come. Raises `ApiError`; ends them when it is left."""
        begin = answers.since
        last = [begin] * len(answers.submissions)
        until = None if self.timeout is None else begin + self.timeout
        async with answers:
            try:
                async for number, token in answers.tokens(until):
                    now = time.monotonic()
                    self.on_token(now - last[number], last[number] == begin)
                    last[number] = now
                    yield number, token
            except (ManyhandsError, TimeoutError) as error:
                raise as_api_error(error) from None
            for submission in answers.submissions:
                if submission.completion().finish_reason == "abort":
                    raise ApiError(503, "the server is stopping", "unavailable_error", code="stopping")
