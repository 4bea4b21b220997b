"""Models from directories and back: our own checkpoints and every published family, by path or hub name.

model, tokenizer = load("allenai/OLMoE-1B-7B-0924")     # or a directory, or a run
model.save("somewhere")                                  # in the family's own names
save(decoder, "somewhere", tokenizer, family="dots1")    # a model of one's own

config.json         what the model is; our own: {"model_type": "manyhands", "version": 1, "model": {…}}
model.safetensors   or shards with an index; experts one by one where the family has them so
tokenizer.json      and what lies beside it: chat template, special tokens
manifest.json       in what manyhands wrote: SHA-256 of every file, verified on loading
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from manyhands.checkpoint.asked import asked_device, asked_dtype
from manyhands.checkpoint.budget import Budget, share
from manyhands.checkpoint.files import building
from manyhands.checkpoint.find import find, open_directory, open_found
from manyhands.checkpoint.gguf.files import is_gguf
from manyhands.checkpoint.manifest import verify
from manyhands.checkpoint.origin import Origin
from manyhands.checkpoint.own import keep_own, read_state, share_out
from manyhands.checkpoint.packed import Record, hold_records, write_packed
from manyhands.checkpoint.put_adapter import put_adapter
from manyhands.checkpoint.room import check_room
from manyhands.checkpoint.safetensors.shards import MAX_SHARD_SIZE
from manyhands.checkpoint.save import write_directory, write_rest
from manyhands.checkpoint.sidecars import copy_tokenizer, read_tokenizer
from manyhands.checkpoint.source import Source, open_source, stored_twice
from manyhands.checkpoint.stored import hold_stored, open_store, read_tensor
from manyhands.checkpoint.tuned import Change
from manyhands.checkpoint.unpacked import Unpacked
from manyhands.config import BuiltConfig, EncoderDecoderConfig, ModelConfig
from manyhands.config.decoder import as_decoder
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import CheckpointError, ConfigError, UserError
from manyhands.families import FAMILIES, family_named, nearest
from manyhands.files import CONFIG, TOKENIZER, TUNED, cannot_write
from manyhands.layers.adapted import base_name
from manyhands.models import AnyModel, Decoder, EncoderDecoder, Recurrent
from manyhands.models.adapted import refuse_adapted
from manyhands.moe import Router
from manyhands.moe.crew import Crew, CrewExperts
from manyhands.text import Tokenizer
from manyhands.text.tokenizer_files import has_tokenizer, instead

_log = logging.getLogger(__name__)


class Loaded(nn.Module):
    """What a model of any kind has that knows which files it came from, and can write itself back. It keeps none of
    them open."""

    origin: Origin | None = None
    tokenizer: Tokenizer | None = None
    budget: Budget | None = None
    """How memory was shared out, of a model whose experts are on disk."""

    @property
    def family(self) -> str:
        """The `model_type` of the files it came from."""
        return "manyhands" if self.origin is None else self.origin.family.model_type

    @property
    def records(self) -> dict[str, Record]:
        """What of it lies in packed records, by their names in `state_dict`; empty for a model that is not packed."""
        held = {base_name(name) for name, _ in self.named_buffers()}
        found = {} if self.origin is None else self.origin.records
        return {name: record for name, record in found.items() if name in held}

    def train(self, mode: bool = True) -> Self:
        """Raises `UserError` for packed weights, which have no gradient; what stands beside them has."""
        beside = self.budget is None and any(parameter.requires_grad for parameter in self.parameters())
        if mode and (self.records or self.budget is not None) and not beside:
            raise UserError(
                "packed weights cannot be trained; load_model(…, decode=True) or `manyhands convert` unpacks them"
            )
        super().train(mode)
        return self

    def save(
        self,
        path: str | Path,
        *,
        family: str | None = None,
        dtype: torch.dtype | str | None = None,
        max_shard_size: int = MAX_SHARD_SIZE,
        overwrite: bool = False,
    ) -> None:
        """Write a directory that transformers loads; see the function `save`. Its own family, unless told another."""
        if family is None and self.family != "manyhands":
            family = self.family
        assert isinstance(self, LoadedModel)
        save(
            self,
            path,
            self.tokenizer,
            family=family,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )


class Model(Loaded, Decoder):
    """A decoder from files."""


class RecurrentModel(Loaded, Recurrent):
    """A recurrent model from files."""


class EncoderDecoderModel(Loaded, EncoderDecoder):
    """An encoder-decoder from files."""


LoadedModel = Model | EncoderDecoderModel | RecurrentModel
"""What `load` gives: the class follows the kind of model that the files hold."""


def only_decoder(model: LoadedModel, what: str) -> Model:
    """`model`, for what is done with decoders alone: `what` (chat, say). Raises `ConfigError` for another kind."""
    as_decoder(model.config, what)
    assert isinstance(model, Model)
    return model


def only_language_model(model: LoadedModel, what: str) -> Model | RecurrentModel:
    """`model`, for what needs one that continues text. Raises `ConfigError` for another kind."""
    if isinstance(model, EncoderDecoderModel):
        raise ConfigError(f"kind = {model.config.kind!r}: {what} is for models that predict every next token of a text")
    return model


def _empty(config: BuiltConfig, implementation: str) -> LoadedModel:
    """On the meta device if one is set."""
    if isinstance(config, ModelConfig):
        return Model(config, implementation)
    if isinstance(config, EncoderDecoderConfig):
        return EncoderDecoderModel(config, implementation)
    return RecurrentModel(config, implementation)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    experts_implementation: str = "auto",
    decode: bool = False,
    ignore_fields: Collection[str] = (),
    memory: int | None = None,
    cache_policy: str = "lfu",
    pin: Sequence[Sequence[int]] | None = None,
    cache_bytes: int | None = None,
    crew: Crew | None = None,
    adapter: str | Path | None = None,
) -> tuple[LoadedModel, Tokenizer]:
    """Model and tokenizer of a checkpoint directory, of a run's newest valid checkpoint, or of a model on the hub.

    A path becomes a verified directory (`find`), that an opened checkpoint whose every tensor has its place in the
    model (`open_found`), and that the model (`from_source`), which holds weights and keeps no file open.

    With a `crew` the others hold most of the experts, and run them for this process (`moe/crew.py`); it leads, and they
    call `own_experts`; not with `dtype`, `decode`, `memory` or a tuned model.

    `adapter` is put on it: a run of `manyhands tune`, or a directory of PEFT's.

    The other arguments are `load_model`'s. Raises `CheckpointError` naming what is missing or damaged; a model
    without a tokenizer can be had through `load_model`.
    """
    directory = find(path)
    tokens = directory
    if (changed := Change.at(directory)) is not None:
        directory, tokens = changed.base, changed.tokenizer
    if not is_gguf(tokens) and not has_tokenizer(tokens):
        raise CheckpointError(
            f"{tokens}: there is no {TOKENIZER}{instead(tokens)}; mh.load_model loads the model without it"
        )
    source = open_found(directory, ignore_fields)
    tokenizer = read_tokenizer(tokens)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise CheckpointError(
            f"{tokens}: the tokenizer has {tokenizer.vocab_size} tokens, the model vocab_size = "
            f"{source.config.vocab_size}; they do not belong together"
        )
    on_disk = _on_disk(memory, cache_policy, pin, cache_bytes)
    if adapter is not None and (changed is not None or on_disk is not None or crew is not None):
        why = f"{path} is tuned itself" if changed is not None else "its experts are to lie elsewhere than in memory"
        raise UserError(f"{why}: no adapter can be put on it; manyhands convert makes a whole model of both")
    model = _model(source, dtype, device, experts_implementation, decode, on_disk, changed, crew)
    if adapter is not None and (own := put_adapter(model, source.origin, adapter)) is not None:
        tokenizer = read_tokenizer(own)
    model.tokenizer = tokenizer
    return model, tokenizer


def load_model(
    directory: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    experts_implementation: str = "auto",
    verified: bool = False,
    decode: bool = False,
    ignore_fields: Collection[str] = (),
    memory: int | None = None,
    cache_policy: str = "lfu",
    pin: Sequence[Sequence[int]] | None = None,
    cache_bytes: int | None = None,
) -> LoadedModel:
    """The model of a checkpoint directory, in evaluation mode; `model.train()` to go on training it.

    On the CPU a tensor that is stored as it is used stays the file itself, mapped into memory and private to this
    process: nothing is read until it is used, and a change is never written back. Stacked experts are copied once.
    Tensors that a publisher quantised are decoded; packed records of our own are not, unless `decode` says so (to
    float32, exactly). `verified` says that the caller answers for the files. `dtype` converts the weights
    (`torch.bfloat16` or "bfloat16"; None, "auto": as stored), except records and the routers' weights, which are
    float32. NaN and infinite weights are loaded as they are. `ignore_fields` names fields of `config.json` that nobody
    knows and that are to be read past: that they change nothing is the caller's word.

    `memory` bounds what this process takes, in bytes: the experts of a packed model stay on disk, and as many as there
    is room for are kept in memory by `cache_policy`: `lfu` (those used most often of late), `lru`, or `pinned` (those
    with the most uses in `pin` [sparse layers][E]). The tokens are the same. `cache_bytes` of it are for the caches of
    requests; None: one context, at most a quarter of what is left. A step that cannot read an expert raises
    `DiskError`.

    Raises `CheckpointError` if the directory is damaged, or holds a config or a tensor that does not fit, and
    `UserError` if memory does not hold the model: all names, shapes, dtypes and sizes are checked before any weight
    is allocated.
    """
    if not verified and (Path(directory) / TUNED).is_file():
        verify(directory)
    if (changed := Change.at(Path(directory))) is not None:
        source = open_found(changed.base, ignore_fields)
    elif verified and not is_gguf(directory):
        source = open_source(directory, ignore_fields)
    else:
        source = open_directory(directory, ignore_fields)
    on_disk = _on_disk(memory, cache_policy, pin, cache_bytes)
    return _model(source, dtype, device, experts_implementation, decode, on_disk, changed)


def save(
    model: AnyModel,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    family: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Write `model` as a directory in a family's format (None: the nearest one that holds it exactly).

    `dtype` converts (None: that of the embedding); `max_shard_size` is in bytes. The directory appears complete, in
    one rename. A packed model stays packed, unless a family or a dtype is asked for, which unpacks it. What exists
    stays, unless it is an empty folder, or `overwrite` is given and it is whole and unchanged what this program wrote.

    Raises `UserError` for a target that may not be written, `ConfigError` naming the field that the family cannot
    express or for a model with adapters, `StorageError` if the disk refuses.
    """
    if isinstance(model, LoadedModel) and model.budget is not None:
        raise UserError("its experts are on disk: load it without memory to save it, or copy its directory")
    refuse_adapted(model, "save")
    dtype = asked_dtype(dtype)
    origin = model.origin if isinstance(model, LoadedModel) else None
    records = model.records if isinstance(model, LoadedModel) else {}
    sources = [] if origin is None else [origin.path]
    if records and family in (None, "manyhands") and dtype is None:
        assert origin is not None and origin.packed is not None
        state = model.state_dict()
        with building(path, overwrite=overwrite, sources=sources) as partial:
            write_packed(
                partial,
                as_decoder(model.config, "packing"),
                origin.packed,
                lambda name: state[name].dtype,
                lambda name: state[name].cpu(),
                max_shard_size=max_shard_size,
            )
            write_rest(partial, tokenizer, origin)
        return
    chosen = nearest(model.config) if family is None else family_named(family, "family")
    values = Unpacked(dict(model.state_dict()), records)
    names = set(values)
    for name in tensor_shapes(model.config):
        if ".experts." in name and name not in names:
            raise ConfigError(f"{name} is not in the model: its experts' weights are held in a way no format stores")
    with building(path, overwrite=overwrite, sources=sources) as partial:
        write_directory(
            partial,
            chosen,
            model.config,
            values,
            origin=origin,
            tokenizer=tokenizer,
            dtype=dtype,
            max_shard_size=max_shard_size,
        )


def save_model(
    directory: str | Path,
    model: AnyModel,
    tokenizer_path: str | Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write our own format into an existing directory; use it inside `building`, which makes it a checkpoint.

    `tokenizer_path` is a `tokenizer.json`, or a directory of a tokenizer's files, whose chat template is kept.
    `weights` are the model's by name, whole, where it holds but parts of them (None: its own).
    Raises `StorageError` if the disk refuses, `ConfigError` for a model with adapters.
    """
    refuse_adapted(model, "save")
    try:
        ours, dtype = model.state_dict() if weights is None else weights, model.embed_tokens.weight.dtype
        write_directory(Path(directory), FAMILIES["manyhands"], model.config, ours, dtype=dtype)
        if tokenizer_path is not None:
            copy_tokenizer(Path(tokenizer_path), Path(directory))
    except OSError as error:
        raise cannot_write(directory, error) from error


def read_config(path: str | Path) -> BuiltConfig:
    """The model that a checkpoint directory holds, from its `config.json` and its tensors' headers."""
    return open_source(path).config


def from_source(
    source: Source,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    implementation: str = "auto",
    decode: bool = False,
    on_disk: "OnDisk | None" = None,
    crew: Crew | None = None,
) -> LoadedModel:
    """The model of an opened checkpoint; arguments and errors are those of `load_model`."""
    dtype = asked_dtype(dtype)
    device = asked_device(device) if crew is None else crew.ranks.device
    if crew is not None and (dtype is not None or decode):
        raise UserError("several processes hold experts as they are stored: not with a dtype or decode")
    if on_disk is not None:
        if crew is not None:
            raise UserError("memory keeps experts on disk for one process: leave it out, or start one process")
        if device.type != "cpu" or dtype is not None or decode:
            raise UserError("memory keeps packed experts on disk: not with another device, a dtype or decode")
        return _from_disk(source, implementation, on_disk)
    own = None if crew is None else share_out(source, crew, implementation)
    check_room(source, dtype, device, decode, own=own)
    try:
        with torch.device("meta"):
            model = _empty(source.config, implementation)
            records = {} if decode else source.records
            hold_records(model, records, implementation)
    except RuntimeError as error:  # sizes that are fine one by one, with a product over 2⁶³
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{source.directory / CONFIG}: no such model can be built: {reason}") from None
    if own is not None:
        keep_own(model, own)
    _log.debug("%s: %s, %d tensors", source.directory, source.family.model_type, len(source.files.stored))
    state = read_state(source, model, records, dtype, device, own)
    _check_tied(source)
    model.load_state_dict(state, assign=True)
    model.origin = source.origin
    if crew is not None:
        for layer, moe in model.sparse_layers().items():
            moe.experts = CrewExperts(moe.experts, crew, layer)
        crew.meet()
    model.requires_grad_(not records and crew is None)  # what is not packed is not trained alone
    return model.eval()


def _model(
    source: Source,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    implementation: str,
    decode: bool,
    on_disk: "OnDisk | None",
    changed: Change | None,
    crew: Crew | None = None,
) -> LoadedModel:
    """With what tuning changed put into it."""
    if changed is not None and crew is not None:
        raise UserError(
            f"{changed.directory} is tuned; processes share whole models: manyhands convert makes one of it"
        )
    if changed is not None and on_disk is not None:
        raise UserError(f"{changed.directory} is tuned; memory is for a whole model: manyhands convert makes one of it")
    model = from_source(source, dtype, device, implementation, decode, on_disk, crew)
    if changed is not None:
        changed.put_into(model)
        model.eval()
    return model


class OnDisk(NamedTuple):
    """How experts stay on disk: `load_model` explains."""

    memory: int
    cache_policy: str
    pin: Sequence[Sequence[int]] | None
    cache_bytes: int | None


def _on_disk(
    memory: int | None, cache_policy: str, pin: Sequence[Sequence[int]] | None, cache_bytes: int | None
) -> OnDisk | None:
    return None if memory is None else OnDisk(memory, cache_policy, pin, cache_bytes)


def _from_disk(source: Source, implementation: str, how: OnDisk) -> Model:
    budget = share(source, how.memory, how.cache_bytes)
    store = open_store(source, budget, how.cache_policy, how.pin)
    with torch.device("meta"):
        model = Model(source.decoder("a memory budget"), implementation)
        linear = {name: record for name, record in source.records.items() if record.num_experts is None}
        hold_records(model, linear, implementation)
    hold_stored(model, source, store, implementation)
    routers = [f"{name}." for name, module in model.named_modules() if isinstance(module, Router)]
    inside = {name for record in source.records.values() for name in record.sections}
    state = {name: read_tensor(source, source.files.stored[name]) for name in linear}
    for name in tensor_shapes(source.config):
        if name not in inside:
            tensor = read_tensor(source, source.files.stored[source.pieces[name][0].theirs])
            state[name] = tensor.float() if name.rpartition(".")[0] + "." in routers else tensor
    _check_tied(source)
    model.load_state_dict(state, assign=True)
    model.origin, model.budget = source.origin, budget
    model.requires_grad_(False)
    return model.eval()


def _check_tied(source: Source) -> None:
    """A tensor that is stored twice, such as a head beside the embedding it is tied to, must be the same both times."""
    twice = stored_twice(source.family, source.config)
    for name in source.dropped:
        if (other := twice.get(name)) is not None:
            same = source.logical[name].header == source.logical[other].header
            if not same or not _equal_bits(source.value(name), source.value(other)):
                said = "tie_word_embeddings = true" if name.endswith("lm_head.weight") else "that they are one table"
                raise CheckpointError(
                    f"{source.files.where(source.logical[name].parts[0])} differs from {other!r}, though {CONFIG} "
                    f"says {said}; it is false, or one of the two is wrong"
                )
            source.release(name)


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # NaN equals NaN
