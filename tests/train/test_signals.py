"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from manyhands.parallel.ranks import Alone
from manyhands.train.signals import StopSignals, agreed

from ..thread_ranks import ThreadRanks, on_ranks

TWICE = """
import hashlib, os, signal, threading
from manyhands.errors import Interrupted
from manyhands.train import signals
from manyhands.train.signals import StopSignals
for second in (signal.SIGTERM, signal.SIGINT):
    if (child := os.fork()) == 0:
        try:
            with StopSignals() as stop:
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop.requested == signal.SIGTERM
                print("first noted", flush=True)
                os.kill(os.getpid(), second)
                print("never", flush=True)
        finally:
            print("no clean-up either", flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
signals._GRACE_SECONDS = 0.01
for case in ("second in a native call", "first while preparing", "first while preparing, in a native call"):
    if (child := os.fork()) == 0:
        with StopSignals() as stop:
            numbers = [signal.SIGTERM, signal.SIGINT] if case.startswith("second") else [signal.SIGINT]
            native = lambda: hashlib.pbkdf2_hmac("sha256", b"a", b"b", (1 << 31) - 1)  # many minutes
            send = lambda: [os.kill(os.getpid(), number) for number in numbers]
            if case.startswith("second"):
                threading.Timer(0.05, send).start()
                native()
            with stop.preparing():
                if case.endswith("call"):
                    threading.Timer(0.05, send).start()
                    native()
                try:
                    send()
                    print("never", flush=True)
                except Interrupted as error:
                    print(error.exit_code, error, flush=True)
                    os._exit(error.exit_code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_the_second_signal_exits_at_once():
    command = [sys.executable, "-W", "ignore", "-c", TWICE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    said = "SIGINT before the first step: nothing was trained; start again"
    # two signals that are pending at once may arrive in either order: the process ends with the number of the later one
    lines = done.stdout.splitlines()
    assert lines[:4] == ["first noted", "143", "first noted", "130"]
    # two signals that are pending at once arrive in either order: the later one's number is the exit code
    assert lines[4] in ("130", "143")
    assert lines[5:] == [f"130 {said}", "130", "130"]
    assert done.stderr == f"manyhands: {said}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_handlers_are_restored(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested is number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with pytest.raises(ValueError, match="mine"), StopSignals():
        raise ValueError("mine")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_outside_the_main_thread_nothing_happens():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopSignals() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_a_signal_to_one_rank_stops_all():
    def work(ranks: ThreadRanks) -> signal.Signals | None:
        stop = StopSignals()
        stop.requested = signal.SIGTERM if ranks.rank == 1 else None
        return agreed(stop, ranks)

    assert on_ranks(2, work) == [signal.SIGTERM] * 2
    assert agreed(StopSignals(), Alone()) is None
