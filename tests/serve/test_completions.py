"""/v1/completions: prompts of every form, choices, stops, log-probabilities, streams that say what the whole says."""

import json
import math

import pytest

PATH = "/v1/completions"
P = "def f(x):"


def texts(reply):
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(reply["choices"])))
    return [choice["text"] for choice in reply["choices"]]


def test_an_answer_has_openais_form(server):
    reply = server.ok(PATH, model="tiny", prompt=P, max_tokens=5)
    assert set(reply) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert reply["object"] == "text_completion" and reply["id"].startswith("cmpl-") and reply["model"] == "tiny"
    (choice,) = reply["choices"]
    expected = {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert choice == {"text": choice["text"], **expected}
    usage = reply["usage"]
    assert usage["completion_tokens"] == 5 and usage["total_tokens"] == usage["prompt_tokens"] + 5
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens"}
    assert server.ok("/completions", prompt=P, max_tokens=5)["choices"] == reply["choices"]


def test_sixteen_tokens_where_nothing_is_said(server):
    assert server.ok(PATH, prompt=P)["usage"]["completion_tokens"] == 16


def test_prompts_of_every_form_say_the_same(server):
    ids = server.ok("/tokenize", prompt=P)["tokens"]
    (alone,) = texts(server.ok(PATH, prompt=P))
    for prompt in ([P], ids, [ids]):
        assert texts(server.ok(PATH, prompt=prompt)) == [alone]
    assert texts(server.ok(PATH, prompt=[P, "für", P])) == [alone, *texts(server.ok(PATH, prompt="für")), alone]


@pytest.mark.parametrize(
    "prompt",
    [
        *(None, True, 5, 1.5, {}, [], [[]], [[], [1]], [True], [1.0], [-1], [330], [1 << 40], [1, "a"], ["a", 1]),
        *([["a"]], [[1], 2], [[[1]]], ["a", None], [1 << 200], "\ud800"),
    ],
)
def test_what_is_no_prompt_is_refused(server, prompt):
    error = server.bad(PATH, prompt=prompt)
    assert error["type"] == "invalid_request_error" and error["param"].startswith("prompt")


def test_choices_are_numbered_and_repeatable(server):
    how = {"prompt": [P, "für"], "n": 3, "temperature": 1, "seed": -7, "max_tokens": 12}
    first, again = (texts(server.ok(PATH, **how)) for _ in range(2))
    assert first == again and len(set(first)) == 6
    assert texts(server.ok(PATH, **{**how, "prompt": P, "n": 1})) == first[:1]
    assert texts(server.ok(PATH, **{**how, "seed": 8})) != first
    greedy = texts(server.ok(PATH, prompt=P, n=3))
    assert len(set(greedy)) == 1


def test_without_a_seed_answers_differ(server):
    found = {texts(server.ok(PATH, prompt=P, temperature=1, max_tokens=20))[0] for _ in range(3)}
    assert len(found) > 1


def test_stop_strings_cut(server):
    (text,) = texts(server.ok(PATH, prompt=P, max_tokens=40))
    stop = text[5:8]
    for given in (stop, [stop], ["\x00", stop]):
        reply = server.ok(PATH, prompt=P, max_tokens=40, stop=given, logprobs=1)
        (choice,) = reply["choices"]
        assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        chunks = server.events(PATH, prompt=P, max_tokens=40, stop=given)[:-1]
        assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_in_the_legacy_form(server):
    (choice,) = server.ok(PATH, prompt=P, max_tokens=12, logprobs=3)["choices"]
    said = choice["logprobs"]
    assert set(said) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(values) for values in said.values()} == {12}
    assert "".join(said["tokens"]) == choice["text"]
    assert said["text_offset"] == [len("".join(said["tokens"][:i])) for i in range(12)]
    for value, top in zip(said["token_logprobs"], said["top_logprobs"], strict=True):
        assert value <= 0 and value == max(top.values()) and len(top) == 3
    (none,) = server.ok(PATH, prompt=P, max_tokens=3, logprobs=0)["choices"]
    assert [len(top) for top in none["logprobs"]["top_logprobs"]] == [1, 1, 1]


def test_what_lm_eval_asks(server):
    ids = server.ok("/tokenize", prompt="def f(x):\n    return x")["tokens"]
    how = {"max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    reply = server.ok(PATH, prompt=[ids, ids[:-2]], **how)
    for choice, n in zip(reply["choices"], (len(ids), len(ids) - 2), strict=True):
        said = choice["logprobs"]
        assert {len(values) for values in said.values()} == {n + 1}
        assert said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
        for value, top in zip(said["token_logprobs"][1:], said["top_logprobs"][1:], strict=True):
            assert value <= max(top.values()) and value in top.values()
        assert "".join(said["tokens"]) == choice["text"]
    both = [choice["logprobs"]["token_logprobs"] for choice in reply["choices"]]
    assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(both[0][1:-3], both[1][1:-1], strict=True))


def test_echo_alone_makes_no_token(server):
    for prompt in (P, server.ok("/tokenize", prompt=P)["tokens"]):
        reply = server.ok(PATH, prompt=prompt, max_tokens=0, echo=True, logprobs=2)
        (choice,) = reply["choices"]
        assert choice["text"] == P and reply["usage"]["completion_tokens"] == 0
        assert choice["finish_reason"] == "length"
        assert "".join(choice["logprobs"]["tokens"]) == P
    (plain,) = server.ok(PATH, prompt=P, max_tokens=2, echo=True)["choices"]
    assert plain["text"].startswith(P) and len(plain["text"]) > len(P)
    streamed = server.events(PATH, prompt=P, max_tokens=0, echo=True, logprobs=2)
    assert streamed[0]["choices"] == [choice] and streamed[1:] == ["[DONE]"]


@pytest.mark.parametrize("how", [{}, {"n": 2, "temperature": 1, "seed": 3}, {"echo": True}, {"ignore_eos": True}])
def test_a_stream_says_what_the_whole_says(server, how):
    how = {"prompt": [P, "naïve ☕"], "max_tokens": 30, "logprobs": 2, **how}
    whole = server.ok(PATH, **how)
    chunks = server.events(PATH, stream_options={"include_usage": True}, **how)
    assert chunks[-1] == "[DONE]" and len({chunk["id"] for chunk in chunks[:-1]}) == 1
    last, chunks = chunks[-2], chunks[:-2]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for c in own for value in c["logprobs"][name]] == values


def test_a_stream_has_no_usage_unasked(server):
    chunks = server.events(PATH, prompt=P, max_tokens=3)
    assert all("usage" not in chunk for chunk in chunks[:-1])
    assert "usage" in json.dumps(server.events(PATH, prompt=P, max_tokens=3, stream_options={"include_usage": True}))


def test_settings_reach_the_draw(server):
    (greedy,) = texts(server.ok(PATH, prompt=P))
    assert texts(server.ok(PATH, prompt=P, temperature=2, top_k=1)) == [greedy]
    assert texts(server.ok(PATH, prompt=P, temperature=2, top_p=1e-9)) == [greedy]
    assert texts(server.ok(PATH, prompt=P, temperature=2, min_p=1.0)) == [greedy]
    for off in (0, -1):
        hot = {"temperature": 2, "seed": 5, "prompt": P}
        assert texts(server.ok(PATH, top_k=off, **hot)) == texts(server.ok(PATH, **hot))
    forced = server.ok(PATH, prompt=P, max_tokens=4, logit_bias={"66": 100})
    assert forced["choices"][0]["text"] == 4 * server.ok("/detokenize", tokens=[66])["prompt"]
    first = server.ok(PATH, prompt=P, max_tokens=1, return_routed_experts=True)
    assert server.ok(PATH, prompt=P, max_tokens=4, repetition_penalty=2.0)["choices"] != forced["choices"]
    assert first["usage"]["completion_tokens"] == 1


def test_a_stop_token_ends_and_is_not_shown(server):
    whole = server.ok(PATH, prompt=P, max_tokens=10, logit_bias={"66": 100})
    assert whole["usage"]["completion_tokens"] == 10
    cut = server.ok(PATH, prompt=P, max_tokens=10, logit_bias={"66": 100}, stop_token_ids=[66], logprobs=1)
    assert cut["choices"][0]["text"] == "" and cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] == 1


def test_more_tokens_than_there_is_room_for_are_cut(server):
    for many in (10**6, 10**12, 10**40):
        reply = server.ok(PATH, prompt=P, max_tokens=many, ignore_eos=True)
        assert reply["usage"]["total_tokens"] == 192 and reply["choices"][0]["finish_reason"] == "length"


def test_a_prompt_that_is_too_long_is_told_both_numbers(server):
    error = server.bad(PATH, prompt=[5] * 1000)
    assert error["code"] == "context_length_exceeded" and "1000" in error["message"] and "192" in error["message"]
    assert server.ok(PATH, prompt=[5] * 191, max_tokens=9)["usage"]["completion_tokens"] == 1
    assert server.ok(PATH, prompt=[5] * 192, max_tokens=0, echo=True, logprobs=0)["usage"]["completion_tokens"] == 0
    server.bad(PATH, prompt=[5] * 192, max_tokens=1)


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "temperature": ["hot", -1, 2.5, True, [], {}],
        "top_p": [0, 1.5, -1, "1"],
        "top_k": [-2, 1.5, "5", True],
        "min_p": [-0.1, 1.1],
        "repetition_penalty": [0, -1],
        "presence_penalty": [9, -3, "x"],
        "frequency_penalty": [9, -2.1],
        "n": [0, -1, 1000, 10**9, 1.5, True],
        "max_tokens": [-5, 1.5, "5", True],
        "logprobs": [-1, 21, True, "1"],
        "seed": [1 << 63, 0.5, "a"],
        "stop": ["", [""], [1], ["a"] * 17, 5, {}],
        "stop_token_ids": [[-1], [330], ["a"], 5],
        "logit_bias": [{"a": 1}, {"330": 1}, {"-1": 1}, {"5": 101}, {"5": "x"}, [1], {"٣": 1}],
        "stream": ["yes", 1],
        "stream_options": [{"include_usage": True}, 1, "a"],
        "echo": ["x", 1],
        "suffix": ["and so on"],
        "best_of": [3],
        "prompt_embeds": ["AAAA"],
        "cache_salt": [1],
        "priority": ["high", 101],
        "routed_experts_prompt_start": [-1, "a"],
        "return_routed_experts": ["yes"],
    }.items(),
)
def test_what_a_field_may_not_be_is_said_with_its_name(server, field, values):
    for value in values:
        error = server.bad(PATH, **{"prompt": "a", "max_tokens": 1, field: value})
        assert error["param"].startswith(field), (value, error)
        assert field in error["message"]


def test_null_is_as_if_it_were_not_there_and_strangers_are_counted(server):
    names = [
        "temperature",
        "top_p",
        "n",
        "logprobs",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "suffix",
        "logit_bias",
    ]
    plain = server.ok(PATH, prompt=P, temperature=0, seed=1)
    nulls = dict.fromkeys(names[3:])
    assert (
        server.ok(PATH, prompt=P, user="me", metadata={"a": 1}, store=True, service_tier="auto", **nulls)["choices"]
        == (plain["choices"])
    )
    before = server.client.get("/metrics").text
    server.ok(PATH, prompt=P, max_tokens=1, frobnicate=1, wibble=None)
    count = [line for line in server.client.get("/metrics").text.splitlines() if "unknown_fields_total " in line]
    assert count != [line for line in before.splitlines() if "unknown_fields_total " in line]


def test_a_special_token_in_a_prompt_is_that_token(server, tokenizer):
    end, spelled = tokenizer.eos_token_id, "def<|endoftext|>x"
    ids = server.ok("/tokenize", prompt=spelled)["tokens"]
    assert ids.count(end) == 1 and ids != tokenizer.encode(spelled)
    text, same = (server.ok(PATH, prompt=prompt, max_tokens=4) for prompt in (spelled, ids))
    assert texts(text) == texts(same) and text["usage"] == same["usage"]
    assert end not in server.ok("/tokenize", messages=[{"role": "user", "content": spelled}])["tokens"]


def test_a_text_that_cannot_fit_is_told_so_before_it_is_cut_into_tokens(server, tokenizer):
    longest = max(int(tokenizer.byte_lengths().max()), len("<|endoftext|>"))
    error = server.bad(PATH, prompt="é" * (192 * longest))
    assert error["code"] == "context_length_exceeded" and f"at least {2 * 192}" in error["message"]
    assert server.ok("/tokenize", prompt="<|endoftext|>" * 190)["count"] == 190
    assert server.ok(PATH, prompt="<|endoftext|>" * 190, max_tokens=1)["usage"]["prompt_tokens"] == 190
    error = server.bad(PATH, prompt="x y z " * (32 * longest))  # as long as 192 of the longest: counted in tokens
    assert error["code"] == "context_length_exceeded" and "at most 191" in error["message"]
