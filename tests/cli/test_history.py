"""What was typed in a chat: kept for one user, bounded, of several sessions, and never a reason to stop."""

from pathlib import Path

import pytest

from manyhands.cli import history
from manyhands.cli.history import MOST, add_history, history_file, kept_history, read_history
from manyhands.cli.loudness import heard

readline = pytest.importorskip("readline")


def test_the_place_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "manyhands" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # the specification: then it is not set
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert history_file() == tmp_path / "home" / ".local" / "state" / "manyhands" / "chat_history"


def test_the_newest_lines_stay(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history"
    add_history(path, [])
    assert not path.parent.exists()
    add_history(path, ["one\ntwo", "  ", "x" * 5000, "drei ä"])
    assert read_history(path) == ["one", "two", "drei ä"] and path.stat().st_mode & 0o777 == 0o600
    add_history(path, [str(number) for number in range(MOST)])
    assert read_history(path) == [str(number) for number in range(MOST)]
    assert [entry.name for entry in path.parent.iterdir()] == ["history"]


def test_two_sessions_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "history"
    add_history(path, ["before"])
    readline.clear_history()
    with kept_history(path):
        assert readline.get_history_item(1) == "before"
        readline.add_history("here")
        add_history(path, ["meanwhile, in another"])
    assert read_history(path) == ["before", "meanwhile, in another", "here"]
    readline.clear_history()


def test_what_is_no_history_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readline.clear_history()
    with heard(), kept_history(tmp_path):  # a folder
        readline.add_history("typed")
    err = capsys.readouterr().err
    assert "cannot be read" in err and "cannot be written" in err
    path = tmp_path / "history"
    path.write_bytes(b"\xff\0caf\xc3\xa9\n" * 3)
    monkeypatch.setattr(history, "_BYTES", 8)
    assert read_history(path) == ["�café"]
    readline.clear_history()
