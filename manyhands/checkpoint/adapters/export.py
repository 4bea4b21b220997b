"""The adapter alone, out of a tuned checkpoint or of another layout, as a directory that PEFT loads."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from manyhands.checkpoint.adapters.read import Adapter, read_adapter
from manyhands.checkpoint.adapters.write import Form, write_adapter
from manyhands.checkpoint.find import find, open_found
from manyhands.checkpoint.merge import lora_parts
from manyhands.checkpoint.target import claim
from manyhands.checkpoint.tuned import Change
from manyhands.errors import UserError


def export_adapter(
    source_path: str | Path,
    target_path: str | Path,
    *,
    form: Form,
    adapter: str | Path | None = None,
    overwrite: bool = False,
    ignore_fields: Collection[str] = (),
) -> dict[str, Any]:
    """Write the LoRA of `source_path`, a tuned checkpoint or run, or `adapter` of the model `source_path`.

    Returns what was written: form, ranks, base. Raises what `read_adapter` and `write_adapter` do, `UserError` for a
    source without LoRA.
    """
    sources = [source_path, *([] if adapter is None else [adapter])]
    claim(target_path, overwrite=overwrite, sources=sources, hashes=False)
    found = find(source_path)
    change = Change.at(found)
    if (change is None) == (adapter is None):
        raise UserError(
            f"{source_path} is a model: --adapter DIR says which adapter of it to write"
            if change is None
            else f"{source_path} is tuned, and has its adapter: leave --adapter out"
        )
    source = open_found(found if change is None else change.base, ignore_fields)
    if change is not None:
        written = Adapter(lora_parts(change), change.tuned.base.source)
    else:
        assert adapter is not None
        written = read_adapter(adapter, source.config, source.family)
    sources += [found, source.path]
    write_adapter(written, target_path, source.config, source.family, form=form, overwrite=overwrite, sources=sources)
    ranks = {part: pair.A.shape[-2] for part, pair in written.matrices.items()}
    return {"form": form, "base": written.base, "ranks": ranks}
