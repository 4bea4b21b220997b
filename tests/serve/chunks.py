"""What a chat core makes, written by hand: the chunks of a stream, and the same reply in one piece."""

import asyncio

HEAD = {"id": "chatcmpl-7", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 5,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def logprob(token):
    """One entry of `logprobs.content`."""
    one = {"token": token, "logprob": -0.5, "bytes": list(token.encode())}
    return {**one, "top_logprobs": [dict(one)]}


def call(index, name=None, arguments="", id=None):
    """One entry of a delta's `tool_calls`."""
    function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
    return {"index": index, "function": function, **({"id": id, "type": "function"} if id else {})}


def stream(*deltas, finish="stop", usage=USAGE, **more):
    """The chunks of a reply: its role, `deltas`, why it ended, what it used. (delta, logprobs) pairs have both."""
    made = [choice({"role": "assistant", "content": None})]
    for delta in deltas:
        delta, entries = delta if isinstance(delta, tuple) else (delta, None)
        made.append(choice(delta, logprobs={"content": entries} if entries else None))
    made.append(choice({}, finish_reason=finish, **more))
    return [*made, {**HEAD, "choices": [], "usage": usage}]


def choice(delta, **fields):
    """One chunk."""
    return {**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": None, **fields}], "usage": None}


def completion(finish="stop", logprobs=None, stop_reason=None, usage=USAGE, **message):
    """A reply in one piece."""
    message = {"role": "assistant", "content": None, **message}
    one = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs, "stop_reason": stop_reason}
    return {**HEAD, "object": "chat.completion", "choices": [one], "usage": usage}


async def source(chunks, error=None):
    """`chunks` as they would come, and then perhaps an error."""
    for chunk in chunks:
        yield chunk
    if error is not None:
        raise error


async def _all(events):
    return [event async for event in events]


def run(events):
    """All events of an asynchronous iterator."""
    return asyncio.run(_all(events))
