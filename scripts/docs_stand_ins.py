"""Small stand-ins for what the documentation's commands take for granted: texts, runs, models, traces.

All models have random or hardly trained weights: what a command does is looked at, not what it finds.
"""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

E, VOCABULARY = 16, 300
SMALL = [
    f"model.vocab_size={VOCABULARY}", "model.hidden_size=64", "model.intermediate_size=64",
    "model.max_position_embeddings=256", "model.moe.moe_intermediate_size=32", f"model.moe.router.num_experts={E}",
    "train.sequence_length=64", "train.batch_size=4", "train.max_steps=6", "tokenizer.pre=llama-bpe",
]  # fmt: skip
TEXT = "the hands are many and each of them is good at one thing , so the work goes to those that know it best"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_stand_ins(folder: Path) -> None:
    """Everything, in a new folder."""
    folder.mkdir()
    _texts(folder)
    run = ["train", "--preset", "tiny", "--data", "text.txt", "--quiet", *SMALL]
    saved = ["train.save_every=2", "train.keep_checkpoints=10", "train.eval_every=2", "trace.every=3"]
    _manyhands(folder, *run, "--out", "runs/quickstart", *saved)
    for copy in ("runs/mine", "run", "runs/a"):
        _copy(folder, "runs/quickstart", copy)
    for name in ("a-0", "a-1", "b-0", "b-1"):
        changed = [f"train.seed={name[-1]}", *["optim.lr=0.02"] * name.startswith("b")]
        _manyhands(folder, *run, *changed, "--data", "my-text.jsonl", "--out", f"runs/{name}")
    _run_files(folder)
    for name, family in (("olmoe", "olmoe"), ("mixtral", "mixtral"), ("dense", "qwen3")):
        _model(folder, name, family)
    _copy(folder, "models/olmoe/config.json", "config.json")
    _manyhands(folder, "convert", "models/mixtral", "model.gguf")
    _manyhands(folder, "quantize", "models/olmoe", "DST", "--no-measure")
    _copy(folder, "DST", "small")
    tuned = ["--data", "notes/", "--max-steps", "3", "--sequence-length", "64", "--batch-size", "2", "--quiet"]
    _manyhands(folder, "tune", "runs/quickstart", "--method", "lora", *tuned, "--out", "runs/tune-lora")
    for copy in ("runs/notes", "runs/poems"):
        _copy(folder, "runs/tune-lora", copy)
    _manyhands(folder, "convert", "runs/tune-lora", "notes-lora", "--as-adapter", "per-expert")
    _manyhands(folder, "tune", "runs/quickstart", *tuned, "--out", "tuned")
    _copy(folder, "runs/quickstart", "base")
    prompts = [word for text in ("the hands", "each of them", "so the work", "it was") for word in ("--prompt", text)]
    for trace, seed in (("traces/one", 1), ("traces/two", 2)):
        sampled = ["--max-new-tokens", "96", "--temperature", "1", "--seed", str(seed)]
        _manyhands(folder, "generate", "runs/quickstart", *prompts, *sampled, "--trace", trace)
    _copy(folder, "traces/one", "traces/monday")
    _manyhands(folder, "trace", "import", "large.jsonl", "traces/large", "--num-experts", "128")
    _copy(folder, "runs/quickstart", "runs/b")
    _copy(folder, "runs/quickstart/traces/step-000003", "runs/b/traces/step-000050")


def _texts(folder: Path) -> None:
    """Plain text, rows, a treebank, and what other engines record."""
    words = TEXT.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(3, 14)) + f" {i % 89}\n" for i in range(900)]
    for name in (
        "text.txt",
        "other.txt",
        "plays.txt",
        "notes/one.md",
        "notes/deep/two.md",
        "corpus/a.md",
        "corpus/b/c.md",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(lines[len(name) :]))
    rows = [{"text": "".join(lines[i : i + 4])} for i in range(0, 600, 4)]
    pairs = [{"prompt": line, "chosen": "many hands", "rejected": "one thing"} for line in lines[:60]]
    records = [
        {"layer_idx": layer, "token_idx": token, "selected_ids": [token % 7, 9], "gate_weights": [0.6, 0.4]}
        for token in range(20)
        for layer in (0, 1)
    ]
    large = [
        {"layer_idx": layer, "token_idx": token, "selected_ids": [(token * i + layer) % 128 for i in range(3, 11)]}
        | {"gate_weights": [0.125] * 8}
        for token in range(1, 13)
        for layer in range(48)
    ]
    for name, values in (
        ("large", large),
        ("my-text", rows),
        ("mail", rows),
        ("preferences", pairs),
        ("routes", records),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    tags = ("NOUN", "VERB", "ADJ")
    sentences = []
    for i, line in enumerate(lines[:120]):
        words = line.split()
        head = f"# newdoc id = {i // 3}\n" * (i % 3 == 0) + f"# text = {' '.join(words)}\n"
        row = "{}\t{}\t_\t{}\t_\t_\t0\t_\t_\t_\n"
        sentences.append(
            head + "".join(row.format(n + 1, word, tags[len(word) % 3]) for n, word in enumerate(words)) + "\n"
        )
    (folder / "treebank.conllu").write_text("".join(sentences))
    npy = io.BytesIO()
    np.save(npy, np.array([[[(t + layer) % E, (t + 5) % E] for layer in range(2)] for t in range(11)], np.uint8))
    routed = base64.b64encode(npy.getvalue()).decode()
    answer = {"object": "text_completion", "model": "m", "choices": [{"index": 0, "routed_experts": routed}]}
    (folder / "answer.json").write_text(json.dumps(answer))
    network = {"format": "manyhands network", "latency": 2e-5, "bandwidth": 5e9, "source": "a stand-in"}
    (folder / "net.json").write_text(json.dumps(network))


def _run_files(folder: Path) -> None:
    """run.yaml and its like: the run above, and one that begins from its weights."""
    values = yaml.safe_load((folder / "runs/quickstart/run.yaml").read_text())
    values["history"] = []
    values["train"]["max_steps"] = 4
    for name in ("run.yaml", "my_run.yaml", "other.yaml"):
        (folder / name).write_text(yaml.safe_dump(values))
    steps = [change for change in SMALL if "tokenizer" not in change] + ["data.sources=['my-text.jsonl']"]
    sweep = {"preset": "tiny", "set": [*steps, "train.max_steps=3"], "seeds": 2, "grid": {"optim.lr": [0.003, 0.006]}}
    (folder / "rates.yaml").write_text(yaml.safe_dump(sweep))
    (folder / "mine.yaml").write_text(yaml.safe_dump({**values, "start": "runs/quickstart"}))


def _model(folder: Path, name: str, family: str) -> None:
    """A random model of a published family, with the run's tokenizer."""
    import manyhands as mh

    _, tokenizer = mh.load(folder / "runs/quickstart")
    router = mh.RouterConfig(num_experts=E, num_experts_per_tok=2, norm_topk_prob=family != "olmoe")
    config = mh.ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64 if family == "qwen3" else 32,
        num_hidden_layers=2,
        max_position_embeddings=256,
        attention={
            "num_attention_heads": 2,
            "head_dim": 32,
            "qk_norm": {"olmoe": "full", "qwen3": "head"}.get(family, "none"),
        },
        moe=None if family == "qwen3" else mh.MoEConfig(router=router, moe_intermediate_size=32),
    )
    model = mh.Decoder(config)
    mh.init_weights(model, seed=0)
    mh.save(model, folder / "models" / name, tokenizer, family=family)
    (folder / "models" / name / "chat_template.jinja").write_text(TEMPLATE)


def _copy(folder: Path, source: str, target: str) -> None:
    """By `cp`, which copies files and folders alike."""
    (folder / target).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-r", folder / source, folder / target], check=True)


def _manyhands(folder: Path, *arguments: str) -> None:
    """A command that must succeed, but for the verdict on so short a run."""
    done = subprocess.run(
        [sys.executable, "-m", "manyhands", *arguments],
        cwd=folder,
        input="",
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode not in (0, 4):
        raise SystemExit(f"no stand-ins: manyhands {' '.join(arguments)}\n{done.stderr or done.stdout}")
