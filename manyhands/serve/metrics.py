"""`/metrics`: vLLM's names with our prefix, and what the experts do. No label per expert."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from manyhands.serve.models import Models
from manyhands.serve.protocol import num_unknown
from manyhands.serve.served import Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_P = "manyhands_"
_MODEL = "model_name"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_DISTINCT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics(Collector):
    """Of all models of one server."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._first = self._histogram("time_to_first_token_seconds", "From a request's acceptance.", _FIRST)
        self._between = self._histogram("inter_token_latency_seconds", "From one token to the next.", _BETWEEN)
        self.requests = Counter(_P + "http_requests", "By status.", ["status"], registry=self._registry)
        models.on_load = self.watch
        self.unknown = Counter(
            _P + "unknown_fields", "Fields of bodies that mean nothing here.", registry=self._registry
        )

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)

    def watch(self, served: Served) -> None:
        """Note how long its tokens take."""
        first, between = self._first.labels(served.name), self._between.labels(served.name)
        served.on_token = lambda seconds, is_first: (first if is_first else between).observe(seconds)

    def count_unknown(self, body: Mapping[str, Any]) -> None:
        """Note the fields of a body that mean nothing here."""
        self.unknown.inc(num_unknown(body))

    def collect(self) -> Iterator[Metric]:
        """Read the counters of the engines."""
        gauges = {name: _gauge(name, what) for name, what in _GAUGES.items()}
        counters = {name: _counter(name, what) for name, what in _COUNTERS.items()}
        ended = _counter("request_success", "Requests that ended, by reason.", "finished_reason")
        refused = _counter("admission_rejections", "Requests that were not taken, by reason.", "reason")
        lookups = _counter("expert_lookups", "Experts that steps asked for, and whether they were in memory.", "result")
        read = _counter("expert_read_bytes", "Bytes of experts read, each expert once a step.", "tier")
        stall = _counter("expert_stall_seconds", "Waited for experts that were not in memory.")
        load = GaugeMetricFamily(
            _P + "moe_load_max_over_mean", "Tokens of the busiest expert over the mean.", labels=[_MODEL, "layer"]
        )
        distinct = HistogramMetricFamily(
            _P + "experts_distinct_per_step", "Experts run in a step, over all layers.", labels=[_MODEL]
        )
        for served in self._models.loaded:
            service, name = served.service, [served.name]
            counts, blocks = service.counters, service.engine.scheduler.blocks
            gauges["num_requests_running"].add_metric(name, service.num_running)
            gauges["num_requests_waiting"].add_metric(name, service.num_waiting)
            gauges["kv_cache_usage_perc"].add_metric(name, blocks.num_used / blocks.num_blocks)
            counters["prompt_tokens"].add_metric(name, counts.prompt_tokens)
            counters["prompt_tokens_cached"].add_metric(name, counts.cached_tokens)
            counters["generation_tokens"].add_metric(name, counts.total.made)
            counters["num_preemptions"].add_metric(name, counts.preemptions)
            counters["steps"].add_metric(name, counts.steps)
            for reason in ("stop", "length", "abort", "error"):
                ended.add_metric([*name, reason], counts.ended[reason])
            for reason in ("full", "stopping"):
                refused.add_metric([*name, reason], counts.refused[reason])
            lookups.add_metric([*name, "hit"], counts.lookups - counts.misses)
            lookups.add_metric([*name, "miss"], counts.misses)
            read.add_metric([*name, "ram"], counts.bytes_ram)
            read.add_metric([*name, "disk"], counts.bytes_disk)
            stall.add_metric(name, counts.stalled)
            for layer, counts_E in counts.total.experts.items():
                mean = counts_E.mean()
                load.add_metric([*name, str(layer)], float(counts_E.max() / mean) if mean else 0.0)
            steps = dict(counts.distinct)
            buckets = [(str(float(b)), float(sum(n for d, n in steps.items() if d <= b))) for b in _DISTINCT]
            total = sum(d * n for d, n in steps.items())
            distinct.add_metric(name, [*buckets, ("+Inf", float(sum(steps.values())))], total)
        yield from (*gauges.values(), *counters.values(), ended, refused, lookups, read, stall, load, distinct)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_P + name, what, [_MODEL], registry=self._registry, buckets=buckets)


_GAUGES = {
    "num_requests_running": "Requests the engine works on.",
    "num_requests_waiting": "Requests that wait for it.",
    "kv_cache_usage_perc": "Blocks of the cache in use; 1 is all.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "prompt_tokens_cached": "Of these, found in the prefix cache.",
    "generation_tokens": "Tokens made.",
    "num_preemptions": "Requests whose blocks were taken and that were computed again.",
    "steps": "Forward passes.",
}


def _gauge(name: str, what: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(_P + name, what, labels=[_MODEL])


def _counter(name: str, what: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(_P + name, what, labels=[_MODEL, *labels])
