"""How much memory loading takes: a mid-size random checkpoint of any family, loaded by a process of its own (Linux).

python tests/families/loading.py SMALL BIG [DTYPE]      # what that process does

N rows, K columns, E experts.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDTHS = {
    "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "head_dim",
    "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "d_model", "d_kv", "d_ff",
}  # fmt: skip
PER_LAYER = ("layer_types", "mlp_only_layers", "attn_type_list", "no_rope_layers", "moe_layers")
LAYERS, VOCAB = 12, 2048
SMALLEST, SHARD = 250_000_000, 60_000_000  # bytes


def enlarged(fields: dict[str, Any], factor: int) -> dict[str, Any]:
    """A `config.json` with every width times `factor`, more layers and a larger vocabulary."""
    if "text_config" in fields:
        return fields | {"text_config": enlarged(fields["text_config"], factor)}
    fields = {name: value for name, value in fields.items() if name not in PER_LAYER}
    fields |= {name: fields[name] * factor for name in WIDTHS & fields.keys() if fields[name] is not None}
    rope = dict(fields.get("rope_parameters") or {})
    for name in {"short_factor", "long_factor"} & rope.keys():  # one for each pair of a head's numbers
        rope[name] = rope[name] * factor
    fields |= {"rope_parameters": rope} if rope else {}
    if "num_decoder_layers" not in fields:
        return fields | {"num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    for side in ("encoder", "decoder"):
        if f"{side}_sparse_step" in fields:
            fields[f"num_sparse_{side}_layers"] = LAYERS // fields[f"{side}_sparse_step"]
    return fields | {"num_layers": LAYERS, "num_decoder_layers": LAYERS, "vocab_size": VOCAB}


def random_checkpoint(small: Path, big: Path) -> None:
    """Write a checkpoint like the one in `small`, quantised the same way, of 250 MB or more once loaded."""
    from manyhands.checkpoint.quantized import Header
    from manyhands.checkpoint.safetensors.shards import write_shards
    from manyhands.checkpoint.save import target_headers, target_pieces
    from manyhands.config.shapes import tensor_shapes
    from manyhands.families import read_config, text_fields

    values = json.loads((small / "config.json").read_text())
    for factor in (4, 8, 16, 24, 32, 40):
        fields = enlarged(values, factor)
        family, config = read_config(fields, "config.json")
        size = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
        method = (text_fields(family, values).get("quantization_config") or {}).get("quant_method")
        dtype = torch.bfloat16 if method else torch.float32
        if size * dtype.itemsize >= SMALLEST:
            break
    stored: dict[str, Header] = {}
    for name, header in target_headers(config, target_pieces(family, config), lambda *_: dtype).items():
        stored |= {n: Header(*rest) for n, *rest in _parts(method, name, header.dtype, header.shape)}
    g = torch.Generator().manual_seed(1)

    def value(name: str) -> Tensor:
        header = stored[name]
        if name.endswith("weight_shape"):
            n, words = stored[name.replace("weight_shape", "weight_packed")].shape
            return torch.tensor([n, words * 8], dtype=torch.int32)
        if header.dtype in ("F32", "BF16"):
            kind = {"F32": torch.float32, "BF16": torch.bfloat16}[header.dtype]
            return torch.empty(header.shape, dtype=kind).uniform_(-0.05, 0.05, generator=g)
        if header.dtype == "I32":
            return torch.randint(-(1 << 31), 1 << 31, header.shape, dtype=torch.int32, generator=g)
        codes = torch.randint(0, 120, header.shape, dtype=torch.uint8, generator=g)
        return codes if header.dtype == "U8" else codes.view(torch.float8_e4m3fn)

    big.mkdir(parents=True, exist_ok=True)
    (big / "config.json").write_text(json.dumps(fields))
    write_shards(big, stored, value, SHARD)


def _parts(
    method: str | None, name: str, dtype: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """How a tensor is stored: (name, dtype, shape) of each part."""
    if method == "fp8" and name.endswith("_proj.weight"):
        n, k = shape
        yield name, "F8_E4M3", shape
        yield f"{name}_scale_inv", "F32", (-(-n // 128), -(-k // 128))
    elif method == "compressed-tensors" and ".mlp.experts." in name:
        n, k = shape
        yield f"{name}_packed", "I32", (n, k // 8)
        yield f"{name}_scale", "BF16", (n, k // 32)
        yield f"{name}_shape", "I32", (2,)
    elif method == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        E, k, n = shape
        yield f"{name}_blocks", "U8", (E, n, k // 32, 16)
        yield f"{name}_scales", "U8", (E, n, k // 32)
    else:
        yield name, dtype, shape


def peak_over_size(small: Path, big: Path, dtype: str = "as stored") -> float:
    """Largest growth of resident memory over the bytes of the weights, in a new process. `small` warms it up."""
    command = [sys.executable, __file__, str(small), str(big), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _status(name: str) -> int:
    """Bytes, from the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _load_and_read(directory: str, dtype: str) -> int:
    """Load a model and read every weight once. Returns their bytes."""
    from manyhands.checkpoint.model import load_model

    model = load_model(directory, dtype=None if dtype == "as stored" else getattr(torch, dtype))
    weights = model.state_dict().values()
    for t in weights:
        t.sum()
    return sum(t.nbytes for t in weights)


def main(small: str, big: str, dtype: str) -> None:
    torch.set_num_threads(1)
    _load_and_read(small, dtype)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    size = _load_and_read(big, dtype)
    print((_status("VmHWM") - before) / size)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(*sys.argv[1:])
