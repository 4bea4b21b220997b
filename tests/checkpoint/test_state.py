"""Training state without pickle: what comes back is what went in, to the last bit."""

import json
import math
import random
import struct

import numpy as np
import pytest
import torch

from manyhands.checkpoint import (
    flatten,
    load_tensors,
    rng_state,
    save_tensors,
    set_rng_state,
    unflatten,
)
from manyhands.errors import CheckpointError, StorageError


def through_disk(tmp_path, tensors, meta):
    save_tensors(tmp_path / "t.safetensors", tensors)
    return load_tensors(tmp_path / "t.safetensors"), json.loads(json.dumps(meta, allow_nan=False))


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    """Equal in type, order and bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return same([a.dtype, *a.shape], [b.dtype, *b.shape]) and torch.equal(bits(a), bits(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)


def test_tensors_of_every_dtype_and_shape_return_bit_for_bit(tmp_path):
    tensors = {
        "nan": torch.tensor([math.nan, -math.inf, -0.0, 1e-45]),
        "bf16": torch.randn(3, 4).bfloat16(),
        "half.t": torch.randn(3, 4).half().t(),
        "double": torch.randn(2, 1, 2, dtype=torch.float64),
        "int": torch.tensor([-(2**63), 2**63 - 1]),
        "bool": torch.tensor([[True, False]]),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 5),
        "grad": torch.ones(2, requires_grad=True),
    }
    save_tensors(tmp_path / "t", tensors)
    loaded = load_tensors(tmp_path / "t")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(tensor.detach(), loaded[name]), name


def test_two_names_for_one_storage_are_the_caller_s_to_decide(tmp_path):
    tied = torch.ones(2)
    with pytest.raises(RuntimeError, match="share memory"):
        save_tensors(tmp_path / "t", {"a": tied, "b": tied})


def test_a_write_that_fails_names_the_file(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*/none/t: "):
        save_tensors(tmp_path / "none" / "t", {"a": torch.ones(2)})


def header(fields, body=b""):
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234",
        struct.pack("<Q", 1 << 60) + b"{}",
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        header({"a": {"dtype": "XX", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        header({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"123"),
        header({"a": {"dtype": "U8", "shape": [2**63, 0], "data_offsets": [0, 0]}}),
    ],
)
def test_a_damaged_tensor_file_is_named_in_one_line(tmp_path, data):
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: not a readable safetensors file") as caught:
        load_tensors(tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)


def test_every_truncation_is_seen(tmp_path):
    save_tensors(tmp_path / "t", {"a": torch.ones(2), "b": torch.zeros(3)})
    data = (tmp_path / "t").read_bytes()
    for length in range(len(data)):
        (tmp_path / "t").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            load_tensors(tmp_path / "t")


def test_no_such_tensor_file(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            load_tensors(path)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], betas=(0.9, 0.95)),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True, foreach=False),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, etas=(0.4, 1.3)),
    "muon": lambda p: torch.optim.Muon(p[:1], lr=0.02),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_continues_as_if_it_had_never_stopped(tmp_path, name):
    def run(optimizer, parameters, steps):
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()

    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(2, 5))]
    optimizer = OPTIMIZERS[name](parameters)
    run(optimizer, parameters, 3)

    state_dict = optimizer.state_dict()
    restored = unflatten(*through_disk(tmp_path, *flatten(state_dict, "optimizer")))
    assert same(state_dict, restored)

    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    other = OPTIMIZERS[name](copies)
    other.load_state_dict(restored)
    for one, its in ((optimizer, parameters), (other, copies)):
        torch.manual_seed(1)
        run(one, its, 3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
    assert same(optimizer.state_dict(), other.state_dict())


def test_a_fresh_optimizer_has_no_tensors():
    tensors, meta = flatten(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict(), "optimizer")
    assert tensors == {}
    assert unflatten(tensors, meta)["state"] == {}


def test_any_tree_returns_with_its_types(tmp_path):
    tree = {
        0: (1, [2.5, None], {"k": torch.tensor(3)}),
        "x": [True, -0.0, math.inf, -math.inf, math.nan, 0.1 + 0.2, 5e-324, 2**70, ""],
        "tuple": ({"tuple": []}, ()),
        "float": {"float": "nan"},
        "tensor": {"tensor": "tree.x"},
        "dict": {},
    }
    assert same(tree, unflatten(*through_disk(tmp_path, *flatten(tree, "tree"))))


def test_what_would_need_pickle_is_refused():
    with pytest.raises(TypeError, match=r"tree\.a\.0: dtype cannot be saved"):
        flatten({"a": [torch.float32]}, "tree")


@pytest.mark.parametrize(
    "meta", [{"tensor": "gone"}, {"tuple": 3}, {"dict": [[1]]}, {"dict": [[[], 1]]}, {"float": "1"}, {}, {"x": 1}]
)
def test_malformed_state_is_a_checkpoint_error(meta):
    with pytest.raises(CheckpointError):
        unflatten({}, [meta])


def draw():
    return [torch.randn(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand()]


def test_every_generator_continues_where_it_was(tmp_path):
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    draw()  # leaves a second Gaussian cached in `random` and in NumPy
    saved = through_disk(tmp_path, *rng_state())
    expected = [draw(), draw()]
    torch.manual_seed(6)
    random.seed(6)
    np.random.seed(6)
    assert draw() != expected[0]
    set_rng_state(*saved)
    assert [draw(), draw()] == expected


def test_a_malformed_generator_state_is_a_checkpoint_error():
    tensors, meta = rng_state()
    with pytest.raises(CheckpointError, match="missing"):
        set_rng_state({}, meta)
    with pytest.raises(CheckpointError, match="malformed"):
        set_rng_state({**tensors, "rng.torch": torch.zeros(3)}, meta)
    with pytest.raises(CheckpointError, match="malformed"):
        set_rng_state(tensors, {"dict": []})
