"""Small language models on real text, all trained by `manyhands train` itself: one regime, many arms.

    run = regime(job, steps=1000, quick_steps=60)            # a dense model, and how it is trained
    sparse = with_experts(run, E=64, K=2, F=64)
    trained = train_arm(job, match_dense(sparse), "dense-0")  # equal active FLOPs, the router's counted in
    trained.valid_loss, trained.worst("max_vio"), trained.training.losses

The regime is the one in which sparse models show what they can: a small vocabulary, so that the feed-forward networks
are most of the model; every layer sparse; a constant learning rate, so that each point of a curve is a result of its
own; and batches of 8,192 tokens, which give each of 64 experts hundreds of rows.

E experts, K experts per token, F expert width.
"""

import atexit
import math
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from manyhands.checkpoint.find import find
from manyhands.checkpoint.model import load_model, only_decoder
from manyhands.config import DataConfig, ModelConfig, RunConfig, SpansConfig, TokenizerConfig
from manyhands.config.load import dump_run, parse_run
from manyhands.files import JOURNAL, RUN, write_atomic
from manyhands.generate.evaluate import evaluate
from manyhands.lab.curves import Progress
from manyhands.lab.experiment import Arm
from manyhands.lab.job import Job
from manyhands.models import Decoder
from manyhands.plan.compute import mean_attention_flops
from manyhands.plan.count import count_model
from manyhands.plan.sizes import sizes_of
from manyhands.text import evaluation_batches
from manyhands.trace.journal import LAST_STEPS, Record, last_steps, of_layer, read_journal
from manyhands.train.data import prepare_data
from manyhands.train.loop import train
from manyhands.train.memory import keep_freed_memory
from manyhands.train.task import Task

REGIME = """
data: {valid_fraction: 0.02}
model:
  vocab_size: 512
  hidden_size: 64
  num_hidden_layers: 3
  intermediate_size: 152
  max_position_embeddings: 128
  attention: {num_attention_heads: 2, head_dim: 32, qk_norm: head}
balance: {aux_loss_coef: 0.01, bias_update_rate: 0.01}
optim: {lr: 0.006, embed_lr_scale: 3, weight_decay: 0.0, ns_steps: 3}
schedule: {warmup_steps: 20, decay_fraction: 0.0}
train: {sequence_length: 128, batch_size: 64, save_seconds: 0}
"""
"""The standard library's sources, 5.6 million tokens of which are trained on; Muon."""
SMALL = """
data: {valid_fraction: 0.05}
model:
  vocab_size: 384
  hidden_size: 32
  num_hidden_layers: 2
  intermediate_size: 64
  max_position_embeddings: 64
  attention: {num_attention_heads: 2, head_dim: 16, qk_norm: head}
balance: {aux_loss_coef: 0.01, bias_update_rate: 0.05}
optim: {lr: 0.01, embed_lr_scale: 3, weight_decay: 0.0, ns_steps: 3}
schedule: {warmup_steps: 10, decay_fraction: 0.0}
train: {sequence_length: 64, batch_size: 16, save_seconds: 0}
"""
"""The same for a few seconds, on a few packages of the standard library."""
_SMALL_TEXT = ("asyncio", "email", "http", "logging")
_EVEN = 8
"""A dense network's width is a multiple of it: odd widths are slow, and its clock is to be a fair one."""


@dataclass(frozen=True, slots=True)
class Trained:
    """One arm, trained with one seed."""

    run: RunConfig
    directory: Path
    """The run: `load()` needs it, and it is gone when the experiment ends."""
    records: tuple[Record, ...]
    """Its journal's `step` records, one per step."""
    training: Progress
    """Loss of each step's batch, nats per token."""
    validation: Progress
    """Loss on the whole validation text, where it was asked for (`train.eval_every`) and at the end."""
    bits_per_byte: float
    """On the validation text, at the end; NaN where only spans of it are asked for."""
    skipped: int
    """Updates that the guard took for spikes."""

    @property
    def valid_loss(self) -> float:
        """Nats per token on the validation text, at the end."""
        return self.validation.losses[-1]

    @property
    def train_loss(self) -> float:
        """Mean over the last 50 steps, nats per token."""
        return self.mean("loss")

    @property
    def step_seconds(self) -> float:
        """Median seconds of a step; means little on a busy machine."""
        times = (0.0, *self.training.seconds)
        each = sorted(after - before for before, after in pairwise(times))
        return each[len(each) // 2]

    @property
    def grad_norms(self) -> tuple[float, ...]:
        """Of each step, before clipping."""
        return tuple(record["grad_norm"] for record in self.records)

    def mean(self, name: str) -> float:
        """Of one figure of the journal's steps, over the last 50."""
        values = [record[name] for record in last_steps(self.records, LAST_STEPS)]
        return float(sum(values) / len(values))

    def layer_means(self, name: str) -> dict[int, float]:
        """Of one figure of the layers' load, over the last 50 steps: `max_vio`, `dead`, `dropped`, … (`LoadSummary`).

        `max_vio` and `dead` count what was wanted, before a capacity drops anything; `dead` is per batch. Empty for a
        dense model.
        """
        recent = last_steps(self.records, LAST_STEPS)
        return {
            layer: sum(of_layer(record, str(layer))[name] for record in recent) / len(recent)
            for layer in self.run.model.sparse_layers
        }

    def worst(self, name: str) -> float:
        """The largest of `layer_means`."""
        return max(self.layer_means(name).values())

    def load(self) -> Decoder:
        """The trained model, in evaluation mode."""
        return only_decoder(load_model(find(self.directory)), "this experiment").eval()

    def valid_batches(self, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation text, or its first `most` batches: ids [B, S + 1] and a target mask [B, S]."""
        ids = prepare_data(self.directory / "data", self.run, lambda text: None).valid.ids
        return evaluation_batches(ids, self.run.train.sequence_length, self.run.train.batch_size, most)

    def loss_of(self, model: Decoder) -> float:
        """Nats per token of `model`, this one changed for instance, on the whole validation text."""
        return evaluate(model, self.valid_batches()).loss


def regime(job: Job, steps: int, quick_steps: int, *settings: str) -> RunConfig:
    """The dense run that every arm starts from: `steps` long, or `quick_steps` if the job is a quick one.

    `settings` are `section.key=value` on top. Text named by `--data` takes the standard library's place.
    """
    basic = [f"data.sources={sources(job)}", "train.worth_every=0", "train.sample_tokens=0"]
    basic.append(f"train.max_steps={quick_steps if job.quick else steps}")
    return parse_run(SMALL if job.quick else REGIME, "the lab's regime", [*basic, *settings])


def sources(job: Job) -> list[str]:
    """What `--data` names, else the standard library, or a part of it if the job is a quick one."""
    return [str(job.data)] if job.data is not None else _small_text() if job.quick else ["stdlib"]


def changed(run: RunConfig, *settings: str) -> RunConfig:
    """`run` with `section.key=value` on top."""
    return parse_run(dump_run(run), "the lab's regime", settings)


def with_experts(run: RunConfig, E: int, K: int, F: int, router: str = "", more: str = "") -> RunConfig:
    """`run` with every layer sparse. `router` and `more` are further fields of `RouterConfig` and `MoEConfig`, as YAML:
    `"score: sigmoid, bias: true"`."""
    fields = ", ".join(filter(None, (f"num_experts: {E}, num_experts_per_tok: {K}", router)))
    sizes = ", ".join(filter(None, (f"moe_intermediate_size: {F}", more)))
    return changed(run, f"model.moe={{{sizes}, router: {{{fields}}}}}")


def match_dense(sparse: RunConfig) -> RunConfig:
    """The dense run of equal active FLOPs: the router's and shared experts' products count, and the width is the next
    multiple of 8, so the dense model has never fewer.
    """
    wanted = count_model(sparse.model).active_without_embedding

    def active(width: int) -> int:
        return count_model(_dense(sparse, width).model).active_without_embedding

    each = active(2 * _EVEN) - active(_EVEN)  # what 8 more columns cost: the same everywhere
    return _dense(sparse, _EVEN * max(1, 1 - (active(_EVEN) - wanted) // each))


def _dense(run: RunConfig, width: int) -> RunConfig:
    return changed(run, "model.moe=null", f"model.intermediate_size={width}")


def arm(run: RunConfig, name: str, note: str = "") -> Arm:
    """Its sizes: parameters, active ones without the input embedding, FLOPs of a forward pass per token."""
    counts = count_model(run.model)
    attention = 0.0
    if isinstance(run.model, ModelConfig):
        attention = mean_attention_flops(sizes_of(run.model), run.train.sequence_length)
    flops = 2 * counts.active_without_embedding + attention
    return Arm(name, counts.total, counts.active_without_embedding, flops, note)


def train_arm(job: Job, run: RunConfig, name: str, task: Task | None = None) -> Trained:
    """Train `run` in the job's scratch directory under `name`, with a clock running.

    The text is prepared once per process. `task` None: language modelling. Raises what `train` raises, `UserError` for
    a name that was used before.
    """
    job.note(f"{name}: {run.train.max_steps} steps")
    if not job.quick:
        keep_freed_memory()
    directory = job.scratch / name
    text = _Text(run.data, run.tokenizer, run.spans, run.model.kind, run.model.vocab_size, run)
    shutil.copytree(_corpus(text), directory / "data")
    write_atomic(directory / RUN, dump_run(run))  # which makes the directory a run with its text prepared
    with job.clock():
        summary = train(directory, run, quiet=True, task=task)
    return read_arm(directory, run, summary.skipped)


def read_arm(directory: Path, run: RunConfig, skipped: int) -> Trained:
    """What the journal of a run, finished or under way, holds."""
    journal = read_journal(directory / JOURNAL)
    steps = tuple(record for record in journal if record["kind"] == "step")
    evaluations = [record for record in journal if record["kind"] == "eval"]
    elapsed = {record["step"]: record["elapsed"] for record in steps}
    at = [record["step"] for record in evaluations]
    return Trained(
        run,
        directory,
        steps,
        Progress([r["step"] for r in steps], [r["elapsed"] for r in steps], [r["loss"] for r in steps]),
        Progress(at, [elapsed[step] for step in at], [record["valid_loss"] for record in evaluations]),
        evaluations[-1]["valid_bits_per_byte"] or math.nan if evaluations else math.nan,
        skipped,
    )


def _small_text() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return [str(library / name) for name in _SMALL_TEXT]


@dataclass(frozen=True, slots=True)
class _Text:
    """What a prepared text depends on."""

    data: DataConfig
    tokenizer: TokenizerConfig
    spans: SpansConfig
    kind: str
    vocab_size: int
    run: RunConfig = field(compare=False)


@cache
def _corpus(text: _Text) -> Path:
    """The text, cut into tokens: made once per process, deleted when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="manyhands-lab-text-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prepare_data(folder, text.run, lambda said: None)
    return folder
