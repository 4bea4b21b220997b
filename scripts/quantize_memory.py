"""Peak memory of `manyhands quantize` on a checkpoint with experts as wide as DeepSeek-V3's.

    python scripts/quantize_memory.py DIRECTORY [--experts 16] [--heads 128] [--vocab 129280]

Writes the checkpoint (random bfloat16 weights, at the defaults 5.6 GB) and its packed copies into DIRECTORY, which must
not exist, and deletes both at the end. Packing takes a minute for some hundred million weights on two cores.
Memory is what the process itself takes (RssAnon in /proc, sampled every 10 ms); pages of mapped files come and go as
the system likes and are given beside it (VmHWM is the peak of both).
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from manyhands.checkpoint.safetensors.shards import write_shards
from manyhands.checkpoint.save import target_headers
from manyhands.checkpoint.source import open_source
from manyhands.config import ModelConfig, PackedConfig, parse
from manyhands.config.shapes import tensor_shapes
from manyhands.families import export_config, family_named
from manyhands.files import CONFIG
from manyhands.quantize.receipt import Sample
from manyhands.quantize.room import layer_bytes

BLOCK = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


def main() -> None:
    """Write, quantise in both ways, print one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experts", type=int, default=16, help="routed experts per layer (DeepSeek-V3: 256)")
    parser.add_argument("--heads", type=int, default=128, help="of attention")
    parser.add_argument("--vocab", type=int, default=129280, help="rows of embedding and head")
    options = parser.parse_args()
    options.directory.mkdir()
    try:
        config = shape(options.experts, options.heads, options.vocab)
        source = options.directory / "source"
        write(source, config)
        moe = config.moe
        assert moe is not None
        expert = 3 * config.hidden_size * moe.moe_intermediate_size * 2
        sample = Sample(torch.zeros(8, 257, dtype=torch.long), None)
        packed = parse(PackedConfig, {"experts": {"format": "int4", "group_size": 32}, "linear": {"format": "int8"}})
        print(
            json.dumps(
                {
                    "checkpoint_bytes": sum(path.stat().st_size for path in source.iterdir()),
                    "expert_bytes": expert,
                    "experts_per_layer": options.experts,
                    "layer_bytes_estimated": layer_bytes(open_source(source), packed, sample),
                }
            ),
            flush=True,
        )
        for flag in ("--no-measure", "--measure"):
            print(json.dumps({"run": flag} | run(source, options.directory / flag[2:], flag)), flush=True)
    finally:
        shutil.rmtree(options.directory)


def shape(experts: int, heads: int, vocab: int) -> ModelConfig:
    """DeepSeek-V3's widths (https://huggingface.co/deepseek-ai/DeepSeek-V3, config.json), with one layer."""
    K = min(8, experts)
    fields = {
        "vocab_size": vocab,
        "hidden_size": 7168,
        "num_hidden_layers": 1,
        "intermediate_size": 18432,
        "attention": {
            "kind": "mla",
            "num_attention_heads": heads,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "latent_norm_eps": 1e-6,
        },
        "moe": {
            "router": {
                "num_experts": experts,
                "num_experts_per_tok": K,
                "score": "sigmoid",
                "bias": True,
            },
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
        },
    }
    return parse(ModelConfig, fields)


def write(directory: Path, config: ModelConfig) -> None:
    """A checkpoint as a publisher has it: experts one by one, in shards."""
    family = family_named("deepseek_v3", "family")
    directory.mkdir()
    (directory / CONFIG).write_text(json.dumps(export_config(family, config)))
    float32 = family.saved_float32

    def dtype_of(theirs: str, ours: str) -> torch.dtype:
        return torch.float32 if ours.endswith(float32) else torch.bfloat16

    headers = target_headers(family, config, dtype_of)

    def value(name: str) -> Iterator[Tensor]:
        left = torch.Size(headers[name].shape).numel()
        while left:
            part = BLOCK[: min(left, len(BLOCK))]
            yield part if headers[name].dtype == "BF16" else part.float()
            left -= len(part)

    write_shards(directory, headers, value)
    assert tensor_shapes(open_source(directory).config) == tensor_shapes(config)


def run(source: Path, target: Path, flag: str) -> dict[str, object]:
    """Quantise in a process of its own."""
    command = [sys.executable, "-m", "manyhands", "quantize", str(source), str(target), flag, "--json"]
    start, anonymous, both = time.perf_counter(), 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            fields = status(process.pid)
            anonymous, both = max(anonymous, fields.get("RssAnon", 0)), max(both, fields.get("VmHWM", 0))
            time.sleep(0.01)
    return {
        "exit": process.returncode,
        "peak_own_bytes": anonymous,
        "peak_with_file_pages_bytes": both,
        "seconds": round(time.perf_counter() - start, 1),
    }


def status(pid: int) -> dict[str, int]:
    """Sizes in /proc/PID/status, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    parts = (line.split() for line in lines)
    return {words[0][:-1]: int(words[1]) * 1024 for words in parts if len(words) == 3 and words[2] == "kB"}


if __name__ == "__main__":
    main()
