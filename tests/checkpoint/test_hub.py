"""Names on the hub: what is taken for one, what is asked for, what is said when there is none."""

import errno
import fnmatch
import sys
from types import SimpleNamespace

import pytest

from manyhands.checkpoint.find import find
from manyhands.checkpoint.hub import download, is_hub_name
from manyhands.errors import CheckpointError

GGUF = ("o/n-GGUF:Q4_K_M", "o/n:UD-Q4_K_XL@main", "hf.co/o/n:q8_0")


@pytest.mark.parametrize("name", ["allenai/OLMoE-1B-7B-0924", "a/b", "Qwen/Qwen3-30B-A3B@v1.0", "o/n@refs/pr/1", *GGUF])
def test_names(name):
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "model", "/abs/path", "./a/b", "../a", "a/b/c", "a//b", "a/b@", "a/b:", "a/b:x/y", "a/b:*", "~/a", "a/../b"],
)
def test_paths_are_no_names(name):
    assert not is_hub_name(name)


def test_a_snapshot_is_asked_for_without_code_or_pickle(tmp_path, monkeypatch):
    asked = {}

    (tmp_path / "config.json").write_text("{}")

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.chdir(tmp_path)
    assert find("owner/model@abc") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model", "abc")
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["patterns"])


def test_without_the_library_or_the_network_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'^owner/model: no such directory; .*pip install "manyhands\[hub\]"$'):
        download("owner/model")


class LocalEntryNotFoundError(FileNotFoundError):
    """As the library's."""


class RepositoryNotFoundError(OSError):
    """As the library's."""


class GatedRepoError(RepositoryNotFoundError):
    """As the library's."""


class RevisionNotFoundError(OSError):
    """As the library's."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            LocalEntryNotFoundError("An error\nhappened. " * 20),
            "cannot be reached (LocalEntryNotFoundError), and it is",
        ),
        (ConnectionError("no route\nto host"), "the hub cannot be reached (ConnectionError)"),
        (
            GatedRepoError("403\n" * 9),
            "consent first: give it at https://huggingface.co/owner/model, then `hf auth login`",
        ),
        (RepositoryNotFoundError("404\n" * 9), "the hub has none of this name, or it is private"),
        (RevisionNotFoundError("404"), "no such revision"),
        (OSError(errno.ENOSPC, "No space left on device", "/cache"), "/cache: No space left on device"),
        (ValueError("what\nelse " + 99 * "there is "), "ValueError: what else there"),
    ],
)
def test_what_the_hub_says_becomes_one_line(tmp_path, monkeypatch, error, said):
    monkeypatch.chdir(tmp_path)

    def refuse(*_args, **_more):
        raise error

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=refuse))
    with pytest.raises(CheckpointError) as raised:
        find("owner/model")
    message = str(raised.value)
    assert message.startswith("owner/model: no such directory, and not to be had from the Hugging Face hub: ")
    assert said in message and "\n" not in message and len(message) < 300


def test_a_mistyped_path_is_told_its_neighbour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "runs" / "tune-lora").mkdir(parents=True)
    for way in (find, download):
        with pytest.raises(CheckpointError, match=r"\(did you mean runs/tune-lora\?\)"):
            way("runs/tune_lora")
    with pytest.raises(CheckpointError, match=r"runs/tune/lora: does not exist; expected"):
        find("runs/tune/lora")
    with pytest.raises(CheckpointError, match=r"does not exist \(did you mean .*/runs\?\); expected"):
        find(tmp_path / "run")


def files_of(directory):
    """A library that fetches what fits the patterns from `directory`, as the hub's does."""
    fetched = []

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        there = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
        wanted = [name for name in there if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_patterns)]
        fetched[:] = [name for name in wanted if not any(fnmatch.fnmatchcase(name, p) for p in ignore_patterns)]
        return str(directory)

    return SimpleNamespace(snapshot_download=snapshot_download), fetched


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Q4_K_M", ["model-Q4_K_M.gguf"]),
        ("q4_k_m", ["model-Q4_K_M.gguf"]),
        ("F16", ["model-f16.gguf"]),
        ("BF16", ["BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf"]),
        ("Q8_0", ["Q8_0.gguf"]),
    ],
)
def test_one_type_of_a_repository_in_gguf(tmp_path, monkeypatch, kind, expected):
    (tmp_path / "BF16").mkdir()
    others = ["mmproj-F16.gguf", "model-Q4_K_S.gguf", "README.md", "model-Q4_K_M.gguf.txt", "model-UD-IQ1_S.gguf"]
    for name in ["model-Q4_K_M.gguf", "model-f16.gguf", "Q8_0.gguf", *others]:
        (tmp_path / name).write_text("")
    for number in (1, 2):
        (tmp_path / "BF16" / f"model-BF16-0000{number}-of-00002.gguf").write_text("")
    hub, fetched = files_of(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    assert find(f"owner/model:{kind}") == tmp_path / expected[0]
    assert sorted(fetched) == expected
    assert find(f"https://huggingface.co/owner/model:{kind}") == tmp_path / expected[0]


def test_a_repository_in_gguf_needs_a_type_that_it_has(tmp_path, monkeypatch):
    hub, _ = files_of(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^owner/model: no config\.json there; .* owner/model:Q4_K_M$"):
        find("owner/model")
    with pytest.raises(CheckpointError, match="no GGUF file of the type Q4_0"):
        find("owner/model:Q4_0")
    for name in ("a-Q4_0.gguf", "b-Q4_0.gguf"):
        (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=r"2 models of that type \(a-Q4_0\.gguf, b-Q4_0\.gguf\)"):
        find("owner/model:Q4_0")


def test_a_directory_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="an empty directory"):
        find("owner/model")
