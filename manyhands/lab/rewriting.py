"""Small encoder-decoders that learn span corruption on real text: T5 and Switch, trained by `manyhands train` itself.

E experts, K experts per token, F width of a network.
"""

from manyhands.config import EncoderDecoderConfig, RunConfig
from manyhands.config.load import parse_run
from manyhands.lab.experiment import Arm
from manyhands.lab.job import Job
from manyhands.lab.language import changed, sources
from manyhands.plan.count_kind import count_any, router_flops, sequence_flops
from manyhands.text import SpanRule

_REGIME = """
data: {valid_fraction: 0.02}
spans: {sentinels: 32}
model:
  kind: encoder_decoder
  vocab_size: 544
  hidden_size: 64
  num_hidden_layers: 2
  num_decoder_layers: 2
  intermediate_size: 152
  num_attention_heads: 2
  head_dim: 32
balance: {aux_loss_coef: 0.01}
optim: {lr: 0.006, embed_lr_scale: 3, weight_decay: 0.0, ns_steps: 3}
schedule: {warmup_steps: 20, decay_fraction: 0.0}
train: {sequence_length: 128, batch_size: 64, save_seconds: 0}
"""
"""The standard library's sources; 8,192 tokens read and 1,856 written in a step; Muon at a constant rate."""
_SMALL = """
data: {valid_fraction: 0.02}
spans: {sentinels: 16}
model:
  kind: encoder_decoder
  vocab_size: 384
  hidden_size: 32
  num_hidden_layers: 2
  num_decoder_layers: 2
  intermediate_size: 64
  num_attention_heads: 2
  head_dim: 16
balance: {aux_loss_coef: 0.01}
optim: {lr: 0.01, embed_lr_scale: 3, weight_decay: 0.0, ns_steps: 3}
schedule: {warmup_steps: 5, decay_fraction: 0.0}
train: {sequence_length: 64, batch_size: 16, save_seconds: 0}
"""
"""The same for a few seconds, on a few packages of the standard library."""


def t5(job: Job, steps: int, quick_steps: int, *settings: str) -> RunConfig:
    """The dense run: `steps` long, or `quick_steps` if the job is a quick one; `settings` are `section.key=value`."""
    basic = [f"data.sources={sources(job)}", f"train.max_steps={quick_steps if job.quick else steps}"]
    return parse_run(_SMALL if job.quick else _REGIME, "the lab's regime", [*basic, *settings])


def switch(run: RunConfig, E: int, K: int, F: int, capacity: float) -> RunConfig:
    """`run` with every layer of both stacks sparse, and a capacity factor while training; evaluation drops nothing."""
    model = _model(run)
    return changed(
        run,
        f"model.intermediate_size={F}",
        f"model.num_sparse_encoder_layers={model.num_hidden_layers}",
        f"model.num_sparse_decoder_layers={model.num_decoder_layers}",
        f"model.router={{num_experts: {E}, num_experts_per_tok: {K}, capacity_factor: {capacity}}}",
    )


def equal_width(E: int, K: int, F: int) -> int:
    """Width of the dense network of equal FLOPs, the router's counted in: two matrices of D·F against one of D·E."""
    return K * F + E // 2


def arm(run: RunConfig, name: str, note: str = "") -> Arm:
    """Its sizes; FLOPs are those of a forward pass of one text, read and written."""
    model, counts = _model(run), count_any(run.model)
    rule = SpanRule(range(run.spans.sentinels), 1, run.spans.noise_density, run.spans.mean_span_length)
    lengths = rule.lengths(rule.text_length(run.train.sequence_length))
    flops = sequence_flops(model, *lengths) + router_flops(model, *lengths)
    return Arm(name, counts.total, counts.active_without_embedding, flops, note)


def _model(run: RunConfig) -> EncoderDecoderConfig:
    assert isinstance(run.model, EncoderDecoderConfig)
    return run.model
