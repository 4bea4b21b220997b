"""What rounding a layer's inputs costs, in logits, routing, tokens and perplexity: `python scripts/rounding.py MODEL`.

MODEL is anything `manyhands generate` takes, or `olmoe`: layers of OLMoE's widths with random weights, on random ids,
and a few channels forty times as large as the others in the input of every product, as trained models have
them. (The next weights are divided by as much: the same function in float32, the hardest case for rounding.)

The weights are rounded to a format as `manyhands quantize` rounds them, and multiplied in float32; beside that, the
inputs of every product with such weights (experts up and down, linears, an untied head) are rounded too: to int8 with
one scale per 32, 64, 128 or 256 inputs or per row, or to bfloat16. So a row of the table shows what the rounding of
activations adds to the rounding of weights. A dense model gets random routers that choose 8 of 64 at the place where a
sparse layer has its own, so that one sees what real activations do to a routing.

T tokens, D inputs, V vocabulary.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import manyhands as mh
from manyhands.checkpoint.packed import is_packable
from manyhands.kernels import ExpertWeights
from manyhands.quant import pack_experts, pack_linear
from manyhands.text import encode_documents, evaluation_batches, read_documents

SETTINGS = ("float32", "int8 / 32", "int8 / 64", "int8 / 128", "int8 / 256", "int8 / row", "bf16")
FORMATS = ("float32", "bf16", "int8", "int4/32", "int4/64")


def rounded(x: Tensor, setting: str) -> Tensor:
    """x [..., D] as a kernel would see it: float32 values of int8 with a scale per group, or of bfloat16."""
    if setting == "bf16":
        return x.bfloat16().float()
    if setting == "float32":
        return x
    D = x.shape[-1]
    depth = -(-D // 64) * 64  # what a record's inputs are padded to
    group = depth if setting.endswith("row") else int(setting.split("/")[1])
    groups = F.pad(x, (0, -(-depth // group) * group - D)).unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    q = (groups / scale.clamp(min=1e-30)).round()
    return (q * scale).flatten(-2)[..., :D]


class RoundInputs(TorchFunctionMode):
    """Rounds the input of every `linear` whose weight lies in one of these storages."""

    def __init__(self, storages: set[int], setting: str) -> None:
        super().__init__()
        self.storages, self.setting = storages, setting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[1].untyped_storage().data_ptr() in self.storages:
            args = (rounded(args[0], self.setting), *args[1:])
        return func(*args, **(kwargs or {}))


def round_weights(model: mh.Decoder, format: str, quick: bool) -> None:
    """In place: experts and linears become what their records would stand for. `quick`: no search for scales."""
    name, _, size = format.partition("/")
    group = int(size or 32)
    for layer in model.sparse_layers().values():
        weights = layer.experts.weights()
        for e in range(weights.num_experts):
            one = weights.stacked([e])
            if quick:
                for w in (one.up, one.down):
                    w.copy_(nearest(w, name, group))
                continue
            up, down, *_ = pack_experts(ExpertWeights(*one), name, group).dequantize()
            one.up.copy_(up), one.down.copy_(down)
    for _, module in linears(model):
        weight = module.weight
        linear = "int8" if name == "int4" and model.sparse_layers() else name  # the default of `manyhands quantize`
        pack = nearest if quick else packed
        weight.copy_(pack(weight, linear, group))


def packed(w: Tensor, name: str, group: int) -> Tensor:
    """w [N, D] as a record has it."""
    return pack_linear(w, None, name, group).dequantize()[0]


def nearest(w: Tensor, name: str, group: int) -> Tensor:
    """w [..., D] rounded with the scale of its largest number."""
    if name in ("bf16", "float32"):
        return rounded(w, name)
    groups = w.unflatten(-1, (-1, group if name == "int4" else w.shape[-1]))
    scale = groups.abs().amax(-1, keepdim=True) / (7 if name == "int4" else 127)
    return ((groups / scale).round() * scale).flatten(-2)


def linears(model: mh.Decoder) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that a packed model holds as records."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_packable(path + ".weight"):
            yield path, module


@contextmanager
def probes(model: mh.Decoder, chosen: list[Tensor]) -> Iterator[None]:
    """What each layer chooses, [T, K] in order of expert: a dense layer by a random router of its input."""
    handles = []
    for block in model.layers:
        D = model.config.hidden_size
        router = torch.randn(64, D, generator=torch.Generator().manual_seed(len(handles))) / math.sqrt(D)

        def see(_: nn.Module, args: Any, router: Tensor = router) -> None:
            chosen.append((args[0].flatten(0, -2) @ router.mT).topk(8).indices.sort().values)

        if not isinstance(block.mlp, mh.MoELayer):
            handles.append(block.mlp.register_forward_pre_hook(see))
    yield
    for handle in handles:
        handle.remove()


def run(model: mh.Decoder, batches: list[tuple[Tensor, Tensor]], storages: set[int], setting: str) -> dict[str, Any]:
    """Logits [T, V], what was chosen by each layer, and the mean nats of the targets."""
    logits, nats, chosen = [], [], []
    mode = nullcontext() if setting == "float32" else RoundInputs(storages, setting)
    for ids, mask in batches:
        seen: list[Tensor] = []
        with mode, probes(model, [] if model.sparse_layers() else seen):
            out = model(ids[:, :-1])
        seen += [routing.expert_ids.sort().values for routing in out.routings.values()]
        logits.append(out.logits.flatten(0, 1)[mask.flatten()])
        nats.append(F.cross_entropy(logits[-1], ids[:, 1:].flatten()[mask.flatten()], reduction="none").double())
        chosen.append(torch.stack(seen)[:, mask.flatten()])
    return {"logits": torch.cat(logits), "chosen": torch.cat(chosen, 1), "nats": float(torch.cat(nats).mean())}


def compare(a: dict[str, Any], b: dict[str, Any]) -> str:
    """How far b is from a, as cells of a table. Logits without their mean over V, which no softmax sees."""
    first, second = (r["logits"] - r["logits"].mean(-1, keepdim=True) for r in (a, b))
    error = (second - first).norm(dim=-1) / first.norm(dim=-1)
    same = (a["chosen"] == b["chosen"]).all(-1).float().mean()
    greedy = (first.argmax(-1) == second.argmax(-1)).float().mean()
    return f"{error.mean():.3%} / {error.max():.2%} | {same:.2%} | {greedy:.2%}"


def olmoe(layers: int) -> mh.Decoder:
    """Layers of OLMoE's widths whose norms give eight channels forty times the others' size."""
    config = mh.ModelConfig(
        vocab_size=4096,
        hidden_size=2048,
        num_hidden_layers=layers,
        max_position_embeddings=512,
        attention={"num_attention_heads": 16, "head_dim": 128, "qk_norm": "full"},
        moe={
            "moe_intermediate_size": 1024,
            "router": {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
        },
    )
    model = mh.Decoder(config, "eager")
    generator = torch.Generator().manual_seed(0)
    large = torch.ones(2048)
    large[torch.randperm(2048, generator=generator)[:8]] = 40.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        model.embed_tokens.weight.normal_(0, 1, generator=generator)
        for block in model.layers:
            attention, mlp = block.self_attn, block.mlp
            block.input_layernorm.weight.mul_(large), block.post_attention_layernorm.weight.mul_(large)
            for w in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
                w.div_(large)
            mlp.experts.gate_up_proj.div_(large), mlp.router.weight.div_(large)
        model.norm.weight.mul_(large), model.lm_head.weight.div_(large)
    return model.eval()


@torch.no_grad()
def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint, or olmoe")
    parser.add_argument("--formats", nargs="*", default=["int8", "int4/32", "int4/64", "bf16"], choices=FORMATS)
    parser.add_argument("--settings", nargs="*", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--data", nargs="*", help="text, as in `manyhands eval`; default: a run's own validation text")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2, help="of olmoe")
    arguments = parser.parse_args()
    made = arguments.model == "olmoe"
    if made:
        model, length, num_bytes = olmoe(arguments.layers), 256, 0
        ids = torch.randint(0, 4096, (arguments.tokens + 1,), generator=torch.Generator().manual_seed(1)).numpy()
    else:
        model, tokenizer = mh.load(arguments.model, dtype=torch.float32, experts_implementation="eager", decode=True)
        own = Path(arguments.model) / "data" / "valid.npy"
        if arguments.data is None and own.is_file():
            ids = np.load(own)[: arguments.tokens + 1].astype(np.int64)
        else:
            documents = read_documents(arguments.data or ["stdlib"], "text")
            ids = encode_documents(documents, tokenizer)[: arguments.tokens + 1].astype(np.int64)
        length = min(512, model.config.max_position_embeddings)
        num_bytes = int(torch.tensor(tokenizer.byte_lengths())[torch.from_numpy(ids[1:])].sum())
    batches = list(evaluation_batches(ids, length, 4))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original = run(model, batches, set(), "float32")
    columns = ["weights", "activations", "logits, relative error, mean / max", "(token, layer) with the same experts"]
    columns += ["greedy tokens equal"] + (["perplexity", "bits per byte"] if num_bytes else [])
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|")

    def row(weights: str, activations: str, cells: str, nats: float) -> None:
        bits = nats * (len(ids) - 1) / math.log(2)
        measured = f" {math.exp(nats):.4f} | {bits / num_bytes:.5f} |" if num_bytes else ""
        print(f"| {weights} | {activations} | {cells} |{measured}", flush=True)

    row("as they were", "float32", "– | – | –", original["nats"])
    for format in arguments.formats:
        if format != "float32":
            round_weights(model, format, made)
        parts = [m.weight for _, m in linears(model)]
        for layer in model.sparse_layers().values():
            parts += [layer.experts.weights().up, layer.experts.weights().down]
        storages = {w.untyped_storage().data_ptr() for w in parts}
        base = run(model, batches, storages, "float32")
        row(format, "float32: weights alone, beside the original", compare(original, base), base["nats"])
        for setting in arguments.settings[1:]:
            found = run(model, batches, storages, setting)
            row(format, setting, compare(base, found), found["nats"])
        model.load_state_dict(kept)


if __name__ == "__main__":
    main()
