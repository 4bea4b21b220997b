"""Every Python snippet of the README and the docs runs as it stands, on small models in place of those it names.

But those fenced with `py`: they need another's client and a server, and `scripts/clients.py` does what they do.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import manyhands as mh
from manyhands.serve.routed import routed_experts
from manyhands.text import Tokenizer

from .families.to_gguf import to_gguf
from .small_runs import manyhands

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(page.name, code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.+?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]
TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind\n" * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 280)


def small(router: dict[str, Any] | None = None, **fields: Any) -> mh.Decoder:
    moe = {"router": {"num_experts": 4, "num_experts_per_tok": 2} | (router or {}), "moe_intermediate_size": 32}
    attention = {"num_attention_heads": 2, "head_dim": 32} | fields.pop("attention", {})
    values = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, **fields}
    model = mh.Decoder(mh.ModelConfig(**values, attention=attention, moe=moe))
    mh.init_weights(model, seed=0)
    return model


def theirs() -> Any:
    """A model of transformers with a sparse layer 3."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=288, hidden_size=32, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize(("page", "code"), SNIPPETS)
def test_it_runs(page: str, code: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"mh": mh, "torch": torch, "x": torch.randn(2, 5, 512), "tokenizer": tokenizer}
    names["ids"] = torch.randint(3, 280, (1, 6))
    if "runs/quickstart" in code:
        mh.save(small(), "runs/quickstart", tokenizer)
    if "OLMoE" in code:
        mh.save(
            small({"norm_topk_prob": False}, attention={"qk_norm": "full"}),
            "path/to/OLMoE-1B-7B-0924",
            tokenizer,
            family="olmoe",
        )
        names["decoder"] = small(attention={"qk_norm": "head"})
    if '"DST"' in code:
        mh.save(small(), "SRC", tokenizer, family="mixtral")
        assert manyhands("quantize", "SRC", "DST").returncode == 0
    if '"mine.yaml"' in code:
        Path("text.txt").write_text(TEXT)
        Path("mine.yaml").write_text(
            "data: {sources: [text.txt]}\ntrain: {max_steps: 2, sequence_length: 16, batch_size: 2}\n"
        )
    if "model.gguf" in code:
        mh.save(small(), "SRC", tokenizer, family="mixtral")
        whole = {"tokenizer.huggingface.json": tokenizer.inner.to_str()}
        to_gguf(Path("SRC"), Path("model.gguf"), **whole)
    if 'choice["routed_experts"]' in code:
        routings = small()(names["ids"]).routings
        names["choice"] = {"routed_experts": routed_experts(routings, names["ids"].shape[1], 0)}
    if "manyhands.hf" in code:
        names["model"] = theirs()
    exec(code, names)  # noqa: S102  # it is ours, and what readers paste
    if "routing" in names:
        y, routing = names["y"], names["routing"]
        assert y.shape == names["x"].shape and torch.isfinite(y).all() and y.std() > 1e-4, "initialised, not memory"
        assert routing.logits.abs().max() < 10 and len(routing.expert_ids.unique()) > 2


def test_every_page_was_read() -> None:
    assert {param.values[0] for param in SNIPPETS} >= {"README.md", "api.md", "checkpoints.md", "quantization.md"}
