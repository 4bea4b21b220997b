"""Names on the hub: what is taken for one, what is asked for, what is said when there is none."""

import sys
from types import SimpleNamespace

import pytest

from manyhands.checkpoint.find import find
from manyhands.checkpoint.hub import download, is_hub_name
from manyhands.errors import CheckpointError


@pytest.mark.parametrize("name", ["allenai/OLMoE-1B-7B-0924", "a/b", "Qwen/Qwen3-30B-A3B@v1.0", "o/n@refs/pr/1"])
def test_names(name):
    assert is_hub_name(name)


@pytest.mark.parametrize("name", ["", "model", "/abs/path", "./a/b", "../a", "a/b/c", "a//b", "a/b@", "~/a", "a/../b"])
def test_paths_are_no_names(name):
    assert not is_hub_name(name)


def test_a_snapshot_is_asked_for_without_code_or_pickle(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, revision, allow_patterns):
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

    def offline(*_args, **_more):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=offline))
    with pytest.raises(CheckpointError, match="not to be had from the Hugging Face hub: ConnectionError: no route to"):
        download("owner/model")


def test_a_directory_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="an empty directory"):
        find("owner/model")
