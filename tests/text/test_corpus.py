"""Reading documents: every kind of source, and every way to get it wrong."""

import gzip
import json
import sys
import types
from pathlib import Path

import pytest

from manyhands.errors import DataError
from manyhands.text import Document, read_documents
from manyhands.text import corpus as corpus_module
from manyhands.text import formats as formats_module


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def fails(sources: list[str], *words: str, text_field: str = "text") -> None:
    with pytest.raises(DataError) as caught:
        read_documents(sources, text_field)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_stdlib_is_the_library_without_its_tests() -> None:
    documents = read_documents(["stdlib"])
    names = [document.name for document in documents]
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert all(name.endswith(".py") and not name.startswith("/") for name in names)
    assert sum(document.num_bytes for document in documents) > 5_000_000
    assert documents == read_documents(["stdlib"])


def test_folder_is_recursive_sorted_and_skips_hidden_and_unknown(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.txt", "a/.venv/x.py", ".git/y.txt", ".hidden.txt", "c.png", "d.py"):
        write(tmp_path / name, f"text of {name}")
    expected = [Document(name, f"text of {name}") for name in ("a/z.txt", "b.md", "d.py")]
    assert read_documents([str(tmp_path)]) == expected


def test_globs(tmp_path: Path) -> None:
    for name in ("books/one.txt", "books/deep/two.txt", "books/deep/three.md", "books/deep/four.csv"):
        write(tmp_path / name, name)
    assert [d.name for d in read_documents([f"{tmp_path}/books/*.txt"])] == ["one.txt"]
    assert [d.name for d in read_documents([f"{tmp_path}/books/**/*.txt"])] == ["deep/two.txt", "one.txt"]
    assert [d.name for d in read_documents([f"{tmp_path}/b*s/deep/*"])] == ["books/deep/three.md", "books/deep/two.txt"]
    fails([f"{tmp_path}/books/*.rst"], "*.rst", ".jsonl.gz")
    fails([f"{tmp_path}/books/**/*.csv"], "*.csv", ".md")


def test_names_do_not_depend_on_where_the_files_lie(tmp_path: Path) -> None:
    for place in ("here", "over/there"):
        write(tmp_path / place / "data/a.txt", "one")
        write(tmp_path / place / "data/b.jsonl", rows("two", "three"))
    here, there = (read_documents([str(tmp_path / place / "data")]) for place in ("here", "over/there"))
    assert here == there == [Document("a.txt", "one"), Document("b.jsonl:1", "two"), Document("b.jsonl:2", "three")]


def test_a_file_in_two_sources_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.txt", "two")
    assert [d.text for d in read_documents([str(path), str(tmp_path), str(path)])] == ["one", "two"]


def test_text_is_kept_exactly_and_empty_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "\ufeffzeile\r\n\tß\0 \U0001f600\n\n")
    write(tmp_path / "b.txt", "")
    write(tmp_path / "c.txt", " \n")
    assert [d.text for d in read_documents([str(tmp_path)])] == ["\ufeffzeile\r\n\tß\0 \U0001f600\n\n"]


def test_jsonl_and_gzip(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", '{"body": "x\\ny", "n": 1}\n\n{"body": "z"}')
    packed = write(tmp_path / "b.jsonl.gz", gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        documents = read_documents([str(path)], text_field="body")
        assert documents == [Document(f"{path.name}:1", "x\ny"), Document(f"{path.name}:3", "z")]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"text": ', "JSON"),
        ('{"text": "a"} trailing', "JSON"),
        ("[" * 100_000, "JSON"),
        ('["text"]', "list"),
        ('{"txt": "a", "id": 3}', "id, txt"),
        ('{"text": 3}', "int"),
        ('{"text": null}', "NoneType"),
        ('{"text": "\\ud83d"}', "surrogate"),
        (b'{"text": "\xff"}', "UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, word: str) -> None:
    data = line.encode() if isinstance(line, str) else line
    path = write(tmp_path / "a.jsonl", rows("fine").encode() + data + b"\n")
    fails([str(path)], f"{path}:2", word)


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_module, "MAX_LINE_BYTES", 1000)
    packed = write(tmp_path / "a.jsonl.gz", gzip.compress(rows("x" * 100, "y" * 2000).encode()))
    fails([str(packed)], f"{packed}:2", "longer")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    packed = gzip.compress(rows("x" * 5000).encode())
    for name, data in (("cut.jsonl.gz", packed[:-12]), ("no.jsonl.gz", b"plain text"), ("bits.jsonl.gz", packed[:12])):
        fails([str(write(tmp_path / name, data))], name, "gzip")
    fails([str(write(tmp_path / "latin.txt", "naïve".encode("latin-1")))], "latin.txt", "UTF-8", "byte 2", "0xef")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    fails([], "no data sources")
    fails([f"{tmp_path}/nothing.txt"], "nothing.txt", "no such file")
    fails([str(write(tmp_path / "table.csv", "a,b"))], "table.csv", ".parquet", ".md")
    fails([str(tmp_path)], str(tmp_path), "no file", ".txt")
    fails([str(write(tmp_path / "empty.txt", "  "))], "empty.txt", "no text")
    fails([str(write(tmp_path / "empty.jsonl", ""))], "empty.jsonl", "no text")
    fails([str(write(tmp_path / "good.txt", "text")), str(tmp_path / "empty.txt")], "empty.txt", "no text")


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2], "text": ["one", "two"], "maybe": ["x", None]}), path)
    assert read_documents([str(path)]) == [Document("a.parquet:1", "one"), Document("a.parquet:2", "two")]
    fails([str(path)], "body", "id, text, maybe", text_field="body")
    fails([str(path)], f"{path}:1", "int", text_field="id")
    fails([str(path)], f"{path}:2", "NoneType", text_field="maybe")
    path.write_bytes(path.read_bytes()[:-20])
    fails([str(path)], "a.parquet", "parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails([str(write(tmp_path / "a.parquet", b"PAR1"))], "a.parquet", 'pip install "manyhands[parquet]"')


class FakeRows(list[dict[str, object]]):
    column_names = ("text", "label")


def test_hugging_face_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: object, **options: object) -> FakeRows:
        calls.append((args, options))
        if args[0] == "gone":
            raise FileNotFoundError("Couldn't find\nany data")
        return FakeRows([{"text": "one", "label": 0}, {"text": "two", "label": 1}])

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_documents(["hf:owner/name/config"]) == [
        Document("hf:owner/name/config:1", "one"),
        Document("hf:owner/name/config:2", "two"),
    ]
    assert calls == [(("owner/name", "config"), {"split": "train"})]
    fails(["hf:gone"], "hf:gone", "Couldn't find any data")
    fails(["hf:name"], "body", "text, label", text_field="body")
    fails(["hf:"], "hf:OWNER/NAME")
    fails(["hf:a/b/c/d"], "hf:OWNER/NAME")


def test_hugging_face_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails(["hf:name"], "hf:name", 'pip install "manyhands[hub]"')


def test_text_that_grows_out_of_a_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed lines, a dictionary of one long text, a file of holes: one line, before the memory is taken."""
    monkeypatch.setattr(formats_module, "_ALWAYS", 1 << 20)
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for _ in range(100):
            file.write(json.dumps({"text": "x" * 30_000}) + "\n")
    fails([str(path)], str(path), "more text than 64 times")
    holes = tmp_path / "holes.txt"
    with holes.open("wb") as file:
        file.truncate(1 << 42)
    fails([str(holes)], str(holes), "more text than")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["x" * 10_000] * 2_000)}), path)
    fails([str(path)], str(path), "more text than 64 times")


def test_rows_of_a_dictionary_share_their_text(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": pa.array(["one text", "another"] * 300 + ["last"])}), tmp_path / "a.parquet")
    documents = read_documents([str(tmp_path / "a.parquet")])
    assert [document.text for document in documents] == ["one text", "another"] * 300 + ["last"]
    assert len({id(document.text) for document in documents[:200]}) == 2


def test_texts_together_fit_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.txt", "x" * 1000)
    monkeypatch.setattr(corpus_module, "memory_for_text", lambda: 2500)
    fails([str(tmp_path)], "c.txt", "half of the memory")


def test_what_is_left_out_of_a_folder_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.md").write_bytes(b"caf\xe9")
    for number in range(5):
        (tmp_path / f"{number}.pdf").write_bytes(b"%PDF")
    assert [d.text for d in read_documents([str(tmp_path)], say=said.append)] == ["good"]
    assert [line.removeprefix(str(tmp_path)) for line in said] == [
        ": left out 5 files (0.pdf, 1.pdf, 2.pdf, …): of an unknown kind; known are "
        ".txt, .md, .py, .jsonl, .jsonl.gz, .parquet",
        ": left out 1 file (b.md): not UTF-8 text",
    ]
    with pytest.raises(DataError, match=r"b\.md: not UTF-8 text"):  # a file that was named is wanted
        read_documents([str(tmp_path / "b.md")])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match="there is no text in it"):
        read_documents([str(tmp_path / "*.md")], say=said.append)
