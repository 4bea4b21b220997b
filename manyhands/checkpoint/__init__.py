"""Checkpoints: models from files and back, directories that are complete or absent, state without pickle, runs.

reading     find.py         a path, a run or a hub name -> a verified directory, opened
            source.py       `config.json` and headers -> which stored tensor becomes which part of ours (match.py)
            tensors.py      what every file format gives: a `TensorSource`; a dtype's name
            safetensors/    the format: header.py, files.py (by memory map), shards.py (written)
            quantized/      publishers' fp8, int4, mxfp4, decoded on load
            packed.py       our own packed records; unpacked.py what they stand for
            room.py         whether a model fits into memory, before it is read
            assemble.py     one tensor from its pieces; experts.py one expert of a stack
            model.py        all of them: `load`, `Model`, `save`
            adapters/       LoRA as PEFT keeps it: read and written
writing     save.py         a model in a family's format; sidecars.py what lies beside it
            convert.py      from files to files, with a receipt (receipt.py)
            origin.py       what a loaded model remembers of its files
directories files.py        complete or absent, in one rename; manifest.py what is in one; target.py what may go
            runs.py         a training run's; state.py optimisers and generators in it
"""

from manyhands.checkpoint.files import building, remove
from manyhands.checkpoint.manifest import verify
from manyhands.checkpoint.runs import RunDirectory, resolve_checkpoint
from manyhands.checkpoint.state import (
    flatten,
    load_tensors,
    rng_state,
    save_tensors,
    set_rng_state,
    unflatten,
)

__all__ = [
    "RunDirectory",
    "building",
    "flatten",
    "load_tensors",
    "remove",
    "resolve_checkpoint",
    "rng_state",
    "save_tensors",
    "set_rng_state",
    "unflatten",
    "verify",
]
