"""Run every command that the documentation shows, each as a reader would, on small stand-ins for what is the reader's.

`python scripts/docs_commands.py` runs them all, prints a table, and ends with 1 if one failed. `--only training.md`
takes one page, `--match TEXT` some of its blocks; `--list` says what would run; `--parse` runs nothing and asks the
command line alone whether it knows every verb and option, those within sentences too.

A command is a line of a ```bash or ```console block, or a line of any block that begins with `$ `. A block is a story:
its lines run in order in a folder of their own, in which the stand-ins lie (docs_stand_ins.py) but for those that the
block makes itself. docs_commands.toml says what is put for a reader's names, what is made shorter, what is not run.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = tomllib.loads((Path(__file__).parent / "docs_commands.toml").read_text(encoding="utf-8"))
SECONDS = 300
"""What one command may take."""
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`(manyhands [^`\n]+)`")
_MADE = re.compile(r"--out (\S+)|(?:generate|serve) .*--trace (\S+)|(?:convert|quantize|upcycle|prune) \S+ (\S+)")


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    line: int
    text: str
    block: int
    """Which block of its page; -1 for one within a sentence, which runs only if it is whole and needs nothing."""

    @property
    def whole(self) -> bool:
        """Whether it can be run at all."""
        return self.block >= 0 or re.fullmatch(r"manyhands (plan|models|choose) [a-z][^A-Z…]*", self.text) is not None

    @property
    def skipped(self) -> str | None:
        """Why it is not run, or None."""
        return next((why for pattern, why in TABLE["skip"].items() if re.search(pattern, self.text)), None)


def pages() -> list[Path]:
    """Those that show commands."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> Iterator[Command]:
    """Every command of a page, comments cut off and continued lines joined."""
    text = page.read_text(encoding="utf-8")
    for number, block in enumerate(_BLOCK.finditer(text)):
        shell = block[1] == "bash" or (block[1] == "console" and "$ " not in block[2])
        waiting = ""
        for offset, line in enumerate(block[2].splitlines()):
            if waiting or shell or re.match(r"\$ \S", line):
                joined = waiting + line.removeprefix("$ ").strip() + " "
                waiting = joined[:-2] if joined.endswith("\\ ") else ""
                if not waiting and (command := without_comment(joined)):
                    yield Command(page.name, text.count("\n", 0, block.start()) + 2 + offset, command, number)
    outside = _BLOCK.sub(lambda found: "\n" * found[0].count("\n"), text)
    for found in _INLINE.finditer(outside):
        yield Command(page.name, outside.count("\n", 0, found.start()) + 1, found[1], -1)


def without_comment(line: str) -> str:
    """What stands before a # that begins a word, outside of quotes."""
    quote = ""
    for place, sign in enumerate(line):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign == "#" and (place == 0 or line[place - 1].isspace()):
            return line[:place].strip()
    return line.strip()


@cache
def command_line() -> Any:
    """As Typer makes it of the verbs."""
    import typer

    from manyhands.cli.main import app

    return typer.main.get_command(app)


def options_of(command: Any, context: Any) -> set[str]:
    """Every name of each option."""
    return {name for option in command.get_params(context) for name in (*option.opts, *option.secondary_opts)}


def refused(command: Command) -> str | None:
    """What the command line says against it without running it, or None. Within a sentence only names are looked at."""
    text = re.split(r"\s[|>]\s|\s>\s?", command.text.replace("`", ""))[0]
    words = shlex.split(text)
    if words[0] == "torchrun" and "-m" in words:
        words = words[words.index("-m") + 1 :]
    if words[0] != "manyhands":
        return None
    words, here = words[1:], command_line()
    context: Any = here.context_class(here, info_name="manyhands")
    known = options_of(here, context)
    while words and hasattr(here, "commands") and not words[0].startswith("-"):
        verb = words[0]
        if verb not in here.commands:
            placeholder = not re.fullmatch(r"[a-z][a-z-]*", verb)
            return None if command.block < 0 and placeholder else f"no verb {verb!r}"
        here, words = here.commands[verb], words[1:]
        context = here.context_class(here, info_name=verb, parent=context)
        known |= options_of(here, context)
    if command.block < 0:
        options = [word.partition("=")[0].rstrip(",.;") for word in words if re.match(r"--?[a-z]", word)]
        return next((f"no option {option}" for option in options if option not in known), None)
    if hasattr(here, "commands") and not words:
        return None
    try:
        given = here.make_context(here.name, list(words)).params
        if here.name == "train" and given.get("preset"):
            from manyhands.config.load import load_preset

            load_preset(given["preset"], given["overrides"] or [])
    except Exception as error:  # whatever Typer, or the description of a run, finds wrong
        return str(error.format_message() if hasattr(error, "format_message") else error) or type(error).__name__
    return None


def prepared(command: Command) -> str:
    """The line that runs: stand-ins for names, and less work."""
    text = command.text
    for pattern, instead in TABLE["words"].items():
        text = re.sub(pattern, instead, text)
    more = next((extra for pattern, extra in TABLE["append"].items() if re.search(pattern, text)), "")
    for name, values in TABLE["sizes"].items():
        more = more.replace(name, values)
    head, sign, rest = text.partition(" > ")
    return f"{head} {more}".strip() + sign + rest


def makes(block: list[Command]) -> set[str]:
    """Paths that a block makes itself: no stand-in lies there."""
    found = {path for command in block for pair in _MADE.findall(command.text) for path in pair if path}
    for command in block:
        named = re.search(r"(?:--preset|-c|sweep) (\S+?)(?:\.yaml)?(?= |$)", command.text)
        if named and "--out" not in command.text:
            found.add(f"runs/{named[1]}")
        if "manyhands tune " in command.text and "--out" not in command.text:
            method = re.search(r"--method (\S+)", command.text)
            found.add(f"runs/tune-{method[1] if method else 'full'}")
    return found


class Servers:
    """What `manyhands serve` started; ended and asked for their exit codes when the block is done."""

    def __init__(self) -> None:
        self.running: list[tuple[Command, subprocess.Popen[str]]] = []
        self.port = 0

    def start(self, command: Command, line: str, folder: Path, environment: dict[str, str]) -> str | None:
        """Wait for the line that names the address; otherwise return what was said."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line} --port {self.port}"],
            cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        said = []
        for text in process.stdout:
            said.append(text)
            if text.startswith("serving "):
                self.running.append((command, process))
                return None
        return f"exit code {process.wait()}: {''.join(said)[-1500:]}"

    def end(self) -> Iterator[tuple[Command, str | None]]:
        """Every server's command with what was wrong, or None."""
        for command, process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                rest, _ = process.communicate(timeout=60)
                yield command, None if process.returncode == 0 else f"exit code {process.returncode}: {rest[-800:]}"
            except subprocess.TimeoutExpired:
                process.kill()
                yield command, "it did not end within a minute of SIGTERM"
        self.running = []


def run_block(block: list[Command], base: Path, work: Path) -> Iterator[tuple[Command, str, float, str]]:
    """(command, outcome, seconds, what it said if it failed) of each command of one block."""
    folder = Path(tempfile.mkdtemp(prefix="block-", dir=work))
    shutil.copytree(base, folder, dirs_exist_ok=True)
    for path in makes(block):
        with suppress(FileNotFoundError):
            shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
    shared = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(work / "cache")}
    environment = {**os.environ, **shared, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    servers = Servers()
    for command in block:
        if command.skipped:
            yield command, "skipped", 0.0, command.skipped
            continue
        line, start = prepared(command), time.perf_counter()
        if re.search(r"\bmanyhands serve\b", line) and "torchrun" not in line:
            wrong = servers.start(command, line, folder, environment)
        else:
            line = re.sub(r"(127\.0\.0\.1|localhost):8000", rf"\1:{servers.port}", line)
            wrong = _ended(line, folder, environment)
        yield command, "failed" if wrong else "ok", time.perf_counter() - start, f"{line}\n{wrong}" if wrong else ""
    for command, wrong in servers.end():
        if wrong:
            yield command, "failed", 0.0, wrong
    shutil.rmtree(folder)


def _ended(line: str, folder: Path, environment: dict[str, str]) -> str | None:
    """What was wrong with a command that ends by itself, or None."""
    typed = "hello\n" if " chat " in line else "It was" if " generate " in line and "--prompt" not in line else ""
    try:
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"],
            cwd=folder, env=environment, input=typed, text=True, capture_output=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"longer than {SECONDS} s"
    allowed = (
        (0, 4) if re.search(r"manyhands (train|tune|sweep) ", line) else (0,)
    )  # so few steps may not be worth keeping
    return (
        None if done.returncode in allowed else f"exit code {done.returncode}: {(done.stderr or done.stdout)[-1500:]}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="PAGE", help="commands of this page: training.md")
    parser.add_argument("--match", metavar="TEXT", default="", help="blocks that hold a command with this text")
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--stand-ins", metavar="DIR", type=Path, help="keep the stand-ins here, for the next time")
    parser.add_argument("--parse", action="store_true", help="only ask the command line whether it knows them")
    arguments = parser.parse_args()
    found = [command for page in pages() for command in commands(page)]
    if arguments.only:
        found = [command for command in found if command.page == arguments.only]
    if arguments.parse:
        wrong = [(command, why) for command in found if (why := refused(command))]
        for command, why in wrong:
            print(f"{command.page}:{command.line}: {command.text}\n    {why}")
        print(f"{len(found)} commands, {len(wrong)} not known to the command line")
        return bool(wrong)
    blocks: dict[tuple[str, int], list[Command]] = {}
    for command in found:
        if command.whole:
            blocks.setdefault((command.page, command.block), []).append(command)
    chosen = [block for block in blocks.values() if any(arguments.match in command.text for command in block)]
    if arguments.list:
        for command in (command for block in chosen for command in block):
            print(f"{command.page}:{command.line}: {command.skipped or 'run'}: {prepared(command)}")
        return 0
    from docs_stand_ins import make_stand_ins

    outcomes = []
    with tempfile.TemporaryDirectory(prefix="docs-commands-") as work:
        base = arguments.stand_ins or Path(work) / "stand-ins"
        if not base.exists():
            make_stand_ins(base)
        for block in chosen:
            for command, outcome, seconds, said in run_block(block, base, Path(work)):
                outcomes.append(outcome)
                print(f"{outcome:8}{seconds:6.1f} s  {command.page}:{command.line}  {command.text[:110]}", flush=True)
                if said:
                    print("    " + said.strip().replace("\n", "\n    "), flush=True)
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("ok", "skipped", "failed")))
    return "failed" in outcomes


if __name__ == "__main__":
    sys.exit(main())
