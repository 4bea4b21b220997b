"""Translations from lists, wheels and catalogues that the tests make, and what is made of them."""

import gzip
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from manyhands.errors import ConfigError, DataError
from manyhands.lab.einsum import einsum_layer
from manyhands.lab.experiments.gshard import configs
from manyhands.lab.translate import START_ID, batches, prepare, read, tells_language
from manyhands.lab.translations import Translation, made_up_translations, read_translations
from manyhands.models import EncoderDecoder
from manyhands.plan.count_kind import count_any
from tests.moe.make_routing import make_layer, tokens

WORDS = {"de": "Wort", "pt_BR": "palavra", "da": "ord"}


def descriptions(language: str, text: str, numbers: range) -> str:
    return "\n".join(
        f"Package: p{n}\nDescription-md5: {n:032x}\nDescription-{language}: {text} {n}\n more of {n}\n .\n end\n"
        for n in numbers
    )


def debian(folder: Path) -> Path:
    """200 pairs: 100 German, 60 Brazilian, 40 Danish (compressed); and what is to be left out."""
    folder.mkdir()
    name = "deb.debian.org_debian_dists_trixie_main_i18n_Translation-"
    (folder / f"{name}en").write_text(descriptions("en", "word", range(100)))
    (folder / f"{name}de").write_text(descriptions("de", "Wort", range(120)), encoding="utf-8")
    (folder / f"{name}pt%5fBR").write_text(descriptions("pt_BR", "palavra", range(60)))
    (folder / f"{name}da.gz").write_bytes(gzip.compress(descriptions("da", "ord", range(40)).encode()))
    (folder / f"{name}nl").write_text(descriptions("nl", "word", range(9)), encoding="utf-8")  # not translated
    (folder / "lock").write_text("")
    return folder


def catalogue(entries: dict[bytes, bytes], order: str = "<") -> bytes:
    """A .mo file, as msgfmt writes it."""
    rows, place = [], 28 + 16 * len(entries)
    for side in (0, 1):
        for entry in entries.items():
            rows.append((len(entry[side]), place, entry[side]))
            place += len(entry[side]) + 1
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    return head + b"".join(struct.pack(f"{order}2I", a, b) for a, b, _ in rows) + b"\0".join(r[2] for r in rows) + b"\0"


ENTRIES = {
    b"": b"Content-Type: text/plain; charset=UTF-8\n",
    b"menu\x04open\0opens": "öffnen\0öffnet".encode(),
    b"same": b"same",
    b"bad": b"\xff\xfe",
}


def test_debians_lists_are_joined_by_their_sums(tmp_path: Path) -> None:
    found = read_translations(debian(tmp_path / "lists"))
    assert len(found) == 200 and found == sorted(found)
    assert {t.language: t.text.split()[0] for t in found} == WORDS
    assert all(t.english == "word " + t.text.split()[1] for t in found)
    held = {t.english for t in found if t.held_out}
    assert 0 < len(held) < 20 and held.isdisjoint(t.english for t in found if not t.held_out)


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogues_of_a_directory_and_of_a_wheel(order: str, tmp_path: Path) -> None:
    data, inner = catalogue(ENTRIES, order), "app/locale/{}/LC_MESSAGES/django.mo"
    for language in ("de", "en_GB"):
        path = tmp_path / "tree" / inner.format(language)
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    (path.parent / "broken.mo").write_bytes(data[:40])
    (path.parent / "other.mo").write_bytes(b"something else altogether")
    expected = [Translation("de", "öffnen", "open")]
    assert read_translations(tmp_path / "tree") == expected
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr(inner.format("de"), data)
        wheel.writestr("top.mo", data)
    assert read_translations(tmp_path / "a.whl") == expected


def test_what_holds_no_translations_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no wheel")
    lists = debian(tmp_path / "lists")
    for path, says in (
        (tmp_path / "nothing", "does not exist; --data is"),
        (tmp_path / "empty", "no translations; --data is"),
        (tmp_path / "file", "is no wheel"),
    ):
        with pytest.raises(DataError, match=says):
            read_translations(path)
    (lists / "x_Translation-fr.lz4").write_bytes(b"?")
    with pytest.raises(DataError, match=r"\.lz4 is not read here; .*GzipIndexes=false"):
        read_translations(lists)
    (lists / "x_Translation-fr.lz4").unlink()
    next(lists.glob("*Translation-en")).unlink()
    with pytest.raises(DataError, match="no Translation-en"):
        read_translations(lists)


def test_a_corpus_keeps_what_is_tested_apart(tmp_path: Path) -> None:
    corpus = prepare(made_up_translations(300, 3, seed=1), 280, 40, valid_most=5)
    assert corpus.languages == [f"made-up-{n}" for n in range(3)]
    counts = corpus.counts()
    assert counts == sorted(counts, reverse=True) and sum(counts) == len(corpus.train.pairs)
    written = [{tuple(target) for _, target in part.pairs} for part in (corpus.train, corpus.valid)]
    assert written[0].isdisjoint(written[1]) and max(map(corpus.valid.languages.count, range(3))) <= 5
    assert all(source[-1] == target[-1] == START_ID for source, target in corpus.train.pairs)
    with pytest.raises(DataError, match="too few"):
        prepare(made_up_translations(2, 1, seed=1), 280, 40, 5)


def test_every_pair_is_met_once_in_an_epoch() -> None:
    corpus = prepare(made_up_translations(60, 2, seed=1), 280, 40, 5)
    size, feed = 1, batches(corpus.train, 1, seed=3)
    seen = sorted(tuple(next(feed)[0].labels_BT[0].tolist()) for _ in range(len(corpus.train.pairs) // size))
    assert seen == sorted(tuple(target) for _, target in corpus.train.pairs)
    first, again, other = (next(batches(corpus.train, 4, seed=s))[0].ids_BS for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_reading_weighs_every_token_and_shuffled_languages_tell_less() -> None:
    corpus = prepare(made_up_translations(200, 3, seed=1), 288, 40, 30)
    sparse, dense = configs(quick=True)
    model = EncoderDecoder(sparse).eval()
    found, small = read(model, corpus), read(model, corpus, batch_size=7)
    assert found.overall == pytest.approx(small.overall, rel=1e-5)
    tokens_of = (
        torch.zeros(3)
        .double()
        .index_add_(
            0,
            torch.tensor(corpus.valid.languages),
            torch.tensor([len(target) for _, target in corpus.valid.pairs]).double(),
        )
    )
    assert float((found.nats * tokens_of).sum() / tokens_of.sum()) == pytest.approx(found.overall)
    told = tells_language(found, corpus, 8, seed=0)
    assert set(told) == {1} and all(null >= 0 and bits >= 0 for bits, null in told.values())
    active = [count_any(c).active_without_embedding for c in (sparse, dense)]
    assert active[0] <= active[1] <= 1.04 * active[0], "the dense model has never fewer"


def test_einsums_need_whole_groups_and_follow_the_random_second() -> None:
    fields = {
        "num_experts": 4,
        "capacity_tokens": 3,
        "capacity_per": "group",
        "capacity_group": 8,
        "random_second": True,
    }
    torch.manual_seed(0)
    layer, x = make_layer(router=fields, hidden_act="relu"), tokens(24, 8)
    y, routing = layer(x)
    assert (routing.expert_ids < 0).any() and (~routing.kept & (routing.expert_ids >= 0)).any()
    torch.testing.assert_close(einsum_layer(layer, x, routing, 8, 3), y, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="no whole number of groups of 7"):
        einsum_layer(layer, x, routing, 7, 3)
