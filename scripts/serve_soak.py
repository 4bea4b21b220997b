"""Load on a running server: what it leaks, refuses, loses and costs. By hand; prints figures, exits 1 if one is bad:

    manyhands serve MODEL --port 8000 --quiet                   # in another terminal
    python scripts/serve_soak.py http://127.0.0.1:8000 NAME --pid PID soak overload

Checks (NAME is one that `/v1/models` lists):
  soak        requests of all kinds, 32 at a time, a fifth left at random moments, 5 % malformed
  overload    ten times more requests at once than there are places
  prefix      the second turn of a conversation of 2,000 tokens; needs a context of 4,096
  overcommit  32 requests where `--kv-memory` holds a quarter of them; texts as alone (int8, int4, or --exact)
  tracing     with and without return_routed_experts, in turns
Times are of the whole machine, this script included: leave it alone meanwhile.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2

WORDS = ["def", "class", "return", "self", "for", "in", "if", "else", "None", "import", "from", "while", "with", "not"]
MALFORMED: list[tuple[str, Any]] = [
    ("/v1/completions", b"{"),
    ("/v1/completions", b"[1]"),
    ("/v1/completions", {"prompt": 7}),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}),
    ("/v1/completions", {"prompt": [10**9]}),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}),
    ("/v1/completions", {"prompt": "def " * 20_000}),
    ("/v1/completions", {"prompt": "a", "model": "no-such-model"}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": [{"role": "user"}], "n": 0}),
    ("/v1/chat/completions", {"messages": "hello"}),
    ("/v1/no-such-path", {}),
]


Answer = tuple[int, dict[str, str], bytes, float]


class Run:
    """One server, one client."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.bad = asked, 0
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        self.client = httpx2.AsyncClient(base_url=asked.base, timeout=600, limits=limits)

    def body(self, chance: random.Random, tokens: int, words: int = 24, **more: Any) -> dict[str, Any]:
        """A completion of a text of random words."""
        prompt = " ".join(chance.choices(WORDS, k=words))
        return {"model": self.asked.model, "prompt": prompt, "max_tokens": tokens, **more}

    async def metric(self, name: str) -> float:
        """The sum over a metric's labels."""
        text = (await self.client.get("/metrics")).text
        found = re.findall(rf"^manyhands_{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        assert found, f"/metrics has no {name}"
        return sum(map(float, found))

    async def rest(self) -> float:
        """Wait until nothing runs or waits; the share of blocks that is in use then."""
        until = time.monotonic() + 60
        while await self.metric("num_requests_running") + await self.metric("num_requests_waiting"):
            if time.monotonic() > until:
                self.check("running and waiting end", False, "not after 60 s")
                break
            await asyncio.sleep(0.1)
        return await self.metric("kv_cache_usage_perc")

    def memory(self) -> int:
        """Resident KiB of the server; 0 without --pid."""
        if self.asked.pid is None:
            return 0
        status = Path(f"/proc/{self.asked.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])

    def check_memory(self, before: int, most: float) -> None:
        """It has grown by less than `most` percent."""
        after = self.memory()
        growth = 100 * (after / before - 1)
        self.check(f"memory growth < {most} %", growth < most, f"{before} -> {after} KiB, {growth:+.2f} %")

    def check(self, what: str, good: bool, figure: object) -> None:
        """Print it; a bad one is counted."""
        self.bad += not good
        print(f"  {'ok  ' if good else 'BAD '} {what}: {figure}", flush=True)


async def soak(run: Run) -> None:
    """No 5xx, no blocks and no memory lost."""
    chance, seen, failures = random.Random(run.asked.seed), Counter[str](), Counter[str]()
    before, turn, memory = await run.rest(), iter(range(run.asked.requests)), {}
    begin = time.monotonic()

    async def worker() -> None:
        for i in turn:
            if i == min(1000, run.asked.requests // 2):
                memory["warm"] = run.memory()
            try:
                await one_of_many(run, random.Random(chance.random()), seen)
            except httpx2.HTTPError as error:
                failures[type(error).__name__] += 1

    await asyncio.gather(*(worker() for _ in range(32)))
    took, after = time.monotonic() - begin, await run.rest()
    print(f"  {run.asked.requests} requests in {took:.0f} s: {dict(sorted(seen.items()))}")
    run.check("no 5xx", not any(k.startswith("5") for k in seen), sum(n for k, n in seen.items() if k[0] == "5"))
    run.check("no malformed one taken", not seen["malformed and taken"], seen["malformed and taken"])
    run.check("no connection lost", not failures, dict(failures))
    run.check("blocks in use before and after", before == after, f"{before:.6f} {after:.6f}")
    if run.asked.pid is not None:
        run.check_memory(memory["warm"], 1)


async def one_of_many(run: Run, chance: random.Random, seen: Counter[str]) -> None:
    """A request of some kind; its status is counted."""
    if chance.random() < 0.05:
        path, bad = chance.choice(MALFORMED)
        data = bad if isinstance(bad, bytes) else json.dumps({"model": run.asked.model, **bad}).encode()
        status = (await run.client.post(path, content=data)).status_code
        seen["malformed and taken"] += status < 400
        seen[str(status)] += 1
        return
    body = run.body(chance, chance.choice((1, 4, 16, 32)), chance.choice((1, 8, 24)))
    body |= {"stream": chance.random() < 0.5, "temperature": chance.choice((0, 1)), "seed": chance.randrange(99)}
    if chance.random() < 0.2:
        body |= chance.choice(({"n": 2}, {"logprobs": 2}, {"return_routed_experts": True}, {"stop": ["e"]}))
    path = "/v1/completions"
    if chance.random() < 0.5:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        if "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": 2}
    leaves = chance.random() < 0.29  # a third of them have their answer before
    asking = asyncio.ensure_future(read(run, path, body, chance.randrange(6) if leaves and body["stream"] else None))
    if leaves and not body["stream"]:
        await asyncio.wait({asking}, timeout=chance.random() * 0.3)
        if asking.cancel():
            await asyncio.gather(asking, return_exceptions=True)
            seen["left"] += 1
            return
    seen[await asking] += 1


async def read(run: Run, path: str, body: dict[str, Any], lines: int | None = None) -> str:
    """Ask and read, at most so many lines of a stream: the status, or "left"; the last line of a stream is checked."""
    async with run.client.stream("POST", path, json=body) as reply:
        last, at = "", 0
        async for line in reply.aiter_lines():
            if lines is not None and at >= lines:
                return "left"
            last, at = line or last, at + 1
        if body["stream"] and reply.status_code == 200 and last != "data: [DONE]":
            return f"500 in a stream: {last[:200]}"
        return str(reply.status_code)


async def post(run: Run, body: dict[str, Any]) -> Answer:
    """A completion on a connection of its own, without a client's costs: status (0: cut), head, body, seconds."""
    url, data = httpx2.URL(run.asked.base), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(url.host, url.port)
    begin = time.monotonic()
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\nConnection: close\r\n".encode())
    writer.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)
    head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    took = time.monotonic() - begin
    writer.close()
    first, *lines = head.decode().split("\r\n")
    if not first:
        return 0, {}, b"", took
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), content, took


async def overload(run: Run) -> None:
    """All at once, and then the excess one by one while all places are taken."""
    places, chance = run.asked.places, random.Random(run.asked.seed)

    def ask_one() -> asyncio.Task[Answer]:
        return asyncio.create_task(post(run, run.body(chance, 96, ignore_eos=True)))

    await asyncio.gather(*(ask_one() for _ in range(places)))  # so that memory is what a full server needs
    before = run.memory()
    health: list[float] = []
    watching = asyncio.create_task(watch(run, health))
    judge(run, f"{10 * places} at once", await asyncio.gather(*(ask_one() for _ in range(10 * places))), None)
    await run.rest()
    asking = [ask_one() for _ in range(places)]
    while await run.metric("num_requests_running") + await run.metric("num_requests_waiting") < places:
        await asyncio.sleep(0.02)
    for _ in range(9 * places):
        if any(task.done() for task in asking[:places]):  # there is a place again
            break
        asking.append(ask_one())
        await asyncio.sleep(run.asked.pause)
    judge(run, f"full, then one each {1000 * run.asked.pause:g} ms", await asyncio.gather(*asking), 100)
    watching.cancel()
    run.check("/health in < 1 s", max(health) < 1, f"{max(health):.3f} s at most, of {len(health)}")
    await run.rest()
    if run.asked.pid is not None:
        run.check_memory(before, 1)


def judge(run: Run, how: str, found: list[Answer], most_ms: float | None) -> None:
    """Every request got all of an answer, or was refused, within `most_ms` for 99 of 100."""
    refused = sorted(1000 * took for status, _, _, took in found if status == 429)
    told = sum("retry-after" in head for status, head, _, _ in found if status == 429)
    ends = [json.loads(data)["choices"][0]["finish_reason"] for status, _, data, _ in found if status == 200]
    print(f"  {how}: {len(found)} requests, {dict(Counter(status for status, *_ in found))}")
    whole = ends.count("length")
    run.check("a whole answer, or 429", whole + len(refused) == len(found), f"{whole} + {len(refused)}")
    run.check("with Retry-After", told == len(refused) > 0, told)
    if refused:
        middle, most = (refused[int(share * (len(refused) - 1))] for share in (0.5, 0.99))
        good = most_ms is None or most < most_ms
        run.check("refused in ms: median, 99 %, most", good, f"{middle:.1f} {most:.1f} {refused[-1]:.1f}")


async def watch(run: Run, took: list[float]) -> None:
    """How long `/health` takes, for ever."""
    while True:
        begin = time.monotonic()
        reply = await run.client.get("/health")
        took.append(time.monotonic() - begin if reply.status_code == 200 else 9.0)
        await asyncio.sleep(0.1)


async def prefix(run: Run) -> None:
    """Time to the first token, of the first turn and of the second."""
    chance, ratios = random.Random(run.asked.seed), []
    for _ in range(5):
        text = " ".join(chance.choices(WORDS, k=1900))
        asked = [{"role": "user", "content": text}]
        first, answer, tokens, _ = await turn_of(run, asked)
        asked += [{"role": "assistant", "content": answer}, {"role": "user", "content": "return None"}]
        second, _, _, cached = await turn_of(run, asked)
        ratios.append(first / second)
        print(f"  {tokens} tokens: first {1000 * first:.0f} ms, second {1000 * second:.0f} ms with {cached} cached")
    ratio = statistics.median(ratios)
    run.check("second turn's first token >= 10 x sooner", ratio >= 10, f"{ratio:.1f} x, median of 5")


async def turn_of(run: Run, messages: list[dict[str, str]]) -> tuple[float, str, int, int]:
    """Seconds to the first token, the answer, the prompt's tokens and how many of them were cached."""
    body = {"model": run.asked.model, "messages": messages, "max_tokens": 16, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "ignore_eos": True, "logprobs": True}
    begin, first, answer, usage = time.monotonic(), 0.0, "", {}
    async with run.client.stream("POST", "/v1/chat/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if choice.get("logprobs") and not first:  # the role comes before there is a token
                    first = time.monotonic() - begin
                answer += choice["delta"].get("content") or ""
    return first, answer, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


async def ask(run: Run, bodies: list[dict[str, Any]], at_once: int) -> list[dict[str, Any]]:
    """The completions, so many at a time."""
    places = asyncio.Semaphore(at_once)

    async def one(body: dict[str, Any]) -> dict[str, Any]:
        async with places:
            return (await run.client.post("/v1/completions", json=body)).json()

    return await asyncio.gather(*map(one, bodies))


async def overcommit(run: Run) -> None:
    """The same prompts together and alone; their salts differ, so that neither finds what the other computed."""
    chance, before = random.Random(run.asked.seed), await run.metric("num_preemptions_total")
    bodies = [run.body(chance, 128, 40, ignore_eos=True, seed=i, temperature=i % 2) for i in range(32)]
    together = await ask(run, [{**b, "cache_salt": "together"} for b in bodies], 32)
    preempted = await run.metric("num_preemptions_total") - before
    alone = await ask(run, [{**b, "cache_salt": f"alone {i}"} for i, b in enumerate(bodies)], 1)
    lost = sum("choices" not in a for a in together + alone)
    run.check("requests lost", lost == 0, lost)
    run.check("requests preempted", preempted > 0, f"{preempted:.0f}")
    if not lost:
        differ = sum(text_of(a) != text_of(b) for a, b in zip(together, alone, strict=True))
        run.check("texts that differ from alone", differ == 0, differ)


def text_of(found: dict[str, Any]) -> str:
    """Of its one choice."""
    text: str = found["choices"][0]["text"]
    return text


async def tracing(run: Run) -> None:
    """Tokens a second, 16 at a time, in pairs whose order changes."""
    chance, ratios, differ = random.Random(run.asked.seed), [], 0
    for turn in range(run.asked.pairs + 1):
        bodies = [run.body(chance, 128, ignore_eos=True, seed=i, temperature=i % 2) for i in range(16)]
        rates, texts = {}, {}
        for traced in (False, True) if turn % 2 else (True, False):
            begin = time.monotonic()
            more = {"return_routed_experts": traced, "cache_salt": f"{turn} {traced}"}
            found = await ask(run, [{**body, **more} for body in bodies], 16)
            rates[traced] = sum(f["usage"]["completion_tokens"] for f in found) / (time.monotonic() - begin)
            texts[traced] = [text_of(f) for f in found]
            assert all(("routed_experts" in f["choices"][0]) == traced for f in found)
        differ += sum(a != b for a, b in zip(texts[False], texts[True], strict=True))
        if turn:  # the first pair warms up
            ratios.append(rates[True] / rates[False])
    cost = 100 * (1 - statistics.median(ratios))
    spread = f"{100 * (1 - max(ratios)):.1f} to {100 * (1 - min(ratios)):.1f}"
    run.check("tracing costs <= 3 % of tokens/s", cost <= 3, f"{cost:.1f} %, median of {len(ratios)} pairs, {spread}")
    run.check("texts that differ", differ == 0, differ)


CHECKS: dict[str, Callable[[Run], Awaitable[None]]] = {
    "soak": soak,
    "overload": overload,
    "prefix": prefix,
    "overcommit": overcommit,
    "tracing": tracing,
}


async def main() -> int:
    """1 if a figure is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="http://HOST:PORT")
    parser.add_argument("model", help="as /v1/models lists it")
    parser.add_argument("checks", nargs="+", choices=CHECKS)
    parser.add_argument("--pid", type=int, help="the server's, for its memory")
    parser.add_argument("--requests", type=int, default=10_000, help="of soak")
    parser.add_argument("--places", type=int, default=160, help="--max-sequences + --max-waiting of the server")
    parser.add_argument("--pause", type=float, default=0.01, help="overload: seconds between requests of the excess")
    parser.add_argument("--pairs", type=int, default=9, help="of tracing")
    parser.add_argument("--seed", type=int, default=0)
    run = Run(parser.parse_args())
    async with run.client:
        for check in run.asked.checks:
            print(check, flush=True)
            await CHECKS[check](run)
    return int(run.bad > 0)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
