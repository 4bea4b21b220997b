"""What a chat request asks of the engine: its prompt through the template, its settings, its form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from manyhands.engine.asked import Asked
from manyhands.engine.ledger import Ledger
from manyhands.serve.choices import Asking, arguments
from manyhands.serve.errors import wrong
from manyhands.serve.forms import form_of
from manyhands.serve.messages_in import checked
from manyhands.serve.protocol import ChatBody, parse
from manyhands.serve.served import FALLBACK_STOP, Served, aside
from manyhands.serve.tools.offer import Offer, offer_of
from manyhands.serve.tools.parser import parser_of

_OURS = ("messages", "add_generation_prompt", "tools", "documents", "bos_token", "eos_token", "tokenize")
"""Not for `chat_template_kwargs` to set."""


class Parser(Protocol):
    """Parts an answer's text, as it comes, into deltas: content, reasoning_content, tool_calls."""

    def feed(self, text: str) -> list[dict[str, Any]]: ...

    def finish(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class ChatAsking(Asking):
    """A chat request that was read."""

    request: ChatBody
    new_parser: Callable[[], Parser]


async def read(served: Served, body: Mapping[str, Any]) -> ChatAsking:
    """Raises `ApiError`."""
    request = parse(ChatBody, body)
    if request.stream_options is not None and not request.stream:
        raise wrong("stream_options", "only with stream: true")
    if request.top_logprobs is not None and not request.logprobs:
        raise wrong("top_logprobs", "only with logprobs: true")
    offer = offer_of(request.tools, request.tool_choice, request.parallel_tool_calls)
    form = await offer.grammar(served.tokenizer) or await form_of(served.tokenizer, request)
    ids = await prompt_ids(served, request, offer, talks=form is None)
    asked_for = request.max_completion_tokens or request.max_tokens
    served.check_ids(ids, "messages", asked_for)
    room = served.room - len(ids)
    stops = request.stops if served.has_template else (*request.stops, FALLBACK_STOP)[:16]  # who gives 16 gets 16
    sampling = served.sampling(
        request,
        stop=stops,
        max_new_tokens=room if asked_for is None else min(asked_for, room),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    ledger = Ledger() if request.return_expert_ledger else None
    asked = [
        Asked(ids, sampling.model_copy(update={"choice": choice}), arguments(request, form and form.new()), ledger)
        for choice in range(request.n)
    ]
    template, end = served.tokenizer.chat_template or "", served.tokenizer.decode(ids[-8:])
    schemas = offer.schemas if offer.shown else None
    new_parser = offer.forced_parser if offer.forced else partial(parser_of, template, end, schemas)
    return ChatAsking(request, asked, [ids], request.logprobs, request, new_parser)


async def prompt_ids(served: Served, request: ChatBody, offer: Offer | None = None, talks: bool = True) -> list[int]:
    """The conversation in the model's template. Who does not talk, but writes what a grammar wants, does not think."""
    messages = checked(request.messages)
    variables = ({} if talks else {"enable_thinking": False}) | (request.chat_template_kwargs or {})
    for name in _OURS:
        if name in variables:
            raise wrong(f"chat_template_kwargs.{name}", "it is not the template's to be told here")
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    offer = offer or offer_of(request.tools, request.tool_choice, request.parallel_tool_calls)
    if shown := offer.shown:
        variables["tools"] = shown
    if request.documents:
        variables["documents"] = request.documents
    continued = None
    if request.continue_final_message:
        if "add_generation_prompt" in request.model_fields_set and request.add_generation_prompt:
            raise wrong("continue_final_message", "not together with add_generation_prompt: true")
        if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
            raise wrong("continue_final_message", "the last message is not a text of the assistant's")
        continued = messages.pop()["content"]
        if not messages:
            raise wrong("messages", "there is nothing in front of the message to continue")
    prompt = request.add_generation_prompt or continued is not None
    ids: list[int] = await aside(served.tokenizer.apply_chat_template, messages, prompt, **variables)
    return ids if continued is None else ids + await aside(served.tokenizer.encode, continued)
