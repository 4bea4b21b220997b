"""What the tensors of a GGUF file stand for: the names of `families/gguf/names.py`, each with how it is decoded.

    queries, keys   rows in pairs [h, d/2, 2] become [h, 2, d/2], where the architecture is `permuted`
    attn_kv_b       from attn_k_b [H,R,n], which is transposed, and attn_v_b [H,v,R]
    ffn_gate_exps   [E,F,D], also from old files' one tensor per expert, or from ffn_gate_up_exps [E,2F,D]
    attn_qkv        is cut into attn_q, attn_k and attn_v

One dtype for all: BF16 or F16 if every matrix is that, else float32. GGUF keeps vectors and routers in float32 whatever
the model was: vectors come back in the matrices' dtype; a router and its bias stay as they are.

H heads, R rank of the latent, n and v widths of a head's keys without rotation and of its values.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from manyhands.checkpoint.gguf.decode import check_readable, decode_into, put
from manyhands.checkpoint.tensors import DTYPES, FLOATS, Header, Logical, TensorSource, cut
from manyhands.config import ModelConfig
from manyhands.errors import CheckpointError
from manyhands.families.gguf import Arch

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_OLD_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d+)\.weight")
_ROUTER = ("ffn_gate_inp.weight", "ffn_gate_inp.bias", "exp_probs_b.bias")
_RECOMPUTED = ("rope_freqs.weight", ".attn_rot_embd", ".attn_rot_embd.weight")


def logical_tensors(files: TensorSource, arch: Arch, config: ModelConfig) -> dict[str, Logical]:
    """Every tensor of the model by GGUF's name; of the layers behind the last one (MTP) nothing.

    Raises `CheckpointError` for a tensor that cannot be decoded or does not fit its companions. Nothing is read.
    """
    wanted = {name: stored.header for name, stored in files.stored.items() if _is_of_model(name, config)}
    for name, header in wanted.items():
        check_readable(header.dtype, files.where(name))
    dtype = _main_dtype(wanted)
    found: dict[str, Logical] = {}
    experts: dict[str, dict[int, str]] = {}
    for name, header in wanted.items():
        match = _BLOCK.fullmatch(name)
        block, tail = (f"blk.{match[1]}.", match[2]) if match else ("", name)
        kept = header.dtype if tail.endswith(_ROUTER) and header.dtype in FLOATS else dtype
        if old := _OLD_EXPERT.fullmatch(tail):
            experts.setdefault(f"{block}ffn_{old[1]}_exps.weight", {})[int(old[2])] = name
        elif tail == "attn_qkv.weight" or tail == "attn_qkv.bias":
            found |= _qkv(files, name, header, block, arch, config, dtype)
        elif tail.startswith("ffn_gate_up_exps."):
            found |= _gate_up(files, name, header, dtype)
        elif tail in ("attn_k_b.weight", "attn_v_b.weight"):
            found |= {} if f"{block}attn_kv_b.weight" in wanted else _latent(files, wanted, block, config, dtype)
        elif arch.permuted and tail.startswith(("attn_q.", "attn_k.")):
            found[name] = _permuted(files, name, header, config, tail.startswith("attn_k."), dtype)
        elif header.dtype == kept:
            found[name] = Logical(header, (name,), None)
        else:
            decode = partial(_plain, name=header.dtype)
            entry = cut(decode) if len(header.shape) == 3 else None
            found[name] = Logical(Header(kept, header.shape), (name,), decode, entry=entry)
    for name, by_number in experts.items():
        if name in found:
            raise CheckpointError(f"{files.where(by_number[min(by_number)])} is stored twice: also as {name!r}")
        found[name] = _stack(files, by_number, wanted, dtype)
    return found


def _is_of_model(name: str, config: ModelConfig) -> bool:
    match = _BLOCK.fullmatch(name)
    behind = match is not None and len(match[1]) < 6 and int(match[1]) >= config.num_hidden_layers
    return not behind and not name.endswith(_RECOMPUTED)


def _main_dtype(headers: Mapping[str, Header]) -> str:
    matrices = {h.dtype for name, h in headers.items() if len(h.shape) > 1 and not name.endswith(_ROUTER)}
    (only,) = matrices if len(matrices) == 1 else ("F32",)
    return only if only in ("BF16", "F16") else "F32"


def _plain(parts: Sequence[Tensor], out: Tensor, *, name: str) -> None:
    decode_into(parts[0], name, out.detach())


def _permuted(files: TensorSource, name: str, header: Header, config: ModelConfig, keys: bool, dtype: str) -> Logical:
    a = config.attention
    heads = a.kv_heads if keys else a.num_attention_heads
    if header.shape[0] != heads * a.head_dim:
        raise CheckpointError(
            f"{files.where(name)} has shape {list(header.shape)}; {heads} heads of {a.head_dim} are expected"
        )
    return Logical(Header(dtype, header.shape), (name,), partial(_unpermute, name=header.dtype, heads=heads))


def _unpermute(parts: Sequence[Tensor], out: Tensor, *, name: str, heads: int) -> None:
    """Head by head: row (i, half) of the file is row (half, i) here."""
    raw, d = parts[0], len(parts[0]) // heads
    for h in range(heads):
        head = raw.new_empty((d, *out.shape[1:]), dtype=DTYPES["F32"])
        decode_into(raw[h * d : (h + 1) * d], name, head)
        into = out.detach()[h * d : (h + 1) * d].view(2, d // 2, *out.shape[1:])
        put(head.view(d // 2, 2, *out.shape[1:]).transpose(0, 1), into)


def _latent(
    files: TensorSource, headers: Mapping[str, Header], block: str, config: ModelConfig, dtype: str
) -> dict[str, Logical]:
    a = config.attention
    names = (f"{block}attn_k_b.weight", f"{block}attn_v_b.weight")
    H, R, n, v = a.num_attention_heads, a.kv_lora_rank, a.qk_nope_head_dim, a.v_head_dim
    for name, shape in zip(names, ((H, R, n), (H, v, R)), strict=True):
        if name not in headers:
            raise CheckpointError(f"{files.name}: tensor {name!r} is missing")
        if headers[name].shape != shape:
            raise CheckpointError(f"{files.where(name)} has shape {list(headers[name].shape)}; expected {list(shape)}")
    decode = partial(_join_latent, names=[headers[name].dtype for name in names])
    return {f"{block}attn_kv_b.weight": Logical(Header(dtype, (H * (n + v), R)), names, decode)}


def _join_latent(parts: Sequence[Tensor], out: Tensor, *, names: Sequence[str]) -> None:
    k_HRn, v_HvR = parts
    for k_Rn, v_vR, out_NR in zip(k_HRn, v_HvR, out.detach().chunk(len(k_HRn)), strict=True):
        decode_into(v_vR, names[1], out_NR[len(out_NR) - len(v_vR) :])
        decode_into(k_Rn, names[0], out_NR[: len(out_NR) - len(v_vR)].T)


def _stack(files: TensorSource, by_number: Mapping[int, str], headers: Mapping[str, Header], dtype: str) -> Logical:
    """Experts that lie one by one."""
    first = headers[by_number[min(by_number)]]
    names = tuple(by_number[e] for e in sorted(by_number))
    if sorted(by_number) != list(range(len(by_number))):
        raise CheckpointError(
            f"{files.where(names[0])}: the experts of this layer are not numbered from 0 without gaps"
        )
    for name in names:
        if headers[name].shape != first.shape:
            raise CheckpointError(
                f"{files.where(name)} has shape {list(headers[name].shape)}; {list(first.shape)} before"
            )
    decode = partial(_decode_stack, names=[headers[name].dtype for name in names])
    entry = partial(_decode_entry, names=decode.keywords["names"])
    return Logical(Header(dtype, (len(names), *first.shape)), names, decode, entry=entry)


def _decode_stack(parts: Sequence[Tensor], out: Tensor, *, names: Sequence[str]) -> None:
    for part, name, into in zip(parts, names, out.detach(), strict=True):
        decode_into(part, name, into)


def _decode_entry(parts: Sequence[Tensor], e: int, out: Tensor, *, names: Sequence[str]) -> None:
    decode_into(parts[e], names[e], out.detach())


def _gate_up(files: TensorSource, name: str, header: Header, dtype: str) -> dict[str, Logical]:
    """Gate and up one behind the other along the rows: [E,2F,D], or biases [E,2F]."""
    bias = name.endswith(".bias")
    if len(header.shape) != 3 - bias or header.shape[1] % 2:
        raise CheckpointError(f"{files.where(name)} has shape {list(header.shape)}; expected [experts, 2 · width, …]")
    E, both, *rest = header.shape
    found = {}
    for half in ("gate", "up"):
        decode = partial(_half, name=header.dtype, second=half == "up")
        found[name.replace("gate_up", half)] = Logical(
            Header(dtype, (E, both // 2, *rest)), (name,), decode, entry=cut(decode)
        )
    return found


def _half(parts: Sequence[Tensor], out: Tensor, *, name: str, second: bool) -> None:
    width = out.shape[1]
    decode_into(parts[0][:, width * second : width * (second + 1)], name, out.detach())


def _qkv(
    files: TensorSource, name: str, header: Header, block: str, arch: Arch, config: ModelConfig, dtype: str
) -> dict[str, Logical]:
    a, ending = config.attention, name.rpartition(".")[2]
    widths = [heads * a.head_dim for heads in (a.num_attention_heads, a.kv_heads, a.kv_heads)]
    if arch.permuted or header.shape[0] != sum(widths):
        raise CheckpointError(f"{files.where(name)}: queries, keys and values in one tensor are not supported here")
    found, start = {}, 0
    for letter, width in zip("qkv", widths, strict=True):
        decode = partial(_rows, name=header.dtype, start=start)
        found[f"{block}attn_{letter}.{ending}"] = Logical(Header(dtype, (width, *header.shape[1:])), (name,), decode)
        start += width
    return found


def _rows(parts: Sequence[Tensor], out: Tensor, *, name: str, start: int) -> None:
    decode_into(parts[0][start : start + len(out)], name, out.detach())
