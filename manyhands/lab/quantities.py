"""The quantities that claims are held against, each from the planner or the catalogue. Needs no torch.

Every function takes the id of a system of the catalogue and, where it says so, numbers. FLOPs are per token unless it
says per sequence; bytes are bytes; a share is between 0 and 1.
"""

import functools
import math
from collections.abc import Callable
from datetime import date

from manyhands.catalog import Entry, Mixture, entries, load
from manyhands.errors import ConfigError
from manyhands.plan.compute import forward_flops
from manyhands.plan.compute import training_flops as flops_of_training
from manyhands.plan.count import Counts
from manyhands.plan.fit import usable
from manyhands.plan.machine import machine_named
from manyhands.plan.price import utilisation
from manyhands.plan.published import computed_figure
from manyhands.plan.report import Ask, Figure
from manyhands.plan.report.scale import parallel
from manyhands.plan.roof import decode_bound
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import BF16, Storage, storage_named, weight_bytes
from manyhands.plan.subject import Subject, of_catalogue
from manyhands.plan.traffic import decode_bytes, mean_distinct
from manyhands.plan.turns import stretches


@functools.cache
def _subject(name: str) -> Subject:
    return of_catalogue(load(name))


def _counts(name: str) -> Counts:
    return _subject(name).counts


def _sizes(name: str) -> Sizes:
    sizes = _subject(name).sizes
    if sizes is None:
        raise ConfigError(f"{name} is not a decoder: it has no attention by context")
    return sizes


def _mixture(name: str) -> Mixture:
    mixture = load(name).mixture
    if mixture is None:
        raise ConfigError(f"{name} has no sparse layers that are published")
    return mixture


def _held(name: str, format: str = "native") -> Storage:
    return storage_named(format, _subject(name).native or BF16)


def total(name: str) -> float:
    """Parameters."""
    return _counts(name).total


def active(name: str) -> float:
    """Parameters that work for a token, embedding and head included."""
    return _counts(name).active


def multiplied(name: str) -> float:
    """Parameters that a token is multiplied by: active without the input embedding."""
    return _counts(name).active_without_embedding


def component(name: str, part: str) -> float:
    """Parameters of one of the planner's components: "router", "routed experts", …"""
    return _counts(name).by_component[part]


def experts(name: str) -> float:
    """Routed experts of one sparse layer."""
    return _mixture(name).experts


def shared_experts(name: str) -> float:
    """Experts of one sparse layer that every token visits."""
    return _mixture(name).shared


def experts_per_token(name: str) -> float:
    """Routed experts that a token visits in one sparse layer."""
    return _mixture(name).experts_per_token


def experts_in_model(name: str) -> float:
    """Routed experts of all layers, of a system that no family reads."""
    return computed_figure(load(name), "experts_in_model")


def sparse_layers(name: str) -> float:
    """Layers that are sparse."""
    sizes = _subject(name).sizes
    return sizes.sparse_layers if sizes is not None else experts_in_model(name) / experts(name)


def flops(name: str, context: int) -> float:
    """Of a forward pass, for a token that sees `context` positions."""
    return forward_flops(_sizes(name), _counts(name), context)


def decoding_flops(name: str, context: int) -> float:
    """The same as it is decoded: with latent attention from the cached latents."""
    return forward_flops(_sizes(name), _counts(name), context, latent=True)


def training_flops(name: str, length: int) -> float:
    """Forward and backward, mean over a sequence of `length`."""
    return flops_of_training(_sizes(name), _counts(name), length)


def sequence_flops(name: str) -> float:
    """Per sequence of 512 tokens in and 114 out, forward: an encoder-decoder's."""
    return computed_figure(load(name), "sequence_flops")


def weights(name: str, format: str = "native") -> float:
    """Bytes of all weights; "native": as they are published."""
    return weight_bytes(_counts(name), _held(name, format))


def read(name: str, batch: int, context: int) -> float:
    """Bytes read per decoded token, in the published format."""
    return decode_bytes(_sizes(name), _counts(name), _held(name), batch=batch, context=context).per_token


def cache(name: str, context: int) -> float:
    """Bytes of keys and values of one sequence, in 16 bits."""
    return decode_bytes(_sizes(name), _counts(name), _held(name), batch=1, context=context).cache


def touched(name: str, tokens: int) -> float:
    """Share of a layer's experts that so many tokens visit together, under uniform routing."""
    return mean_distinct(_sizes(name), tokens) / experts(name)


def cheaper_up_to_batch(name: str, other: str, context: int) -> float:
    """The largest batch up to which `name` reads fewer bytes per decoded token than `other`."""
    found = stretches(lambda n: read(name, n, context), lambda n: read(other, n, context), 1 << 16)[0]
    return 0 if found.smaller else found.last


def cheaper_up_to_context(name: str, other: str) -> float:
    """The longest context up to which `name` needs fewer FLOPs per decoded token than `other`."""
    found = stretches(lambda c: decoding_flops(name, c), lambda c: decoding_flops(other, c), 1 << 20)[0]
    return 0 if found.smaller else found.last


def tokens_per_second(name: str, machine: str, batch: int, context: int) -> float:
    """The most that `machine` can decode, for all sequences together: a roofline."""
    bound = decode_bound(machine_named(machine), _sizes(name), _counts(name), _held(name), batch=batch, context=context)
    return bound.tokens_per_second


def exchange(name: str, machine: str, devices: int) -> float:
    """Time of sending tokens to experts and back, in times of the experts' own arithmetic: one layer, on paper."""
    subject, chosen = _subject(name), machine_named(machine)
    table = parallel(subject, Ask(storage=_held(name), devices=devices), chosen).table
    assert table is not None
    there, back, arithmetic = (cell.value for cell in table.rows[0][3:6] if isinstance(cell, Figure))
    assert there is not None and back is not None and arithmetic is not None
    return (there + back) / arithmetic


def memory(machine: str) -> float:
    """Bytes that can be used on `machine`."""
    return usable(machine_named(machine))


def devices(name: str, machine: str) -> float:
    """Devices of one kind that hold the published weights, and nothing else."""
    return math.ceil(weights(name) / memory(machine))


def published(name: str, what: str) -> float:
    """A figure of the catalogue, as it was printed."""
    figure = load(name).figure(what)
    if figure is None or figure.value is None:
        raise ConfigError(f"the catalogue has no {what} of {name}")
    return figure.value


def model_flops_utilisation(name: str, tokens: float, hours: float, machine: str) -> float:
    """Share of the matrix rate that training on so many tokens in so many device hours amounts to."""
    rate = machine_named(machine).rate("bf16")
    assert rate is not None, machine
    return utilisation(tokens * training_flops(name, 4096), rate[1], hours)


def days_between(earlier: str, later: str) -> float:
    """Days between two releases."""
    first, second = (date.fromisoformat(load(name).released) for name in (earlier, later))
    return (second - first).days


def _decoders() -> list[Entry]:
    return [entry for entry in entries() if entry.kind == "decoder" and entry.mixture is not None]


def sparse_decoders() -> float:
    """Decoders of the catalogue with a published mixture."""
    return len(_decoders())


def sparse_decoders_visiting_up_to(k: int) -> float:
    """Of these, those whose tokens visit at most `k` routed experts."""
    return sum(entry.mixture is not None and entry.mixture.experts_per_token <= k for entry in _decoders())


def released(year: int) -> float:
    """Systems of the catalogue of one year whose makers say whether they are sparse."""
    return sum(entry.year == year and entry.sparse is not None for entry in entries())


def sparse_released(year: int) -> float:
    """Of these, the sparse ones."""
    return sum(entry.year == year and entry.sparse is True for entry in entries())


def _routers() -> list[Entry]:
    return [entry for entry in entries() if entry.config is not None and entry.config.moe is not None]


def described_routers() -> float:
    """Systems of the catalogue whose router a family of this package reads."""
    return len(_routers())


def routers_without_renormalising() -> float:
    """Of these, those that take the chosen experts' scores as they are."""
    return sum(not entry.config.moe.router.norm_topk_prob for entry in _routers() if entry.config and entry.config.moe)


def sigmoid_routers() -> float:
    """Of these, those that score each expert on its own."""
    return sum(entry.config.moe.router.score == "sigmoid" for entry in _routers() if entry.config and entry.config.moe)


QUANTITIES: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        *(total, active, multiplied, component, experts, shared_experts, experts_per_token, experts_in_model),
        *(sparse_layers, flops, decoding_flops, training_flops, sequence_flops, weights, read, cache, touched),
        *(cheaper_up_to_batch, cheaper_up_to_context, tokens_per_second, exchange, memory, devices, published),
        *(model_flops_utilisation, days_between, sparse_decoders, sparse_decoders_visiting_up_to, released),
        *(sparse_released, described_routers, routers_without_renormalising, sigmoid_routers),
    )
}
"""Every function above, by its name."""
