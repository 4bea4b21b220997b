"""What tuning made of a model, put on the model by hand: a run of `manyhands tune`, or a directory of PEFT's."""

from pathlib import Path

from manyhands.checkpoint.adapters import load_adapter
from manyhands.checkpoint.adapters.fields import CONFIG as ADAPTER_CONFIG
from manyhands.checkpoint.find import fetched, find
from manyhands.checkpoint.origin import Origin
from manyhands.checkpoint.tuned import Change
from manyhands.errors import UserError
from manyhands.models import AnyModel
from manyhands.text.tokenizer_files import has_tokenizer


def put_adapter(model: AnyModel, origin: Origin, path: str | Path, *, shared: bool = False) -> Path | None:
    """Put on `model`, whose files `origin` remembers, what lies at `path`; in place.

    `shared`: others compute with the same weights, which then stay as they are. Returns where a tokenizer of its own
    lies, if it has one (with the chat template it was taught through).

    Raises `CheckpointError` for an adapter that is damaged, or of another model, and `UserError` for a path that holds
    none, or one that cannot share.
    """
    directory = fetched(path)
    if (directory / ADAPTER_CONFIG).is_file():
        load_adapter(model, directory)
        model.eval()
        return None
    directory = find(directory)
    change = Change.at(directory, origin.path)
    if change is None:
        raise UserError(
            f"{path}: a whole model, and no adapter; expected a run of manyhands tune, or a folder of PEFT's"
        )
    change.put_into(model, shared=shared)
    model.eval()
    return directory if has_tokenizer(directory) else None
