"""A trace for other programs: NumPy arrays, or one CSV line for each expert of each token and layer."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from manyhands.errors import UserError
from manyhands.files import writing
from manyhands.trace.part import Part
from manyhands.trace.recording import Trace

COLUMNS = "sequence,position,token_id,phase,step,layer,slot,expert,weight"


def export_npy(trace: Trace, path: str | Path, array: str = "expert_ids") -> None:
    """One array of the trace, as a .npy file: `expert_ids` [T, L, K] is what vLLM calls `routed_experts`.

    Written part by part. Raises `UserError` for an array that was not recorded and for a file that exists.
    """
    wanted = trace.manifest.shapes(len(trace))
    if array not in wanted:
        raise UserError(f"{trace.path}: has no {array!r}; it has {', '.join(wanted)}")
    dtype, shape = wanted[array]
    _check_new(path)
    with writing(path) as file:
        about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        for part in trace.parts():
            file.write(np.ascontiguousarray(part.arrays()[array]).data)


def export_csv(trace: Trace, path: str | Path) -> None:
    """Lines of `COLUMNS`; no expert is left out, no weight and an unknown token are empty.

    Raises `UserError` for a file that exists.
    """
    _check_new(path)
    with writing(path) as file:
        file.write(f"{COLUMNS}\n".encode())
        for part in trace.parts():
            for first in range(0, len(part), 4096):
                _write_lines(file, part.rows(slice(first, first + 4096)), trace)


def _write_lines(file: BinaryIO, part: Part, trace: Trace) -> None:
    layers, none = trace.manifest.layers, trace.manifest.none
    weights = None if part.weights is None else part.weights.tolist()
    each = zip(
        part.sequence, part.position, part.token_ids, part.phase, part.step, part.expert_ids.tolist(), strict=True
    )
    lines: list[str] = []
    for t, (sequence, position, token, phase, step, by_layer) in enumerate(each):
        front = f"{sequence},{position},{'' if token < 0 else token},{phase},{step}"
        for at, experts in enumerate(by_layer):
            for slot, expert in enumerate(experts):
                if expert != none:
                    weight = "" if weights is None else weights[t][at][slot]
                    lines.append(f"{front},{layers[at]},{slot},{expert},{weight}\n")
    file.write("".join(lines).encode())


def _check_new(path: str | Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"{path}: exists; choose another name")
