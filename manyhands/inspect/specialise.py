"""What experts specialise in: token ids, parts of speech, domains. Each figure stands beside both of its nulls.

Information is about the first expert of a token, in bits, beyond the shuffled null (information.py).

T tokens   E experts   K experts per token   X texts
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyhands.inspect.information import entropy, information
from manyhands.inspect.observed import Floats, Ints, Observed, chosen
from manyhands.inspect.resample import Figure, Resampler, over_all, within

MIN_COUNT = 10
"""Token ids seen fewer times say nothing of an id's favourite."""
_MIN_TAGGED = 50
_MOST_CELLS = 6


def first_entropy(seen: Observed, layer: int) -> float:
    """H(first expert) in bits: what information about it can be at most."""
    first = seen.expert_ids[:, layer, 0]
    return entropy(np.bincount(first[first >= 0], minlength=seen.num_experts).astype(np.float64))


def vocabulary(seen: Observed, layer: int, sampled: Resampler) -> dict[str, Figure]:
    """How far the token id alone decides the first expert.

    `share`: the mean over ids (seen ten times or more) of the largest expert's share (OLMoE, arXiv 2409.02060 §5).
    `bits`: I(expert; id).
    """
    first = [ids[:, 0] for ids in seen.variants(layer)]
    _, compact = np.unique(seen.token_ids, return_inverse=True)
    frequent = np.bincount(compact) >= MIN_COUNT
    E = seen.num_experts

    def share(first_T: NDArray[np.int32], weight_T: Floats) -> float:
        flat = compact * (E + 1) + np.where(first_T < 0, E, first_T)
        table = np.bincount(flat, weight_T, len(frequent) * (E + 1)).reshape(-1, E + 1)[frequent, :E]
        rows = table.sum(1)
        return float((table.max(1)[rows > 0] / rows[rows > 0]).mean()) if (rows > 0).any() else math.nan

    found = {"bits": sampled.figure(information(compact, E), first, over_all, excess=True)}
    if frequent.any():
        found["share"] = sampled.figure(share, first, over_all)
    return found


def syntax(seen: Observed, layer: int, sampled: Resampler) -> dict[str, Any]:
    """I(expert; UPOS), the same once the token id is known, and where each part of speech goes.

    The null of the second shuffles experts among tokens of equal id: what it keeps is what the id explains.
    """
    assert seen.tag is not None
    tagged = seen.tag >= 0
    first = [np.where(tagged, ids[:, 0], -1) for ids in seen.variants(layer)]
    labels = np.where(tagged, seen.tag, len(seen.tags))
    _, ids = np.unique(np.where(tagged, seen.token_ids, -1), return_inverse=True)
    E = seen.num_experts
    share_GE, load_E, tokens_G = _share_by(labels, first[0], E, len(seen.tags))
    return {
        "bits": sampled.figure(information(labels, E), first, _among(tagged), excess=True),
        "bits_given_token": sampled.figure(information(labels, E, given=ids), first, within(ids), excess=True),
        "share": share_GE,
        "load": load_E,
        "tokens": tokens_G,
        "sharpest": _sharpest(share_GE, load_E, tokens_G, seen.tags),
    }


def _among(tagged: NDArray[np.bool_]) -> Any:
    """Shuffle among the tokens that count; the others hold no expert."""

    def shuffle(first_T: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.int32]:
        out = first_T.copy()
        out[tagged] = rng.permutation(first_T[tagged])
        return out

    return shuffle


def _share_by(labels: Ints, first_T: NDArray[np.int32], E: int, groups: int) -> tuple[Floats, Floats, Ints]:
    """[G, E] share of each label's tokens by first expert, the share of all tokens, and the tokens of each label."""
    real = first_T >= 0
    table = np.bincount(labels[real] * E + first_T[real], minlength=(groups + 1) * E)[: groups * E].reshape(groups, E)
    tokens = table.sum(1)
    return table / np.maximum(tokens, 1)[:, None], table.sum(0) / max(int(tokens.sum()), 1), tokens


def _sharpest(share_GE: Floats, load_E: Floats, tokens_G: Ints, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each label's favourite expert, the largest shares first, of labels with enough tokens."""
    rows = [g for g in range(len(names)) if tokens_G[g] >= _MIN_TAGGED]
    rows.sort(key=lambda g: -share_GE[g].max())
    found = [(g, int(share_GE[g].argmax())) for g in rows[:_MOST_CELLS]]
    return [{"tag": names[g], "expert": e, "share": float(share_GE[g, e]), "load": float(load_E[e])} for g, e in found]


def domains(seen: Observed, layer: int, sampled: Resampler, seed: int = 0) -> dict[str, Any]:
    """Whether experts know what a text is about.

    `share` [domains, E]: tokens of a domain that have the expert among their K (OLMoE's domain specialisation; K/E
    each under random routing). `bits`: I(expert; domain); its null deals domains to other texts, whole. `window`: how
    often the domain of a sequence is told from its experts' load alone, by naive Bayes learned on the other half.
    """
    names = seen.domains
    first = [ids[:, 0] for ids in seen.variants(layer)]
    on_TE = chosen(seen.expert_ids[:, layer], seen.num_experts)
    share = np.stack([on_TE[seen.domain == d].mean(0) for d in range(len(names))])
    bits = sampled.figure(information(seen.domain, seen.num_experts), first, over_all, excess=True)
    null, sd = _domain_null(seen, first[0], sampled.shuffles, seed)
    # A text keeps one domain, so that dealing tokens is too kind a null: the rest of it is taken off here.
    extra = null - bits.shuffled
    bits = Figure(
        bits.value - extra, bits.low - extra, bits.high - extra, null, sd,
        bits.random - extra, bits.random_low - extra, bits.random_high - extra, bits.samples,
    )  # fmt: skip
    return {"share": share, "bits": bits, "window": _windows(seen, layer, sampled)}


def _domain_null(seen: Observed, first_T: NDArray[np.int32], shuffles: int, seed: int) -> tuple[float, float]:
    """Mean and sd of I(expert; domain) when domains are dealt to other texts."""
    texts = int(seen.text.max()) + 1
    of_text = np.zeros(texts, np.int64)
    of_text[seen.text] = seen.domain
    rng, ones = np.random.default_rng(seed), np.ones(len(seen))
    found = []
    for _ in range(max(shuffles, 2) * 4):
        dealt = rng.permutation(of_text)[seen.text]
        found.append(information(dealt, seen.num_experts)(first_T, ones))
    return float(np.mean(found)), float(np.std(found, ddof=1))


def _windows(seen: Observed, layer: int, sampled: Resampler) -> Figure:
    """Share of sequences whose domain is told right; the null is the largest domain's share of them."""
    starts = np.flatnonzero(np.diff(seen.sequence, prepend=-1))
    domain_W, text_W = seen.domain[starts], seen.text[starts]
    half = np.random.default_rng(1).permutation(int(seen.text.max()) + 1) % 2
    right = []
    for ids in seen.variants(layer):
        counts_WE = np.add.reduceat(chosen(ids, seen.num_experts).astype(np.float64), starts, axis=0)
        told = np.full(len(starts), np.nan)
        for fold in (0, 1):
            asked, learned = half[text_W] == fold, half[text_W] != fold
            if set(domain_W[learned].tolist()) < set(range(len(seen.domains))):
                continue
            totals = np.stack([counts_WE[learned & (domain_W == d)].sum(0) for d in range(len(seen.domains))]) + 1
            best = (counts_WE[asked] @ np.log(totals / totals.sum(1, keepdims=True)).T).argmax(1)
            told[asked] = best == domain_W[asked]
        right.append(told)
    chance = float(np.bincount(domain_W).max() / len(domain_W))
    return sampled.mean(right, chance, rows=starts)
