"""Weights from anywhere: each bad safetensors or index file is one line with the file and the tensor."""

import json
import pickle
import shutil
import zipfile

import pytest
import torch

from manyhands.checkpoint.model import load, load_model
from manyhands.checkpoint.source import open_source

from .hostile import EXPERT, GATE, INDEX, NORM, SINGLE, copy, fifo, join, link, make, nested, refused, split

SHARDS = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return make(tmp_path_factory.mktemp("single") / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("sharded") / "model", shard_size=16_000)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == SHARDS
    return folder


@pytest.fixture(autouse=True)
def nothing_is_read(request, monkeypatch):
    if "good" not in request.node.name:
        monkeypatch.setattr("manyhands.checkpoint.own.our_tensor", None)  # reading would be a TypeError


def entry(**fields):
    return lambda header, data: header[NORM].update(fields)


def offsets(change):
    return lambda header, data: header[NORM].update(data_offsets=change(*header[NORM]["data_offsets"]))


def add(name, dtype, shape, size):
    def change(header, data):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        return header, data + bytes(size)

    return change


def swap(header, data):
    header[GATE]["shape"].reverse()


def text(change):
    return lambda header, data: (change(json.dumps(header)).encode(), data)


BAD_HEADERS = {
    "not JSON": (lambda h, d: (b"x" * 100, d), "the header: not valid JSON"),
    "no bytes": (lambda h, d: (b"", d), "the header: not valid JSON"),
    "UTF-16": (lambda h, d: (json.dumps(h).encode("utf-16"), d), "the header: not valid JSON"),
    "invalid UTF-8": (lambda h, d: (b'{"\xff": 1}', d), "the header: not valid JSON"),
    "a list": (lambda h, d: ([1], d), "the header: expected an object, found list"),
    "100,000 deep": (lambda h, d: (b"[" * 100_000, d), "the header: not valid JSON"),
    "a name twice": (text(lambda t: t[:-1] + f', "{NORM}": 1}}'), f"the header: '{NORM}' stands twice"),
    "a field twice": (text(lambda t: t.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"')), "'dtype' stands"),
    "NaN": (lambda h, d: h.update(extra=float("nan")), "the header: extra = nan: expected a finite number"),
    "name of 600": (lambda h, d: h.update({"a" * 600: 1}), r"'a+\.\.\.a+': a name of 600 characters"),
    "500 deep": (entry(shape=nested(500)), rf"'{NORM}': shape \[+\.\.\.\]+ makes no sense"),
    "metadata a list": (lambda h, d: h.update(__metadata__=[]), "__metadata__ is not an object of strings"),
    "metadata of numbers": (lambda h, d: h.update(__metadata__={"a": 1}), "__metadata__ is not"),
    "metadata null": (lambda h, d: h.update(__metadata__=None), "__metadata__ is not"),
    "no dtype": (lambda h, d: h[NORM].pop("dtype"), f"'{NORM}': the header must give"),
    "a field more": (entry(stride=[1]), f"'{NORM}': the header must give"),
    "entry a list": (lambda h, d: h.update({NORM: []}), f"'{NORM}': the header must give"),
    "unknown dtype": (entry(dtype="F31"), f"'{NORM}': dtype 'F31' is unknown; known: F64"),
    "F4": (entry(dtype="F4"), f"'{NORM}': dtype 'F4' is unknown"),
    "F6": (entry(dtype="F6_E2M3"), f"'{NORM}': dtype 'F6_E2M3' is unknown"),
    "complex": (entry(dtype="C64"), f"'{NORM}': dtype 'C64' is unknown"),
    "dtype a list": (entry(dtype=["F32"]), rf"'{NORM}': dtype \['F32'\] is unknown"),
    "negative shape": (entry(shape=[-16]), rf"'{NORM}': shape \[-16\] makes no sense"),
    "two negatives": (entry(shape=[-4, -4]), rf"'{NORM}': shape \[-4, -4\] makes no sense"),
    "huge shape": (entry(shape=[10**4000]), "the header: shape = 10+…: an integer of 4,001 digits"),
    "float shape": (entry(shape=[16.0]), rf"'{NORM}': shape \[16\.0\] makes no sense"),
    "boolean shape": (entry(shape=[True, 16]), rf"'{NORM}': shape \[True, 16\] makes no sense"),
    "nested shape": (entry(shape=[[16]]), rf"'{NORM}': shape \[\[16\]\] makes no sense"),
    "shape null": (entry(shape=None), rf"'{NORM}': shape None makes no sense"),
    "nine dimensions": (entry(shape=[1] * 8 + [16]), rf"'{NORM}': shape .* makes no sense"),
    "overflow to 64": (entry(shape=[1 << 32, 1 << 30, 1 << 2]), rf"'{NORM}': F32 .* takes {1 << 66} bytes"),
    "overflow + 64": (entry(shape=[(1 << 47) + 1, 1 << 17]), rf"'{NORM}': F32 .* data_offsets give it 64"),
    "a zero in the shape": (entry(shape=[0, 16]), rf"'{NORM}': F32 \[0, 16\] takes 0 bytes"),
    "other size": (entry(shape=[15]), rf"'{NORM}': F32 \[15\] takes 60 bytes, data_offsets give it 64"),
    "other dtype": (entry(dtype="F64"), rf"'{NORM}': F64 \[16\] takes 128 bytes, data_offsets give it 64"),
    "offsets reversed": (offsets(lambda a, b: [b, a]), f"'{NORM}': .* data_offsets give it -64"),
    "offsets negative": (offsets(lambda a, b: [-64, 0]), rf"'{NORM}': data_offsets \[-64, 0\] make no sense"),
    "offsets huge": (
        offsets(lambda a, b: [10**4000, 10**4000 + 64]),
        "data_offsets = 10+…: an integer",
    ),
    "offsets floats": (offsets(lambda a, b: [float(a), b]), f"'{NORM}': data_offsets .* make no sense"),
    "one offset": (offsets(lambda a, b: [a]), f"'{NORM}': data_offsets .* make no sense"),
    "offsets an object": (offsets(lambda a, b: {"a": a}), f"'{NORM}': data_offsets .* make no sense"),
    "beyond the end": (offsets(lambda a, b: [a + 10**6, b + 10**6]), f"'{NORM}' ends at byte .*; truncated"),
    "just below 2^63": (offsets(lambda a, b: [2**63 - 65, 2**63 - 1]), f"'{NORM}' ends at byte .*; truncated"),
    "overlap": (offsets(lambda a, b: [a - 64, b - 64]), "tensor .* overlaps the tensor before it"),
    "gap": (lambda h, d: h.pop(GATE), "tensor .* leaves a gap before it"),
    "trailing bytes": (lambda h, d: (h, d + b"12345"), "5 bytes after the last tensor"),
    "truncated": (lambda h, d: (h, d[:-1]), "tensor .* ends at byte .*; truncated"),
    "no data": (lambda h, d: (h, b""), "tensor .* ends at byte .*; truncated"),
    "no tensors": (lambda h, d: ({}, b""), "tensor 'model.embed_tokens.weight' is missing, which config.json calls"),
    "missing": (lambda h, d: h.update(other=h.pop(NORM)), f"tensor '{NORM}' is missing, which config.json calls for"),
    "an expert missing": (lambda h, d: h.update(other=h.pop(EXPERT)), f"tensor '{EXPERT}' is missing"),
    "unknown": (add("extra", "F32", [2], 8), "'extra' is not one of this model's, as config.json describes it"),
    "an expert more": (add(EXPERT.replace("3", "4"), "F32", [16, 8], 512), r"experts\.4\.w2.* not one of this model's"),
    "empty tensor": (add("extra", "F32", [0, 1 << 40], 0), "'extra' is not one of this model's"),
    "other shape": (entry(shape=[4, 4]), rf"'{NORM}' has shape \[4, 4\]; config.json says \[16\]"),
    "transposed": (swap, rf"'{GATE}' has shape \[16, 4\]; config.json says \[4, 16\]"),
    "integers": (entry(dtype="I32"), rf"'{NORM}' is I32; expected F64 or F32"),
    "float8 without scales": (entry(dtype="F8_E4M3", shape=[64]), rf"'{NORM}' is F8_E4M3; expected F64 or F32"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_safetensors_file_is_one_line(tmp_path, single, case):
    change, message = BAD_HEADERS[case]
    directory = copy(single, tmp_path / "model")
    header, data = split(directory / SINGLE)
    result = change(header, data)
    header, data = result if isinstance(result, tuple) else (header, data)
    join(directory / SINGLE, header, data)
    refused(directory, rf"/{SINGLE}: .*(?:{message})")


def size(n):
    return lambda path: join(path, *split(path), size=n)


def sparse(path, header_size, length):
    path.write_bytes(header_size.to_bytes(8, "little"))
    with open(path, "r+b") as file:
        file.truncate(length)


BAD_FILES = {
    "empty": (lambda p: p.write_bytes(b""), "it has 0 bytes"),
    "7 bytes": (lambda p: p.write_bytes(b"1234567"), "it has 7 bytes"),
    "8 bytes": (lambda p: p.write_bytes(bytes(8)), "the header: not valid JSON"),
    "header of 0": (size(0), "the header: not valid JSON"),
    "header of 2^63": (size(1 << 63), f"a header of {1 << 63} bytes"),
    "header of 2^64 - 1": (size((1 << 64) - 1), "a header of"),
    "header over 100 MB": (lambda p: sparse(p, 100_000_001, 1 << 30), "a header of 100000001 bytes"),
    "header beyond the file": (size(1 << 23), f"or truncated: a header of {1 << 23} bytes"),
    "header too short": (size(100), "the header: not valid JSON"),
    "zeros, a terabyte": (lambda p: sparse(p, 0, 1 << 40), "the header: not valid JSON"),
    "deleted": (lambda p: p.unlink(), "does not exist"),
    "a directory": (lambda p: (p.unlink(), p.mkdir()), "not a regular file"),
    "a pipe": (fifo, "not a regular file"),
    "a link out": (lambda p: link(p, "/etc/hostname"), "a symbolic link out of the checkpoint"),
    "a link to a device": (lambda p: link(p, "/dev/zero"), "not a regular file"),
    "a link to itself": (lambda p: link(p, p.name), "cannot be read"),
    "a dangling link": (lambda p: link(p, "nowhere"), "does not exist"),
}


@pytest.mark.parametrize("which", [SINGLE, SHARDS[1]])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_safetensors_is_one_line(tmp_path, single, sharded, case, which):
    change, message = BAD_FILES[case]
    directory = copy(single if which == SINGLE else sharded, tmp_path / "model")
    change(directory / which)
    refused(directory, rf"/{which}: .*{message}")


def mapping(change):
    def edit(directory):
        values = json.loads((directory / INDEX).read_text())
        change(values["weight_map"])
        (directory / INDEX).write_text(json.dumps(values))

    return edit


def to(file):
    return mapping(lambda m: m.update({NORM: file}))


def index(content):
    return lambda d: (d / INDEX).write_text(content)


def twice(directory):
    header, data = split(directory / SHARDS[3])
    header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    join(directory / SHARDS[3], header, data + bytes(4))
    other, data = split(directory / SHARDS[0])
    other["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    join(directory / SHARDS[0], other, data + bytes(4))


def huge(directory):
    with open(directory / INDEX, "r+b") as file:
        file.truncate(1 << 33)


BESIDE = f"{INDEX}: tensor '{NORM}' is said to be in .*expected the name of a .safetensors file beside the index"
BAD_INDEXES = {
    "shard missing": (lambda d: (d / SHARDS[2]).unlink(), f"{SHARDS[2]}: does not exist"),
    "shard named that is not": (to("other.safetensors"), "other.safetensors: does not exist"),
    "shard lacks the tensor": (to(SHARDS[0]), f"tensor '{NORM}' is not in '{SHARDS[0]}'"),
    "tensor of no shard": (mapping(lambda m: m.update(x=SHARDS[0])), f"tensor 'x' is not in '{SHARDS[0]}'"),
    "tensor left out": (mapping(lambda m: m.pop(NORM)), f"{SHARDS[2]}: tensor '{NORM}' is not in {INDEX}"),
    "tensor in two shards": (twice, f"{SHARDS[3]}: tensor 'extra' is also in {SHARDS[0]}"),
    "shards swapped": (
        lambda d: (shutil.copy(d / SHARDS[1], d / "x"), shutil.copy(d / SHARDS[2], d / SHARDS[1])),
        f"{SHARDS[2]}: tensor .* is also in {SHARDS[1]}",
    ),
    "up": (to("../model.safetensors"), BESIDE),
    "up and back": (to(f"../model/{SHARDS[3]}"), BESIDE),
    "absolute": (to("/etc/x.safetensors"), BESIDE),
    "in a folder": (to("a/x.safetensors"), BESIDE),
    "no name": (to(""), BESIDE),
    "dots": (to(".."), BESIDE),
    "another kind": (to("pytorch_model.bin"), BESIDE),
    "a number": (to(7), BESIDE),
    "null": (to(None), BESIDE),
    "a list": (to([SHARDS[3]]), BESIDE),
    "nested": (to(nested(500)), BESIDE),
    "a NUL": (to("a\0b.safetensors"), BESIDE),
    "two lines": (to("a\nb.safetensors"), BESIDE),
    "a terminal's escape": (to("\x1b[2J.safetensors"), BESIDE),
    "half a character": (to("\ud800.safetensors"), BESIDE),
    "too long a name": (to("a" * 100_000 + ".safetensors"), BESIDE),
    "long within": (to("a" * 243 + ".safetensors"), "does not exist|cannot be read"),
    "no weight_map": (index("{}"), "'weight_map' is missing"),
    "weight_map empty": (index('{"weight_map": {}}'), "'weight_map' is missing"),
    "weight_map a list": (index('{"weight_map": ["a"]}'), "'weight_map' is missing or is not an object"),
    "not JSON": (index("{"), f"{INDEX}: not valid JSON"),
    "an array": (index("[]"), f"{INDEX}: expected an object, found list"),
    "empty": (index(""), f"{INDEX}: not valid JSON"),
    "deep": (index('{"weight_map": ' + "[" * 100_000), f"{INDEX}: not valid JSON"),
    "a name twice": (
        index(f'{{"weight_map": {{"{NORM}": "a.safetensors", "{NORM}": "b.safetensors"}}}}'),
        f"{INDEX}: '{NORM}' stands twice",
    ),
    "8 GiB": (huge, f"{INDEX}: {1 << 33} bytes is too long"),
    "a directory": (lambda d: ((d / INDEX).unlink(), (d / INDEX).mkdir()), f"{INDEX}: not a regular file"),
    "a pipe": (lambda d: fifo(d / INDEX), f"{INDEX}: not a regular file"),
    "a link out": (lambda d: link(d / INDEX, "/etc/hostname"), f"{INDEX}: a symbolic link out"),
    "dangling": (lambda d: link(d / INDEX, "nowhere"), f"{INDEX}: does not exist"),
    "no index": (lambda d: (d / INDEX).unlink(), f"no {INDEX} that says what is in '{SHARDS[0]}'"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_a_bad_index_is_one_line(tmp_path, sharded, case):
    change, message = BAD_INDEXES[case]
    directory = copy(sharded, tmp_path / "model")
    change(directory)
    refused(directory, message)


class Canary:
    def __reduce__(self):
        return (pytest.exit, ("a pickle was executed",))


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Canary()))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", SINGLE, "model.pt"]
)
@pytest.mark.parametrize("write", [zipped, lambda path: path.write_bytes(pickle.dumps(Canary()))], ids=["zip", "bare"])
def test_a_pickle_is_refused_as_one_and_never_run(tmp_path, single, name, write):
    directory = copy(single, tmp_path / "model")
    (directory / SINGLE).unlink()
    write(directory / name)
    refused(directory, rf"{name}.* a pickle, which can run any code and is (?:never|not) read")


def same(directory, other):
    a, b = load_model(directory).state_dict(), load_model(other).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_good_files_load(single, sharded):
    assert same(single, sharded)
    model, tokenizer = load(sharded)
    assert (model.family, tokenizer.vocab_size) == ("mixtral", 270)


def test_good_links_of_the_hub_cache_load(tmp_path, single, sharded):
    """models--x--y/snapshots/REVISION/FILE -> ../../blobs/HASH"""
    folder = tmp_path / "models--x--y"
    snapshot = folder / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, folder / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    assert same(snapshot, single) and load(snapshot)[1].vocab_size == 270
    (folder / "refs").symlink_to(snapshot)
    assert same(folder / "refs", single)
    shutil.move(folder / "blobs", tmp_path / "elsewhere")
    (folder / "blobs").symlink_to(tmp_path / "elsewhere")
    refused(snapshot, "a symbolic link out of the checkpoint", loaders=(open_source,))


def test_good_headers_of_any_length_load(tmp_path, single):
    """Old writers did not align the data."""
    header, data = split(single / SINGLE)
    ids = torch.arange(7)[None]
    for pad in range(4):
        directory = copy(single, tmp_path / f"model-{pad}")
        join(directory / SINGLE, json.dumps(header).encode() + b" " * pad, data)
        assert same(directory, single)
        assert torch.equal(load_model(directory)(ids).logits, load_model(single)(ids).logits)


def test_good_files_without_room_for_them_are_one_line(single, monkeypatch):
    empty = torch.empty

    def no_room(*shape, **options):
        if shape == ((4, 16, 16),) and options.get("device") == torch.device("cpu"):
            raise RuntimeError("can't allocate memory:\nyou tried to allocate 2199023255552 bytes")
        return empty(*shape, **options)

    monkeypatch.setattr("manyhands.checkpoint.assemble.torch.empty", no_room)
    refused(single, r"no room for layers\.0\.mlp\.experts\.gate_up_proj \[4, 16, 16\]", loaders=(load_model, load))
    monkeypatch.undo()
    monkeypatch.setattr("mmap.mmap", lambda *_, **__: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")))
    refused(single, f"{SINGLE}: cannot be mapped: .*Cannot allocate memory", loaders=(load_model, load))


def test_two_sets_of_weights_are_refused(single, sharded, tmp_path):
    """transformers would read the single file, others the shards."""
    directory = copy(sharded, tmp_path / "both")
    shutil.copy(single / SINGLE, directory / SINGLE)
    refused(directory, "both model.safetensors and model.safetensors.index.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "chat_template.jinja"])
def test_a_tokenizer_file_is_not_read_through_a_link(single, tmp_path, name):
    """It would be copied, byte for byte, into whatever is saved."""
    directory = copy(single, tmp_path / "model")
    (tmp_path / "secret").write_text("{}")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(tmp_path / "secret")
    refused(directory, f"{name}: a symbolic link out of the checkpoint", loaders=(load,))
