"""Other engines' traces: each form gives the ids that were put in; what is not in the form is refused by its line."""

import base64
import io
import json

import numpy as np
import pytest

from manyhands.errors import DataError, UserError
from manyhands.trace.foreign import FORMATS, Hints, import_trace, opened, read
from manyhands.trace.part import Phase
from manyhands.trace.recording import Trace
from tests.trace.traces import record

IDS = np.random.default_rng(0).permuted(np.tile(np.arange(8), (7, 3, 1)), axis=2)[:, :, :2]  # [T, L, K]


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def imported(tmp_path, name: str, data: bytes | str, hints: Hints | None = None, format: str | None = None):
    source = tmp_path / name
    source.write_bytes(data.encode() if isinstance(data, str) else data)
    trace = import_trace(source, tmp_path / f"{name}.trace", hints, format)
    (part,) = trace.parts()
    return trace, part


def refused(tmp_path, name: str, data: bytes | str, match: str, error=DataError, **arguments) -> None:
    with pytest.raises(error, match=match) as raised:
        imported(tmp_path, name, data, **arguments)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / f"{name}.trace").exists()


def test_vllm_array(tmp_path):
    trace, part = imported(tmp_path, "r.npy", npy(IDS.astype(np.uint8)), Hints(prompt_tokens=4, layers=(1, 2, 5)))
    assert np.array_equal(part.expert_ids, IDS) and trace.manifest.layers == (1, 2, 5)
    assert part.step.tolist() == [0, 0, 0, 0, 1, 2, 3] and part.phase.tolist() == [0] * 4 + [1] * 3
    assert part.position.tolist() == list(range(7)) and set(part.token_ids) == {-1}
    _, part = imported(tmp_path, "s.npy", npy(IDS.astype(np.int32)))
    assert set(part.phase) == {Phase.SCORING} and set(part.step) == {0}  # nobody said what the prompt was


def test_vllm_answer(tmp_path):
    none = IDS.astype(np.uint8)
    none[2, 1, 1] = 255
    choices = [{"routed_experts": b64(npy(none))}, {"routed_experts": b64(npy(none[:5]))}]
    answer = json.dumps({"choices": choices, "usage": {"prompt_tokens": 4}})
    trace, part = imported(tmp_path, "answer.json", answer)
    assert trace.manifest.num_experts == 8 and part.expert_ids[2, 1, 1] == trace.manifest.none
    assert part.sequence.tolist() == [0] * 7 + [1] * 5 and part.step.tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 4, 4, 4, 5]
    _, part = imported(tmp_path, "r.b64", b64(npy(IDS)), format="vllm")
    assert np.array_equal(part.expert_ids, IDS)


def test_vllm_refuses(tmp_path):
    refused(tmp_path, "a.npy", npy(IDS)[:-1], "do not hold")
    refused(tmp_path, "b.npy", npy(IDS[0]), r"not a .npy array of integers \[T, L, K\] .*\(3, 2\)")
    refused(tmp_path, "c.npy", npy(IDS.astype(float)), "<f8")
    refused(tmp_path, "d.npy", b"\x93NUMPY\x01\x00\xff\xff", "not a .npy array")
    refused(tmp_path, "e.npy", npy(np.array([[[object()]]], dtype=object)), "not a .npy array of integers")
    refused(tmp_path, "f.npy", npy(IDS), "holds expert 7, and there are 4", hints=Hints(num_experts=4))
    refused(tmp_path, "g.json", '{"choices": [{}]}', r"choices\[0\].routed_experts is missing")
    refused(tmp_path, "h.json", '{"choices": [{"routed_experts": "?"}]}', "not base64")
    refused(tmp_path, "i.npy", npy(IDS), "3 layers in it, and 2 were named", UserError, hints=Hints(layers=(0, 1)))


def test_sglang(tmp_path):
    raw = IDS.astype("<i4").tobytes()
    hints = Hints(layers=(0, 1, 2), num_experts_per_tok=2)
    answer = json.dumps({"choices": [{"sglext": {"routed_experts": b64(raw)}}], "usage": {"prompt_tokens": 3}})
    _, part = imported(tmp_path, "answer.json", answer, hints)
    assert np.array_equal(part.expert_ids, IDS) and part.step.tolist() == [0, 0, 0, 1, 2, 3, 4]
    answer = json.dumps([{"meta_info": {"routed_experts": b64(raw), "prompt_tokens": 7}}])
    _, part = imported(tmp_path, "generate.json", answer, hints)
    assert np.array_equal(part.expert_ids, IDS) and set(part.phase) == {Phase.PREFILL}
    _, part = imported(tmp_path, "raw.bin", raw, hints, "sglang")
    assert np.array_equal(part.expert_ids, IDS)
    refused(tmp_path, "b.bin", raw, "give --layers and --num-experts-per-tok", UserError, format="sglang")
    refused(tmp_path, "c.bin", raw[:-4], "are not int32", hints=hints, format="sglang")
    refused(tmp_path, "d.json", '{"meta_info": {}}', "there is no routed_experts", hints=hints)


def megatron(step: int, layer: int, ids, **more) -> str:
    return json.dumps({"step": step, "layer": layer, "block": "decoder", "top_indices": ids.tolist(), **more}) + "\n"


def test_megatron(tmp_path):
    folder = tmp_path / "ranks"
    folder.mkdir()
    for rank in range(2):
        text = ""
        for step in range(3):
            for layer in (1, 2, 3):  # two micro-batches
                text += megatron(step, layer, IDS[:3, layer - 1]) + megatron(step, layer, IDS[3:, layer - 1])
        (folder / f"router_trace_rank{rank}.jsonl").write_text(text + megatron(2, 1, IDS[:, 0], block="mtp", mtp_idx=0))
    trace = import_trace(folder, tmp_path / "t")
    steps = list(trace.steps())
    assert len(steps) == 3 and trace.manifest.layers == (1, 2, 3)
    for step in steps:
        assert np.array_equal(step.expert_ids, np.concatenate([IDS, IDS]))
        assert step.sequence.tolist() == [0] * 7 + [1] * 7 and set(step.phase) == {Phase.TRAINING}
    assert steps[2].position[:7].tolist() == list(range(14, 21))
    one = megatron(0, 1, IDS[:, 0])
    refused(tmp_path, "a.jsonl", one + megatron(0, 2, IDS[:3, 1]), "3 tokens of layer 2 and 7 of another")
    refused(tmp_path, "b.jsonl", megatron(2, 1, IDS[:, 0]) + one, "step 0 after step 2")
    refused(tmp_path, "c.jsonl", one + "{", "line 2: not valid JSON")
    refused(tmp_path, "d.jsonl", one.replace("[[", "[[[1],"), "line 1: top_indices")
    refused(tmp_path, "e.jsonl", one.replace('"step": 0', '"step": -1'), "line 1: step is '-1'")


def test_llama_cpp(tmp_path):
    prompt, decoded = IDS[:4], IDS[4:]
    rows = [f"{layer},{e}" for layer in range(3) for e in (prompt[:, layer] if layer < 2 else prompt[3:, 2]).ravel()]
    rows += [f"{layer},{e}" for token in decoded for layer in range(3) for e in token[layer]]
    trace, part = imported(tmp_path, "t.csv", "layer,expert\n" + "\n".join(rows))
    assert trace.manifest.num_experts_per_tok == 2 and part.step.tolist() == [0] * 4 + [1, 2, 3]
    assert part.phase.tolist() == [0] * 4 + [1] * 3
    assert np.array_equal(part.expert_ids[3:], IDS[3:]) and np.array_equal(part.expert_ids[:, :2], IDS[:, :2])
    assert (part.expert_ids[:3, 2] == 255).all()  # the last layer ran for the last token alone
    refused(tmp_path, "a.csv", "0,1\n0,2\n1,3\n1,4\n", "give --num-experts-per-tok", UserError)
    refused(tmp_path, "b.csv", "0,1\n1,2\n0,1,2\n", "line 3: '0,1,2' is not layer,expert")
    refused(tmp_path, "c.csv", "0,1\n0,x\n", "line 2: expert is 'x'")
    refused(
        tmp_path, "d.csv", "0,1\n1,2\n0,1\n0,2\n0,3\n1,1\n", "K = 2 does not divide", hints=Hints(num_experts_per_tok=2)
    )


_EDGE = """# route_trace v1
# model=/data/m.gguf arch=olmoe n_layer=3 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=7
# layer=1 expert_bytes=100 dense_bytes=7
# layer=2 expert_bytes=120 dense_bytes=6
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,1,0,3,0.75,0,100
0,0,0,1,1,5,0.25,0,100
0,0,1,1,0,3,0.5,1,0
0,0,1,1,1,1,0.5,0,100
0,0,1,2,0,7,0.5,0,120
0,0,1,2,1,6,0.5,0,120
0,1,2,1,0,2,0.5,0,100
0,1,2,1,1,3,0.5,2,0
0,1,2,2,0,1,1,0,120
1,0,0,1,0,4,1,0,100
"""


def test_big_moe_on_edge(tmp_path):
    trace, part = imported(tmp_path, "t.route.csv", _EDGE)
    about = trace.manifest
    assert about.layers == (1, 2) and about.record_bytes == (100, 120) and about.dense_bytes == 20
    assert "m.gguf" in about.source and "/data" not in about.source
    assert part.expert_ids.tolist() == [
        [[3, 5], [255, 255]],
        [[3, 1], [7, 6]],
        [[2, 3], [1, 255]],
        [[4, 255], [255, 255]],
    ]
    assert part.step.tolist() == [0, 0, 1, 2] and part.phase.tolist() == [0, 0, 1, 0]
    assert part.sequence.tolist() == [0, 0, 0, 1] and part.position.tolist() == [0, 1, 2, 0]
    assert part.weights[0, 0].tolist() == [0.75, 0.25] and part.residency[2, 0].tolist() == [0, 2]
    for at, (old, new, match) in enumerate(
        [
            ("0,1,2,1,0,2", "0,1,2,1,0,8", "line 13: '0,1,2,1,0,8"),
            ("0,1,2,1,0,2", "0,1,2,0,0,2", "line 13"),
            ("0,1,2,1,0,2", "0,1,2,1,1,2", "stand there twice"),
            ("n_expert_used=2", "n_expert_used=0", "8 experts, 0 of them"),
            ("n_expert=8 ", "", "no n_expert="),
            ("turn,phase", "turn,fase", "line 6: expected the columns"),
            ("0.75", "nan", "line 7"),
        ]
    ):
        refused(tmp_path, f"{at}.csv", _EDGE.replace(old, new), match)


@pytest.mark.parametrize("by_layer", [False, True])
def test_lattice(tmp_path, by_layer):
    pairs = [(t, layer) for t in range(7) for layer in range(3)]
    pairs.sort(key=lambda pair: pair[::-1] if by_layer else pair)
    text = "".join(
        json.dumps(
            {"layer_idx": layer, "token_idx": t, "selected_ids": IDS[t, layer].tolist(), "gate_weights": [0.75, 0.25]}
        )
        + "\n"
        for t, layer in pairs
    )
    _, part = imported(tmp_path, "t.jsonl", text + text, Hints(prompt_tokens=5))
    assert np.array_equal(part.expert_ids, np.concatenate([IDS, IDS])) and (part.weights == [0.75, 0.25]).all()
    assert part.sequence.tolist() == [0] * 7 + [1] * 7
    assert part.step.tolist() == [0] * 5 + [1, 2] + [3] * 5 + [4, 5]
    refused(tmp_path, "a.jsonl", text + '{"layer_idx": 0, "token_idx": 0, "selected_ids": 3}', "line 22: selected_ids")
    refused(tmp_path, "b.jsonl", text.replace("0.25", "1e9"), "line 1: gate_weights")


def test_pickles_are_refused_by_name(tmp_path):
    refused(tmp_path, "experts.pt", b"\x80\x02}q\x00.", "experts.pt: a pickle, which can run any code")


def test_unknown_files(tmp_path):
    refused(tmp_path, "x.txt", "hello", "Say so with --from", UserError)
    refused(tmp_path, "y.txt", "hello", "no format is called 'tgi'; there are big-moe", UserError, format="tgi")
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "nothing.csv")


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_any_bytes_are_an_error_or_a_trace(tmp_path, format):
    """Nothing but our errors comes out, whatever the file holds."""
    rng = np.random.default_rng(0)
    good = {
        "vllm": npy(IDS.astype(np.uint8)),
        "sglang": json.dumps({"meta_info": {"routed_experts": b64(IDS.astype("<i4").tobytes())}}).encode(),
        "big-moe-on-edge": _EDGE.encode(),
        "megatron": (megatron(0, 1, IDS[:, 0]) + megatron(1, 1, IDS[:, 1])).encode(),
        "llama.cpp": b"0,1\n1,2\n0,3\n1,0\n",
        "lattice": b'{"layer_idx": 0, "token_idx": 0, "selected_ids": [3, 1], "gate_weights": [1, 0]}\n',
    }[format]
    source = tmp_path / "source"
    for _ in range(150):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] = int(rng.integers(32, 127) if rng.random() < 0.8 else rng.integers(256))
        source.write_bytes(data[: int(rng.integers(len(data) + 1))] if rng.random() < 0.3 else data)
        try:
            foreign = read(source, Hints(layers=(0, 1, 2), num_experts_per_tok=2), format)
            for block in foreign.blocks():
                assert block["expert_ids"].max(initial=-1) < foreign.fields["num_experts"]
        except UserError:
            pass


def test_opened_takes_ours_and_others(tmp_path):
    record(tmp_path / "ours")
    (tmp_path / "t.route.csv").write_text(_EDGE)
    with opened(tmp_path / "ours") as trace:
        assert len(trace) == 40
    with opened(tmp_path / "t.route.csv") as trace:
        assert isinstance(trace, Trace) and len(trace) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="without a trace"), opened(tmp_path / "empty"):
        pass
