"""`manyhands serve`: what is refused before anything is loaded, and a process that serves, stops and is looked at."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from manyhands.checkpoint.model import save
from manyhands.cli.serve import _paths
from manyhands.cli.size import size
from manyhands.config import EncoderDecoderConfig
from manyhands.errors import UserError
from manyhands.models import EncoderDecoder
from manyhands.serve.run import bind

from ..small_runs import manyhands, small_run, write_text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to serve"),
        (["m", "--host", "0.0.0.0"], "--api-key KEY, or --insecure"),
        (["m", "--host", "::"], "--api-key KEY, or --insecure"),
        (["m", "--api-key", ""], "empty key"),
        (["m", "--allow-origin", "chat.example.org"], "expected SCHEME://HOST"),
        (["m", "--api-key", "schlüssel"], "ASCII"),
        (["m", "--api-key-file", "nowhere"], "nowhere: cannot be read"),
        (["m", "--kv-memory", "much"], "--kv-memory much: expected a size"),
        (["m", "--max-body", "0"], "--max-body 0"),
        (["--model", "a"], "expected NAME=PATH"),
        (["--model", "a=x", "--model", "a=y"], "two models of the name a"),
        (["--served-model-name", "a", "--model", "b=x"], "--model NAME=PATH"),
        (["nowhere-at-all"], "nowhere-at-all"),
    ],
)
def test_what_is_refused_in_one_line(arguments, said):
    done = manyhands("serve", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("manyhands: ") and said in done.stderr and done.stderr.count("\n") == 1


def test_sizes():
    assert [size("", text) for text in ("512", "2k", "1.5MB", "2GiB", "3 gb", "1Ti", None)] == [
        *(512, 2000, 1_500_000, 2 << 30, 3 * 10**9, 1 << 40, None)
    ]
    for text in ("", "-1", "0", "1e9", "5PB", "nan", "9" * 30):
        with pytest.raises(UserError, match="--memory"):
            size("--memory", text)


def test_names(tmp_path):
    (tmp_path / "run").mkdir()
    assert list(_paths(tmp_path / "run" / "..", ["b=x=y"], None)) == [tmp_path.name, "b"]
    assert list(_paths(Path("somebody/model"), [], None)) == ["somebody/model"]
    assert _paths(None, ["b=x=y"], None) == {"b": "x=y"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from manyhands.train.loop import train

    folder = tmp_path_factory.mktemp("serve")
    train(folder / "run", small_run(write_text(folder), "train.max_steps=2"), quiet=True)
    return folder / "run"


def get(url, data=None, key="a-secret-key"):
    request = urllib.request.Request(url, None if data is None else json.dumps(data).encode())
    request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=20) as reply:
        return json.load(reply)


def test_a_process_that_serves(run):
    command = [sys.executable, "-W", "error", "-m", "manyhands", "serve", str(run), "--port", "0"]
    command += ["--api-key", "a-secret-key", "--host", "127.0.0.1", "--kv-memory", "1MiB", "--shutdown-timeout", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"serving run at (http://127\.0\.0\.1:\d+)\n", line)
            assert found, line + process.stderr.read()
            base = found[1]
            with pytest.raises(urllib.error.HTTPError, match="401"):
                get(f"{base}/v1/models", key="another")
            assert get(f"{base}/v1/models")["data"][0]["id"] == "run"
            reply = get(f"{base}/v1/completions", {"prompt": "private words", "max_tokens": 3})
            assert reply["usage"]["completion_tokens"] == 3
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0 and out == ""
    assert "POST '/v1/completions' 200" in err and "stopping" in err
    assert "private" not in err and "a-secret-key" not in err and "Traceback" not in err


def test_a_model_that_is_refused_leaves_no_open_socket(tmp_path, monkeypatch):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "head_dim": 16}
    config = EncoderDecoderConfig(num_hidden_layers=1, num_decoder_layers=1, **sizes)
    save(EncoderDecoder(config), tmp_path / "pair")
    made = []
    monkeypatch.setattr("manyhands.serve.run.bind", lambda host, port: made.append(bind(host, port)) or made[0])
    done = manyhands("serve", str(tmp_path / "pair"), "--port", "0")
    assert done.returncode == 2 and "pair: " in done.stderr
    assert made[0].fileno() == -1
