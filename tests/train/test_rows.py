"""Learning from rows: packed or padded the same losses and gradients; a run that resumes bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from manyhands.config import RunConfig
from manyhands.errors import ConfigError, DataError
from manyhands.files import PREPARED
from manyhands.models import Decoder, init_weights
from manyhands.parallel.ranks import Alone
from manyhands.text import Tokenizer
from manyhands.text.packing import RowBatch, RowBatches
from manyhands.text.pairs import NO_TARGET
from manyhands.trace.journal import read_journal
from manyhands.trace.recording import Trace
from manyhands.train import loop
from manyhands.train.guard import SpikeGuard
from manyhands.train.optim import Optimizers
from manyhands.train.row_data import TOKENIZER_FILES, RowData, prepare_rows
from manyhands.train.rows import Rows, check_rows, evaluate_rows
from manyhands.train.step import StepResult, train_step

from ..small_runs import small_run, write_text
from ..thread_ranks import ThreadRanks, on_ranks

PLAIN = ["rows.chat_template=plain", "train.micro_batch_size=2"]


def write_rows(folder: Path, count: int = 60) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for i in range(count):
            question, answer = f"what is {i % 7}?", f"{'abcde'[i % 5] * (i % 3 + 1)}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages if i % 4 else [*messages, *messages]}) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    path = folder / "tokenizer.json"
    Tokenizer.train([write_text(folder).read_text(), write_rows(folder).read_text()], 300).save(path)
    return path


def row_run(source: Path | str, tokenizer: Path, *changes: str) -> RunConfig:
    return small_run(
        Path(source), f"data.tokenizer={tokenizer}", *PLAIN, "train.sequence_length=96",
        "model.max_position_embeddings=96", "data.valid_fraction=0.2", *changes,
    )  # fmt: skip


@pytest.fixture
def prepared(tmp_path: Path, tokenizer_file: Path) -> tuple[RunConfig, RowData]:
    run = row_run(write_rows(tmp_path), tokenizer_file)
    return run, prepare_rows(tmp_path / "data", run, lambda _: None)


def take(run: RunConfig, batch: RowBatch, ranks: Any = None) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """One step in float64 that changes nothing, and its gradients."""
    model = Decoder(run.model, "eager")
    init_weights(model, 0)
    model.double().train()
    result = train_step(model, Optimizers([]), SpikeGuard(run.guard), batch, run, 1, 0.0, torch.float64, Rows(), ranks)
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: Any, other: Any) -> None:
    assert one[0].loss == pytest.approx(other[0].loss, rel=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=1e-6 * float(gradient.abs().max()))


CLIP = "optim.grad_clip=null"


def test_packed_padded_and_one_by_one_are_the_same(prepared: tuple[RunConfig, RowData], tmp_path: Path) -> None:
    """And what it means, from PyTorch: the sum over all targets over their number. Balance is another matter."""
    run, data = prepared
    run = run.model_copy(update={"balance": run.balance.model_copy(update={"aux_loss_coef": 0.0})})
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"grad_clip": None})})
    packed = next(Rows().batches(data, run, Alone()))
    assert max(len(sequence) for sequence in packed.sequences) > 1
    padded = RowBatch(packed.sequences, packed=False)
    whole = take(run, packed)
    assert_same(whole, take(run, padded))
    single = RowBatch(tuple((row,) for row in packed.rows), packed=True)
    one_by_one = run.model_copy(update={"train": run.train.model_copy(update={"micro_batch_size": 1})})
    assert_same(whole, take(one_by_one, single))
    model = Decoder(run.model, "eager")
    init_weights(model, 0)
    model.double()
    nats: Any = sum(
        F.cross_entropy(model(read[None]).logits[0].float(), labels, ignore_index=NO_TARGET, reduction="sum")
        for read, labels in packed.rows
    )
    assert whole[0].loss == pytest.approx(float(nats.detach()) / packed.targets, rel=1e-5)
    assert whole[0].count.targets == packed.targets < whole[0].count.tokens == sum(packed.lengths)
    assert whole[0].loss == pytest.approx(evaluate_rows(model, packed.split(1)).loss, rel=1e-6)


def test_ranks_together_are_one(prepared: tuple[RunConfig, RowData]) -> None:
    """Each has its sequences, of as many tokens and targets as they happen to have."""
    run, data = prepared
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"grad_clip": None})})

    def work(ranks: ThreadRanks) -> tuple[StepResult, dict[str, torch.Tensor]]:
        return take(run, next(Rows().batches(data, run, ranks)), ranks)

    [whole] = on_ranks(1, work)
    parts = on_ranks(2, work)
    assert parts[0][0].count == parts[1][0].count == whole[0].count
    assert parts[0][0].loss == pytest.approx(whole[0].loss, rel=1e-6)


def test_what_is_prepared(prepared: tuple[RunConfig, RowData], tmp_path: Path) -> None:
    """Whole rows on one side or the other, those alike on one; what was read is written down."""
    run, data = prepared
    told = json.loads((tmp_path / "data" / PREPARED).read_text())["rows"]
    assert told["sources"] == list(run.data.sources) and told["train"]["rows"] + told["valid"]["rows"] == 60
    assert told["train"]["targets"] == int(data.train_rows.learnt.sum()) and told["cut"] == told["left_out"] == 0

    def texts(rows: Any) -> set[str]:
        return {data.tokenizer.decode(rows.row(n)[0].tolist()) for n in range(len(rows))}

    train, valid = texts(data.train_rows), texts(data.valid_rows)
    assert train and valid and not train & valid
    share = told["valid"]["targets"] / (told["valid"]["targets"] + told["train"]["targets"])
    assert 0.1 < share < 0.3
    assert all(text.startswith("### user\nwhat is ") and text.endswith("<|endoftext|>") for text in train)
    again = prepare_rows(tmp_path / "data", run, lambda _: None)
    assert again.sha256 == data.sha256 and len(again.sha256) >= 8
    assert again.tokenizer.chat_template == data.tokenizer.chat_template is not None


@pytest.mark.parametrize("name", ["train.targets.npy", f"{TOKENIZER_FILES}/chat_template.jinja"])
def test_changed_files_are_refused(prepared: tuple[RunConfig, RowData], tmp_path: Path, name: str) -> None:
    path = tmp_path / "data" / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{name}: not what was prepared for this run"):
        prepare_rows(tmp_path / "data", prepared[0], lambda _: None)


def test_long_rows(tmp_path: Path, tokenizer_file: Path) -> None:
    """A conversation loses its end, and is left out and counted where it loses all targets; a text is cut in pieces."""

    def chat(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    path = tmp_path / "rows.jsonl"
    records = [chat(str(i), "b") for i in range(8)] + [chat("x " * 160, "lost"), chat("short", "y " * 160)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    said: list[str] = []
    data = prepare_rows(tmp_path / "data", row_run(path, tokenizer_file), said.append)
    assert any("2 rows are longer than train.sequence_length = 96" in line for line in said)
    assert any(f"left out 1 rows with nothing to learn before the cut ({path}:9)" in line for line in said)
    assert max(data.train_rows.lengths.max(), data.valid_rows.lengths.max()) <= 97
    assert len(data.train_rows) + len(data.valid_rows) == 9

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} " + "the hands are many " * (10 * i)}) + "\n" for i in range(5)))
    run = row_run(text, tokenizer_file)
    data = prepare_rows(tmp_path / "texts", run, said.append)
    kept = [rows.row(n) for rows in (data.train_rows, data.valid_rows) for n in range(len(rows))]
    targets = sum(int(learnt.sum()) for _, learnt in kept)
    tokens = sum(len(data.tokenizer.encode(json.loads(line)["text"])) for line in text.read_text().splitlines())
    assert targets == tokens, "every token but the first of each text, and its end, once"


def test_nothing_left_to_learn_is_an_error(tmp_path: Path, tokenizer_file: Path) -> None:
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "x " * 200}, {"role": "assistant", "content": "y"}]
    path.write_text((json.dumps({"messages": messages}) + "\n") * 3)
    with pytest.raises(DataError, match=r"too few rows to hold out|no row is left"):
        prepare_rows(tmp_path / "data", row_run(path, tokenizer_file), lambda _: None)


def test_held_out_rows_of_their_own(tmp_path: Path, tokenizer_file: Path) -> None:
    other = tmp_path / "valid.jsonl"
    other.write_text("".join(write_rows(tmp_path).read_text().splitlines(True)[:3]))
    said: list[str] = []
    run = row_run(write_rows(tmp_path), tokenizer_file, f"data.valid=['{other}']")
    data = prepare_rows(tmp_path / "data", run, said.append)
    assert len(data.valid_rows) == 3 and len(data.train_rows) < 60 - 2
    assert any("rows that are held out too (data.valid)" in line for line in said)


def test_a_run_resumes_bit_for_bit(tmp_path: Path, tokenizer_file: Path) -> None:
    """And its checkpoint can chat: it has the template that it was tuned with."""
    path = write_rows(tmp_path)
    whole = loop.train(tmp_path / "whole", row_run(path, tokenizer_file, "train.max_steps=6"), quiet=True)
    changes = "train.max_steps=6", "train.save_every=3"
    with pytest.MonkeyPatch.context() as patch:
        real = loop.save

        def save_and_die(trainer: loop.Trainer) -> Path:
            real(trainer)
            raise KeyboardInterrupt

        patch.setattr(loop, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            loop.train(tmp_path / "parts", row_run(path, tokenizer_file, *changes), quiet=True)
    path.unlink()  # the sources are not read again
    parts = loop.train(tmp_path / "parts", row_run(path, tokenizer_file, *changes), quiet=True)
    one, two = (
        {r["step"]: r["loss"] for r in read_journal(tmp_path / name / "journal.jsonl") if r["kind"] == "step"}
        for name in ("whole", "parts")
    )
    assert one == two and len(one) == 6 and one[6] < one[1]
    assert (whole.checkpoint / "model.safetensors").read_bytes() == (
        parts.checkpoint / "model.safetensors"
    ).read_bytes()
    assert whole.valid_loss == parts.valid_loss and np.isnan(whole.valid_bits_per_byte)
    kept = Tokenizer.from_directory(whole.checkpoint)
    assert kept.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).endswith("### assistant\n")


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_trace_knows_the_rows(tmp_path: Path, tokenizer_file: Path, packing: str) -> None:
    run = row_run(write_rows(tmp_path), tokenizer_file, "train.max_steps=1", "trace.every=1", f"rows.packing={packing}")
    loop.train(tmp_path / "run", run, quiet=True)
    trace = Trace.open(next((tmp_path / "run" / "traces").iterdir()))
    part = next(iter(trace.parts()))
    starts = np.flatnonzero(np.asarray(part.position) == 0)
    assert len(starts) == len(set(np.asarray(part.sequence).tolist())) >= 4
    assert (np.asarray(part.token_ids) >= 0).all()


REFUSED = {
    "sequence balance": (["balance.aux_scope=sequence"], "aux_scope = 'sequence': packed rows share a sequence"),
    "DeepSeek's balance": (["balance.sequence_loss_coef=0.1"], "sequence_loss_coef: packed rows share"),
    "room per sequence": (
        ["model.moe.router.capacity_factor=1.0", "model.moe.router.capacity_per=sequence"],
        "shares out each sequence",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_packing_cannot_do_is_refused_before_work(tmp_path: Path, tokenizer_file: Path, name: str) -> None:
    changes, words = REFUSED[name]
    path = write_rows(tmp_path)
    with pytest.raises(ConfigError, match=f"{words}.*rows.packing=false"):
        loop.train(tmp_path / "run", row_run(path, tokenizer_file, *changes), quiet=True)
    check_rows(row_run(path, tokenizer_file, *changes, "rows.packing=false"))


def test_other_models_and_no_tokenizer_are_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    path = write_rows(tmp_path)
    with pytest.raises(ConfigError, match="rows: name the tokenizer"):
        check_rows(row_run(path, tokenizer_file, "data.tokenizer=null"))
    with pytest.raises(
        ConfigError, match=r"no chat template, and these are conversations: say rows.chat_template=plain"
    ):
        prepare_rows(tmp_path / "data", row_run(path, tokenizer_file, "rows.chat_template=null"), lambda _: None)
    with pytest.raises(ConfigError, match=r"rows.chat_template = 'nowhere.jinja': cannot be read"):
        prepare_rows(
            tmp_path / "data", row_run(path, tokenizer_file, "rows.chat_template=nowhere.jinja"), lambda _: None
        )
    with pytest.raises(DataError, match="this run's data is plain text"):
        Rows().batches(object(), row_run(path, tokenizer_file), None)  # type: ignore[arg-type]


def test_rows_make_a_run_what_it_is(tmp_path: Path, tokenizer_file: Path) -> None:
    """They cannot change on the way, nor come or go."""
    path = write_rows(tmp_path)
    loop.train(tmp_path / "run", row_run(path, tokenizer_file, "train.max_steps=1"), quiet=True)
    for changes in (["rows.turns=last"], ["rows=null"]):
        with pytest.raises(ConfigError, match="holds another run: its rows"):
            loop.train(tmp_path / "run", row_run(path, tokenizer_file, "train.max_steps=1", *changes), quiet=True)


def test_batches_are_of_rows(prepared: tuple[RunConfig, RowData]) -> None:
    run, data = prepared
    assert isinstance(Rows().batches(data, run, Alone()), RowBatches)
