"""One file per verb: parse, call, print. Verbs import what they need when they run, so `--help` needs no torch."""
