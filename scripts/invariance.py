"""Whether a row's logits depend on that row alone, bit for bit: `python scripts/invariance.py [--cases 50] [--seed 0]`.

Small random models (grouped and latent attention, sinks, soft caps, windows, every kind of router, shared experts,
biases, tied heads; packed in int8 and int4, and in mixtures of formats) run the same texts in many ways: alone token by
token, alone in chunks, many at once in chunks of all sizes, in a rectangle with padding, through an engine that chunks,
preempts and shares room, from a fork, from a prefix; with one thread and with several; at each level of this CPU. Every
logit must be that of the text alone, token by token, on one thread. A case that differs is printed with its seed, by
which it can be run again: `--seed N --cases 1`.

R texts, S tokens of one, T tokens of a pass, V vocabulary.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import manyhands as mh
from manyhands.check.decoding import pack
from manyhands.config import PackedConfig, Packing, SamplingConfig
from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.prefix import Prefix
from manyhands.engine.runner import Runner
from manyhands.kernels.native import library, views
from manyhands.layers.cache import Cache
from manyhands.models import Decoder, init_weights

VOCABULARY, CONTEXT = 61, 96
Texts = list[list[int]]
Way = Callable[[Runner, Texts, random.Random], Iterator[tuple[int, int, Tensor]]]
"""Gives (text, position, logits [V]) for as many positions as it likes."""


def draw_config(rng: random.Random, odd: bool) -> mh.ModelConfig:
    """A small model of any kind. `odd`: of widths that are no multiples of 16, of which a part runs in PyTorch."""
    one = rng.choice
    D = one((40, 72, 100)) if odd else one((32, 48, 64, 112, 256, 272))
    gqa: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": one((1, 2, 4)),
        "head_dim": one((16, 32, 48)),
    }
    gqa |= {"qk_norm": one(("none", "head", "full", "head_after_rope")), "sinks": one((False, False, True))}
    gqa |= {
        "attention_bias": one((False, True)),
        "sliding_window": one((None, None, 5)),
        "output_bias": one((False, True)),
    }
    gqa |= {"attn_logit_softcap": one((None, None, 5.0))}
    mla = {"kind": "mla", "num_attention_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
    mla |= {"v_head_dim": 16, "q_lora_rank": one((None, 32))}
    groups, E = one((1, 1, 2, 4)), one((4, 8, 20))
    kept = rng.randint(1, groups)
    router = {"num_experts": E, "num_experts_per_tok": rng.randint(1, min(4, E // groups * kept)), "n_group": groups}
    router |= {"topk_group": kept, "score": one(("softmax", "sigmoid")), "norm_topk_prob": one((False, True))}
    router |= {"bias": one((False, True)), "logit_bias": one((False, True)), "routed_scaling_factor": one((1.0, 2.5))}
    router |= {"group_score": one(("top2_sum", "max"))}
    moe = {
        "router": router,
        "moe_intermediate_size": one((24, 40) if odd else (16, 48, 64, 144)),
        "expert_bias": one((False, True)),
    }
    moe |= {"n_shared_experts": one((0, 1)), "first_k_dense_replace": one((0, 1))}
    moe |= {"shared_expert_gate": moe["n_shared_experts"] == 1 and one((False, True))}
    moe |= {"hidden_act": one(("swiglu", "swiglu", "geglu", "geglu_tanh", "gelu", "relu", "swiglu_oai"))}
    attention = one((gqa, gqa, mla))
    rotated = one((1.0, 1.0, 0.5)) if odd or attention is gqa else 1.0
    return mh.ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=2,
        intermediate_size=one((48, 80, 96)),
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        attention=attention,
        moe=moe,
        tie_word_embeddings=one((False, True)),
        output_norms=one((False, False, True)),
        rope={"interleave": one((False, True)), "partial_rotary_factor": rotated},
    )


def draw_packing(rng: random.Random, exact: bool) -> PackedConfig | None:
    """Integers somewhere and any format beside them; for `exact` none."""
    integers = [Packing(format="int8"), Packing(format="int4", group_size=32), Packing(format="int4", group_size=64)]
    floats = [Packing(format="bf16"), Packing(format="float32"), None]
    pair = [rng.choice(floats if exact else integers), rng.choice(floats if exact else integers + floats)]
    rng.shuffle(pair)
    return None if pair == [None, None] else PackedConfig(experts=pair[0], linear=pair[1])


def build(rng: random.Random, odd: bool, exact: bool = False) -> tuple[Decoder, str]:
    """A model in evaluation, and what it is."""
    config, packed = draw_config(rng, odd), draw_packing(rng, exact)
    dtype = rng.choice((torch.float32, torch.bfloat16))
    model = Decoder(config)
    init_weights(model, seed=rng.randint(0, 1 << 30))
    generator = torch.Generator().manual_seed(rng.randint(0, 1 << 30))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or name.endswith(("bias", "sinks")):
                tensor.add_(0.4 * torch.randn(tensor.shape, generator=generator))
    model = pack(model.to(dtype).eval(), packed)
    described = [part and part.model_dump(exclude_defaults=True) for part in (config, packed)]
    return model, "\n  ".join(map(str, (*described, dtype)))


def caches(runner: Runner) -> Callable[[], Cache]:
    """What makes empty caches, of the kind that the runner reads."""
    return Caches(len(runner.model.layers)).new if runner.reads_blocks else runner.model.new_cache


def run(runner: Runner, rows: list[Row]) -> Tensor:
    """[R, V]: of the last token of each."""
    return runner.run(Batch(rows)).logits.clone()


def token_by_token(runner: Runner, texts: Texts, rng: random.Random) -> Iterator[tuple[int, int, Tensor]]:
    """Alone: what all else must equal."""
    new = caches(runner)
    for r, text in enumerate(texts):
        cache = new()
        for position, token in enumerate(text):
            yield r, position, run(runner, [Row([token], cache)])[0]


def alone_in_chunks(runner: Runner, texts: Texts, rng: random.Random) -> Iterator[tuple[int, int, Tensor]]:
    """Each text cut anywhere, or not at all."""
    new = caches(runner)
    for r, text in enumerate(texts):
        cache, done = new(), 0
        while done < len(text):
            size = rng.choice((1, 2, 7, 17, 33, len(text)))
            chunk = text[done : done + size]
            done += len(chunk)
            yield r, done - 1, run(runner, [Row(chunk, cache)])[0]


def many_in_chunks(runner: Runner, texts: Texts, rng: random.Random) -> Iterator[tuple[int, int, Tensor]]:
    """Any of the texts together, each with as many tokens as it likes."""
    done = [0] * len(texts)
    new = caches(runner)
    own = [new() for _ in texts]
    while left := [r for r, text in enumerate(texts) if done[r] < len(text)]:
        chosen = rng.sample(left, rng.randint(1, len(left)))
        decode, rows = rng.random() < 0.4, []
        for r in chosen:
            size = 1 if decode else rng.choice((1, 1, 3, 16, 19, 64))
            chunk = texts[r][done[r] : done[r] + size]
            done[r] += len(chunk)
            rows.append(Row(chunk, own[r]))
        for r, logits in zip(chosen, run(runner, rows), strict=True):
            yield r, done[r] - 1, logits


@torch.inference_mode()
def rectangle(runner: Runner, texts: Texts, rng: random.Random) -> Iterator[tuple[int, int, Tensor]]:
    """All tokens of all texts in one pass, padded on either side: their states are those of the text alone."""
    longest, left = max(map(len, texts)), rng.random() < 0.5
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for r, text in enumerate(texts):
        first = longest - len(text) if left else 0
        ids[r, first : first + len(text)], mask[r, first : first + len(text)] = torch.tensor(text), True
    new, states = caches(runner), runner.score(ids, mask).states
    for r, text in enumerate(texts):
        alone = runner.run(Batch([Row(text, new())]), states=True)
        assert alone.states is not None
        first = longest - len(text) if left else 0
        same = torch.equal(states[r, first : first + len(text)], alone.states)
        yield r, len(text) - 1, alone.logits[0] if same else alone.logits[0] * float("nan")


def forked(runner: Runner, texts: Texts, rng: random.Random) -> Iterator[tuple[int, int, Tensor]]:
    """A part of the text, then twice the rest, beside each other."""
    new = caches(runner)
    for r, text in enumerate(texts):
        cut, cache = rng.randint(1, len(text)), new()
        yield r, cut - 1, run(runner, [Row(text[:cut], cache)])[0]
        if cut < len(text):
            for logits in run(runner, [Row(text[cut:], cache.fork()), Row(text[cut:], cache)]):
                yield r, len(text) - 1, logits


def through_engine(runner: Runner, texts: Texts, rng: random.Random) -> Iterator[tuple[int, int, Tensor]]:
    """An engine with little room; the tokens it makes are not looked at, the logits of the prompts' are."""
    engine = mh.Engine(
        runner.model,
        exact=runner._asked,
        max_sequences=rng.choice((1, 2, 5, 64)),
        max_batch_tokens=rng.choice((None, 1, 5, 17, 40)),
        cache_tokens=rng.choice((None, CONTEXT, 3 * CONTEXT)),
    )
    seen: list[tuple[Any, int, Tensor]] = []
    schedule, forward, plan = engine.scheduler.schedule, engine.runner.run, []

    def scheduled() -> Any:
        plan[:] = [schedule()]
        return plan[0]

    def forwarded(batch: Batch) -> Any:
        where = [(c.request, c.request.num_computed + c.count - 1) for c in plan[0].chunks]
        out = forward(batch)
        seen.extend((*where[row], logits.clone()) for row, logits in zip(batch.drawing, out.logits, strict=True))
        return out

    engine.scheduler.schedule, engine.runner.run = scheduled, forwarded  # type: ignore[method-assign]
    requests, number = {}, 0
    while number < len(texts) or engine.busy:  # they come at any time
        if number < len(texts) and (not engine.busy or rng.random() < 0.5):
            sampling = SamplingConfig(temperature=0, max_new_tokens=rng.randint(1, 6))
            prefix = Prefix() if rng.random() < 0.2 else None
            requests[engine.add(texts[number], sampling, prefix=prefix)] = number
            number += 1
        engine.step()
    made = {request: [*request.prompt_ids, *request.token_ids] for request in requests}
    expected = {(r, p): logits for r, p, logits in token_by_token(runner, list(made.values()), rng)}
    order = {request: i for i, request in enumerate(made)}
    for request, position, logits in seen:
        if not torch.equal(expected[order[request], position], logits):
            yield requests[request], min(position, len(texts[requests[request]]) - 1), logits * float("nan")


def by_prefix(runner: Runner, texts: Texts, rng: random.Random) -> Iterator[tuple[int, int, Tensor]]:
    """A conversation: what is shared with the turn before is not computed again."""
    new = caches(runner)
    for r, text in enumerate(texts):
        prefix = Prefix()
        for cut in sorted({rng.randint(1, len(text)), rng.randint(1, len(text)), len(text)}):
            cache = prefix.begin(text[:cut], new)
            fresh = text[len(prefix.ids) : cut]
            prefix.ids += fresh
            yield r, cut - 1, run(runner, [Row(fresh, cache)])[0]


WAYS: dict[str, Way] = {
    "alone, in chunks": alone_in_chunks,
    "many, in chunks": many_in_chunks,
    "a rectangle": rectangle,
    "a fork": forked,
    "an engine": through_engine,
    "a prefix": by_prefix,
    "token by token": token_by_token,
}


@contextmanager
def at(level: str, threads: int) -> Iterator[None]:
    """The native library at a level by default, with so many threads."""
    known, before = views.default_level, torch.get_num_threads()
    torch.set_num_threads(threads)
    views.default_level = lambda: level  # type: ignore[assignment]
    views._run.cache_clear()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        views.default_level = known
        views._run.cache_clear()


def torture(seed: int, levels: list[str], ways: list[str], odd: bool, exact: bool) -> list[str]:
    """One model in every way; what differs, in words."""
    rng = random.Random(seed)
    model, what = build(rng, odd, exact)
    texts = [
        [rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 3, 8, 20, 34, 50)))] for _ in range(rng.randint(1, 9))
    ]
    with at(levels[-1], 1):
        expected = {(r, p): logits for r, p, logits in token_by_token(Runner(model, exact), texts, rng)}
    wrong = []
    for level in levels:
        for name in ways:
            threads = rng.choice((1, 2, 3))
            bad, worst, count = 0, 0.0, 0
            with at(level, threads):
                for r, p, logits in WAYS[name](Runner(model, exact), texts, rng):
                    count += 1
                    if not torch.equal(logits, expected[r, p]):
                        bad += 1
                        worst = max(worst, float((logits.float() - expected[r, p].float()).abs().max()))
            if bad:
                wrong.append(f"{level}, {threads} threads, {name}: {bad} of {count} rows differ, by up to {worst:.2g}")
    if wrong:
        print(f"seed {seed}: {len(texts)} texts of {[len(t) for t in texts]}\n  {what}")
        print("".join(f"  {line}\n" for line in wrong), end="", flush=True)
    return wrong


def main() -> int:
    """Parse, run, say how many differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", nargs="*", default=library.levels(), choices=library.levels())
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--odd",
        action="store_true",
        help="widths of which a part runs in PyTorch: rows may differ",
    )
    parser.add_argument("--exact", action="store_true", help="float weights alone, with exact=True")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.cases)
    bad = [seed for seed in seeds if torture(seed, arguments.levels, arguments.ways, arguments.odd, arguments.exact)]
    print(f"{len(seeds) - len(bad)} of {len(seeds)} models: every logit equal; levels {', '.join(arguments.levels)}")
    return 1 if bad else 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
