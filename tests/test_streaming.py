"""Text without end: the tokens are those of the same documents read at once, and what lies on disk is known by hash."""

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import recipe.corpus
import recipe.sources
import recipe.streaming
from harness.commands import data as command
from parity_tests.compare.tolerance import check
from recipe.baselines import ngram_baselines
from recipe.config import DataConfig, UserError
from recipe.contract import UNIT_ROUNDOFF
from recipe.corpus import load_documents, pieces
from recipe.data import prepare
from recipe.mixture import BLOCK
from recipe.reading import read_json
from recipe.shards import HEADER, Shards
from recipe.sources import Place, Source, is_held_out
from recipe.tokenizer import load_tokenizer, train_bpe

SHAPE = dict(accumulation=2, batch_size=3, sequence_length=5)
WORDS = "a quick brown fox jumps over the lazy dog — naïve 漢字 \U0001f600 and so on".split()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shards, documents and batches of a size that a test can fill."""
    for name, value in {
        "shards.SHARD_TOKENS": 700,
        "streaming.SHARD_TOKENS": 700,
        "streaming.BYTES_AT_ONCE": 300,
        "streaming.BYTES_BETWEEN_COMMITS": 2_000,
        "corpus.LARGEST_DOCUMENT": 2**11,
        "corpus.ROWS_AT_ONCE": 7,
    }.items():
        monkeypatch.setattr(f"recipe.{name}", value)


def some_texts(count: int, seed: int = 0) -> list[str]:
    drawn = random.Random(seed)
    return [f"{n}: " + " ".join(drawn.choices(WORDS, k=drawn.randrange(1, 40))) for n in range(count)]


def write_json_lines(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([" ".join(WORDS)] * 9, 280).save(folder)
    return str(folder / "tokenizer.json")


@pytest.fixture
def config(tmp_path, tokenizer) -> DataConfig:
    """A folder of every kind of file, with a cache of its own."""
    corpus = tmp_path / "corpus"
    (corpus / "below").mkdir(parents=True)
    write_json_lines(corpus / "b.jsonl", [*some_texts(60), "", " \n", "half \ud83d of a pair", *some_texts(30, seed=1)])
    (corpus / "a.txt").write_text("one text\n\n" + some_texts(1)[0] + "\n", encoding="utf-8")
    (corpus / "c.md").write_text("\n\n", encoding="utf-8")
    (corpus / "below" / "z.txt").write_bytes(b"\xef\xbb\xbf" + "with a mark é\n".encode())
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": [*some_texts(40, seed=2), None, "last"], "n": list(range(42))})
    pq.write_table(table, corpus / "d.parquet", row_group_size=16)
    return DataConfig(
        corpus=str(corpus),
        split="hashed",
        tokenizer=tokenizer,
        validation_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def changed(config: DataConfig, **fields) -> DataConfig:
    return dataclasses.replace(config, **fields)


def load(config: DataConfig, seed: int = 0, show: bool = False):
    return prepare(config, seed=seed, show_progress=show)


def expected(config: DataConfig) -> tuple[list[int], list[int]]:
    """Training and held-out tokens of the documents that are all read at once, each tokenised alone."""
    tokenizer = load_tokenizer(config.tokenizer)
    sides: tuple[list[int], list[int]] = [], []
    for text in load_documents(changed(config, split="documents")).texts:
        sides[is_held_out(text, config.validation_fraction)].extend([*tokenizer.encode(text), tokenizer.eos_id])
    return sides


CASES = {
    "a folder": {},
    "max_documents": {"max_documents": 77},
    "max_documents before a blank": {"max_documents": 61},
    "max_characters": {"max_characters": 50},
    "another field": {"text_field": "n"},
    "more held out": {"validation_fraction": 0.7},
}


@pytest.mark.parametrize("case", CASES)
def test_streamed_tokens_are_those_of_documents_read_at_once(config, case):
    if case == "another field":
        records = [{"text": 7, "n": text} for text in some_texts(50)]
        Path(config.corpus, "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        Path(config.corpus, "d.parquet").unlink()
    config = changed(config, **CASES[case])
    dataset, (train, held_out) = load(config), expected(config)
    assert dataset.train_tokens[:].tolist() == train
    assert dataset.validation_tokens[:].tolist() == dataset.held_out_tokens[:].tolist() == held_out
    assert len(train) > 700, "more than a shard"
    text = dataset.tokenizer.decode(held_out)
    check("bytes per token", dataset.bytes_per_token, len(text.encode()) / len(held_out), UNIT_ROUNDOFF["float64"])
    said = load_documents(changed(config, split="documents")).said
    assert dataset.said.startswith(said if case != "max_documents before a blank" else "2 files read")
    assert re.search(r", \d+ documents, \d+ of them held out$", dataset.said)


class Records(list):
    """What stands for a dataset that streams."""

    def skip(self, count: int) -> "Records":
        return Records(self[count:])


@pytest.fixture
def hub(monkeypatch) -> Records:
    """The records of every dataset on the Hub, and of every folder that is read like one."""
    records = Records({"text": text} for text in [*some_texts(60), None, "end"])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, **kwargs: records))
    monkeypatch.setattr("recipe.corpus.reach", lambda name, kind: None)
    return records


@pytest.mark.parametrize("corpus", ["stdlib", "hub:{0}/hub", "hub:someone/something", "{0}/corpus/b.jsonl"])
def test_other_corpora_stream_too(config, corpus, hub, monkeypatch, tmp_path):
    named = [(str(n), text) for n, text in enumerate(some_texts(70))]
    monkeypatch.setitem(recipe.corpus.EMBEDDED, "stdlib", lambda: iter(named))
    (tmp_path / "hub").mkdir()
    write_json_lines(tmp_path / "hub" / "x.jsonl", some_texts(60))
    config = changed(config, corpus=corpus.format(tmp_path), max_characters=90)
    dataset = load(config)
    assert (dataset.train_tokens[:].tolist(), dataset.validation_tokens[:].tolist()) == expected(config)
    sources = read_json(entry_of(config) / "manifest.json")["sources"]
    assert list(sources) == {"hub:{0}/hub": ["x.jsonl"], "{0}/corpus/b.jsonl": ["b.jsonl"]}.get(corpus, [])


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["shakespeare", "stdlib", "hub:{0}/hub"])
def test_the_real_corpora_stream_too(config, corpus, monkeypatch, tmp_path):
    monkeypatch.setattr("recipe.corpus.LARGEST_DOCUMENT", 2**20)
    monkeypatch.setattr("recipe.shards.SHARD_TOKENS", 2**16)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "hub").mkdir()
    write_json_lines(tmp_path / "hub" / "x.jsonl", some_texts(60))
    config = changed(config, corpus=corpus.format(tmp_path))
    dataset = load(config)
    assert (dataset.train_tokens[:].tolist(), dataset.validation_tokens[:].tolist()) == expected(config)


@pytest.mark.parametrize("limit", [1, 650, 700, 701])
def test_max_tokens_ends_the_reading(config, limit):
    whole, dataset = load(config), load(changed(config, max_tokens=limit))
    np.testing.assert_array_equal(dataset.train_tokens[:], whole.train_tokens[:limit])
    count = len(dataset.validation_tokens)
    assert 0 < count < len(whole.validation_tokens)
    np.testing.assert_array_equal(dataset.validation_tokens[:], whole.validation_tokens[:count])


def documents(config: DataConfig, start: Place = Place()) -> list:  # noqa: B008
    return list(Source(config, config.corpus).documents(start))


@pytest.mark.parametrize("fields", [{}, {"max_documents": 70}, {"max_characters": 2_500}], ids=str)
def test_reading_goes_on_from_any_place(config, fields):
    long = "x" * 3_000 + "\n\n" + " ".join(WORDS * 90)
    write_json_lines(Path(config.corpus, "e.jsonl"), ["short", long, "end"])
    Path(config.corpus, "f.txt").write_text(long, encoding="utf-8")
    config = changed(config, **fields)
    whole = documents(config)
    for index, piece in enumerate(whole):
        if piece.after is not None:
            assert documents(config, piece.after) == whole[index + 1 :]


def test_reading_a_hub_corpus_goes_on_by_record(config, hub):
    config = changed(config, corpus="hub:someone/something")
    whole = documents(config)
    assert len(whole) == 61
    for index, piece in enumerate(whole):
        assert documents(config, piece.after) == whole[index + 1 :]


def cut(text: str, tmp_path: Path) -> list[str]:
    """A text as a file is cut, which is how a record is cut."""
    (tmp_path / "x.txt").write_bytes(text.encode())
    found = [found.text for found in recipe.corpus.read_texts(tmp_path / "x.txt", "x", 0, 0, None)]
    assert found == list(pieces(text)) and "".join(found) == text
    assert all(len(piece.encode()) <= 2**11 for piece in found)
    return found


def test_a_long_document_is_cut_where_it_pauses(tmp_path):
    line = "word " * 9 + "\n"
    assert len(cut("x" * 2**11, tmp_path)) == 1
    paragraphs = cut((line * 9 + "\n") * 30, tmp_path)
    assert len(paragraphs) > 5 and all(piece.endswith("\n\n") for piece in paragraphs)
    assert all(piece.endswith("\n") for piece in cut(line * 300, tmp_path))
    assert all(piece.endswith("\r\n\r\n") for piece in cut((line[:-1] + "\r\n\r\n") * 200, tmp_path)[:-1])
    assert all(piece.endswith(" ") for piece in cut("word " * 3_000, tmp_path))
    for shift in range(4):
        assert len(cut("x" * shift + "\U0001f600" * 2_000, tmp_path)) > 3, "between characters"


def test_copies_of_a_document_are_on_one_side_wherever_they_lie(config, tmp_path):
    """Also: the side is one of the text alone, whatever its file, its neighbours and the seed are."""
    texts = some_texts(200)
    sides = [is_held_out(text, 0.2) for text in texts]
    assert 20 < sum(sides) < 60
    assert sides == [is_held_out(f"\n {text} \n", 0.2) for text in texts]
    assert all(is_held_out(text, 0.5) for text, side in zip(texts, sides, strict=True) if side), (
        "more is held out of more"
    )
    found = []
    for name, order in {"one": texts, "other": list(reversed(texts)) + texts[:50]}.items():
        (tmp_path / name).mkdir()
        for part in range(3):
            write_json_lines(tmp_path / name / f"{part}.jsonl", order[part::3])
        dataset = load(changed(config, corpus=str(tmp_path / name)), seed=len(found))
        split = (
            dataset.tokenizer.decode(tokens[:].tolist()) for tokens in (dataset.train_tokens, dataset.validation_tokens)
        )
        found.append([[text for text in texts if text in side] for side in split])
    assert found[0] == found[1]
    held_out = [text for text, side in zip(texts, sides, strict=True) if side]
    assert found[0] == [[text for text in texts if text not in held_out], held_out]


def test_batches_are_windows_of_the_tokens_in_a_pure_order(config):
    dataset, again, other = load(config), load(config), load(config, seed=1)
    text = dataset.train_tokens[:]
    windows = (len(text) - 1) // 5
    seen = []
    for step in range(-(-2 * windows // 6)):
        inputs, targets = dataset.batch(step, **SHAPE)
        assert inputs.shape == targets.shape == (2, 3, 5) and inputs.dtype == targets.dtype == np.int32
        for row_in, row_out in zip(inputs.reshape(-1, 5), targets.reshape(-1, 5), strict=True):
            seen.append((*row_in.tolist(), row_out[-1]))
            assert row_in[1:].tolist() == row_out[:-1].tolist()
    every = sorted(tuple(text[5 * n : 5 * n + 6].tolist()) for n in range(windows))
    assert sorted(seen[:windows]) == every and seen[:windows] != seen[windows : 2 * windows]
    for step in (9, 0, 9):
        np.testing.assert_array_equal(again.batch(step, **SHAPE), dataset.batch(step, **SHAPE))
    assert not np.array_equal(other.batch(0, **SHAPE), dataset.batch(0, **SHAPE))
    batches = list(dataset.validation_batches(3, 5, 50))
    assert [batch[0].shape for batch in batches] == [(3, 5)] * 3
    np.testing.assert_array_equal(batches[1][1][2], dataset.validation_tokens[26:31])


def test_windows_reach_over_shards(config):
    dataset = load(config)
    parts = dataset.parts[0].train
    assert len(parts.files) >= 3 and [tokens for _, tokens in parts.files[:-1]] == [700] * (len(parts.files) - 1)
    text = np.concatenate([np.load(file, allow_pickle=False) for file, _ in parts.files])
    assert text.dtype == parts.dtype == np.uint16 and len(text) == len(parts)
    starts = np.array([0, 699, 650, 1_399, len(text) - 1_000])
    np.testing.assert_array_equal(parts.windows(starts, 1_000), [text[start : start + 1_000] for start in starts])
    np.testing.assert_array_equal(parts[690:1_500], text[690:1_500])
    assert parts[5:5].shape == (0,) and len(Shards([], np.dtype("<u2"))) == 0


@pytest.mark.parametrize("split", ["documents", "leaking-windows", "hashed", "mixture"])
def test_some_rows_of_a_batch_are_those_of_the_whole(config, tmp_path, split):
    if split == "mixture":
        config = changed(
            config, corpus=f"3*{config.corpus} + 1*{write_json_lines(tmp_path / 'x.jsonl', some_texts(90))}"
        )
    dataset = load(changed(config, split="hashed" if split == "mixture" else split))
    shape = dict(accumulation=3, batch_size=8, sequence_length=7)
    for step in (0, 50):
        whole = dataset.batch(step, **shape)
        for rows in (slice(0, 4), slice(4, 8), slice(3, 3), slice(None), slice(1, None, 3)):
            some = dataset.batch(step, **shape, rows=rows)
            for a, b in zip(some, whole, strict=True):
                np.testing.assert_array_equal(a, b[:, rows])


def test_only_the_rows_asked_for_are_read(config, monkeypatch):
    dataset, read = load(config), []
    windows = Shards.windows
    monkeypatch.setattr(
        Shards, "windows", lambda self, starts, length: read.extend(starts) or windows(self, starts, length)
    )
    dataset.batch(0, accumulation=2, batch_size=8, sequence_length=5, rows=slice(2, 4))
    assert len(read) == 4


# Mixtures
@pytest.fixture
def mixed(config, tmp_path) -> DataConfig:
    """Three quarters of one corpus and a quarter of another, whose documents all end in `!`."""
    other = [text + "!" for text in some_texts(150, seed=5)]
    return changed(config, corpus=f"0.75*{config.corpus} + 0.25*{write_json_lines(tmp_path / 'other.jsonl', other)}")


def test_a_mixture_has_its_shares_and_every_window_of_each_corpus_once_an_epoch(mixed):
    dataset = load(mixed)
    assert dataset.counts == [3 * BLOCK // 4, BLOCK // 4]
    inputs = dataset.batch(0, accumulation=4, batch_size=BLOCK // 2, sequence_length=5)[0].reshape(2 * BLOCK, 5)
    parts, places = dataset._schedule(np.arange(2 * BLOCK))
    for index, part in enumerate(dataset.parts):
        assert (parts[:BLOCK] == index).sum() == (parts[BLOCK:] == index).sum() == dataset.counts[index]
        text, windows = part.train[:], (len(part.train) - 1) // 5
        rows = [tuple(row) for row in inputs[parts == index].tolist()]
        every = sorted(tuple(text[5 * n : 5 * n + 5].tolist()) for n in range(windows))
        epochs = len(rows) // windows
        assert epochs >= 1
        for epoch in range(epochs):
            assert sorted(rows[epoch * windows : (epoch + 1) * windows]) == every
        assert places[parts == index].tolist() == list(range(len(rows)))
    apart = np.concatenate(
        [dataset.batch(step, accumulation=1, batch_size=32, sequence_length=5)[0][0] for step in (3, 4)]
    )
    np.testing.assert_array_equal(apart, inputs[96:160])


def test_each_corpus_of_a_mixture_is_built_once_whatever_its_weight(mixed, config, monkeypatch):
    first = load(mixed)
    monkeypatch.setattr("recipe.streaming._Build.run", lambda *_: pytest.fail("built again"))
    other = load(changed(mixed, corpus=mixed.corpus.replace("0.75", "0.5")))
    assert load(mixed).fingerprint == first.fingerprint != other.fingerprint
    alone = load(config)
    assert alone.fingerprint != first.fingerprint
    np.testing.assert_array_equal(alone.train_tokens[:], first.parts[0].train[:])
    joined = [part.train[:] for part in first.parts]
    np.testing.assert_array_equal(first.train_tokens[:], np.concatenate(joined))
    first.check_length(5)
    assert first.said.startswith(f"75.00% {config.corpus[:5]}") and "; 25.00% " in first.said


def test_the_evaluation_of_a_mixture_has_its_shares(mixed):
    dataset = load(mixed)
    batches = list(dataset.validation_batches(8, 5, 16 * 5))
    assert [batch[0].shape for batch in batches] == [(8, 5)] * 2
    rows = np.concatenate([inputs for inputs, _ in batches])
    first, second = (part.validation[:] for part in dataset.parts)
    np.testing.assert_array_equal(rows[:12].ravel(), first[:60])
    np.testing.assert_array_equal(rows[12:].ravel(), second[:20])
    np.testing.assert_array_equal(batches[1][1][-1], second[16:21])
    shares = zip(dataset.parts, dataset.counts, strict=True)
    shortest = min((len(part.validation) - 1) // 5 * BLOCK // count for part, count in shares)
    assert sum(len(inputs) for inputs, _ in dataset.validation_batches(2, 5, 10**9)) == shortest // 2 * 2
    one = list(dataset.validation_batches(4, (len(second) - 1) // 2, 1))
    assert len(one) == 1 and 1 <= len(one[0][0]) <= 4


def test_bytes_per_token_of_a_mixture_are_weighted(mixed):
    dataset = load(mixed)
    first, second = (part.bytes_per_token for part in dataset.parts)
    check("bytes per token", dataset.bytes_per_token, 0.75 * first + 0.25 * second, 3 * UNIT_ROUNDOFF["float64"])


def test_baselines_count_a_bounded_part(config, mixed, monkeypatch):
    whole = ngram_baselines(load(config))
    monkeypatch.setattr("recipe.data.BASELINE_TOKENS", 400)
    dataset = load(mixed)
    train, held_out = dataset.counted()
    assert len(train) == 400 and len(held_out) <= 400
    np.testing.assert_array_equal(train, np.concatenate([dataset.parts[0].train[:300], dataset.parts[1].train[:100]]))
    assert whole.keys() == ngram_baselines(dataset).keys() and ngram_baselines(load(config)) != whole


# The BPE
def test_a_bpe_is_made_of_the_first_characters_to_train_on(config, monkeypatch):
    config = changed(config, tokenizer="bpe", bpe_vocab_size=300)
    texts = [piece.text for piece in documents(config) if not is_held_out(piece.text, 0.2)]
    assert load(config).tokenizer.identity == train_bpe(texts, 300).identity
    monkeypatch.setattr("recipe.streaming.SAMPLE", 1_000)
    monkeypatch.setattr("recipe.streaming.SAMPLE_AT_ONCE", 64)
    first = "".join(texts)[:1_000]
    ends = np.cumsum([len(text) for text in texts])
    assert ends[0] > 0
    sampled = list(recipe.streaming._sample(Source(config, config.corpus), 1_000, False))
    assert "".join(sampled) == first and max(map(len, sampled)) <= 64
    assert load(config).tokenizer.identity == train_bpe(sampled, 300).identity


def test_a_mixture_has_one_bpe_of_both_in_proportion(mixed, monkeypatch):
    monkeypatch.setattr("recipe.streaming.SAMPLE", 2_000)
    mixed = changed(mixed, tokenizer="bpe", bpe_vocab_size=300)
    sources = [Source(mixed, part) for part in re.split(r" \+ ", re.sub(r"0\.\d+\*", "", mixed.corpus))]
    sample = [
        t
        for source, size in zip(sources, (1_500, 500), strict=True)
        for t in recipe.streaming._sample(source, size, False)
    ]
    assert sum(map(len, sample)) == 2_000
    dataset = load(mixed)
    assert dataset.tokenizer.identity == train_bpe(sample, 300).identity
    assert dataset.said == load(mixed).said


def test_a_file_that_was_touched_gives_the_same_bpe_and_is_not_tokenised_again(config, monkeypatch):
    config = changed(config, tokenizer="bpe", bpe_vocab_size=300)
    first = load(config)
    os.utime(Path(config.corpus, "b.jsonl"), (1, 1))
    monkeypatch.setattr("recipe.streaming._Build.run", lambda *_: pytest.fail("tokenised again"))
    assert load(config).fingerprint == first.fingerprint


# What is on disk
def entry_of(config: DataConfig) -> Path:
    (manifest,) = Path(config.cache_dir).glob("*/stamp.json")
    return manifest.parent


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files whose hashes are taken."""
    names, file_hash = [], recipe.cache.file_hash
    for module in ("cache", "shards", "sources"):
        monkeypatch.setattr(f"recipe.{module}.file_hash", lambda file: names.append(file.name) or file_hash(file))
    return names


def test_hashes_are_compared_once(config, hashed, capsys):
    first = load(config)
    assert sorted(set(hashed)) == sorted(hashed), "each file once"
    hashed.clear()
    again = load(config, show=True)
    assert not hashed and again.fingerprint == first.fingerprint and again.said == first.said
    entry = entry_of(config)
    (entry / "stamp.json").unlink()
    load(config, show=True)
    shards = sorted(file.name for file in entry.glob("*.npy"))
    assert len(shards) > 3 and sorted(hashed) == sorted([*shards, "a.txt", "b.jsonl", "c.md", "d.parquet", "z.txt"])
    assert f"note: comparing the hashes of {len(shards)} files" in capsys.readouterr().err
    hashed.clear()
    load(config)
    assert not hashed
    os.utime(entry / shards[1])
    os.utime(Path(config.corpus, "a.txt"), (5, 5))
    load(config)
    assert sorted(hashed) == sorted([shards[1], "a.txt"]), "only what changed"
    moved = entry.with_name("copy")
    shutil.copytree(entry, moved)
    shutil.rmtree(entry)
    moved.rename(entry)
    hashed.clear()
    load(config)
    assert sorted(hashed) == shards, "of a copy every shard"


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "stamp", "another's manifest"])
def test_a_damaged_shard_is_named_and_built_again(config, capsys, damage):
    load(config)
    entry = entry_of(config)
    whole = {file.name: file.read_bytes() for file in entry.iterdir()}
    name = {"manifest": "manifest.json", "stamp": "stamp.json"}.get(damage, "train-00001.npy")
    data = bytearray(whole[name])
    data[len(data) // 2] ^= 1
    if damage == "remove":
        (entry / name).unlink()
    elif damage == "another's manifest":
        name, values = "manifest.json", read_json(entry / "manifest.json")
        values["options"]["max_tokens"] = 5
        (entry / name).write_bytes(recipe.cache.sealed(values))
    else:
        (entry / name).write_bytes(data[:-1] if damage == "cut" else data)
    again = load(config, show=True)
    said = capsys.readouterr().err
    assert (f"note: the cache entry {entry} is damaged: " in said and name in said) == (damage != "stamp")
    assert ("built again" in said) == (damage != "stamp")
    assert again.train_tokens[:].tolist() == expected(config)[0]
    now = {file.name: file.read_bytes() for file in entry.iterdir()}
    assert now | {"stamp.json": b""} == whole | {"stamp.json": b""}
    assert [path.name for path in Path(config.cache_dir).iterdir()] == [entry.name]


def test_a_corpus_that_changed_is_built_again_though_its_size_did_not(config, capsys):
    before = load(config)
    file = Path(config.corpus, "b.jsonl")
    file.write_bytes(file.read_bytes().replace(b"quick", b"quack"))
    after = load(config, show=True)
    assert after.fingerprint != before.fingerprint
    assert f"note: {file} is not what {entry_of(config)} was made of; that is built again" in capsys.readouterr().err
    assert after.train_tokens[:].tolist() == expected(config)[0]
    Path(config.corpus, "a.txt").write_text("longer " * 20, encoding="utf-8")
    assert load(config).train_tokens[:].tolist() == expected(config)[0]
    assert len(list(Path(config.cache_dir).iterdir())) == 2, "of another size it is another entry"


def test_a_stamp_that_cannot_be_written_stops_nobody(config, monkeypatch, hashed):
    def refuse(*_):
        raise OSError("read-only")

    first = load(config)
    (entry_of(config) / "stamp.json").unlink()
    monkeypatch.setattr("recipe.streaming.write_whole", refuse)
    for _ in range(2):
        hashed.clear()
        assert load(config).fingerprint == first.fingerprint and hashed


def test_every_option_has_its_own_entry(config):
    load(config)
    count = len(list(Path(config.cache_dir).iterdir()))
    for fields in ({"max_tokens": 100}, {"max_documents": 50}, {"max_characters": 50}, {"validation_fraction": 0.5}):
        load(changed(config, **fields))
        assert len(list(Path(config.cache_dir).iterdir())) == count + 1
        count += 1
    load(changed(config, bpe_vocab_size=999), seed=5)
    assert len(list(Path(config.cache_dir).iterdir())) == count, "what does not matter has none"


# The command
def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["data", *arguments])
    command.main()


def test_the_command_builds_and_checks(config, tmp_path, monkeypatch, capsys):
    data = {"corpus": config.corpus, "tokenizer": "bpe", "bpe_vocab_size": "300", "cache_dir": config.cache_dir}
    flags = [word for name, value in data.items() for word in (f"--data.{name}", value)]
    run(monkeypatch, "build", *flags, "--data.split", "hashed")
    assert "text       " in (said := capsys.readouterr().out) and "corpus     5 files read" in said
    run(monkeypatch, "build", *flags)
    assert "tokens     " in capsys.readouterr().out
    run(monkeypatch, "check", config.cache_dir)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all(line.startswith("sound      ") for line in said)
    assert sum("a tokenizer" in line for line in said) == sum(" shards" in line for line in said) == 1
    entry = entry_of(config)
    run(monkeypatch, "check", str(entry))
    shard = entry / "validation-00000.npy"
    data, stat = bytearray(shard.read_bytes()), shard.stat()
    data[HEADER] ^= 4
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    load(changed(config, tokenizer="bpe", bpe_vocab_size=300, validation_fraction=0.05), show=True)
    assert "damaged" not in capsys.readouterr().err, "which a start does not notice, as time and size are the same"
    with pytest.raises(UserError, match=r"validation-00000\.npy is not what was written: remove what is damaged"):
        run(monkeypatch, "check", config.cache_dir)
    assert sum(line.startswith("DAMAGED ") for line in capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(UserError, match="is no entry of the cache and holds none"):
        run(monkeypatch, "check", config.corpus)


# What is refused
def refused(config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        load(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_side_without_documents_is_refused(config, tmp_path):
    file = write_json_lines(tmp_path / "x.jsonl", ["one", "two", "three"])
    one = changed(config, corpus=str(file))
    assert "holds out none of the 3 documents of " in (said := refused(changed(one, validation_fraction=1e-9)))
    assert "raise that, or pass --data.split documents" in said
    assert "holds out all of the 3 documents of " in refused(changed(one, validation_fraction=1 - 1e-9))
    write_json_lines(file, [" ", ""])
    assert "holds no text (1 file read (1 .jsonl), 2 empty)" in refused(one)


def test_a_line_without_end_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr("recipe.sources.LONGEST_LINE", 100)
    file = write_json_lines(tmp_path / "x.jsonl", ["x" * (99 - len('{"text": ""}')), "two"])
    one = changed(config, corpus=str(file), validation_fraction=0.5)
    assert len(documents(one)) == 2, "a hundred bytes with its end"
    write_json_lines(file, ["one", "x" * 200])
    assert f"{file} line 2 has more than 100 bytes; cut its text into several" in refused(one)


def test_a_file_that_changes_while_it_is_read_is_refused(config, monkeypatch):
    take, file = recipe.streaming._Build._take, Path(config.corpus, "b.jsonl")

    def late(self, batch, limit):
        if len(self.sources) == 2:
            os.utime(file, (7, 7))
        return take(self, batch, limit)

    monkeypatch.setattr("recipe.streaming._Build._take", late)
    assert f"{file} changed while it was read; start again when it is whole" in refused(config)
    monkeypatch.undo()


@pytest.mark.parametrize("call", ["shards.ShardWriter.append", "streaming.write_whole", "streaming.make_folder"])
def test_a_full_disk_is_one_line_and_the_build_goes_on(config, monkeypatch, call):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"recipe.{call}", refuse)
        said = refused(config)
    assert f"the cache {config.cache_dir} cannot be written (No space left on device); make room there" in said
    assert load(config).train_tokens[:].tolist() == expected(config)[0]


def test_a_file_that_goes_is_refused(config, monkeypatch):
    monkeypatch.setattr("recipe.sources.local_files", lambda path, tally: [(path / "gone.txt", "gone.txt")])
    assert "gone.txt cannot be looked at (No such file or directory); restore it." in refused(config)


def test_bytes_that_are_no_text_are_refused_by_their_place(config):
    Path(config.corpus, "b.txt").write_bytes(b"word " * 600 + b"\xff" * 3_000)
    assert "b.txt, byte 2,045 is not UTF-8 text" in refused(config)
    Path(config.corpus, "b.txt").write_bytes(b"\x80" * 5_000)
    assert "b.txt is not UTF-8 text" in refused(config)


def test_a_window_longer_than_a_corpus_is_refused(mixed):
    dataset = load(mixed)
    with pytest.raises(UserError, match="the training text has"):
        dataset.check_length(100_000)
    with pytest.raises(UserError, match="the held-out text has"):
        dataset.check_length(len(dataset.parts[1].validation))


def test_a_manifest_without_its_files_is_damaged(tmp_path):
    options = {"format": 1}
    (tmp_path / "manifest.json").write_bytes(recipe.cache.sealed({"options": options, "sha256": {}}))
    with pytest.raises(UserError, match="is of another entry"):
        recipe.cache.check_entry(tmp_path, options, {"tokenizer.json"})


def test_progress_is_said_in_lines(config, monkeypatch, capsys):
    monkeypatch.setattr("recipe.streaming.SECONDS_BETWEEN_LINES", 0)
    load(changed(config, tokenizer="bpe", bpe_vocab_size=300), show=True)
    said = capsys.readouterr().err
    total = sum(file.stat().st_size for file in Path(config.corpus).rglob("*") if file.is_file())
    assert f"of {total:,} bytes\n" in said and "making a tokenizer of " in said
    positions = [int(found.replace(",", "")) for found in re.findall(r": ([\d,]+) of [\d,]+ bytes so far", said)]
    assert len(positions) > 5 and positions == sorted(positions) and positions[-1] <= total
