"""What request bodies may hold. Types are strict; `null` is as if the field were not there; other fields are ignored.

A model's rules that need its vocabulary or context are checked where it is known (`served.py`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyhands.config.base import short_repr
from manyhands.config.sampling import StopString
from manyhands.serve.errors import ApiError

B = TypeVar("B", bound="Body")
MOST_CHOICES = 128
"""n of one prompt."""
MOST_SEQUENCES = 2048
"""Prompts × n of one request."""

Whole = Annotated[int, Field(ge=0)]
Id = Annotated[int, Field(ge=0, lt=1 << 32)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Top = Annotated[int, Field(ge=0, le=20)]


class Body(BaseModel):
    """Base: strict types, finite numbers, the rest kept in `model_extra`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool | None = None


class Generating(Body):
    """What completions and chat have in common."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=1024)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=4096)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Whole | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_json_object: bool | None = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    return_routed_experts: bool = False
    routed_experts_prompt_start: Whole = 0
    return_expert_ledger: bool = False
    return_token_routing: bool = False

    @property
    def usage_chunk(self) -> bool:
        """Whether a stream ends with one."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a list."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(Generating):
    """`/v1/completions`."""

    prompt: str | list[Any]
    max_tokens: Whole | None = None
    logprobs: Top | None = None
    echo: bool = False
    suffix: Any = None
    best_of: int | None = None
    prompt_embeds: Any = None


class ChatBody(Generating):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Any], Field(min_length=1, max_length=16384)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Top | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    documents: list[Any] | None = None


class TokenizeBody(Body):
    """`/tokenize`: `prompt` (or llama.cpp's `content`), or `messages`."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """`/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Id], Field(max_length=1 << 22)]


ACCEPTED = frozenset({"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"})
"""Fields of OpenAI's that change nothing here."""
_KNOWN = ACCEPTED.union(*(cls.model_fields for cls in (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)))


def parse(cls: type[B], body: Mapping[str, Any]) -> B:
    """The body as `cls`. Raises `ApiError` 400 about the first thing that is wrong."""
    try:
        return cls.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    # of what may be one or several, each form has its own complaint: the telling one is not about the form
    problem = next((p for p in problems if p["type"] not in ("string_type", "list_type")), problems[0])
    place = str(problem["loc"][0])
    for part in problem["loc"][1:]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place == "stream_options" else ""
    if problem["type"] == "missing":
        raise ApiError(400, f"{place}: this field is required", param=place)
    found = "" if problem["type"].startswith("too_") else f", found {short_repr(problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    raise ApiError(400, f"{place}: {message[:1].lower()}{message[1:]}{found}", param=place)


def num_unknown(body: Mapping[str, Any]) -> int:
    """Fields that mean nothing here."""
    return sum(name not in _KNOWN for name in body)
