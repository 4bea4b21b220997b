"""Rows of every form from every kind of file; what is no row is told with file and number."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from manyhands.errors import DataError
from manyhands.text.row import ChatRow, PairRow, PreferenceRow, Row, TextRow, digest_of, row_of
from manyhands.text.rows import read_rows
from manyhands.text.stdlib_rows import stdlib_rows

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
RECORDS: dict[str, dict[str, Any]] = {
    "text": {"text": "abc", "meta": 7},
    "messages": {"messages": CHAT, "prompt": "hi", "prompt_id": "x"},
    "tools": {"messages": CHAT, "tools": TOOLS},
    "pair": {"prompt": "a", "completion": "b"},
    "chats": {"prompt": CHAT[:1], "completion": CHAT[1:]},
}


def write(path: Path, records: list[Any]) -> Path:
    lines = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def rows(path: Path | str, **more: Any) -> list[Row]:
    return list(read_rows([str(path)], **more))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("name", RECORDS)
def test_every_form_from_every_file(tmp_path: Path, name: str, suffix: str) -> None:
    record, path = RECORDS[name], tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = {key: [value, value] for key, value in record.items()}
        if "tools" in table:
            table["tools"] = [json.dumps(TOOLS)] * 2  # a column has one type, and tools have many
        parquet.write_table(pa.table(table), path)
    else:
        write(path, [record, "", record])
    first, second = rows(path)
    assert digest_of(first) == digest_of(second) and first.where.startswith(f"{path}:1")
    assert second.where == f"{path}:{2 if suffix == 'parquet' else 3}"
    if name == "text":
        assert isinstance(first, TextRow) and first.text == "abc"
    elif name == "pair":
        assert isinstance(first, PairRow) and (first.prompt, first.completion) == ("a", "b")
    else:
        assert isinstance(first, ChatRow) and list(first.messages) == CHAT
        assert first.given == (name == "chats") and first.tools == (tuple(TOOLS) if name == "tools" else None)


def test_preferences(tmp_path: Path) -> None:
    """With a prompt, or with what both conversations begin with."""
    worse = [CHAT[0], {"role": "assistant", "content": "no"}]
    texts = row_of({"prompt": "a", "chosen": "b", "rejected": "c"}, "x:1")
    assert isinstance(texts, PreferenceRow) and texts.chosen == PairRow("x:1", "a", "b")
    told = row_of({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": worse[1:]}, "x:1")
    implied = row_of({"chosen": CHAT, "rejected": worse}, "x:1")
    assert told == implied and digest_of(told) == digest_of(implied) != digest_of(texts)
    assert isinstance(told, PreferenceRow) and isinstance(told.chosen, ChatRow) and told.chosen.given == 1
    path = write(tmp_path / "x.jsonl", [{"chosen": CHAT, "rejected": worse}])
    assert digest_of(rows(path)[0]) == digest_of(told)


def test_what_a_table_fills_up_is_taken_out(tmp_path: Path) -> None:
    """One type for all messages gives each the fields of all, null where it has none."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [CHAT[0], {"role": "assistant", "content": "x", "tool_calls": [call]}]
    parquet.write_table(pa.table({"messages": [messages]}), tmp_path / "t.parquet")
    (row,) = rows(tmp_path / "t.parquet")
    assert isinstance(row, ChatRow) and list(row.messages) == messages


def test_texts_folders_and_files_named_twice(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.md").write_text("ay")
    (tmp_path / "left.bin").write_bytes(b"\0")
    said: list[str] = []
    found = list(read_rows([str(tmp_path), str(tmp_path / "a.md")], say=said.append))
    assert [row.text for row in found if isinstance(row, TextRow)] == ["ay", "bee"] and len(found) == 2
    assert found[0].where == str(tmp_path / "a.md")
    assert said == [f"{tmp_path}: left out 1 file (left.bin): of an unknown kind; known are .txt, .md, .py, .jsonl, "
                    ".jsonl.gz, .parquet"]  # fmt: skip


def test_another_column_for_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"code": "abc", "text": 7}])
    assert rows(path, text_field="code")[0] == TextRow(f"{path}:1", "abc")


def test_columns_of_several_forms_ask_which() -> None:
    record = {**RECORDS["messages"], **RECORDS["pair"]}
    with pytest.raises(DataError, match="x:3: it could be a row of messages or of prompt and completion: say which"):
        row_of(record, "x:3")
    assert isinstance(row_of(record, "x:3", form="messages"), ChatRow)
    with pytest.raises(DataError, match="x:3: no 'text', which a row of text has"):
        row_of(record, "x:3", form="text")


BROKEN: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not valid JSON"),
    "not an object": ([1], "expected an object, found list"),
    "other columns": ({"conversations": [], "id": 1}, r"not a row of 'text', .* it has conversations, id"),
    "nothing": ({}, "it has nothing"),
    "half a pair": ({"prompt": "a"}, "it has prompt"),
    "null": ({"messages": None}, "not a row of"),
    "half a preference": ({"prompt": "a", "chosen": "b"}, "it has chosen, prompt"),
    "the same twice": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    "no beginning": ({"chosen": CHAT, "rejected": CHAT[1:]}, "no 'prompt', and chosen and rejected do not begin"),
    "a text without prompt": ({"chosen": "a", "rejected": "b"}, "field 'chosen' is str, not a list of messages"),
    "text of a number": ({"text": 1}, "field 'text' is int, not a string"),
    "an empty text": ({"text": " \n"}, "field 'text' is empty"),
    "an empty prompt": ({"prompt": "", "completion": "b"}, "field 'prompt' is empty"),
    "half a surrogate pair": ('{"text": "\\ud800"}', "half a surrogate pair"),
    "messages as text": ({"messages": "hi"}, "field 'messages' is str, not a list of messages"),
    "no messages": ({"messages": []}, "field 'messages' is empty"),
    "messages without a role": ({"messages": [CHAT[0], {"content": "x"}]}, "message 2 of 'messages' is not an object"),
    "ShareGPT's names": ({"messages": [{"from": "human", "value": "x"}]}, "message 1 of 'messages' is not an object"),
    "content of a number": ({"messages": [{"role": "user", "content": 1}]}, "message 1 of 'messages': its content"),
    "a text and messages": ({"prompt": "a", "completion": CHAT}, "two texts or two lists of messages"),
    "tools that are none": ({"messages": CHAT, "tools": ["f"]}, "field 'tools' is not a list of objects"),
    "tools that are not JSON": ({"messages": CHAT, "tools": "[{"}, "field 'tools' is text, and not JSON"),
    "another form": ({"text": "x"}, r"a row of text, after rows of messages \(the first: .*x.jsonl:1\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_told_with_its_number(tmp_path: Path, name: str) -> None:
    bad, words = BROKEN[name]
    path = write(tmp_path / "x.jsonl", [{"messages": CHAT}, bad])
    with pytest.raises(DataError, match=rf"^{path}:2: .*{words}") as caught:
        rows(path)
    assert "\n" not in str(caught.value)


def test_no_rows(tmp_path: Path) -> None:
    for source in (write(tmp_path / "x.jsonl", ["", ""]), tmp_path / "nowhere"):
        with pytest.raises(DataError, match=f"^{source}: "):
            rows(source)
    with pytest.raises(DataError, match="no data sources given"):
        list(read_rows([]))


def test_a_small_file_of_much_is_refused(tmp_path: Path) -> None:
    """What a .gz unpacks to is bounded by its size."""
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * 1000 + b'"}\n' * 1 + b" " * (80 << 20)))
    with pytest.raises(DataError, match=r"holds more text than|longer than 64 MiB"):
        rows(path)


def test_rows_of_the_standard_library() -> None:
    """Real questions and answers that are on every machine; the same each time."""
    found = list(stdlib_rows())
    assert len(dict(found)) == len(found) == 400 and found[:20] == list(stdlib_rows(20))
    for name, (asked, answered) in found:
        function = name.rpartition(".")[2]
        code = answered["content"]
        assert f"def {function}(" in asked["content"] and re.search(rf"def {function}\s*\(", code)
        compile(code, name, "exec")
    assert next(read_rows(["stdlib-docstrings"])).where == f"stdlib-docstrings: {found[0][0]}"
