"""llama.cpp as a peer of `decode.py`: the same weights as GGUF files, and one model fed through the low-level API.

Needs llama-cpp-python and gguf (`benchmarks/install_peers.sh`). Nothing of either is imported before it is used.
"""

import importlib.util
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyhands.checkpoint.model import Model, load_model
from manyhands.config import ModelConfig

FORMATS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # ours: the nearest of theirs
BITS = {"BF16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5}  # per weight: Q8_0 and Q4_0 have one float16 scale for 32
ERROR = 4  # GGML_LOG_LEVEL_ERROR
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.router": "ffn_gate_inp",
}
kept: list[Any] = []  # callbacks that llama.cpp holds by address


def installed() -> bool:
    """Both packages are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


def write_gguf(
    config: ModelConfig,
    state: dict[str, Tensor],
    formats: list[str],
    directory: Path,
    vocabulary: dict[str, Any] | None = None,
) -> None:
    """`BF16.gguf` of our weights, and what llama.cpp's own quantiser makes of it for each of `formats`.

    Every matrix is in the format, embedding and head too; norms and routers stay float32. `vocabulary`: the `model`
    of a tokenizer.json, byte-level BPE, for who wants text; texts are parted as GPT-2 does, which times nothing else.
    """
    directory.mkdir()
    base = directory / "BF16.gguf"
    write_bf16(config, state, base, vocabulary)
    import llama_cpp

    quiet()
    for format in formats:
        if format == "BF16":
            continue
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.nthread = torch.get_num_threads()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{format}")
        parameters.pure = True  # otherwise the head becomes Q6_K
        target = directory / f"{format}.gguf"
        if llama_cpp.llama_model_quantize(str(base).encode(), str(target).encode(), parameters):
            raise RuntimeError(f"llama.cpp did not write {target.name}")


def write_bf16(
    config: ModelConfig, state: dict[str, Tensor], path: Path, vocabulary: dict[str, Any] | None = None
) -> None:
    """Our weights under the names of llama.cpp's architecture `olmoe`."""
    import gguf

    assert config.moe is not None
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_vocab_size(config.vocab_size)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        special = [gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL for token in tokens]
        writer.add_token_types(special)
        pairs = vocabulary["merges"]
        writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
        writer.add_eos_token_id(next(i for i, token in enumerate(tokens) if token.startswith("<|")))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.moe.moe_intermediate_size)
    writer.add_head_count(config.attention.num_attention_heads)
    writer.add_head_count_kv(config.attention.num_attention_heads)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.moe.router.num_experts)
    writer.add_expert_used_count(config.moe.router.num_experts_per_tok)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, tensor in gguf_tensors(state):
        if "norm" in name or "ffn_gate_inp" in name:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            data = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as llama.cpp has them; gate and up, one tensor with us, are two there."""
    for name, tensor in state.items():
        prefix = ""
        if name.startswith("layers."):
            _, number, name = name.split(".", 2)
            prefix = f"blk.{number}."
        if name == "mlp.experts.gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            yield f"{prefix}ffn_gate_exps.weight", gate
            yield f"{prefix}ffn_up_exps.weight", up
        elif name == "mlp.experts.down_proj":
            yield f"{prefix}ffn_down_exps.weight", tensor
        else:
            yield f"{prefix}{NAMES[name.removesuffix('.weight')]}.weight", tensor


class LlamaCpp:
    """One model, one context of `length` tokens for all of its sequences; as many threads as torch has."""

    def __init__(self, path: Path, length: int, sequences: int = 1) -> None:
        import llama_cpp

        quiet()
        self.api: Any = llama_cpp
        self.api.llama_backend_init()
        self.model = self.api.llama_model_load_from_file(str(path).encode(), self.api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp did not load {path.name}")
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = length, sequences
        parameters.kv_unified = sequences > 1
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        self.context = self.api.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.vocab_size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

    def feed(self, ids: Tensor) -> np.ndarray:
        """Logits [V] after the last of `ids`, which follow what was fed before; valid until the next call."""
        tokens = (self.api.llama_token * ids.numel())(*ids.flatten().tolist())
        if status := self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(tokens))):
            raise RuntimeError(f"llama_decode gave {status}")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,))

    def feed_many(self, tokens: list[int], position: int) -> list[int]:
        """The greedy next token of each sequence after its token at `position`."""
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = i, True
            if status := self.api.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode gave {status}")
            rows = (self.api.llama_get_logits_ith(self.context, i) for i in range(len(tokens)))
            return [int(np.ctypeslib.as_array(row, (self.vocab_size,)).argmax()) for row in rows]
        finally:
            self.api.llama_batch_free(batch)

    def close(self) -> None:
        """Give the memory back."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def step(self, ids: Tensor) -> Tensor:
        """The greedy next token [1, 1] after `ids`."""
        return torch.tensor([[int(self.feed(ids).argmax())]])

    def prefill(self, ids: Tensor) -> Tensor:
        """The same, after forgetting what was fed before."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        return self.step(ids)


def many_steps(path: Path, prompts: list[list[int]], steps: int) -> float:
    """Seconds of the median step that decodes a token for each prompt (all of one length)."""
    peer = LlamaCpp(path, (len(prompts[0]) + steps + 3) * len(prompts), len(prompts))
    tokens, times = [], []
    for position in range(len(prompts[0])):
        tokens = peer.feed_many([prompt[position] for prompt in prompts], position)
    for position in range(len(prompts[0]), len(prompts[0]) + steps + 2):
        started = time.perf_counter()
        tokens = peer.feed_many(tokens, position)
        times.append(time.perf_counter() - started)
    peer.close()
    return statistics.median(times[2:])


@torch.inference_mode()
def logits_difference(directory: str) -> dict[str, float]:
    """llama.cpp's BF16 file against our model of the plain checkpoint, computed in float32, on one short prompt.

    Eight tokens at once, then eight one by one. `relative`: the norm of the difference over the norm, of nine
    positions' logits together; `same_argmax`: the share of those positions with the same greedy token.
    """
    model = load_model(Path(directory) / "plain", dtype=torch.float32)
    assert isinstance(model, Model)
    ids = torch.randint(0, model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(1))
    ours = model.head(model.hidden(ids).states[:, 7:])[0].float()
    peer = LlamaCpp(Path(directory) / "gguf" / "BF16.gguf", ids.shape[1])
    chunks = (ids[:, :8], *ids[:, 8:].split(1, dim=1))
    theirs = torch.stack([torch.from_numpy(peer.feed(chunk).copy()) for chunk in chunks])
    return {
        "relative": float((theirs - ours).norm() / ours.norm()),
        "same_argmax": float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()),
    }


def quiet() -> None:
    """Errors only, on stderr. llama-cpp-python's own filter numbers the levels wrongly and drops just those."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def on_log(level: int, text: bytes, _: Any) -> None:
        if level == ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    kept.append(on_log)
    llama_cpp.llama_log_set(on_log, None)
