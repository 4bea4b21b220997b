"""Official clients against a running server, one PASS or FAIL line each. Run by hand, in an environment of its own:

    python -m venv /tmp/clients
    /tmp/clients/bin/pip install openai anthropic langchain-openai llama-index-llms-openai-like litellm
    manyhands serve MODEL --port 8000
    /tmp/clients/bin/python scripts/clients.py http://127.0.0.1:8000 NAME [API_KEY]

NAME is one that `/v1/models` lists. The answers of a small model mean little: what is checked is that each client
reads them, that streams add up to something, and that forced tools and formats hold. Exit code 1 if one fails.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

BASE, NAME = sys.argv[1].rstrip("/"), sys.argv[2]
KEY = sys.argv[3] if len(sys.argv) > 3 else "none"
V1 = f"{BASE}/v1"
ASK: Any = [{"role": "user", "content": "Say hello."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
ABOUT = {"name": "weather", "description": "The weather of a city."}
TOOL: Any = {"type": "function", "function": {**ABOUT, "parameters": SCHEMA}}
FLAT: Any = {"type": "function", **ABOUT, "parameters": SCHEMA, "strict": True}
BLOCK: Any = {**ABOUT, "input_schema": SCHEMA}
SHORT, LONG = 16, 128


def city(arguments: str | dict[str, Any]) -> None:
    """The arguments are what the schema allows."""
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert set(value) == {"city"} and isinstance(value["city"], str), value


def openai_client() -> Any:
    """The synchronous one."""
    import openai

    return openai.OpenAI(base_url=V1, api_key=KEY, max_retries=0)


def anthropic_client() -> Any:
    """The synchronous one."""
    import anthropic

    return anthropic.Anthropic(base_url=BASE, api_key=KEY, max_retries=0)


def openai_sync() -> None:
    """One answer."""
    reply = openai_client().chat.completions.create(model=NAME, messages=ASK, max_tokens=SHORT)
    assert reply.choices[0].finish_reason in ("stop", "length") and reply.usage.prompt_tokens > 0


def openai_async() -> None:
    """Four at once."""
    import openai

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=V1, api_key=KEY, max_retries=0) as client:
            asks = [client.chat.completions.create(model=NAME, messages=ASK, max_tokens=SHORT) for _ in range(4)]
            assert all(reply.choices[0].message.role == "assistant" for reply in await asyncio.gather(*asks))

    asyncio.run(run())


def openai_stream() -> None:
    """A stream, with usage in its last chunk."""
    options = {"include_usage": True}
    create = openai_client().chat.completions.create
    chunks = list(create(model=NAME, messages=ASK, max_tokens=SHORT, stream=True, stream_options=options))
    assert chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")


def openai_tools() -> None:
    """A named tool is called with arguments that its schema allows."""
    named: Any = {"type": "function", "function": {"name": "weather"}}
    create = openai_client().chat.completions.create
    reply = create(model=NAME, messages=ASK, tools=[TOOL], tool_choice=named, max_tokens=LONG)
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "weather"
    city(call.function.arguments)


def openai_structured() -> None:
    """A strict JSON schema holds."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    create = openai_client().chat.completions.create
    reply = create(model=NAME, messages=ASK, response_format=form, max_tokens=LONG)
    city(reply.choices[0].message.content)


def responses() -> None:
    """One response, and a second turn that sends the first back."""
    create = openai_client().responses.create
    first = create(model=NAME, input="Say hello.", instructions="Be brief.", max_output_tokens=SHORT)
    assert first.status in ("completed", "incomplete") and first.usage.input_tokens > 0
    second = create(model=NAME, input=[*ASK, *first.output, *ASK], max_output_tokens=SHORT)
    assert second.output


def responses_stream() -> None:
    """The pieces are the whole text; the last event has the response."""
    stream = openai_client().responses.create(model=NAME, input="Say hello.", max_output_tokens=SHORT, stream=True)
    events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[0].type == "response.created" and events[-1].response.output_text == text


def responses_tools() -> None:
    """A forced call, whole and through the client's own assembling of a stream."""
    client = openai_client()
    reply = client.responses.create(model=NAME, input="Weather?", tools=[FLAT], tool_choice="required")
    city(next(item for item in reply.output if item.type == "function_call").arguments)
    with client.responses.stream(model=NAME, input="Weather?", tools=[FLAT], tool_choice="required") as stream:
        final = stream.get_final_response()
    city(next(item for item in final.output if item.type == "function_call").arguments)


def responses_structured() -> None:
    """A strict JSON schema holds."""
    form: Any = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}}
    city(openai_client().responses.create(model=NAME, input="Where?", text=form, max_output_tokens=LONG).output_text)


def anthropic_sync() -> None:
    """One message, its tokens counted, and an error of the right class."""
    import anthropic

    client = anthropic_client()
    reply = client.messages.create(model=NAME, messages=ASK, max_tokens=SHORT, system="Be brief.")
    assert reply.content[0].type in ("text", "thinking") and reply.usage.output_tokens > 0
    assert client.messages.count_tokens(model=NAME, messages=ASK).input_tokens > 0
    try:
        client.messages.create(model=NAME, messages=[], max_tokens=SHORT)
    except anthropic.BadRequestError as error:
        assert error.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    else:
        raise AssertionError("no messages were accepted")


def anthropic_async() -> None:
    """Four streams at once."""
    import anthropic

    async def one(client: Any) -> None:
        async with client.messages.stream(model=NAME, messages=ASK, max_tokens=SHORT) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == "".join(block.text for block in final.content if block.type == "text")

    async def run() -> None:
        async with anthropic.AsyncAnthropic(base_url=BASE, api_key=KEY, max_retries=0) as client:
            await asyncio.gather(*[one(client) for _ in range(4)])

    asyncio.run(run())


def anthropic_stream() -> None:
    """The pieces are the whole text."""
    with anthropic_client().messages.stream(model=NAME, messages=ASK, max_tokens=SHORT) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in final.content if block.type == "text") and final.stop_reason


def anthropic_tools() -> None:
    """A forced call, whole and streamed, and its result sent back."""
    client, forced = anthropic_client(), {"type": "tool", "name": "weather"}
    settings: Any = {"model": NAME, "tools": [BLOCK], "max_tokens": LONG}
    reply = client.messages.create(messages=ASK, tool_choice=forced, **settings)
    call = next(block for block in reply.content if block.type == "tool_use")
    city(call.input)
    assert reply.stop_reason == "tool_use"
    with client.messages.stream(messages=ASK, tool_choice=forced, **settings) as stream:
        city(next(block for block in stream.get_final_message().content if block.type == "tool_use").input)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]}
    turns: Any = [*ASK, {"role": "assistant", "content": reply.content}, result]
    assert client.messages.create(messages=turns, **settings).content


def langchain() -> None:
    """LangChain's ChatOpenAI: an answer, a stream, a structured answer."""
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=V1, api_key=KEY, model=NAME, max_tokens=LONG, max_retries=0)  # type: ignore[call-arg, arg-type]
    assert model.invoke("Say hello.").response_metadata["finish_reason"] in ("stop", "length")
    assert list(model.stream("Say hello."))
    city(model.with_structured_output({"title": "place", **SCHEMA}, method="json_schema").invoke("Where?"))  # type: ignore[arg-type]


def llama_index() -> None:
    """LlamaIndex's OpenAILike: an answer and a stream."""
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(api_base=V1, api_key=KEY, model=NAME, is_chat_model=True, max_tokens=SHORT, max_retries=0)
    ask = [ChatMessage(role="user", content="Say hello.")]
    assert model.chat(ask).message.role == "assistant"
    assert list(model.stream_chat(ask))


def lite_llm() -> None:
    """litellm as a client of OpenAI's interface and of Anthropic's."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    settings: Any = {"messages": ASK, "max_tokens": SHORT, "api_key": KEY}
    reply = litellm.completion(model=f"openai/{NAME}", api_base=V1, **settings)
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert list(litellm.completion(model=f"openai/{NAME}", api_base=V1, stream=True, **settings))
    reply = litellm.completion(model=f"anthropic/{NAME}", api_base=BASE, **settings)
    assert reply.choices[0].message.role == "assistant"


CHECKS: list[Callable[[], None]] = [
    openai_sync,
    openai_async,
    openai_stream,
    openai_tools,
    openai_structured,
    responses,
    responses_stream,
    responses_tools,
    responses_structured,
    anthropic_sync,
    anthropic_async,
    anthropic_stream,
    anthropic_tools,
    langchain,
    llama_index,
    lite_llm,
]


def main() -> int:
    """1 if a check failed."""
    failed = 0
    for check in CHECKS:
        try:
            check()
            print(f"PASS {check.__name__}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAIL {check.__name__}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
