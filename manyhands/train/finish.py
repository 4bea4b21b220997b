"""The end of a run: what it reached and whether it is worth keeping, on one screen and in `report.html`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyhands.checkpoint.runs import RunDirectory
from manyhands.compare.verdict import Verdict, judge
from manyhands.config import RunConfig
from manyhands.config.history import stopped_early
from manyhands.generate.evaluate import Evaluation, gather_no_more
from manyhands.models import AnyModel, LanguageModel
from manyhands.parallel.ranks import Ranks, first
from manyhands.text import evaluation_batches
from manyhands.trace.journal import LAST_STEPS, last_steps, of_layer, read_journal
from manyhands.trace.random_router import RandomRouter, recorded_inputs
from manyhands.trace.report import write_report
from manyhands.trace.tokens import TokenShare
from manyhands.train.data import RunData
from manyhands.train.speed import used

_TRACE_TOKENS = 200_000  # validation tokens looked at for "what each expert takes"


@dataclass(frozen=True, slots=True)
class LayerBalance:
    """One layer's balance over the last steps of training."""

    max_vio: float
    """Mean over those of the last 50 steps that were logged of each batch's MaxVio."""
    max_vio_worst: float
    """The largest of them."""
    dead: int
    """Experts that no token of these steps chose."""
    dropped: float


@dataclass(frozen=True, slots=True)
class Before:
    """The figures of `Summary` of the same names, at step 0."""

    valid_loss: float
    valid_bits_per_byte: float
    valid_perplexity: float


@dataclass(frozen=True, slots=True)
class Best(Before):
    """The same at the best validation on the way."""

    step: int
    checkpoint: Path | None
    """None: it was not kept."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished run reached."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    valid_loss: float
    """Nats per target."""
    valid_bits_per_byte: float
    """NaN where the task's targets are not a whole text."""
    valid_perplexity: float
    compressors: dict[str, float]
    balance: dict[int, LayerBalance]
    skipped: int
    checkpoint: Path
    report: Path
    verdict: Verdict
    """Whether it is worth keeping, and why not (docs/verdicts.md)."""
    before: Before | None = None
    """With a tuning: what the model that it began with reached on the same text."""
    machine: str | None = None
    """Operations per second, as a share of the machine's measured rate where that is known, and the most memory."""
    budget: str | None = None
    """With a time budget: the steps it was turned into, and when."""
    epochs: float | None = None
    """How often the training text was seen; None where batches do not count it."""
    best: "Best | None" = None
    """The best validation, if it was not the last."""
    stopped_early: int | None = None
    """Where `train.early_stop` ended the run: that number of validations."""

    def lines(self) -> list[str]:
        """For a person."""
        others = ", ".join(f"{name} {value:.3f}" for name, value in self.compressors.items())
        seen = f"{self.tokens:,} tokens" + ("" if self.epochs is None else f" ({self.epochs:.2f} epochs)")
        lines = [
            f"{self.steps:,} steps, {seen} in {self.seconds:.0f} s ({self.tokens_per_s:,.0f} tokens/s)"
            + (f", updates skipped as spikes: {self.skipped}" if self.skipped else "")
        ]
        if self.machine:
            lines.append(self.machine)
        if self.before is not None:
            lines.append(f"before:     {_reached(self.before)}")
        lines.append(
            f"validation: {_reached(self)}"
            + (f"  (on the same text: {others})" if math.isfinite(self.valid_bits_per_byte) else "")
        )
        if self.best is not None:
            lines.append(
                f"best:       {_reached(self.best)}, at step {self.best.step:,}: {self.best.checkpoint or 'not kept'}"
            )
        if self.stopped_early is not None:
            lines.append(f"stopped early: no better validation in {self.stopped_early} (train.early_stop)")
        for layer, b in self.balance.items():
            dropped = f", dropped {b.dropped:.1%}" if b.dropped else ""
            lines.append(
                f"layer {layer}: MaxVio {b.max_vio:.2f} (mean of the last {LAST_STEPS} steps; worst "
                f"{b.max_vio_worst:.2f}), dead experts {b.dead}{dropped}"
            )
        if self.budget:
            lines.append(self.budget)
        return [*lines, f"checkpoint {self.checkpoint}", f"report     {self.report}", *self.verdict.lines()]


def _reached(figures: "Summary | Before") -> str:
    if math.isfinite(figures.valid_bits_per_byte):
        return f"{figures.valid_bits_per_byte:.3f} bits per byte, perplexity {figures.valid_perplexity:.2f}"
    return f"loss {figures.valid_loss:.4f}, perplexity {figures.valid_perplexity:.2f}"


def _before(records: list[dict[str, Any]]) -> Before | None:
    """What was reached before the first step, if somebody looked."""
    found = [record for record in records if record["kind"] == "eval" and record["step"] == 0]
    return Before(*_figures(found[-1])) if found else None


def _best(records: list[dict[str, Any]], directory: RunDirectory, last: int) -> Best | None:
    """The best validation of all, if it was not at step `last`."""
    judged = [record for record in records if record["kind"] == "eval" and record["valid_loss"] is not None]
    best = min(judged, key=lambda record: record["valid_loss"], default=None)
    if best is None or best["step"] == last:
        return None
    kept = dict(directory.checkpoints()).get(best["step"])
    return Best(*_figures(best), best["step"], kept)


def _figures(record: dict[str, Any]) -> tuple[float, float, float]:
    """Those of `Before`, of an `eval` record, whose null is NaN or infinity."""
    found = [record[f"valid_{name}"] for name in ("loss", "bits_per_byte", "perplexity")]
    loss, bits, perplexity = (math.nan if value is None else float(value) for value in found)
    return loss, bits, perplexity


def finish(
    directory: RunDirectory,
    run: RunConfig,
    data: RunData,
    model: AnyModel,
    evaluation: Evaluation,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Summary:
    """Have rank 0 write `report.html`, and return the summary. Needs the journal of the finished run."""
    shares, random = None, None
    if run.model.sparse_layers and isinstance(model, LanguageModel):
        shares, random = token_shares(model, data, run, dtype, ranks)
    report = directory.path / "report.html"

    def write() -> None:
        records = read_journal(directory.journal_file)
        extra = {"compressors": data.compressors}
        write_report(report, records, run, shares, _decoder(data), extra, random, judge(records, run).as_json())

    first(ranks, write)
    records = read_journal(directory.journal_file)
    steps = [record for record in records if record["kind"] == "step"]
    last = steps[-1]
    recent = last_steps(steps, LAST_STEPS)
    balance = {layer: final_balance(recent, str(layer)) for layer in run.model.sparse_layers}
    return Summary(
        steps=last["step"],
        tokens=last["tokens"],
        seconds=last["elapsed"],
        tokens_per_s=last["tokens"] / last["elapsed"],
        valid_loss=evaluation.loss,
        valid_bits_per_byte=evaluation.bits_per_byte or float("nan"),
        valid_perplexity=evaluation.perplexity,
        compressors=data.compressors,
        balance=balance,
        skipped=sum(bool(record["skipped"]) for record in steps),
        checkpoint=directory.checkpoints()[-1][1],
        report=report,
        before=_before(records),
        machine=used(steps),
        budget=_budget(records, last["step"]),
        verdict=judge(records, run),
        epochs=last.get("epochs"),
        best=_best(records, directory, last["step"]),
        stopped_early=run.train.early_stop if stopped_early(run, last["step"]) else None,
    )


def _budget(records: list[dict[str, Any]], steps: int) -> str | None:
    plans = [record for record in records if record["kind"] == "plan"]
    if not plans:
        return None
    first, *later = plans
    said = (
        f"time budget of {plans[-1]['max_seconds']:g} s: {first['max_steps']:,} steps planned at step {first['step']}"
    )
    for plan in later:
        said += f", {plan['max_steps']:,} at step {plan['step']}"
    why = "; the machine's speed changed, or the budget" if later else ""
    ends = [record for record in records if record["kind"] == "end"]
    took = f" after {ends[-1]['wall']:.0f} s" if ends and ends[-1].get("wall") else ""
    return f"{said}; ended at step {steps:,}{took}{why}"


def final_balance(steps: list[dict[str, Any]], layer: str) -> LayerBalance:
    """Balance of one layer over these `step` records."""
    figures = [of_layer(record, layer) for record in steps]
    total_E = [sum(loads) for loads in zip(*(entry["load"] for entry in figures), strict=True)]
    vio = [entry["max_vio"] for entry in figures]
    return LayerBalance(
        max_vio=sum(vio) / len(vio),
        max_vio_worst=max(vio),
        dead=sum(share == 0.0 for share in total_E),
        dropped=sum(entry["dropped"] for entry in figures) / len(figures),
    )


@torch.no_grad()
def token_shares(
    model: LanguageModel, data: RunData, run: RunConfig, dtype: torch.dtype, ranks: Ranks
) -> tuple[TokenShare, TokenShare | None]:
    """Which tokens each expert takes, on the beginning of the validation text; and of a router with random weights.

    The second is None for routers that choose by other things than scores. Each rank runs each `ranks.size`-th batch.
    """
    moe = run.model.moe
    assert moe is not None
    E, V = moe.router.num_experts, run.model.vocab_size
    shares, random = TokenShare(E, V), TokenShare(E, V) if moe.router.select == "topk" else None
    routers: dict[int, RandomRouter] = {}
    S, B = run.train.sequence_length, run.train.batch_size
    was_training = model.training
    model.eval()
    layers = model.sparse_layers()
    batches = list(evaluation_batches(data.valid.ids, S, B, max_batches=max(1, _TRACE_TOKENS // (S * B))))
    with recorded_inputs({layer: mlp.router for layer, mlp in layers.items()}) as states:
        for first_of_round in range(0, len(batches), ranks.size):
            number = first_of_round + ranks.rank
            ids, mask = batches[min(number, len(batches) - 1)]
            inputs = ids[:, :-1].to(model.embed_tokens.weight.device)
            hidden = model.hidden(inputs, mask.to(inputs.device), dtype=dtype)
            if number >= len(batches):  # the others have one more: run along, count nothing
                mask = torch.zeros_like(mask)
            for layer, routing in hidden.routings.items():
                shares.add(layer, inputs, routing.expert_ids, mask)
                if random is None:
                    continue
                if layer not in routers:
                    real = routing.token_mask
                    routers[layer] = RandomRouter(
                        layers[layer].router, states[layer][real], routing.expert_ids[real], layer, ranks
                    )
                random.add(layer, inputs, routers[layer](states[layer]), mask)
    model.train(was_training)
    gather_no_more(model, ranks)
    return shares.over(ranks, layers), None if random is None else random.over(ranks, layers)


def _decoder(data: RunData) -> Any:
    return lambda token_id: data.tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
