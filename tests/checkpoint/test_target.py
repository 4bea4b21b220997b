"""Nothing that exists is replaced unless this program made it and the user asked."""

import os
from pathlib import Path

import pytest

from manyhands.checkpoint import building, verify
from manyhands.checkpoint.target import claim
from manyhands.errors import CheckpointError, UserError


def save(directory: Path, text: str = "x", **options: bool) -> None:
    with building(directory, **options) as new:
        (new / "config.json").write_text(text)
        (new / "README.md").write_text(text)


def content(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    (tmp_path / "dots").mkdir()
    (tmp_path / "dots" / ".hidden").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("theirs")
    (tmp_path / "theirs-by-link").symlink_to(tmp_path / "theirs")
    return tmp_path


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["", ".", "..", "~", "~/x", "/", "/dev/null", "../file", "../file/x", "../nothing", "../dots", "../theirs"]
)
def test_what_is_in_the_way_stays_and_is_named_in_one_line(place, name, overwrite):
    before = content(place)
    with pytest.raises(UserError) as caught, building(name, overwrite=overwrite):
        pytest.fail("nothing may be begun")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert content(place) == before and sorted(os.listdir(place)) == sorted(
        ["work", "file", "nothing", "dots", "theirs", "theirs-by-link"]
    )


def test_new_and_empty_folders_are_free(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep"):
        save(tmp_path / name)
        verify(tmp_path / name)


def test_ours_is_replaced_only_when_asked(tmp_path):
    save(tmp_path / "a", "old")
    with pytest.raises(UserError, match="--overwrite"):
        save(tmp_path / "a", "new")
    save(tmp_path / "a", "new", overwrite=True)
    assert (tmp_path / "a" / "config.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("what", ["added", "edited", "folder", "link", "replaced", "note"])
def test_a_manifest_does_not_make_others_files_ours(tmp_path, what):
    save(tmp_path / "a", "old")
    inside = tmp_path / "a"
    if what == "added":
        (inside / "thesis").write_text("years")
    elif what == "edited":
        (inside / "config.json").write_text("mine")
    elif what == "folder":
        (inside / "mine").mkdir()
    elif what == "link":
        (inside / "mine").symlink_to(tmp_path)
    elif what == "replaced":
        (inside / "config.json").unlink()
        (inside / "config.json").symlink_to(tmp_path / "elsewhere")
    else:
        (inside / "README.md").write_text("my notes")
    before = content(tmp_path)
    with pytest.raises(UserError, match="stays; choose another"):
        save(inside, "new", overwrite=True)
    assert content(tmp_path) == before


def test_a_file_that_comes_meanwhile_stays(tmp_path):
    with pytest.raises(UserError, match="not empty"), building(tmp_path / "a") as new:
        (new / "x").write_text("x")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "thesis").write_text("years")
    assert list(content(tmp_path)) == [str(tmp_path / "a" / "thesis")]


def test_source_and_target_are_never_one(place, monkeypatch):
    source = place / "theirs"
    monkeypatch.chdir(place)
    targets = ["theirs", "theirs/", "theirs/.", "theirs/../theirs", "./theirs", "theirs-by-link", str(source)]
    for target in targets:
        for read in (source, "theirs", "theirs-by-link"):
            with pytest.raises(UserError, match="the same directory"):
                claim(target, overwrite=True, sources=[read])
    with pytest.raises(UserError, match="inside the source"):
        claim("theirs-by-link/new/deep", sources=[source])
    save(place / "outer" / "run")
    with pytest.raises(UserError, match="holds the source"):
        claim("outer", overwrite=True, sources=["outer/run"])


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    with pytest.raises(UserError, match="mount point"):
        claim(tmp_path / "disk")


def test_an_edited_text_file_is_a_warning_and_an_edited_config_an_error(tmp_path, caplog):
    with building(tmp_path / "a") as new:
        for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json"):
            (new / name).write_text("{}")
    with open(tmp_path / "a" / "generation_config.json", "a") as file:
        file.write("\n")
    verify(tmp_path / "a")
    assert "'generation_config.json' is not as it was saved" in caplog.text and "manyhands convert" in caplog.text
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "a" / name).write_text("{")
        with pytest.raises(CheckpointError, match="1 bytes where the manifest says 2"):
            verify(tmp_path / "a")
        (tmp_path / "a" / name).write_text("{}")
    (tmp_path / "a" / "generation_config.json").unlink()
    (tmp_path / "a" / "generation_config.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify(tmp_path / "a")
