"""The command line's entry: `manyhands`, and `python -m manyhands`."""

import signal


def main() -> None:
    """Run it. While its modules are imported Ctrl-C ends the process as the system does, without a word."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else somebody decided, nohup say
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from manyhands.cli.main import main as run

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
