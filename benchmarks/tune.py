"""LoRA on experts against PEFT and transformers: `python benchmarks/tune.py`.

A random OLMoE (6 layers, d 384, 6 heads of 64, 32 experts, top-4, F 256, vocabulary 8,192), LoRA of rank 8 on attention
and on the routed experts; forward, backward and AdamW on 4 × 256 tokens. PEFT makes the adapter and saves it, both load
that file, so that both begin with the same numbers; each system runs in processes of its own, in turn. Prints the
losses side by side, tokens per second (of the median step, the first two left out), and the memory that training takes
beside the loaded model (the largest resident size of the process, less what it had before the first step).

PEFT makes B·A of every expert in every step; here it is never made. All in float32.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB, D, LAYERS, HEADS, E, K, F = 8192, 384, 6, 6, 32, 4, 256
R, ALPHA, LR = 8, 16, 1e-3
SYSTEMS = ("manyhands", "peft")


def main() -> None:
    """Parse, run the processes in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2, help="each system's processes, in turn")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--packed", action="store_true", help="also ours on int4 experts and int8 layers")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, folder = arguments.one
        run_one(name, folder, arguments)
        return
    try:
        import peft
        import transformers
    except ImportError:
        sys.exit("this benchmark compares with PEFT and transformers: pip install peft transformers")
    systems = [*SYSTEMS, *(["manyhands, packed"] if arguments.packed else [])]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), packed=arguments.packed)
        for number in range(arguments.rounds):
            for name in systems if number % 2 == 0 else systems[::-1]:
                found[name].append(child(name, folder, arguments))
    tokens = arguments.batch * arguments.length
    result: dict[str, Any] = {"peft": peft.__version__, "transformers": transformers.__version__, "tokens": tokens}
    for name, runs in found.items():
        seconds = [value for run in runs for value in run["seconds"][2:]]
        result[name] = {
            "tokens_per_second": tokens / statistics.median(seconds),
            "memory": min(run["memory"] for run in runs),
            "losses": runs[0]["losses"],
        }
    ours, theirs = result["manyhands"], result["peft"]
    result["loss_difference"] = max(abs(a - b) / b for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    result["speed_ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
    result["memory_ratio"] = ours["memory"] / theirs["memory"]
    print(json.dumps(result) if arguments.json else shown(result, systems))


def shown(result: dict[str, Any], systems: list[str]) -> str:
    """For people."""
    lines = [f"{'':20}{'tokens/s':>10}{'memory, MB':>12}{'first loss':>12}{'last loss':>12}"]
    for name in systems:
        of, losses = result[name], result[name]["losses"]
        lines.append(
            f"{name:20}{of['tokens_per_second']:>10.0f}{of['memory'] / 1e6:>12.0f}{losses[0]:>12.6f}{losses[-1]:>12.6f}"
        )
    lines.append(
        f"losses differ by {result['loss_difference']:.1e} of theirs at most; {result['speed_ratio']:.2f} times PEFT's "
        f"tokens/s, {result['memory_ratio']:.2f} of its memory"
    )
    return "\n".join(lines)


def child(name: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One system in a process of its own."""
    sizes = ("steps", "batch", "length")
    command = [sys.executable, __file__, "--one", name, folder]
    command += [word for size in sizes for word in (f"--{size}", str(getattr(arguments, size)))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def make(folder: Path, packed: bool) -> None:
    """The model, the adapter as PEFT makes it, and the packed model."""
    import peft
    import transformers

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, num_experts=E, num_experts_per_tok=K, max_position_embeddings=1024,
        norm_topk_prob=True, initializer_range=0.05,
    )  # fmt: skip
    model = transformers.OlmoeForCausalLM(config)
    model.save_pretrained(folder / "model")
    lora = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    if packed:
        from manyhands.checkpoint.find import open_checkpoint
        from manyhands.config import PackedConfig, Packing
        from manyhands.quantize.quantize import quantize

        formats = PackedConfig(experts=Packing(format="int4", group_size=32), linear=Packing(format="int8"))
        quantize(open_checkpoint(folder / "model"), folder / "packed", formats, measure=False)


def run_one(name: str, folder: str, arguments: argparse.Namespace) -> None:
    """Train, and print what was measured."""
    warnings.simplefilter("ignore")
    step = theirs(Path(folder)) if name == "peft" else ours(Path(folder), name.endswith("packed"))
    g = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCAB, (arguments.batch, arguments.length + 1), generator=g) for _ in range(4)]
    before, losses, seconds = resident("VmRSS"), [], []
    for number in range(arguments.steps):
        started = time.perf_counter()
        losses.append(step(batches[number % len(batches)]))
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"losses": losses, "seconds": seconds, "memory": resident("VmHWM") - before}))


def resident(name: str) -> int:
    """Bytes, from the kernel's account of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def trained(parameters: list[Tensor], loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
    """A step of AdamW."""
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=0.0, foreach=True)

    def step(batch: Tensor) -> float:
        value = loss(batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


def ours(folder: Path, packed: bool) -> Callable[[Tensor], float]:
    """Ours, from PEFT's files."""
    from manyhands.checkpoint.adapters import load_adapter
    from manyhands.checkpoint.model import Model, load_model
    from manyhands.layers.cross_entropy import linear_cross_entropy

    model = load_model(folder / ("packed" if packed else "model"))
    assert isinstance(model, Model)
    load_adapter(model, folder / "adapter")
    model.train()

    def loss(batch: Tensor) -> Tensor:
        states = model.hidden(batch[:, :-1]).states
        if packed:  # the head too
            return torch.nn.functional.cross_entropy(model.head(states).flatten(0, 1), batch[:, 1:].flatten())
        mask = torch.ones(batch[:, 1:].numel(), dtype=torch.bool)
        return linear_cross_entropy(states.flatten(0, 1), model.head_weight, batch[:, 1:].flatten(), mask)

    return trained([p for p in model.parameters() if p.requires_grad], loss)


def theirs(folder: Path) -> Callable[[Tensor], float]:
    """PEFT's."""
    import peft
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", experts_implementation="grouped_mm")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()

    def loss(batch: Tensor) -> Tensor:
        logits = model(batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    return trained([p for p in model.parameters() if p.requires_grad], loss)


if __name__ == "__main__":
    main()
