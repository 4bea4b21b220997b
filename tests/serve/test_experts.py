"""Who went where over HTTP: complete, equal to the engine's own, and changing nothing; counts and metrics."""

import base64
import concurrent.futures as futures
import io
import math

import numpy as np
import pytest

from manyhands.config import SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.serve.routed import expert_array

PATH = "/v1/completions"
CHAT = "/v1/chat/completions"
P = "def f(x):\n    return x + 1\n" * 6
HELLO = [{"role": "user", "content": "Hello the hands"}]


def array_of(choice):
    return np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])), allow_pickle=False)


def test_the_array_is_the_engines_and_complete_after_a_prefix_hit(server, model, tokenizer):
    engine = Engine(model, tokenizer, max_sequences=1)
    (alone,) = engine.generate([P], SamplingConfig(temperature=0, max_new_tokens=9), routing=True)
    expected = expert_array(alone.routings, len(tokenizer.encode(P)) + 8)
    plain = server.ok(PATH, prompt=P, max_tokens=9)
    for _ in range(2):
        reply = server.ok(PATH, prompt=P, max_tokens=9, return_routed_experts=True)
        (choice,) = reply["choices"]
        assert choice["text"] == plain["choices"][0]["text"] == alone.text
        found = array_of(choice)
        assert found.dtype == np.uint8 and found.shape == (reply["usage"]["total_tokens"] - 1, 2, 2)
        assert np.array_equal(found, expected)
    assert "routed_experts" not in plain["choices"][0]
    later = server.ok(PATH, prompt=P, max_tokens=9, return_routed_experts=True, routed_experts_prompt_start=11)
    assert np.array_equal(array_of(later["choices"][0]), expected[11:])


@pytest.mark.parametrize(("path", "asked"), [(PATH, {"prompt": P}), (CHAT, {"messages": HELLO})])
def test_a_stream_has_it_with_the_reason(server, path, asked):
    how = {"max_tokens": 6, "n": 2, "return_routed_experts": True, **asked}
    whole = server.ok(path, **how)
    chunks = server.events(path, **how)[:-1]
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert [c["finish_reason"] for c in own if "routed_experts" in c] == ["length"]
        assert own[-1]["routed_experts"] == choice["routed_experts"]


@pytest.mark.parametrize(("path", "asked"), [(PATH, {"prompt": P}), (CHAT, {"messages": HELLO})])
def test_each_token_of_a_stream_has_its_experts(server, path, asked):
    how = {"max_tokens": 9, "return_routed_experts": True, "return_token_routing": True, **asked}
    chunks = server.events(path, **how)[:-1]
    tokens = [token for chunk in chunks for token in chunk.get("manyhands", {}).get("routing", [])]
    found = array_of(chunks[-1]["choices"][0])
    assert len(tokens) == 9 and all(isinstance(token["token"], str) for token in tokens)
    for token, experts_LK in zip(tokens, found[-9:], strict=True):
        assert [[e for e, _ in token["layers"][layer]] for layer in ("1", "2")] == experts_LK.tolist()
        assert all(math.isclose(sum(w for _, w in pairs), 1, abs_tol=1e-3) for pairs in token["layers"].values())


def test_counts_since_the_start_and_of_late(serving):
    with serving() as running:
        used = running.ok(PATH, prompt=[5, 6, 7], max_tokens=8)["usage"]["total_tokens"] - 1
        for path in ("/v1/routing", "/routing?model=tiny"):
            found = running.client.get(path).json()
            assert found["model"] == "tiny" and found["layers"] == [1, 2]
            assert (found["num_experts"], found["num_experts_per_tok"]) == (6, 2)
            assert found["tokens"] == found["recent"]["tokens"] == used
            for counts in (found["counts"], found["recent"]["counts"]):
                assert [sum(counts[layer]) for layer in ("1", "2")] == [2 * used, 2 * used]
                assert all(len(counts_E) == 6 for counts_E in counts.values())
            assert found["running"] == found["waiting"] == 0 and found["tokens_per_second"] > 0
            assert 0 <= found["cache_usage"] <= 1


@pytest.mark.parametrize(("path", "asked"), [(PATH, {"prompt": P}), (CHAT, {"messages": HELLO})])
def test_ledgers_add_up_to_the_counters(serving, path, asked):
    with serving() as running:
        with futures.ThreadPoolExecutor(6) as pool:
            how = {"temperature": 1, "return_expert_ledger": True, **asked}
            replies = list(pool.map(lambda i: running.ok(path, **how, seed=i, n=1 + i % 2, max_tokens=9 + i), range(6)))
        ledgers = [reply["manyhands"] for reply in replies]
        counters = running.service.counters
        assert sum(ledger["experts"]["bytes_ram"] for ledger in ledgers) == counters.bytes_ram > 0
        found = metrics_of(running)
        assert found['manyhands_expert_read_bytes_total{model_name="tiny",tier="ram"}'] == counters.bytes_ram
        assert found['manyhands_expert_lookups_total{model_name="tiny",result="hit"}'] == counters.lookups
        assert found['manyhands_expert_stall_seconds_total{model_name="tiny"}'] == 0
        for number, ledger in enumerate(ledgers):
            assert set(ledger) == {"experts", "stall_ms", "steps", "batch_mean"}
            assert 2 <= ledger["experts"]["distinct"] <= 12 and ledger["experts"]["hit_rate"] == 1
            assert ledger["steps"] >= 9 + number and 1 <= ledger["batch_mean"] <= 4
        last = running.events(path, **how, seed=1, max_tokens=5)[-2]
        assert last["manyhands"]["experts"]["bytes_ram"] > 0 and last["choices"][0]["finish_reason"]


def metrics_of(running):
    found = {}
    for line in running.client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def test_metrics_add_up(serving):
    with serving(max_waiting=0, engine={"max_sequences": 1}) as running:
        text = running.client.get("/metrics")
        assert text.headers["content-type"].startswith("text/plain") and "# TYPE manyhands_steps_total" in text.text
        usage = [running.ok(PATH, prompt=P, max_tokens=7)["usage"] for _ in range(2)]
        running.bad(PATH, prompt=[])
        found = metrics_of(running)
        one = '{model_name="tiny"}'
        assert found[f"manyhands_prompt_tokens_total{one}"] == sum(u["prompt_tokens"] for u in usage)
        assert found[f"manyhands_generation_tokens_total{one}"] == 14
        cached = [u["prompt_tokens_details"]["cached_tokens"] for u in usage]
        assert found[f"manyhands_prompt_tokens_cached_total{one}"] == sum(cached) and cached[0] == 0
        assert found['manyhands_request_success_total{finished_reason="length",model_name="tiny"}'] == 2
        assert found[f"manyhands_num_requests_running{one}"] == found[f"manyhands_num_requests_waiting{one}"] == 0
        assert found[f"manyhands_time_to_first_token_seconds_count{one}"] == 2
        assert found[f"manyhands_inter_token_latency_seconds_count{one}"] == 12
        assert found['manyhands_http_requests_total{status="400"}'] == 1
        steps = found[f"manyhands_steps_total{one}"]
        assert found['manyhands_experts_distinct_per_step_bucket{le="+Inf",model_name="tiny"}'] == steps
        assert found['manyhands_moe_load_max_over_mean{layer="1",model_name="tiny"}'] >= 1
        assert not any("expert=" in name for name in found)
