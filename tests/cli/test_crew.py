"""`generate` and `serve` on several processes: what one process says, one line for what is wrong, and an end."""

import json
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.checkpoint.model import save
from manyhands.config import ModelConfig
from manyhands.models import Decoder
from tests.engine.conftest import build
from tests.jobs import Job, job, started
from tests.small_runs import manyhands

SAMPLED = ["--prompt", "def", "--prompt", "für", "--max-new-tokens", "6", "--temperature", "0.8", "--json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from manyhands.text import Tokenizer

    folder = tmp_path_factory.mktemp("crew")
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n", "für Élise, naïve café ☕ " * 3] * 5, 300)
    save(build(moe={"router": {"num_experts": 6, "num_experts_per_tok": 2}}), folder / "model", tokenizer)
    dense = build().config.model_dump() | {"moe": None}
    save(Decoder(ModelConfig.model_validate(dense)), folder / "dense", tokenizer)
    return folder / "model"


def test_generate_says_what_one_process_says(model: Path) -> None:
    alone = manyhands("generate", str(model), *SAMPLED)
    leader, *others = job(3, "generate", str(model), *SAMPLED)
    assert (leader.returncode, leader.stderr) == (0, "") and json.loads(leader.stdout) == json.loads(alone.stdout)
    assert {(done.returncode, done.stdout, done.stderr) for done in others} == {(0, "", "")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "MODEL", "--prompt", "a", "--top-p", "7"], "top_p = 7.0"),
        (["generate", "NOTHING", "--prompt", "a"], "does not exist"),
        (["generate", "DENSE", "--prompt", "a"], "a dense model has no experts that several processes could share"),
        (["generate", "MODEL", "--prompt", "a", "--memory", "1GB"], "memory keeps experts on disk for one process"),
        (["serve", "MODEL", "--memory", "1GB"], "several processes share the experts of one model"),
        (["serve", "MODEL", "--host", "no.such.address.invalid", "--insecure"], "no such address"),
    ],
)
def test_one_process_says_what_is_wrong(model: Path, arguments: list[str], said: str) -> None:
    places = {"MODEL": model, "NOTHING": model.parent / "nothing", "DENSE": model.parent / "dense"}
    leader, other = job(2, *[str(places.get(argument, argument)) for argument in arguments])
    assert leader.returncode == other.returncode == 2
    assert said in leader.stderr and leader.stderr.count("\n") == 1 and not other.stderr


def wait_for(running: Job, said: str) -> str:
    for _ in range(1200):
        if said in (text := (running.folder / "0.out").read_text() if (running.folder / "0.out").exists() else ""):
            return text
        time.sleep(0.05)
    raise AssertionError(f"{said!r} did not come: {(running.folder / '0.err').read_text()}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_job_with_one_line(model: Path, rank: int) -> None:
    many = [argument for _ in range(40) for argument in ("--prompt", "x")]
    with started(2, "generate", str(model), "-q", "--max-new-tokens", "40", "--temperature", "0", *many) as running:
        wait_for(running, "x")
        running.kill(rank)
        found = running.wait(20)
    assert found[rank].returncode == -signal.SIGKILL
    other = found[1 - rank]
    assert other.returncode == 1
    assert other.stderr == (
        "manyhands: a process that holds a part of the model's experts is gone: start them all again\n"
    )


def complete(url: str) -> str:
    body = {"model": "model", "prompt": "def", "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def _stopped(running: Job) -> None:
    """As torchrun does it: all of them."""
    running.kill(1, signal.SIGTERM)
    running.kill(0, signal.SIGTERM)


def _killed(running: Job) -> None:
    running.kill(1)


@pytest.mark.parametrize(("how", "codes"), [(_stopped, [0, 0]), (_killed, [1, -signal.SIGKILL])])
def test_serve(model: Path, how: Callable[[Job], None], codes: list[int]) -> None:
    """The answer is that of one process; the leader finishes and tells the others to end; without one it ends too."""
    greedy = manyhands(
        "generate", str(model), "--prompt", "def", "--max-new-tokens", "6", "--temperature", "0", "--json"
    )
    with started(2, "serve", str(model), "--port", "0") as running:
        url = wait_for(running, "serving model at ").split(" at ")[1].strip()
        assert complete(url) == json.loads(greedy.stdout)["text"]
        how(running)
        if codes[0]:
            with pytest.raises(urllib.error.HTTPError, match="500"):
                complete(url)
        found = running.wait(20)
    assert [done.returncode for done in found] == codes
    assert ("is gone" in found[0].stderr) == bool(codes[0]) or "an engine has died" in found[0].stderr
