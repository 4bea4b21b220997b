"""`train --out` touches nothing that is not a run of ours, and a start that fails leaves nothing behind."""

import json

import pytest

from manyhands.checkpoint import RunDirectory
from manyhands.cli.train import train as train_command
from manyhands.config.load import dump_run, load_preset
from manyhands.errors import ConfigError, DataError, UserError
from manyhands.train.loop import train


def start(folder):
    train(folder, load_preset("quickstart", ["data.sources=[no-such-file]"]), quiet=True)


def content(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def theirs(tmp_path):
    folder = tmp_path / "theirs"
    for name in ("checkpoints/step-00000300/thesis", ".notes.partial-7", "data/tokenizer.json", "report.html"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize("extra", [None, "run.yaml", ".manyhands-run.json"])
def test_a_folder_that_is_no_run_is_refused_untouched(theirs, extra):
    if extra:
        (theirs / extra).write_text("{}")
    before = content(theirs)
    with pytest.raises(UserError, match="holds no run of this program"):
        start(theirs)
    assert content(theirs) == before


def test_a_failed_start_leaves_nothing(tmp_path):
    for folder in ("new", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="no-such-file"):
            start(tmp_path / folder)
        assert content(tmp_path) == {}


def test_a_run_made_before_there_was_a_mark_is_known(tmp_path):
    run = RunDirectory(tmp_path)
    run.config_file.write_text(dump_run(load_preset("quickstart", [])))
    with pytest.raises(UserError):
        run.check_ours()
    run.journal_file.write_text(json.dumps({"kind": "start", "step": 0}) + "\n")
    run.check_ours()


def test_resume_and_out_are_not_both(tmp_path):
    with pytest.raises(ConfigError, match="leave --out away"):
        train_command(resume=tmp_path, out=tmp_path / "b")


def test_in_a_run_only_our_names_are_swept(tmp_path):
    run = RunDirectory(tmp_path)
    with run.lock():
        mine = run.checkpoint_path(300)
        mine.mkdir(parents=True)
        (mine / "thesis").write_text("mine")
        (tmp_path / ".notes.partial-7").write_text("mine")
        (tmp_path / ".run.yaml.partial-7").write_text("half")
        run.clean_partial()
        assert (mine / "thesis").is_file() and (tmp_path / ".notes.partial-7").is_file()
        assert not (tmp_path / ".run.yaml.partial-7").exists()
