"""A model whose experts lie on several processes: it says what one process says."""

from pathlib import Path

import pytest
import torch

from manyhands.checkpoint.find import open_checkpoint
from manyhands.checkpoint.model import load, save
from manyhands.checkpoint.own import own_experts
from manyhands.config import SamplingConfig
from manyhands.config.packing import PackedConfig
from manyhands.engine.engine import Engine
from manyhands.errors import ConfigError, UserError
from manyhands.models import Decoder
from manyhands.moe.crew import Crew, CrewExperts
from manyhands.moe.edit import Mask
from manyhands.parallel.group import Group
from manyhands.quantize.quantize import quantize
from tests.gloo import on_processes

from .conftest import build

PROMPTS = [[5, 6, 7], [9] * 20, [1], list(range(30)), [4, 4]]
SAMPLINGS = [SamplingConfig(max_new_tokens=8, temperature=t, seed=3) for t in (0.0, 1.0)]


def stored(path: Path, tokenizer, num_experts: int, family: str | None = None, **fields) -> str:
    moe = {"router": {"num_experts": num_experts, "num_experts_per_tok": 2}}
    save(build(moe=moe, **fields), path, tokenizer, family=family)
    return str(path)


def said(model: Decoder) -> list[list[list[int]]]:
    """Greedy and sampled, all prompts together, and a prompt alone."""
    return [
        [c.token_ids for c in Engine(model, max_sequences=8).generate(prompts, sampling)]
        for prompts in (PROMPTS, PROMPTS[:1])
        for sampling in SAMPLINGS
    ]


@torch.inference_mode()
def logits(model: Decoder) -> torch.Tensor:
    return model(torch.tensor([list(range(24))])).logits


def _crew(ranks: Group, paths: list[str], name: str) -> list[object]:
    """What the leader says, and how many bytes of experts are here."""
    found: list[object] = []
    for path in paths:
        crew = Crew(ranks)
        if crew.leads:
            model, _ = load(path, crew=crew, experts_implementation=name)
            found.append((said(model), logits(model).tolist()))
            experts = [moe.experts.here for moe in model.sparse_layers().values()]
            crew.close()
        else:
            banks = own_experts(crew)
            crew.follow(banks)
            experts = list(banks.values())
        found.append(sum(x.nbytes for bank in experts for x in [*bank.parameters(), *bank.buffers()]))
    return found


@pytest.mark.parametrize(("size", "num_experts"), [(2, 6), (4, 3)])
def test_says_what_one_process_says(tmp_path: Path, tokenizer, size: int, num_experts: int) -> None:
    """Experts one by one in the files and in one stack; where some processes, or the leader, hold none."""
    families = {"manyhands": None, "qwen3_moe": "qwen3_moe"}
    paths = [stored(tmp_path / name, tokenizer, num_experts, family) for name, family in families.items()]
    found = on_processes(size, _crew, paths, "auto")
    for i, path in enumerate(paths):
        model, _ = load(path)
        tokens, numbers = found[0][2 * i]
        assert tokens == said(model)
        torch.testing.assert_close(torch.tensor(numbers), logits(model), rtol=1e-4, atol=1e-4)
        bytes_here = [rank[2 * i + 1] if not n else rank[i] for n, rank in enumerate(found)]
        whole = sum(p.nbytes for moe in model.sparse_layers().values() for p in moe.experts.parameters())
        assert sum(bytes_here) == whole and max(bytes_here) <= -(-num_experts // size) * whole // num_experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_with_grouped_mm(tmp_path: Path, tokenizer, dtype: torch.dtype) -> None:
    moe = {"router": {"num_experts": 5, "num_experts_per_tok": 2}}
    save(build(moe=moe), tmp_path / "model", tokenizer, dtype=dtype)
    [tokens, numbers], *_ = on_processes(2, _crew, [str(tmp_path / "model")], "grouped_mm")[0]
    model, _ = load(tmp_path / "model", experts_implementation="grouped_mm")
    assert torch.equal(torch.tensor(numbers), logits(model).float())
    assert tokens == said(model)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_experts(tmp_path: Path, tokenizer, format: str) -> None:
    """Records are cut as weights are; each process reads its own."""
    path = stored(tmp_path / "plain", tokenizer, 6)
    packing = {"format": format, "group_size": 32} if format == "int4" else {"format": format}
    quantize(open_checkpoint(path), tmp_path / "packed", PackedConfig(experts=packing, linear=packing), measure=False)
    found = on_processes(2, _crew, [str(tmp_path / "packed")], "auto")
    (tokens, numbers), size = found[0]
    model, _ = load(tmp_path / "packed")
    assert tokens == said(model)
    torch.testing.assert_close(torch.tensor(numbers), logits(model), rtol=1e-4, atol=1e-4)
    assert (
        size
        == found[1][0]
        == sum(x.nbytes for moe in model.sparse_layers().values() for x in moe.experts.buffers()) / 2
    )


def _other_ways(ranks: Group, path: str) -> list[list[int]] | None:
    crew = Crew(ranks)
    if not crew.leads:
        crew.follow(own_experts(crew))
        return None
    model, _ = load(path, crew=crew)
    found = ways(model)
    experts = model.layers[1].mlp.experts
    assert isinstance(experts, CrewExperts)
    with pytest.raises(UserError, match="other processes hold experts"):
        experts.stacked([0])
    with pytest.raises(UserError, match="no gradient goes through"):
        x = torch.zeros(2, 32, requires_grad=True)
        experts(x, model.layers[1].mlp.router(x))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts.* is not in the model"):
        save(model, Path(path).parent / "copy")
    crew.close()
    return found


def ways(model: Decoder) -> list[list[int]]:
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.0)
    masked = Engine(model).generate(PROMPTS, sampling, edit={1: Mask((0, 3))})
    return [
        *[c.token_ids for c in Engine(model, exact=True, max_batch_tokens=7).generate(PROMPTS, sampling)],
        *[c.token_ids for c in Engine(model, speculate=4).generate(PROMPTS[1:2], sampling)],
        *[c.token_ids for c in masked],
    ]


def test_other_ways_to_run_it(tmp_path: Path, tokenizer) -> None:
    path = stored(tmp_path / "model", tokenizer, 6)
    assert on_processes(2, _other_ways, path)[0] == ways(load(path)[0])
