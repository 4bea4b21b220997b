"""What the shell offers behind TAB: names of presets, systems, machines, fields, experiments. Paths are the shell's.

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


def machines(incomplete: str) -> list[str]:
    """Machines with published figures, and this one."""
    from manyhands.plan.machine import machine_names

    return [name for name in ("here", *machine_names()) if name.startswith(incomplete.lower())]


def fields(incomplete: str) -> list[str]:
    """Paths of a run's fields, and their last parts."""
    from manyhands.config.reference import everything

    paths = {told.field for told in everything()}
    found = sorted(path for path in paths if path.startswith(incomplete))
    return found or sorted(
        {path.rpartition(".")[2] for path in paths if path.rpartition(".")[2].startswith(incomplete)}
    )


def changes(incomplete: str) -> list[str]:
    """`section.key=` of a run."""
    from manyhands.config.reference import everything

    return sorted({f"{told.field}=" for told in everything() if not told.section and told.field.startswith(incomplete)})


def experiments(incomplete: str) -> list[str]:
    """Experiments of the lab."""
    from manyhands.lab.registry import names

    return [name for name in names() if name.startswith(incomplete)]
