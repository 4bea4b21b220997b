"""Encoder-decoders: what they learn from a text, how it is counted, and that a run goes on bit for bit."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from manyhands.checkpoint.model import load
from manyhands.config import EncoderDecoderConfig, RouterConfig, RunConfig
from manyhands.config.load import dump_run, load_preset, parse_run
from manyhands.errors import ConfigError
from manyhands.models.encoder_decoder import EncoderDecoder
from manyhands.parallel.ranks import Alone
from manyhands.text import pad_pairs
from manyhands.trace.journal import read_journal
from manyhands.train.data import RunData, prepare_data
from manyhands.train.guard import SpikeGuard
from manyhands.train.loop import train
from manyhands.train.optim import build_optimizers
from manyhands.train.seq2seq import SequencePairs, SpanCorruption, task_of
from manyhands.train.step import train_step
from manyhands.train.task import Forward, LanguageModelling

from ..small_runs import manyhands, small_run, write_text

SMALL = [
    "spans.sentinels=8",
    "model.vocab_size=300",
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.head_dim=8",
    "model.router.num_experts=4",
    "train.sequence_length=32",
    "train.batch_size=8",
    "train.max_steps=8",
]
PAIRS = [([row % 7 + 2] * (row % 3 + 1), [row % 7 + 2, 1]) for row in range(30)]


def small(text: Path, *changes: str) -> RunConfig:
    return load_preset("switch-tiny", [*SMALL, f"data.sources=['{text}']", *changes])


def tiny_model(sparse: bool = True) -> EncoderDecoder:
    torch.manual_seed(0)
    router = {"router": RouterConfig(num_experts=4, num_experts_per_tok=1)} if sparse else {}
    layers = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1} if sparse else {}
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_decoder_layers": 2}
    heads = {"intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}
    return EncoderDecoder(EncoderDecoderConfig.model_validate({**sizes, **heads, **layers, **router}))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def test_the_loss_is_the_mean_over_targets_alone() -> None:
    model, task = tiny_model(), SequencePairs(PAIRS, PAIRS)
    batch = pad_pairs(PAIRS[:5])
    assert task.count(batch).tokens == int(batch.mask_BS.sum()) + 10 and task.count(batch).targets == 10
    loss = task.loss(model, batch, Forward(torch.float32))
    nats = []
    for source, target in PAIRS[:5]:  # each by itself, without padding
        logits = model(torch.tensor([source]), torch.tensor([[0, *target[:-1]]])).logits[0]
        nats.append(F.cross_entropy(logits, torch.tensor(target), reduction="none"))
    torch.testing.assert_close(loss.mean, torch.cat(nats).mean(), rtol=1e-5, atol=1e-6)
    assert sorted(loss.routings) == model.config.sparse_layers == [1, 3]
    masked = [int(routing.token_mask.sum()) for routing in loss.routings.values()]
    assert masked == [int(batch.mask_BS.sum()), 10]


def test_micro_batches_weigh_by_their_targets(text: Path) -> None:
    """Pairs of very different lengths: the gradient is that of the whole batch at once."""
    pairs = [([2, 3, 4], [5] * n) for n in (9, 1, 1, 1)]
    gradients = []
    for size in (4, 2, 1):
        run = small(text, "balance.aux_loss_coef=0", "optim.name=adamw", "train.batch_size=4")
        run = parse_run(dump_run(run), "run", [f"train.micro_batch_size={size}"])
        model, task = tiny_model(sparse=False), SequencePairs(pairs, pairs)
        optimizers = build_optimizers(model, run.optim)
        batch = next(task.batches(None, run, Alone()))  # type: ignore[arg-type]
        result = train_step(model, optimizers, SpikeGuard(run.guard), batch, run, 1, 1e-9, torch.float32, task)
        assert result.count.targets == 12 and result.count.tokens == 24
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_it_learns_to_copy(text: Path, name: str) -> None:
    rate = {"muon": 0.02, "adafactor": 0.1}[name]
    run = small(text, f"optim.name={name}", f"optim.lr={rate}", "train.batch_size=15")
    model, task = tiny_model(), SequencePairs(PAIRS, PAIRS)
    optimizers, batches = build_optimizers(model, run.optim), task.batches(None, run, Alone())  # type: ignore[arg-type]
    guard = SpikeGuard(run.guard)
    before = task.validate(model, None, run, torch.float32).loss  # type: ignore[arg-type]
    for step in range(35):
        train_step(model, optimizers, guard, next(batches), run, step, rate, torch.float32, task)
    after = task.validate(model, None, run, torch.float32)  # type: ignore[arg-type]
    assert before > 2.5 and after.loss < 0.5 and after.tokens == 60 and sorted(after.load) == [1, 3]


def prepared(run: RunConfig, folder: Path) -> RunData:
    return prepare_data(folder, run, lambda line: None)


def test_the_tokenizer_is_laid_out_as_t5s_and_validation_is_the_same_for_every_seed(text: Path, tmp_path: Path) -> None:
    run = small(text)
    data, task = prepared(run, tmp_path), SpanCorruption()
    tokenizer = data.tokenizer
    top = tokenizer.vocab_size - 1
    assert tokenizer.eos_token_id == 1 and tokenizer.sentinel_ids == list(range(top, top - 8, -1))
    assert tokenizer.decode([0, 1, top]) == "<pad></s><extra_id_0>"
    assert tokenizer.encode("a</s><extra_id_0>") == [*tokenizer.encode("a"), *tokenizer.encode("</s><extra_id_0>")]
    assert top not in tokenizer.encode("<extra_id_0>") and tokenizer.encode("<extra_id_0>", parse_special=True) == [top]
    batch = next(task.batches(data, run, Alone()))
    assert batch.ids_BS.shape == (8, 32) and batch.labels_BT[:, 0].tolist() == [top] * 8
    torch.manual_seed(0)
    model = EncoderDecoder(run.model)
    losses = [
        task.validate(model, data, parse_run(dump_run(run), "run", [f"train.seed={seed}"]), torch.float32)
        for seed in (0, 1)
    ]
    assert losses[0].loss == losses[1].loss and losses[0].bits_per_byte is None


def test_a_run_goes_on_bit_for_bit_and_writes(text: Path, tmp_path: Path) -> None:
    """With dropped tokens, Adafactor's state and spans that straddle a checkpoint."""
    changes = ["optim.name=adafactor", "optim.lr=0.05", "schedule.decay_fraction=0", "schedule.warmup_steps=0"]
    run = small(text, *changes)
    whole = train(tmp_path / "whole", run, quiet=True)
    train(tmp_path / "parts", small(text, *changes, "train.max_steps=3"), quiet=True)
    parts = train(tmp_path / "parts", run, quiet=True)
    assert parts.valid_loss == whole.valid_loss and whole.steps == 8
    ours, theirs = (load(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [record for record in read_journal(tmp_path / "whole/journal.jsonl") if record["kind"] == "step"]
    assert sorted(steps[-1]["moe"]) == ["0", "1", "2", "3"] and steps[0]["loss"] > steps[-1]["loss"]
    assert any(record["moe"]["0"]["dropped"] for record in steps)
    report = (tmp_path / "whole/report.html").read_text()
    assert "layer 3" in report.lower() and "encoder_decoder" in report
    assert "spans:" in (tmp_path / "whole/run.yaml").read_text()

    asked = ["generate", str(tmp_path / "whole"), "--prompt", "line <extra_id_0>: aaa", "--temperature", "0"]
    done = manyhands(*asked, "--max-new-tokens", "6", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 1 <= len(found["token_ids"]) <= 6 and found["filled"].startswith("line ")
    shown = manyhands(*asked, "--max-new-tokens", "6", "-q")
    assert shown.returncode == 0 and shown.stderr == ""
    for flags, word in (
        (["--exact"], "--exact"),
        (["--show-routing"], "--show-routing"),
        (["--speculate", "2"], "--s"),
    ):
        refused = manyhands(*asked, *flags)
        assert refused.returncode != 0 and word in refused.stderr and "encoder-decoder" in refused.stderr
    refused = manyhands("chat", str(tmp_path / "whole"))
    assert refused.returncode != 0 and "encoder_decoder" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("spans.sentinels=1", r"sequence_length = 32: a text has 2 spans, and there are 1 sentinels"),
        ("model.vocab_size=264", r"vocab_size = 264: .* needs 266 .* spans.sentinels = 8"),
        ("trace.every=1", r"trace.every = 1"),
        ("train.sequence_length=2", r"sequence_length = 2"),
    ],
)
def test_what_cannot_be_trained_is_said_first(text: Path, tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        train(tmp_path / "run", small(text, change), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_sentinels_is_refused(text: Path, tmp_path: Path) -> None:
    data = prepared(small_run(text), tmp_path)
    with pytest.raises(ConfigError, match="no sentinels"):
        SpanCorruption().batches(data, small(text), Alone())


def test_spans_are_an_encoder_decoders() -> None:
    decoder = load_preset("tiny")
    assert isinstance(task_of(decoder), LanguageModelling) and "spans" not in dump_run(decoder)
    with pytest.raises(ConfigError, match="spans is what an encoder-decoder learns"):
        load_preset("tiny", ["spans.noise_density=0.5"])
