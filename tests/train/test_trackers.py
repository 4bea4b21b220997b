import sys
import types
from pathlib import Path

import pytest

from manyhands.errors import ConfigError
from manyhands.trace.journal import Journal, read_journal
from manyhands.train.trackers import open_tracker


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_tracker_is_one_line_that_says_what_to_do(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    what = r"'manyhands\[track\]'" if name == "tensorboard" else name
    with pytest.raises(ConfigError, match=f"{name} is not installed; run: pip install {what}"):
        open_tracker(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


class FakeTracker(types.ModuleType):
    """Looks like wandb."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__("wandb")
        self.calls: list[object] = []
        self.broken = broken

    def init(self, **kwargs: object) -> None:
        self.calls.append(kwargs)

    def log(self, metrics: dict, step: int) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.calls.append((metrics, step))

    def finish(self) -> None:
        self.calls.append("finish")


def test_a_tracker_gets_steps_and_evals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Journal(tmp_path / "j", [open_tracker("wandb", tmp_path, 7, {"optim": {"lr": 1}})]) as journal:
        journal.write("start", step=0, parameters=5)
        journal.write("step", step=1, loss=2.0)
    started, *rest = fake.calls
    assert rest == [({"train/loss": 2.0}, 1), "finish"]
    open_tracker("wandb", tmp_path, 8, {"optim": {"lr": 2}})
    again = fake.calls[3]
    for call, lr in ((started, 1), (again, 2)):
        assert isinstance(call, dict) and call["config"] == {"optim": {"lr": lr}} and call["resume"] == "allow"
        assert call["name"] == tmp_path.name and call["id"] == started["id"]  # the same run goes on


def test_tensorboard_forgets_what_a_killed_process_told_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = types.ModuleType("tensorboard"), []

    class Writer:
        def __init__(self, **kwargs: object) -> None:
            calls.append(kwargs)

        def add_text(self, *args: object) -> None:
            calls.append(args)

        def close(self) -> None:
            pass

    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    open_tracker("tensorboard", tmp_path, 40, {"optim": {}}).close()
    assert calls[0] == {"log_dir": str(tmp_path / "tensorboard"), "purge_step": 41}
    assert calls[1][0] == "config" and '"optim"' in calls[1][1]


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeTracker(broken=True))
    with Journal(tmp_path / "j", [open_tracker("wandb", tmp_path)]) as journal:
        journal.write("step", step=1, loss=2.0)
        journal.write("step", step=2, loss=2.0)
    assert len(read_journal(tmp_path / "j")) == 2
    assert [record.getMessage() for record in caplog.records] == ["RunTracker stopped: no network"]
