"""One experiment is two files: NAME.toml says what it asks, NAME.py (dashes as underscores) runs it."""
