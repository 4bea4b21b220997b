"""/v1/chat/completions: messages of every form, the template, streams, log-probabilities."""

import pytest

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def said(reply):
    return reply["choices"][0]["message"]["content"]


def test_an_answer_has_openais_form(server):
    reply = server.ok(PATH, model="tiny", messages=HELLO, max_tokens=6)
    assert reply["object"] == "chat.completion" and reply["id"].startswith("chatcmpl-")
    (choice,) = reply["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"], "refusal": None}
    assert reply["usage"]["completion_tokens"] == 6


def test_it_is_the_completion_of_the_template(server):
    prompt = "<system>Be kind\n<user>Hello\n<assistant>"
    messages = [{"role": "developer", "content": "Be kind"}, *HELLO]
    (choice,) = server.ok("/v1/completions", prompt=prompt, max_tokens=9)["choices"]
    assert said(server.ok(PATH, messages=messages, max_tokens=9)) == choice["text"]
    assert server.ok("/tokenize", messages=messages)["tokens"] == server.ok("/tokenize", prompt=prompt)["tokens"]


def test_parts_of_a_text_are_one_text(server):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    one, other = (server.ok(PATH, messages=m, max_tokens=8) for m in (HELLO, [{"role": "user", "content": parts}]))
    assert one["choices"] == other["choices"] and one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]


def test_without_a_limit_the_answer_goes_to_the_end_of_the_context(server):
    assert server.ok(PATH, messages=HELLO, ignore_eos=True)["usage"]["total_tokens"] == 192
    assert server.ok(PATH, messages=HELLO, max_completion_tokens=3, max_tokens=9)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "messages",
    [None, "x", [], [1], [None], [{}], [{"role": 1}], [{"role": "user"}], [{"role": "king", "content": "a"}]]
    + [[{"role": "system", "content": 123}], [{"role": "user", "content": [{"type": "nope"}]}]]
    + [[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]]
    + [[{"role": "user", "content": ["a"]}], [{"role": "user", "content": {"a": 1}}], [[HELLO]]]
    + [[{"role": "user", "content": [{"type": "text", "text": 5}]}], {"role": "user"}]
    + [[{"role": "assistant", "content": None, "tool_calls": calls}] for calls in ("x", [1], [{}], [{"function": {}}])]
    + [[{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]]
    + [[{"role": "user", "content": "a", "name": 5}], [{"role": "user", "content": "\ud800"}]],
)
def test_what_are_no_messages_is_refused_with_its_place(server, messages):
    assert server.bad(PATH, messages=messages)["type"] == "invalid_request_error"


def test_the_place_is_in_the_param(server):
    error = server.bad(PATH, messages=[*HELLO, {"role": "user", "content": [{"type": "text", "text": 1}]}])
    assert error["param"] == "messages[1].content[0].text"


@pytest.mark.parametrize("how", [{}, {"n": 2, "temperature": 1, "seed": 3}, {"stop": ["e", "x"]}])
def test_a_stream_says_what_the_whole_says(server, how):
    how = {"messages": HELLO, "max_tokens": 30, "logprobs": True, "top_logprobs": 2, **how}
    whole = server.ok(PATH, **how)
    events = server.events(PATH, stream_options={"include_usage": True}, **how)
    assert events[-1] == "[DONE]" and len({e["id"] for e in events[:-1]}) == 1
    usage, chunks = events[-2], events[:-2]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": None}
        assert not any("role" in c["delta"] for c in own[1:])
        assert own[-1]["delta"] == {} and own[-1]["finish_reason"] == choice["finish_reason"]
        assert not any(c["finish_reason"] for c in own[:-1])
        assert "".join(c["delta"].get("content") or "" for c in own) == choice["message"]["content"]
        entries = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]


def test_log_probabilities_have_bytes_that_join_to_the_text(server):
    (choice,) = server.ok(PATH, messages=HELLO, max_tokens=20, logprobs=True, top_logprobs=3)["choices"]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 20
    assert bytes(b for e in entries for b in e["bytes"]).decode("utf-8", "replace") == choice["message"]["content"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3 and entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0
    (bare,) = server.ok(PATH, messages=HELLO, max_tokens=2, logprobs=True)["choices"]
    assert [entry["top_logprobs"] for entry in bare["logprobs"]["content"]] == [[], []]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_logprobs", 3),
        ("logprobs", 3),
        ("max_tokens", 0),
        ("max_completion_tokens", -1),
        ("stream_options", {"include_usage": True}),
        ("tools", "x"),
        ("tool_choice", "auto"),
        ("response_format", {"type": "sound"}),
        ("response_format", "json"),
        ("chat_template_kwargs", [1]),
        ("chat_template_kwargs", {"messages": []}),
        ("continue_final_message", True),
        ("add_generation_prompt", "yes"),
    ],
)
def test_what_a_field_may_not_be_is_said_with_its_name(server, field, value):
    assert server.bad(PATH, messages=HELLO, **{field: value})["param"].startswith(field)
    if field == "top_logprobs":
        server.bad(PATH, messages=HELLO, logprobs=True, top_logprobs=21)


def test_the_last_message_can_be_continued(server):
    messages = [*HELLO, {"role": "assistant", "content": "def f("}]
    (choice,) = server.ok("/v1/completions", prompt="<user>Hello\n<assistant>def f(", max_tokens=7)["choices"]
    continued = {"continue_final_message": True, "add_generation_prompt": False}
    assert said(server.ok(PATH, messages=messages, max_tokens=7, **continued)) == choice["text"]
    server.bad(PATH, messages=messages, continue_final_message=True, add_generation_prompt=True)


def test_a_model_without_a_template_continues_a_dialogue(serving):
    with serving(template=None) as running:
        (choice,) = running.ok("/completions", prompt="User: Hello\nAssistant:", max_tokens=9, stop="\nUser:")[
            "choices"
        ]
        reply = running.ok(PATH, messages=HELLO, max_tokens=9, stop=[f"\x00{i}" for i in range(16)])
        assert said(reply) == choice["text"]


def test_thoughts_are_a_field_of_their_own(serving, tokenizer):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>{# </think> reasoning_content #}"
    with serving(template=template) as running:
        ids = tokenizer.encode("</think>")
        reply = running.ok(PATH, messages=HELLO, max_tokens=12)
        message = reply["choices"][0]["message"]
        assert message["content"] == "" and message["reasoning_content"] and ids
        deltas = [e["choices"][0]["delta"] for e in running.events(PATH, messages=HELLO, max_tokens=12)[:-1]]
        assert "".join(d.get("reasoning_content") or "" for d in deltas) == message["reasoning_content"]


def test_a_template_that_refuses_is_the_callers_mistake(serving):
    with serving(template="{{ raise_exception('no system here') }}") as running:
        assert "no system here" in running.bad(PATH, messages=HELLO)["message"]


def test_no_stop_string_is_lost_where_there_is_no_template(serving):
    with serving(template=None) as running:
        asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24}
        words = running.ok("/v1/chat/completions", **asked)["choices"][0]["message"]["content"]
        stops = [f"never {i}" for i in range(15)] + [words[3:6]]
        choice = running.ok("/v1/chat/completions", stop=stops, **asked)["choices"][0]
        assert choice["message"]["content"] == words[: words.index(stops[-1])] and choice["stop_reason"] == stops[-1]
