"""From one family's files to another's, tensor by tensor, with a receipt of what became of every byte.

The model is never in memory: a target tensor is read from the parts it is made of, hashed, written and let go. The
receipt (`receipt.json`, in the new directory) lists every source tensor with its SHA-256 and what became of it,
every target tensor, the files on both sides, and how far the two models agree on sample tokens.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands.checkpoint.adapters.fields import CONFIG as ADAPTER_CONFIG
from manyhands.checkpoint.adapters.file import WEIGHTS as ADAPTER_WEIGHTS
from manyhands.checkpoint.adapters.read import Adapter, attach, read_adapter
from manyhands.checkpoint.assemble import our_tensor
from manyhands.checkpoint.files import building, written_in
from manyhands.checkpoint.find import find, open_found
from manyhands.checkpoint.merge import Edit, Edited, edits_of, lora_edits, without_delta
from manyhands.checkpoint.model import EncoderDecoderModel, LoadedModel, from_source, load_model
from manyhands.checkpoint.receipt import RECEIPT, describe, describe_source, hash_files, tensor_sha256
from manyhands.checkpoint.room import check_room
from manyhands.checkpoint.safetensors.shards import MAX_SHARD_SIZE, write_shards
from manyhands.checkpoint.save import dtype_rule, target_config, target_headers, target_pieces
from manyhands.checkpoint.sidecars import tokenizer_of, write_beside
from manyhands.checkpoint.source import Source
from manyhands.checkpoint.target import claim
from manyhands.checkpoint.tensors import DTYPES, Header
from manyhands.checkpoint.tuned import Change
from manyhands.config.kinds import longest_sequence
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import CheckFailed, CheckpointError, UserError
from manyhands.families import Family, Piece, family_named, nearest
from manyhands.files import CONFIG
from manyhands.models import Output
from manyhands.version import __version__

SAMPLE_TOKENS = 48
Progress = Callable[[str, int, int], None]
"""(tensor just written, how many are, of how many)."""


class Conversion:
    """What would become of every tensor. Making one reads headers only, and refuses what would not work out.

    Raises `CheckpointError` naming a tensor that would be left over, `ConfigError` naming a field that the target
    family cannot express.
    """

    def __init__(
        self,
        source: Source,
        family: Family,
        dtype: torch.dtype | None = None,
        *,
        drop_extras: bool = False,
        tokenizer: str | Path | None = None,
        edits: Mapping[str, Edit] | None = None,
    ) -> None:
        """`edits` change tensors of ours on the way."""
        self.edits, self.edited_parts = edits or {}, Edited()
        self.source, self.family, config, origin = source, family, source.config, source.origin
        self.dtype = DTYPES[origin.main_dtype] if dtype is None else dtype
        self.tokenizer, self.unread = tokenizer_of(source.path if tokenizer is None else Path(tokenizer))
        self.config = target_config(family, config, self.dtype, origin, self.tokenizer)
        self.extras = () if drop_extras else source.kept
        self.pieces = target_pieces(family, config, self.extras if family is source.family else ())
        self.headers = target_headers(config, self.pieces, dtype_rule(family, self.dtype, origin))
        if self.extras and family is not source.family:
            raise CheckpointError(
                f"{source.files.where(self.extras[0])} would be left over: {family.model_type} has no place for what "
                f"this model does not compute with ({len(self.extras)} tensors); leave them out with --drop-extras"
            )
        self.headers |= {name: source.logical[name].header for name in self.extras}
        self._origins = {_key(piece): piece for pieces in source.pieces.values() for piece in pieces}
        self._last: tuple[str, Tensor] | None = None

    def read_from(self, target: str) -> list[str]:
        """The logical source tensors that a target tensor is made of."""
        if target not in self.pieces:
            return [target]
        names: dict[str, None] = {}
        for piece in self.pieces[target]:
            origin = self._origins.get(_key(piece))
            of_ours = [origin] if origin is not None else self.source.pieces[piece.ours]
            names |= dict.fromkeys(p.theirs for p in of_ours)
        return list(names)

    def _written(self, name: str) -> torch.dtype:
        """What one of our tensors is written as."""
        theirs = next(target for target, pieces in self.pieces.items() if any(piece.ours == name for piece in pieces))
        return DTYPES[self.headers[theirs].dtype]

    def unedited(self) -> "Conversion":
        """The same without edits."""
        return Conversion(self.source, self.family, self.dtype, drop_extras=not self.extras)

    def edited(self, target: str) -> bool:
        """Whether an edit changes it."""
        return any(self._edit(piece) is not None for piece in self.pieces.get(target, ()))

    def _edit(self, piece: Piece) -> Edit | None:
        edit = self.edits.get(piece.ours)
        return edit if edit is not None and edit.touches(piece) else None

    def value(self, target: str) -> Tensor:
        """A target tensor, contiguous."""
        if target not in self.pieces:
            return self.source.value(target).contiguous()
        header, pieces = self.headers[target], self.pieces[target]
        dtype = DTYPES[header.dtype]
        if len(pieces) == 1 and not pieces[0].theirs_index:
            return self._part(pieces[0], dtype).to(dtype).contiguous()
        out = torch.empty(header.shape, dtype=dtype)
        for piece in pieces:
            out[piece.theirs_index] = self._part(piece, dtype)
        return out

    def _part(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """What a target piece holds, in the target's layout."""
        origin = self._origins.get(_key(piece))
        if self._edit(piece) is not None:
            part = self._ours(piece.ours)[piece.ours_index]
        elif origin is not None and self.source.logical[origin.theirs].decode is None:
            part = self.source.value(origin.theirs)[origin.theirs_index]
            part = part.transpose(-2, -1) if origin.transpose else part
        else:
            part = self._ours(piece.ours)[piece.ours_index]
        return part.transpose(-2, -1) if piece.transpose else part

    def _ours(self, name: str) -> Tensor:
        """One of our tensors, whole; the last one is kept, since its pieces come one after another."""
        if self._last is None or self._last[0] != name:
            self._last = None
            shape = tensor_shapes(self.source.config)[name]
            tensor = our_tensor(self.source, name, shape, None, torch.device("cpu"))
            if (edit := self.edits.get(name)) is not None:
                tensor = self.edited_parts.run(name, edit, tensor, self._written(name))
            self._last = (name, tensor)
        return self._last[1]


def _key(piece: Piece) -> str:
    return f"{piece.ours}{piece.ours_index}"


def convert(
    source_path: str | Path,
    target_path: str | Path,
    *,
    to: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    drop_extras: bool = False,
    agreement: bool = True,
    overwrite: bool = False,
    ignore_fields: Collection[str] = (),
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `source_path` as family `to` (None: its own; for ours, the nearest) and return the receipt.

    With `agreement` both models are run on sample tokens before the new directory appears; without a change of dtype
    they must agree, else `CheckFailed` is raised and nothing is written. `overwrite` replaces a target that this
    program wrote; any other that exists and is not empty is a `UserError`. `ignore_fields` are `load_model`'s, and
    stand in the receipt. `tokenizer` names a directory whose tokenizer is taken in the place of the source's. `adapter`
    is a LoRA adapter in PEFT's files, which is merged: W + s·B·A in float32, rounded once.

    Raises what `Conversion` does, before anything is written, `CheckpointError` for an adapter that is not one of this
    model's, `CheckFailed` if a tensor that it adapts is not changed, or another is, and `StorageError` if the disk
    refuses.
    """
    sources = [source_path, *([] if adapter is None else [adapter])]
    claim(target_path, overwrite=overwrite, sources=sources, hashes=False)
    found = find(source_path)
    change = Change.at(found)
    source = open_found(found if change is None else change.base, ignore_fields)
    edits = None if change is None else edits_of(change, source)
    sources += [found, source.path]
    added: Adapter | None = None
    if adapter is not None:
        if change is not None:
            raise UserError(f"{source_path} is tuned: merge that first, then the adapter into what comes of it")
        added = read_adapter(adapter, source.config, source.family)
        edits = lora_edits(added.matrices)
    ours = source.family.model_type == "manyhands"
    own = family_named(source.family.model_type)  # in its own names, whatever the source's are
    family = family_named(to, "--to") if to else nearest(source.config) if ours else own
    if tokenizer is None and change is not None:
        tokenizer = change.tokenizer
    plan = Conversion(source, family, dtype, drop_extras=drop_extras, tokenizer=tokenizer, edits=edits)
    if agreement:  # before hours of writing: both models are then held whole, one after the other
        check_room(source, decode=True, remedy="--no-agreement converts it without running it")
    with building(target_path, overwrite=overwrite, sources=sources) as partial:
        receipt = write_conversion(partial, plan, max_shard_size=max_shard_size, progress=progress)
        _check_others(plan, receipt)
        if change is not None:
            what = {"method": change.tuned.tune.method, "base": change.tuned.base.model_dump(mode="json")}
            receipt["tuned"] = what | plan.edited_parts.described()
        if added is not None and adapter is not None:
            files = hash_files(Path(adapter), [Path(adapter) / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)])
            receipt["adapter"] = {"files": files, "base": added.base} | plan.edited_parts.described()
            receipt["adapter"]["adds_nothing_to"] = without_delta(added.matrices, plan.edits)
        receipt["agreement"] = _agreement(plan, partial, found, added) if agreement else None
        (partial / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return receipt


def write_conversion(
    partial: Path, plan: Conversion, *, max_shard_size: int = MAX_SHARD_SIZE, progress: Progress | None = None
) -> dict[str, Any]:
    """Everything that a conversion writes but its receipt, which is returned; use it inside `building`."""
    (partial / CONFIG).write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
    written: dict[str, Any] = {}

    def value(name: str) -> Tensor:
        tensor = plan.value(name)
        written[name] = describe(plan.headers[name], tensor_sha256(tensor)) | {"from": plan.read_from(name)}
        if progress is not None:
            progress(name, len(written), len(plan.headers))
        return tensor

    write_shards(partial, plan.headers, value, max_shard_size)
    beside = write_beside(partial, plan.tokenizer, plan.source.path, plan.source.values, plan.unread)
    return {
        "manyhands": __version__,
        "source": describe_source(plan.source),
        "target": {
            "model_type": plan.family.model_type,
            "files": hash_files(partial, written_in(partial)),
        },
        "source_tensors": _fates(plan, written),
        "target_tensors": written,
        "beside": {"copied": beside.copied, "left": beside.left},
        "notes": beside.line,
    }


def _fates(plan: Conversion, written: dict[str, Any]) -> dict[str, Any]:
    """Every stored tensor of the source: what it was, and what became of it."""
    source = plan.source
    became: dict[str, list[str]] = {name: [] for name in source.logical}
    for target, entry in written.items():
        for name in entry["from"]:
            became[name].append(target)
    fates: dict[str, Any] = {}
    for name, logical in source.logical.items():
        how = "dropped: recomputed, or stored twice" if name in source.dropped else "left out, as asked"
        if became[name]:
            how = "kept as it is, not computed with" if name in plan.extras else "converted"
            same_dtype = {written[target]["dtype"] for target in became[name]} == {logical.header.dtype}
            if any(plan.edited(target) for target in became[name]):
                how = "tuned"
            elif logical.decode is not None:
                how = f"decoded to {logical.header.dtype}"
            elif same_dtype and how == "converted":
                how = "moved, bit for bit"
        for part in logical.parts:
            if part in fates:  # a packed record holds several tensors
                fates[part]["became"] += became[name]
                continue
            stored = source.files.stored[part]
            entry = describe(stored.header, tensor_sha256(source.files.tensor(part)))
            source.files.release(part)
            fates[part] = entry | {"file": stored.file, "became": became[name], "how": how}
    return fates


def _check_others(plan: Conversion, receipt: Mapping[str, Any]) -> None:
    """What no edit touches is as it was: the same bytes where it moved whole. Raises `CheckFailed`."""
    if not plan.edits:
        return
    written, fates = receipt["target_tensors"], receipt["source_tensors"]
    for name, entry in written.items():
        if plan.edited(name):
            continue
        pieces, read = plan.pieces.get(name, []), entry["from"]
        whole = len(read) == 1 and all(not p.transpose and not p.theirs_index and not p.ours_index for p in pieces)
        fate = fates.get(read[0]) if whole else None
        if fate is not None and fate["dtype"] == entry["dtype"] and fate["shape"] == entry["shape"]:
            same = fate["sha256"] == entry["sha256"]
        else:
            same = tensor_sha256(plan.unedited().value(name)) == entry["sha256"]
        if not same:
            raise CheckFailed(f"{name}: changed, and was not tuned, so nothing was written")


def _run(model: LoadedModel, ids: Tensor) -> Output:
    """An encoder-decoder is given the ids on both sides."""
    if isinstance(model, EncoderDecoderModel):
        return model(ids, ids, dtype=torch.float32)
    return model(ids, dtype=torch.float32)


@torch.no_grad()
def _agreement(plan: Conversion, directory: Path, tuned: Path, adapter: Adapter | None) -> dict[str, Any]:
    """Both models on the same sample tokens, in float32: logits and experts. `tuned`, or an adapter, is what the edits
    are from."""
    config = plan.source.config
    length = min(SAMPLE_TOKENS, longest_sequence(config) or SAMPLE_TOKENS)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    if plan.edits and adapter is None:
        original = load_model(tuned, verified=True, decode=True)
    else:
        original = from_source(plan.source, decode=True)
    if adapter is not None:
        attach(original, adapter)
    before = _run(original, ids)
    after = _run(load_model(directory, verified=True, decode=True), ids)
    difference = float((before.logits - after.logits).abs().max())
    pairs = [(r.expert_ids, after.routings[layer].expert_ids) for layer, r in before.routings.items()]
    same = sum(int((a == b).sum()) for a, b in pairs)
    total = sum(a.numel() for a, _ in pairs)
    result = {
        "tokens": ids.numel(),
        "largest_logit_difference": difference,
        "mean_logit_difference": float((before.logits - after.logits).abs().mean()),
        "logits_std": float(before.logits.std()),
        "same_experts": same / total if total else None,
    }
    rounded = any(edit.must_change for edit in plan.edits.values()) and plan.dtype != torch.float32
    lossless = not rounded and all(
        plan.source.logical[name].header.dtype == plan.headers[target].dtype
        for target in plan.pieces
        for name in plan.read_from(target)
    )
    if lossless and (difference > 1e-4 * max(1.0, result["logits_std"] or 0.0) or same != total):
        raise CheckFailed(
            f"the converted model does not agree with its source (logits differ by {difference:.2g}, {same} of {total} "
            "experts are the same), so nothing was written"
        )
    return result


__all__ = ["RECEIPT", "Conversion", "Header", "Progress", "convert", "write_conversion"]
