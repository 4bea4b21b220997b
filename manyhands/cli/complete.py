"""What the shell offers behind TAB: presets and the catalogue's names, where a verb takes one. Paths are the shell's.

Each is called with what is typed so far and gives the names that begin so; no torch, nothing is read but names.
"""


def presets(incomplete: str) -> list[str]:
    """Runs that ship with the package."""
    from manyhands.config.load import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


def systems(incomplete: str) -> list[str]:
    """Systems of the catalogue, which are found in any case."""
    from manyhands.catalog import names

    return [name for name in names() if name.startswith(incomplete.lower())]


def described(incomplete: str) -> list[str]:
    """What `manyhands plan` takes by name: a system, or a run that ships with the package."""
    return sorted({*systems(incomplete), *presets(incomplete)})
