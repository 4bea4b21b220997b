"""What a checkpoint holds once decoded, told from the headers of its stored tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from manyhands.checkpoint.quantized.config import Fp8, IntWeights, read_quantization
from manyhands.checkpoint.quantized.decode import decode_fp8, decode_int, decode_mxfp4
from manyhands.checkpoint.tensors import Header, Logical, as_stored, cut
from manyhands.errors import CheckpointError

_FLOAT_SCALES = ("F32", "BF16", "F16")


def logical_tensors(
    stored: Mapping[str, Header], quantization_config: Mapping[str, Any] | None, where: str
) -> dict[str, Logical]:
    """The tensors of a checkpoint by name, as they are after decoding. Nothing is read.

    `quantization_config` is that of the `config.json` at `where`; None: every tensor is stored as it is. A tensor is
    quantised if its companions are there, whatever the config's lists of modules say: they name modules that never
    were. Static scales of activations are left out: activations are not quantised here.

    Raises `CheckpointError` naming the field, for a method that is not known or a field that changes the weights and is
    not supported, or the tensor, for parts that are missing or do not fit each other.
    """
    if quantization_config is None:
        return as_stored(stored)
    config = read_quantization(quantization_config, where)
    checkpoint = _Stored(stored, where)
    if isinstance(config, Fp8):
        quantized = _fp8(checkpoint, config)
    elif isinstance(config, IntWeights):
        quantized = _int(checkpoint, config)
    else:
        quantized = _mxfp4(checkpoint)
    used = {part for tensor in quantized.values() for part in tensor.parts}
    if isinstance(config, Fp8) and config.activation_scheme == "static":
        used |= {name for name in stored if name.endswith("activation_scale")}
    plain = as_stored({name: header for name, header in stored.items() if name not in used})
    for name in quantized.keys() & plain.keys():
        raise checkpoint.error(name, f"is stored twice: as it is, and as {quantized[name].parts[0]!r}")
    return plain | quantized


@dataclass(frozen=True, slots=True)
class _Stored:
    """Stored tensors, and the errors about them."""

    headers: Mapping[str, Header]
    where: str

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: tensor {name!r} {problem}")

    def get(self, name: str, dtypes: Sequence[str], *, needed_by: str) -> Header:
        """Raises `CheckpointError` if it is missing, or of none of these dtypes."""
        if name not in self.headers:
            raise self.error(needed_by, f"needs {name!r}, which is missing")
        header = self.headers[name]
        if header.dtype not in dtypes:
            raise self.error(name, f"is {header.dtype}; expected {' or '.join(dtypes)}")
        return header

    def shaped(self, name: str, header: Header, *allowed: tuple[int, ...], why: str = "") -> None:
        if header.shape not in allowed:
            expected = " or ".join(str(list(shape)) for shape in allowed)
            raise self.error(name, f"has shape {list(header.shape)}; expected {expected}{why}")


def _fp8(stored: _Stored, config: Fp8) -> dict[str, Logical]:
    """`X` float8 [N,K] or [E,N,K] and `X_scale_inv`; names and shapes of transformers 5.23, `finegrained_fp8.py`."""
    scales = (*_FLOAT_SCALES, "F8_E8M0", "U8") if config.scale_fmt == "ue8m0" else (*_FLOAT_SCALES, "F8_E8M0")
    found = {}
    for name, header in stored.headers.items():
        if name.endswith("_scale_inv"):
            stored.get(name.removesuffix("_scale_inv"), config.dtypes, needed_by=name)
        elif header.dtype.startswith("F8_"):
            stored.get(name, config.dtypes, needed_by=name)
            if len(header.shape) not in (2, 3):
                raise stored.error(name, f"has shape {list(header.shape)}; expected 2 dimensions, or 3 with experts")
            scale_name = name + "_scale_inv"
            scale = stored.get(scale_name, scales, needed_by=name)
            *lead, n, k = header.shape
            if config.weight_block_size is not None:
                block = config.weight_block_size
                why = f" for weights {list(header.shape)} with weight_block_size = {list(block)}"
                stored.shaped(scale_name, scale, (*lead, -(-n // block[0]), -(-k // block[1])), why=why)
            elif lead and n and n % 2 == 0 and scale.shape == (*lead, 2, 1):
                block = (n // 2, k)  # an expert's fused gate and up projections, one scale each
            else:
                block = (n, k)
                stored.shaped(scale_name, scale, (), (1,), (*lead, 1, 1), why=" with weight_block_size = null")
            decode = partial(decode_fp8, block=block)
            stacked = lead and scale.shape[:1] == header.shape[:1]
            entry = cut(decode) if stacked else None
            found[name] = Logical(Header("BF16", header.shape), (name, scale_name), decode, entry=entry)
    return found


def _int(stored: _Stored, config: IntWeights) -> dict[str, Logical]:
    """`X_packed`, `X_scale`, `X_shape` and, if asymmetric, `X_zero_point`, where X is `….weight`."""
    per_word = 32 // config.num_bits
    found = {}
    for name, header in stored.headers.items():
        leaf = name.rpartition(".")[2]
        stem = name.removesuffix(leaf) + "weight"
        if leaf in ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"):
            stored.get(stem + "_packed", ("I32",), needed_by=name)
            if leaf == "weight_g_idx" or (leaf == "weight_zero_point" and config.symmetric):
                raise stored.error(name, "is not supported with this quantization_config")
        if leaf != "weight_packed":
            continue
        stored.get(name, ("I32",), needed_by=name)
        if len(header.shape) not in (2, 3):
            raise stored.error(name, f"has shape {list(header.shape)}; expected 2 dimensions, or 3 with experts")
        *lead, n, words = header.shape
        k = words * per_word
        group = config.columns or k
        if k == 0 or k % group:
            raise stored.error(name, f"holds {k} columns, not a whole number of groups of group_size = {group}")
        parts = [name, stem + "_scale", stem + "_shape"]
        why = f" for weights {[*lead, n, k]} with group_size = {group}"
        stored.shaped(parts[1], stored.get(parts[1], _FLOAT_SCALES, needed_by=name), (*lead, n, k // group), why=why)
        stored.shaped(parts[2], stored.get(parts[2], ("I64", "I32"), needed_by=name), (len(header.shape),))
        if not config.symmetric:
            parts.append(stem + "_zero_point")
            zero = stored.get(parts[3], ("I32",), needed_by=name)
            stored.shaped(parts[3], zero, (*lead, -(-n // per_word), k // group), why=why)
        shape = (*lead, n, k)
        said = f"{stored.where}: tensor {parts[2]!r}"
        decode = partial(decode_int, num_bits=config.num_bits, group=group, shape=list(shape), said=said)
        found[stem] = Logical(Header("BF16", shape), tuple(parts), decode)
    return found


def _mxfp4(stored: _Stored) -> dict[str, Logical]:
    """`X_blocks` [E,N,G,16] and `X_scales` [E,N,G] of gpt-oss; X is [E,32G,N], as in its unquantised checkpoints."""
    found = {}
    for name, header in stored.headers.items():
        if name.endswith("_scales"):
            stored.get(name.removesuffix("_scales") + "_blocks", ("U8",), needed_by=name)
        elif name.endswith("_blocks"):
            stored.get(name, ("U8",), needed_by=name)
            stem = name.removesuffix("_blocks")
            scales = stored.get(stem + "_scales", ("U8",), needed_by=name)
            if len(header.shape) != 4 or header.shape[3] != 16:
                raise stored.error(name, f"has shape {list(header.shape)}; expected [experts, rows, groups, 16]")
            experts, n, groups, _ = header.shape
            stored.shaped(stem + "_scales", scales, (experts, n, groups))
            decoded = Header("BF16", (experts, groups * 32, n))
            found[stem] = Logical(decoded, (name, stem + "_scales"), decode_mxfp4, True, cut(decode_mxfp4))
    return found
