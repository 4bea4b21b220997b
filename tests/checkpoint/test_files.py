"""Atomic writes: whole or not at all, whatever happens, and every damage is seen."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manyhands.checkpoint import building, files, remove, save_tensors, verify
from manyhands.errors import CheckpointError, StorageError, UserError
from manyhands.files import write_atomic

MIB = 1 << 20


def save(directory: Path, text: str = "hello") -> None:
    with building(directory, overwrite=True) as new:
        (new / "sub").mkdir()
        (new / "a.txt").write_text(text)
        (new / "sub" / "b.txt").write_text(text * 2)


def tree(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


@pytest.fixture(params=["tmpfs", "limit"])
def small_disk(request, tmp_path):
    """A directory in which no more than 16 MiB fit: a full disk as root, a file size limit for everyone."""
    if request.param == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a tmpfs needs root")
        yield tmp_path, "No space left on device"
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    else:  # Python ignores SIGXFSZ, so the write fails with EFBIG
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 * MIB, hard))
        yield tmp_path, "File too large"
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_atomic_writes_replaces_and_makes_parents(tmp_path):
    path = tmp_path / "deep" / "er" / "x.txt"
    write_atomic(path, "één")
    assert path.read_bytes() == "één".encode()
    write_atomic(path, b"\0two")
    assert path.read_bytes() == b"\0two"
    assert tree(tmp_path) == ["deep", "deep/er", "deep/er/x.txt"]


def test_write_atomic_follows_a_link_and_refuses_what_is_no_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "x"
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(StorageError, match="not a regular file"):
            write_atomic(path, "x")
    with pytest.raises(StorageError, match="cannot write"):
        write_atomic(tmp_path / "real" / "below-a-file", "x")


def test_full_disk_keeps_the_old_file(small_disk):
    disk, reason = small_disk
    write_atomic(disk / "x", "old")
    with pytest.raises(StorageError) as caught:
        write_atomic(disk / "x", bytes(20 * MIB))
    assert str(caught.value) == f"cannot write {disk}/x: {reason}; what was there before is unchanged"
    assert caught.value.exit_code == 1
    assert (disk / "x").read_text() == "old"
    assert tree(disk) == ["x"]


@pytest.mark.parametrize("mebibytes", [3, 20], ids=["fits", "does-not-fit"])
def test_full_disk_keeps_the_old_checkpoint(small_disk, mebibytes):
    disk, reason = small_disk
    save(disk / "ckpt")
    before = tree(disk)
    try:
        with building(disk / "ckpt", overwrite=True) as new:
            save_tensors(new / "w.safetensors", {"w": torch.ones(mebibytes * MIB // 4)})
    except StorageError as error:
        assert mebibytes == 20
        assert reason in str(error) and str(error).startswith(f"cannot write {disk}/ckpt/w.safetensors: ")
        assert "\n" not in str(error) and "partial" not in str(error)
        verify(disk / "ckpt")
        assert tree(disk) == before
    else:
        assert mebibytes == 3
        assert set(verify(disk / "ckpt").files) == {"w.safetensors"}


def test_full_disk_in_plain_writes_becomes_a_storage_error(small_disk):
    disk, reason = small_disk
    with pytest.raises(StorageError, match=f"cannot write {disk}/ckpt: {reason}"), building(disk / "ckpt") as new:
        (new / "x").write_bytes(bytes(20 * MIB))
    assert tree(disk) == []


def test_building_makes_a_complete_directory_that_others_may_read(tmp_path):
    save_mask = os.umask(0o022)
    try:
        with building(tmp_path / "new" / "ckpt") as new:
            assert new.parent == tmp_path / "new"  # the same file system, or the rename would fail with EXDEV
            save_tensors(new / "w.safetensors", {"w": torch.ones(3)})
    finally:
        os.umask(save_mask)
    ckpt = tmp_path / "new" / "ckpt"
    assert tree(tmp_path / "new") == ["ckpt", "ckpt/manifest.json", "ckpt/w.safetensors"]
    assert (ckpt / "w.safetensors").stat().st_mode & 0o777 == 0o644
    manifest = json.loads((ckpt / "manifest.json").read_text())
    assert manifest["format"] == "manyhands" and manifest["version"] == 1
    assert manifest["files"]["w.safetensors"]["size"] == (ckpt / "w.safetensors").stat().st_size


def test_building_through_a_link_stays_on_the_target_s_file_system(tmp_path):
    (tmp_path / "elsewhere" / "ckpt").mkdir(parents=True)
    (tmp_path / "ckpt").symlink_to(tmp_path / "elsewhere" / "ckpt")
    with building(tmp_path / "ckpt") as new:
        assert new.parent == tmp_path / "elsewhere"
        (new / "x").write_text("x")
    assert (tmp_path / "ckpt").is_symlink()
    verify(tmp_path / "ckpt")


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_in_the_block_leaves_everything_as_it_was(tmp_path, error):
    save(tmp_path / "ckpt")
    before = tree(tmp_path)
    with pytest.raises(type(error)) as caught, building(tmp_path / "ckpt", overwrite=True) as new:
        (new / "x").write_text("half")
        raise error
    assert caught.value is error
    assert tree(tmp_path) == before
    verify(tmp_path / "ckpt")


def test_replacing_a_complete_checkpoint(tmp_path):
    save(tmp_path / "ckpt", "old")
    with building(tmp_path / "ckpt", overwrite=True) as new:
        (new / "only.txt").write_text("new")
        verify(tmp_path / "ckpt")  # the old one survives until the new one is complete
    assert tree(tmp_path) == ["ckpt", "ckpt/manifest.json", "ckpt/only.txt"]


def test_another_s_directory_under_our_temporary_name_stays(tmp_path):
    save(tmp_path / "ckpt", "old")
    theirs = tmp_path / f".ckpt.partial-{os.getpid()}"
    theirs.mkdir()
    (theirs / "junk").write_text("junk")
    (tmp_path / ".ckpt.replaced-5").mkdir()
    (tmp_path / ".ckpt.replaced-5" / "thesis").write_text("years")
    save(tmp_path / "ckpt", "new")
    assert (tmp_path / "ckpt" / "a.txt").read_text() == "new"
    assert (theirs / "junk").is_file() and (tmp_path / ".ckpt.replaced-5" / "thesis").is_file()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_person_s_files_survive_a_run_s_checkpoint_in_their_place(tmp_path, caplog):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="is not all this program's"):
        save(tmp_path / "documents")
    with building(tmp_path / "documents", own=True) as new:
        (new / "a.txt").write_text("x")
    verify(tmp_path / "documents")
    (kept,) = tmp_path.glob("documents.before-*")
    assert (kept / "thesis.tex").read_text() == "years"
    assert "thesis.tex" in caplog.text


def test_a_failed_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    save(tmp_path / "ckpt", "old")
    before = tree(tmp_path)
    rename = os.rename

    def refuse_new(source, target):
        if ".partial-" in str(source) and Path(source).is_dir():
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(StorageError, match="Input/output error"):
        save(tmp_path / "ckpt", "new")
    assert tree(tmp_path) == before
    assert (tmp_path / "ckpt" / "a.txt").read_text() == "old"
    verify(tmp_path / "ckpt")


def test_order_of_a_save(tmp_path, monkeypatch):
    """Files reach the disk before the manifest, the manifest before the rename, the rename before we say so."""
    events = []
    fsync = os.fsync

    def noted(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    for name, function in (("rename", os.rename), ("replace", os.replace)):
        monkeypatch.setattr(os, name, lambda a, b, f=function: (events.append(f"-> {Path(b).name}"), f(a, b)))
    save(tmp_path / "ckpt")
    new = f".ckpt.partial-{os.getpid()}"
    temporary = f".manifest.json.partial-{os.getpid()}"
    last = [temporary, "-> manifest.json", new, "-> ckpt", tmp_path.name]
    assert events == ["a.txt", "b.txt", "sub", *last]


def test_killed_at_every_step_of_a_save(tmp_path):
    helper = Path(__file__).with_name("killed_writer.py")
    subprocess.run([sys.executable, "-W", "ignore", str(helper), str(tmp_path)], check=True, timeout=60)
    deaths = int((tmp_path / "done").read_text())
    assert deaths > 15
    seen = set()
    for number in range(deaths):
        here = tmp_path / str(number)
        bare = not (here / "ckpt").exists()  # killed between the two renames
        seen.add("bare" if bare else (here / "ckpt" / "a.txt").read_text())
        if not bare:
            verify(here / "ckpt")
        files.sweep(here, re.compile("ckpt"))
        assert [path.name for path in here.iterdir()] == ["ckpt"]
        verify(here / "ckpt")
        texts = {(here / "ckpt" / name).read_text() for name in ("a.txt", "sub/b.txt")}
        assert len(texts) == 1
        save(here / "ckpt", "again")
        verify(here / "ckpt")
    assert seen == {"old", "bare", "new"}


def test_every_flipped_byte_is_seen(tmp_path):
    save(tmp_path / "ckpt")
    verify(tmp_path / "ckpt")
    for name in ("a.txt", "sub/b.txt"):
        path = tmp_path / "ckpt" / name
        good = path.read_bytes()
        for position in range(len(good)):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            with pytest.raises(CheckpointError, match=rf"ckpt: '{name}': its SHA-256"):
                verify(tmp_path / "ckpt")
            verify(tmp_path / "ckpt", hashes=False)
        path.write_bytes(good)
    verify(tmp_path / "ckpt")


@pytest.mark.parametrize("hashes", [True, False])
def test_missing_and_truncated_files_are_named(tmp_path, hashes):
    save(tmp_path / "ckpt")
    (tmp_path / "ckpt" / "a.txt").write_text("hell")
    with pytest.raises(CheckpointError, match=r"ckpt: 'a.txt': 4 bytes where the manifest says 5"):
        verify(tmp_path / "ckpt", hashes=hashes)
    (tmp_path / "ckpt" / "a.txt").unlink()
    with pytest.raises(CheckpointError, match=r"ckpt: 'a.txt': missing"):
        verify(tmp_path / "ckpt", hashes=hashes)
    (tmp_path / "ckpt" / "a.txt").mkdir()
    with pytest.raises(CheckpointError, match=r"ckpt: 'a.txt': not a regular file"):
        verify(tmp_path / "ckpt", hashes=hashes)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: does not exist"):
        verify(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: not a directory"):
        verify(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"no manifest.json; not a checkpoint, or an incomplete one"):
        verify(tmp_path)


GOOD = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"files": {"a": {"size": 1}}}',
        json.dumps({"files": {"a": {"size": -1, "sha256": "0" * 64}}}),
        json.dumps({"files": {"a": {"size": 1, "sha256": "xyz"}}}),
        json.dumps({"files": {"a": GOOD}, "version": 2}),
        json.dumps({"files": {"a": GOOD}, "format": "other"}),
        json.dumps({"files": {"a": GOOD}, "extra": 1}),
    ],
)
def test_a_broken_manifest_is_named_in_one_line(tmp_path, manifest):
    (tmp_path / "a").write_text("x")
    (tmp_path / "manifest.json").write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    with pytest.raises(CheckpointError) as caught:
        verify(tmp_path, hashes=False)
    assert str(caught.value).startswith(f"{tmp_path}/manifest.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../secret", "points out"),
        ("sub/../../secret", "points out"),
        ("/etc/hostname", "points out"),
        ("nul\0", "points out"),
        ("link", "symbolic link"),
        ("linked/secret", "symbolic link"),
        ("inside", "symbolic link"),
        ("loop", "not a regular file"),
        ("\ud800", "cannot be read"),
        ("x" * 300, "cannot be read"),
        ("", "not a regular file"),
        ("fifo", "not a regular file"),
    ],
)
def test_a_manifest_cannot_reach_outside(tmp_path, name, problem):
    """The size and hash are right in each case, so only the name can be what is refused."""
    (tmp_path / "secret").write_text("secret")
    ckpt = tmp_path / "ckpt"
    (ckpt / "sub").mkdir(parents=True)
    (ckpt / "good").write_text("secret")
    for link, target in (("link", tmp_path / "secret"), ("linked", tmp_path), ("inside", "good"), ("loop", "loop")):
        (ckpt / link).symlink_to(target)
    os.mkfifo(ckpt / "fifo")
    digest = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"

    def listing(file: str) -> None:
        (ckpt / "manifest.json").write_text(json.dumps({"files": {file: {"size": 6, "sha256": digest}}}))

    listing("good")
    verify(ckpt)
    listing(name)
    with pytest.raises(CheckpointError, match=problem):
        verify(ckpt)


def test_remove_takes_the_manifest_first_and_survives_failure(tmp_path, monkeypatch, caplog):
    save(tmp_path / "one")
    remove(tmp_path / "one")
    assert tree(tmp_path) == []

    save(tmp_path / "two")

    def fail(path, *args, **kwargs):
        assert not (tmp_path / "two" / "manifest.json").exists()
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        remove(tmp_path / "two")
    assert "Device or resource busy" in caplog.text and "two" in caplog.text
    assert tree(tmp_path / "two") == [".deleting", "a.txt", "sub", "sub/b.txt"]
    (tmp_path / "two" / "notes").write_text("mine")
    remove(tmp_path / "two")
    assert tree(tmp_path / "two") == ["notes"] and "notes" in caplog.text
    remove(tmp_path / "nowhere")
    assert "nowhere" in caplog.text


def test_a_snapshot_of_the_hubs_cache_is_verified_through_its_links(tmp_path):
    with building(tmp_path / "made") as new:
        (new / "weights").write_bytes(b"abc")
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "rev").mkdir(parents=True)
    for file in (tmp_path / "made").iterdir():
        file.rename(repository / "blobs" / f"{file.name}-hash")
        (repository / "snapshots" / "rev" / file.name).symlink_to(f"../../blobs/{file.name}-hash")
    verify(repository / "snapshots" / "rev")
    (repository / "blobs" / "weights-hash").write_bytes(b"abd")
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify(repository / "snapshots" / "rev")
