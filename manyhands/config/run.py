"""What a training run is: data, model, balance, optimiser, schedule, loop. One YAML file, or a preset."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from manyhands.config.base import Strict
from manyhands.config.decoder import ModelConfig
from manyhands.config.history import SAME, Change, settings_at
from manyhands.config.kinds import ByKind, longest_sequence
from manyhands.config.numbers import Count, Rate, Size
from manyhands.config.parallel import ParallelConfig
from manyhands.config.rows import RowsConfig
from manyhands.config.tune import TuneConfig
from manyhands.errors import ConfigError

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class DataConfig(Strict):
    """Where the text comes from and how it is split. `stdlib` is the Python standard library's own sources."""

    sources: tuple[str, ...] = ("stdlib",)
    """Files, folders, globs (.txt .md .py .jsonl .jsonl.gz .parquet), or `hf:NAME` for a Hugging Face data set."""
    text_field: str = "text"
    """The field of .jsonl and .parquet rows that holds the text."""
    valid_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the text's bytes kept for validation: whole documents, chosen by a hash of their names and `seed`."""
    valid: tuple[str, ...] = ()
    """Sources of the validation text, named as `sources` are; then all of `sources` is trained on."""
    seed: int = 0
    tokenizer: str | None = None
    """A `tokenizer.json`, or its directory; without one a byte-level BPE of `model.vocab_size` is trained."""


class TokenizerConfig(Strict):
    """The tokenizer that is trained, where `data.tokenizer` names none."""

    pre: Literal["llama-bpe", "qwen2", "gpt-2"] | None = None
    """A published rule for where it may not merge, by llama.cpp's name: with one of them the model can be written as
    GGUF. None: this project's own rule, which needs fewer tokens for source code."""


class SpansConfig(Strict):
    """T5's span corruption (arXiv 1910.10683): what an encoder-decoder learns from plain text. `train.sequence_length`
    is what the encoder reads of a text; 512 leave 114 tokens to write."""

    noise_density: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the tokens that are cut out, and are to be written again."""
    mean_span_length: Annotated[float, Field(ge=1.0, le=1e4)] = 3.0
    """Of the pieces that are cut out."""
    sentinels: Annotated[int, Field(strict=True, ge=1, le=10_000)] = 100
    """`<extra_id_0>` and so on, in the last places of a vocabulary that is trained: a sequence needs one per piece."""


class BalanceConfig(Strict):
    """How the router is kept balanced. All terms are per layer, then averaged over the sparse layers."""

    aux_loss_coef: Rate = 0.01
    """f·P, equal to 1 at perfect balance at any k (see `moe/balance.py` for other frameworks' scales)."""
    aux_scope: Literal["micro", "sequence", "global"] = "global"
    """Over which tokens f is counted: the micro-batch, each sequence, or the whole optimiser step so far."""
    bias_update_rate: Rate = 0.001
    """γ of the loss-free bias (arXiv 2408.15664); only where the router has a bias."""
    bias_update: Literal["sign", "quantile"] = "sign"
    """How that bias moves: by γ towards balance, or to where each expert would have had its share of the step's tokens
    (quantile balancing, Megatron), which has no rate."""
    z_loss_coef: Rate = 0.0
    """ST-MoE's penalty on large router logits (arXiv 2202.08906)."""
    importance_coef: Rate = 0.0
    """CV² of the summed weights of each expert (arXiv 1701.06538)."""
    load_coef: Rate = 0.0
    """CV² of the smooth load; needs a noisy router."""
    sequence_loss_coef: Rate = 0.0
    """DeepSeek-V3's complementary sequence-wise loss."""
    orthogonality_coef: Rate = 0.0
    variance_coef: Rate = 0.0
    """The two terms of arXiv 2505.22323."""
    simbal_coef: Rate = 0.0
    """‖W·Wᵀ − I‖₁ of the router's weights (SimBal, arXiv 2506.14038; 0.1 there)."""
    l1_coef: Rate = 1e-8
    """λ₀ of ReMoE's penalty, which rises and falls by a factor of 1.2 a step; only with select = 'positive'."""


class OptimConfig(Strict):
    """MuonClip, AdamW or Adafactor. Muon's update is scaled to AdamW's RMS, so one learning rate serves both."""

    name: Literal["muon", "adamw", "adafactor"] = "muon"
    """adafactor (arXiv 1804.04235): what T5 and Switch were trained with. Its `lr` is relative to the size of a
    parameter, 0.01 in T5, and falls as 1/√step once that is less."""
    lr: Annotated[float, Field(gt=0.0, le=10.0)] = 3e-3
    """The highest learning rate, of the matrices; what the schedule multiplies."""
    embed_lr_scale: Rate = 1.0
    """Multiplies `lr` for the embedding and the output head."""
    router_lr_scale: Rate = 1.0
    """Multiplies `lr` for the routers."""
    router_optim: Literal["adamw", "muon"] = "adamw"
    weight_decay: Rate = 0.1
    """Decoupled, times the rate; of matrices alone."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's β₁ and β₂."""
    eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-8
    momentum: Share = 0.95
    """Muon's."""
    nesterov: bool = True
    ns_steps: Annotated[int, Field(strict=True, ge=1, le=20)] = 5
    """Newton-Schulz iterations of a Muon step."""
    qk_clip: Annotated[float, Field(gt=0.0)] | None = 100.0
    """τ of QK-Clip (arXiv 2507.20534): the largest attention logit allowed. None turns it off. Muon only."""
    grad_clip: Annotated[float, Field(gt=0.0)] | None = 1.0
    """The largest norm of the whole gradient; null: any."""


class ScheduleConfig(Strict):
    """Linear warm-up, then cosine, or warm-up–stable–decay (WSD), down to `min_ratio` × lr."""

    kind: Literal["cosine", "wsd"] = "wsd"
    warmup_steps: Count = 20
    """Over which the rate rises linearly to `optim.lr`."""
    decay_fraction: Share = 0.5
    """wsd: the last share of the steps, over which the rate falls linearly."""
    min_ratio: Share = 0.0
    """Where the rate ends, as a share of `optim.lr`."""


class GuardConfig(Strict):
    """When an update is skipped and when the run stops."""

    spike_sigma: Annotated[float, Field(gt=0.0)] | None = 6.0
    """Skip an update whose loss or gradient norm lies this many deviations above the last `spike_window` steps."""
    spike_window: Annotated[int, Field(strict=True, ge=8, le=100_000)] = 128
    max_skips: Annotated[int, Field(strict=True, ge=1)] = 10
    """Stop, with advice, after this many skipped updates in a row."""


class TrainConfig(Strict):
    """The loop."""

    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] = 0
    max_steps: Size = 300
    """Optimiser steps of the whole run."""
    max_seconds: Annotated[float, Field(gt=0.0)] | None = None
    """A time budget for steps, validation and saving: max_steps becomes what fits, after a few measured steps, and
    again whenever the machine turns out a tenth of the budget faster or slower."""
    sequence_length: Size = 256
    """Tokens of a sequence."""
    batch_size: Size = 16
    """Sequences per optimiser step."""
    micro_batch_size: Size | None = None
    """Sequences per forward and backward; None: the whole batch at once."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; the master weights are float32. auto: bfloat16 where it is faster, on CUDA and, for models at
    least 256 wide, on a CPU with AMX or AVX512_BF16; else float32. A run keeps the one it began with, on any machine.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    recompute: bool = False
    """Recompute each block's activations in the backward pass to save memory."""
    experts_implementation: str = "auto"
    """The backend of the experts: eager, grouped_mm, native, …; auto takes the fastest one that fits."""
    log_every: Size = 1
    """A record in the journal each n-th step."""
    eval_every: Count = 0
    """Validate every n steps; 0: at the end only."""
    worth_every: Count | None = None
    """Measure what each expert is worth (docs/training.md) every n steps, and at the end; 0: never. None: at the end
    and at as many validations as take a twentieth of the time together, if the run is long enough for that."""
    sample_tokens: Annotated[int, Field(strict=True, ge=0, le=4096)] | None = None
    """At each validation let the model go on with the beginning of the validation text for so many tokens; 0: never.
    None: 48, in runs of fifty steps or more."""
    early_stop: Size | None = None
    """End the run after this many validations in a row that were no better than the best; None: never. Validations are
    those of eval_every."""
    save_every: Count = 0
    """Checkpoint every n steps; 0: by time and at the end only."""
    save_seconds: Annotated[float, Field(ge=0.0)] = 120.0
    """Checkpoint when this much time has passed since the last one, but spend a twentieth of the time on it at most;
    0: never. A killed run loses no more than this."""
    keep_checkpoints: Size = 2
    """The newest n."""
    keep_best: bool = True
    """Beside them the one with the best validation, `best` in the run's directory: each validation that is better than
    all before it saves one."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()


class TraceConfig(Strict):
    """Who went to which expert, recorded while the run goes on: `traces/` in its directory (docs/trace.md)."""

    every: Count = 0
    """Record each n-th step; 0: none."""
    max_bytes: Annotated[int, Field(strict=True, ge=1 << 20, le=1 << 50)] = 1_000_000_000
    """Of one session's trace; the oldest steps are deleted beyond it."""


class RunConfig(Strict):
    """Everything a run needs. The resolved file is saved beside the output and is enough to repeat it."""

    start: Annotated[str, Field(min_length=1)] | None = None
    """A checkpoint, a run, or a name on the Hugging Face hub to begin from: the model is then its, with its weights
    and, without `data.tokenizer`, its tokenizer; a `model` section may only say the same."""
    trainable: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = ("*",)
    """Patterns over the names of the parameters that are trained (`*` is anything); `!` in front of one leaves out what
    it matches. The others are frozen."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    spans: SpansConfig = SpansConfig()
    rows: RowsConfig | None = None
    """Learn from rows (conversations, prompts and completions, texts) in the place of plain text."""
    model: ByKind = ModelConfig()
    """A decoder, unless `kind` says otherwise."""
    balance: BalanceConfig = BalanceConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    guard: GuardConfig = GuardConfig()
    train: TrainConfig = TrainConfig()
    trace: TraceConfig = TraceConfig()
    parallel: ParallelConfig = ParallelConfig()
    tune: TuneConfig | None = Field(default=None, discriminator="method")
    """How the model of `start` is tuned; None: the run trains a model."""
    history: tuple[Change, ...] = ()
    """Settings that changed while the run went on (`train --resume` writes it); `history=[]` starts without."""

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        micro = self.train.micro_batch_size
        if micro is not None and self.train.batch_size % micro:
            raise ValueError(
                f"train.micro_batch_size = {micro} does not divide train.batch_size = {self.train.batch_size}"
            )
        longest = longest_sequence(self.model)
        if self.train.early_stop is not None and not self.train.eval_every:
            raise ValueError(
                f"train.early_stop = {self.train.early_stop} counts validations: set train.eval_every, "
                "the steps from one to the next"
            )
        if self.describes_model and longest is not None and self.train.sequence_length > longest:
            raise ValueError(
                f"train.sequence_length = {self.train.sequence_length} exceeds "
                f"model.max_position_embeddings = {longest}"
            )
        if self.tokenizer.pre is not None and self.data.tokenizer is not None:
            raise ValueError(
                f"tokenizer.pre = {self.tokenizer.pre!r} is for a tokenizer that is trained; data.tokenizer names one "
                "that is there"
            )
        if self.describes_model and self.model.kind != "encoder_decoder" and self.spans != SpansConfig():
            raise ValueError(f"spans is what an encoder-decoder learns; model.kind is {self.model.kind!r}")
        for change in self.history:
            for path in change.set:
                section, _, name = path.partition(".")
                if path.startswith(SAME) or name not in getattr(type(getattr(self, section, None)), "model_fields", {}):
                    raise ValueError(f"history: {path!r} is not a setting that may change while a run goes on")
            try:
                settings_at(self, change.step)
            except ConfigError as error:
                raise ValueError(f"history, from step {change.step} on: {error}") from None
        if self.tune is not None and self.start is None:
            raise ValueError(f"tune.method = {self.tune.method!r} changes a model that is there: start says which")
        if self.tune is not None and self.saves_changes and self.trainable != ("*",):
            raise ValueError(f"trainable: tune.method = {self.tune.method!r} itself says what is trained; leave it out")
        moe, ep = self.model.moe, self.parallel.ep
        if self.describes_model and ep > 1 and (moe is None or moe.router.num_experts % ep):
            raise ValueError(
                f"parallel.ep = {ep} does not divide model.moe.router.num_experts = "
                f"{0 if moe is None else moe.router.num_experts}"
            )
        if self.describes_model and self.balance.load_coef and (moe is None or not moe.router.noisy):
            raise ValueError("balance.load_coef needs a noisy router: model.moe.router.noisy = true")
        return self

    @property
    def describes_model(self) -> bool:
        """Whether `model` is this run's: one that starts from a checkpoint need not say what that holds."""
        return self.start is None or "model" in self.model_fields_set

    @property
    def saves_changes(self) -> bool:
        """Whether a checkpoint holds only what is trained, and names the model that it began with."""
        return self.tune is not None and self.tune.method != "full"

    @property
    def puts_beside(self) -> bool:
        """Whether everything that is trained stands beside the model, whose weights may then be packed."""
        return self.saves_changes and self.tune is not None and self.tune.method != "esft"
