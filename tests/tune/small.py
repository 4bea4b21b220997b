"""Settings of small tunings."""

TUNE = ["--max-steps", "4", "--batch-size", "4", "--lr", "0.003"]
