"""Conversations become rows: what the assistant says is trained on, as transformers masks it; whole, and each once."""

import dataclasses
import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import torch_ref.train
from harness import loop
from harness.commands.train import parse_run_config
from harness.runlog import read_metrics
from recipe import conversations
from recipe.baselines import ngram_baselines
from recipe.chat import ChatTemplate, template_of
from recipe.config import DataConfig, ModelConfig, RunConfig, UserError
from recipe.conversations import Conversation, Rows, Side, tokenised
from recipe.data import prepare
from recipe.packing import IGNORE, best_fit_decreasing, documents_by_end
from recipe.tokenizer import load_tokenizer
from tests.chat_folders import CHATML, MARKING, TEMPLATES, THINKING, chat_folder, chat_tokenizer, turns, write_talks

ROOT = Path(__file__).resolve().parents[1]
ASKS = [
    turns("Who goes there?", "A friend."),
    turns("Who?", "  Two words,\nSchöne Grüße 日本 ", "And more?", "of them: <b>", system="Be kind."),
    turns("A", "", "Q", "\n\n"),
]
THOUGHT = turns("Who?", "<think>\nA friend?\n</think>\n\nA friend.", "And?", "<think>\nmore\n</think>\n\nTwo words.")


def masked(template: str, talks: list) -> tuple[list[str], list[list[int]]]:
    """What is trained on of each conversation, as text with its special tokens, and all its tokens."""
    tokenizer = chat_tokenizer(template)
    listed = [Conversation(f"line {number}", talk) for number, talk in enumerate(talks)]
    side = tokenised(tokenizer, template_of(tokenizer, "here"), listed, "", False)
    parts = [np.split(array, side.ends[:-1]) for array in (side.tokens, side.trained)]
    said = (ids[own].tolist() for ids, own in zip(*parts, strict=True))
    texts = [tokenizer.rust.decode(ids, skip_special_tokens=False) for ids in said]
    return texts, [ids.tolist() for ids in parts[0]]


@pytest.mark.parametrize("name", ["chatml", "trimming", "thinking"])
def test_contents_and_the_ends_of_their_turns_are_trained_on(name, tmp_path):
    texts, tokens = masked(TEMPLATES[name], ASKS)
    strip = str.strip if name == "trimming" else str
    said = [[strip(turn["content"]) + "<|im_end|>" for turn in talk if turn["role"] == "assistant"] for talk in ASKS]
    if name == "thinking":
        said[2][1] = "<|im_end|>"  # of an answer it takes the line ends in front: see the next test
        texts, tokens, said = texts[:2], tokens[:2], said[:2]
    assert texts == ["".join(parts) for parts in said]
    theirs = AutoTokenizer.from_pretrained(chat_folder(tmp_path, TEMPLATES[name]))
    for talk, ids in zip(ASKS, tokens, strict=False):
        assert ids == theirs.apply_chat_template(talk, return_dict=True)["input_ids"]


def test_what_a_template_rewrites_is_refused_by_its_line():
    with pytest.raises(UserError, match=r"line 1: the chat template of here does not write .* \{% generation %\}"):
        masked(THINKING, [ASKS[0], THOUGHT])
    with pytest.raises(UserError, match=r"line 0: the chat template of here refuses these messages"):
        masked("{{ raise_exception('no') }}", [ASKS[0]])


def test_a_token_that_begins_before_the_words_is_theirs():
    """As transformers has it: the space that a template writes in front is one token with the first word."""
    assert masked(TEMPLATES["plain"], [ASKS[0]])[0] == [" A friend. <|im_end|>"]


def test_marked_words_are_those_that_transformers_masks(tmp_path):
    talks = [*ASKS[:2], THOUGHT]
    texts, tokens = masked(MARKING, talks)
    assert texts[2] == "A friend.<|im_end|><think>\nmore\n</think>\n\nTwo words.<|im_end|>"
    tokenizer = load_tokenizer(chat_folder(tmp_path, MARKING))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    side = tokenised(tokenizer, template_of(tokenizer, ""), [Conversation("", talk) for talk in talks], "", False)
    for talk, ids, own in zip(talks, tokens, np.split(side.trained, side.ends[:-1]), strict=True):
        found = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        assert (ids, own.astype(int).tolist()) == (found["input_ids"], found["assistant_masks"])


def test_marks_within_marks_and_private_letters():
    nested = MARKING.replace("{% generation %}", "{% generation %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endgeneration %}"
    )
    odd = [turns("\ue0000\ue001", "\ue0001\ue001\ue0002\ue001")]
    assert masked(nested, [*ASKS[:1], *odd]) == masked(MARKING, [*ASKS[:1], *odd])
    assert masked(CHATML, odd)[0] == ["\ue0001\ue001\ue0002\ue001<|im_end|>"]


# Packing.
def test_rows_are_those_of_best_fit_decreasing_in_as_few_words():
    generator = np.random.default_rng(0)
    for capacity in (1, 7, 40):
        lengths = generator.integers(1, capacity + 1, 60)
        rows, room = [], []
        for index in sorted(range(60), key=lambda index: (-lengths[index], index)):
            fits = [row for row in range(len(rows)) if room[row] >= lengths[index]]
            best = min(fits, key=lambda row: room[row]) if fits else len(rows)
            if not fits:
                rows.append([])
                room.append(capacity)
            rows[best].append(index)
            room[best] -= lengths[index]
        found = best_fit_decreasing(lengths, capacity)
        assert sorted(map(len, found)) == sorted(map(len, rows)) and len(found) == len(rows)
        assert sorted(index for row in found for index in row) == list(range(60))
        assert max(lengths[row].sum() for row in found) <= capacity
        assert found == best_fit_decreasing(lengths.tolist(), capacity)
    assert best_fit_decreasing([], 5) == []


def side_of(*talks: tuple[list[int], list[int]]) -> Side:
    tokens, trained = ([x for part in parts for x in part] for parts in zip(*talks, strict=True))
    ends = np.cumsum([len(talk) for talk, _ in talks])
    return Side(np.array(tokens, np.uint16), np.array(trained, bool), ends.astype(np.int64))


def test_a_row_holds_whole_conversations_and_says_whose_each_token_is():
    # The second is cut, of the third nothing is left, the fourth's first token is nobody's target.
    rows = Rows(
        side_of(
            ([1, 2, 3], [0, 1, 1]), ([4, 5, 6, 7, 8, 9, 10], [0, 1, 0, 0, 1, 1, 1]), ([11] * 6 + [12], [0] * 6 + [1]),
            ([13, 14], [1, 1]), ([15], [1]),
        ),
        length=5, filler=99,
    )  # fmt: skip
    assert rows.said() == (
        "3 conversations in 2 rows, 91.7% full, 1 longer than a row and cut, "
        "2 of whose assistant nothing is left, not used"
    )
    inputs, targets, documents = rows.gather([1, 0])
    _ = IGNORE
    np.testing.assert_array_equal(inputs, [[1, 2, 3, 13, 14], [4, 5, 6, 7, 8]])
    np.testing.assert_array_equal(targets, [[2, 3, _, 14, _], [5, _, _, 8, 9]])
    np.testing.assert_array_equal(documents, [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    assert {array.dtype for array in (inputs, targets, documents)} == {np.dtype(np.int32)}
    inputs, targets, documents = Rows(side_of(([1, 2], [0, 1])), 5, 99).gather([0])
    row = [[1, 2, 99, 99, 99], [2, _, _, _, _], [0, 0, 1, 1, 1]]
    np.testing.assert_array_equal((inputs[0], targets[0], documents[0]), row)


def test_documents_of_plain_text_end_with_the_end_of_text():
    tokens = np.array([[5, 0, 6, 0, 0, 7], [0, 5, 5, 5, 5, 0]])
    np.testing.assert_array_equal(documents_by_end(tokens, 0), [[0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1]])


# The dataset.
def talks_of(count: int, seed: int = 3) -> list:
    words, generator = "friend kind words more goes there think".split(), np.random.default_rng(seed)

    def talk() -> list:
        return turns(*(" ".join(generator.choice(words, size)) for size in generator.integers(2, 9, 4)))

    return [talk() for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("talks")
    file = write_talks(folder / "talks.jsonl", [*talks_of(30), turns("Who?"), *talks_of(2, seed=4)])
    where = dict(tokenizer=str(chat_folder(folder / "tokenizer", CHATML)), cache_dir=str(folder / "cache"))
    return DataConfig(chat=True, corpus=str(file), validation_fraction=0.2, **where)


def test_batches_are_a_function_of_the_step_and_use_each_row_once_an_epoch(corpus):
    dataset, again = (prepare(corpus, seed=0, show_progress=False) for _ in range(2))
    rows = len(dataset._rows("train", 48))
    shape = dict(accumulation=2, batch_size=3, sequence_length=48)
    seen = [tuple(x) for step in range(rows) for x in dataset.batch(step, **shape)[0].reshape(-1, 48)]
    counted = {row: seen.count(row) for row in set(seen)}
    assert len(counted) == rows and set(counted.values()) == {6} and seen[:rows] != seen[rows : 2 * rows]
    whole, part = again.batch(2, **shape), dataset.batch(2, **shape, rows=slice(1, 2))
    assert [x.shape for x in whole] == [(2, 3, 48)] * 3 and {x.dtype.name for x in whole} == {"int32"}
    for a, b, c in zip(whole, dataset.batch(2, **shape), part, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[:, 1:2], c)
    other = prepare(corpus, seed=1, show_progress=False)
    assert dataset.fingerprint == again.fingerprint != other.fingerprint
    assert "1 without a word of the assistant's left out" in dataset.describe(48)
    assert dataset.epochs(2 * rows, 48) == 2.0


def test_held_out_conversations_are_whole_and_nobody_trains_on_them(corpus):
    dataset = prepare(corpus, seed=0, show_progress=False)
    held, trained = (np.split(side.tokens, side.ends[:-1]) for side in (dataset.validation, dataset.train))
    assert len(held) + len(trained) == 32 and 0.1 < len(held) / 32 < 0.3
    ours = {tuple(talk.tolist()) for talk in held}
    assert len(ours) == len(held) and not ours & {tuple(talk.tolist()) for talk in trained}
    batches = list(dataset.validation_batches(2, 48, 10**9))
    rows = len(dataset._rows("validation", 48))
    assert len(batches) == rows // 2 and {len(x) for batch in batches for x in batch} == {2}
    (only,) = dataset.validation_batches(10**6, 48, 1)
    assert len(only[0]) == rows
    words = dataset.tokenizer.decode(dataset.validation.tokens[dataset.validation.trained].tolist())
    assert dataset.bytes_per_token == len(words.encode()) / dataset.validation.trained.sum()
    with pytest.raises(UserError, match=r"sequence_length=1 cuts off all .* raise --sequence_length"):
        dataset.check_length(1)


def test_of_two_conversations_the_shorter_one_is_held_out(corpus, tmp_path):
    file = write_talks(tmp_path / "two.jsonl", [turns("Who?", "friend " * 30), turns("Who?", "friend")])
    dataset = prepare(dataclasses.replace(corpus, corpus=str(file)), seed=0, show_progress=False)
    assert len(dataset.train.ends) == len(dataset.validation.ends) == 1
    assert len(dataset.train.tokens) > len(dataset.validation.tokens)


def test_a_second_run_finds_its_tokens_and_a_damaged_entry_is_built_again(corpus, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(corpus, cache_dir=str(tmp_path))
    first = prepare(config, seed=0, show_progress=True)
    assert "tokenising training text: " in capsys.readouterr().err
    monkeypatch.setattr(conversations, "TOGETHER", "whoever needs it fails")
    assert prepare(config, seed=0, show_progress=True).fingerprint == first.fingerprint
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    (file,) = tmp_path.glob("*/train-trained.npy")
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    assert prepare(config, seed=0, show_progress=False).fingerprint == first.fingerprint
    assert "is damaged" in capsys.readouterr().err
    with_less = prepare(dataclasses.replace(config, max_documents=9), seed=0, show_progress=False)
    assert len(with_less.train.ends) + len(with_less.validation.ends) == 9


def test_losses_to_beat_are_those_of_the_tokens_trained_on(corpus):
    dataset = prepare(corpus, seed=0, show_progress=False)
    pairs = {}
    for name, side in (("train", dataset.train), ("held out", dataset.validation)):
        starts = {0, *side.ends.tolist()}
        pairs[name] = [(int(side.tokens[i - 1]), int(side.tokens[i])) for i in range(len(side.tokens))
                       if side.trained[i] and i not in starts]  # fmt: skip
    vocabulary, after = dataset.tokenizer.vocab_size, [b for _, b in pairs["train"]]

    def unigram(b):
        return (after.count(b) + 1.0) / (len(after) + vocabulary)

    def bigram(a, b, m):
        first = [x for x, _ in pairs["train"]].count(a)
        return (pairs["train"].count((a, b)) + m * unigram(b)) / (first + m)

    expected = {
        "uniform": math.log(vocabulary),
        "unigram": -sum(math.log(unigram(b)) for _, b in pairs["held out"]) / len(pairs["held out"]),
        "bigram": min(
            -sum(math.log(bigram(a, b, m)) for a, b in pairs["held out"]) / len(pairs["held out"])
            for m in (10.0, 30.0, 100.0, 300.0, 1000.0)
        ),
    }
    found = ngram_baselines(dataset)
    assert {name: f"{value:.12g}" for name, value in found.items()} == {n: f"{v:.12g}" for n, v in expected.items()}


@pytest.mark.parametrize("split", ["documents", "hashed", "leaking-windows"])
def test_a_document_mask_comes_with_plain_text_however_it_is_read(split, tmp_path):
    lines = "".join(json.dumps({"text": "word " * (1 + number % 5)}) + "\n" for number in range(200))
    (tmp_path / "texts.jsonl").write_text(lines, encoding="utf-8")
    config = DataConfig(
        corpus=str(tmp_path / "texts.jsonl"), bpe_vocab_size=260, cache_dir=str(tmp_path / "cache"), split=split,
        validation_fraction=0.2, document_mask=True,
    )  # fmt: skip
    dataset = prepare(config, seed=0, show_progress=False)
    plain = prepare(dataclasses.replace(config, document_mask=False), seed=0, show_progress=False)
    shape = dict(accumulation=1, batch_size=3, sequence_length=20)
    for batch, without in (
        (dataset.batch(1, **shape), plain.batch(1, **shape)),
        (next(dataset.validation_batches(2, 20, 80)), next(plain.validation_batches(2, 20, 80))),
    ):
        inputs, _, documents = batch
        np.testing.assert_array_equal(batch[:2], without)
        np.testing.assert_array_equal(documents, documents_by_end(inputs, dataset.tokenizer.eos_id))
        assert documents.max() > 1 and documents.dtype == np.int32


# Refusals.
GOOD = {"messages": turns("Who?", "A friend.")}
RECORDS = {
    "not JSON": ("{", r"line 2 is not JSON"),
    "no object": ("[1]", r"line 2 has no list of messages \(it is a list\); write"),
    "another form": ({"conversations": [{"from": "human"}]}, r"no list of messages \(fields: conversations\); write"),
    "a text": ({"messages": "Hi"}, r"line 2 has no list of messages \(fields: messages\)"),
    "none": ({"messages": []}, r"line 2 has an empty list of messages"),
    "a message that is a text": ({"messages": ["Hi"]}, r"line 2, message 1 is a text, not an object"),
    "a role nobody knows": ({"messages": [{"role": "gpt", "content": ""}]}, r"message 1 has the role 'gpt'; it must"),
    "no content": ({"messages": [{"role": "user"}]}, r"message 1 has a content that is null, not a text"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"a content that is a list, not a text"),
    "half a character": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', r"half of a character"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_is_no_conversation_is_refused_by_its_line(case, corpus, tmp_path):
    record, said = RECORDS[case]
    file = write_talks(tmp_path / "talks.jsonl", [GOOD, record, GOOD])
    with pytest.raises(UserError, match=said) as refused:
        prepare(dataclasses.replace(corpus, corpus=str(file)), seed=0, show_progress=False)
    assert f"{file} line 2" in str(refused.value) and "\n" not in str(refused.value)


def test_a_corpus_of_too_little_or_of_another_kind_is_refused(corpus, tmp_path):
    one = write_talks(tmp_path / "one.jsonl", [GOOD, {"messages": turns("Who?")}])
    (tmp_path / "only.txt").write_text("Who?")
    for file, said in (
        (one, r"has 1 conversations .* 1 without a word"),
        (tmp_path / "only.txt", r"has no \.jsonl file"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(dataclasses.replace(corpus, corpus=str(file)), seed=0, show_progress=False)
    with pytest.raises(UserError, match=r"data\.tokenizer=bpe has none; pass a chat model's folder"):
        prepare(dataclasses.replace(corpus, tokenizer="bpe"), seed=0, show_progress=False)
    bare = chat_folder(tmp_path / "bare", None)
    with pytest.raises(UserError, match=r"data\.chat: .*bare has no chat template .* --data\.tokenizer"):
        prepare(dataclasses.replace(corpus, tokenizer=str(bare)), seed=0, show_progress=False)


@pytest.mark.parametrize("field", [dict(split="hashed"), dict(max_tokens=9), dict(max_characters=9)])
def test_what_cuts_texts_does_not_go_with_conversations(field):
    with pytest.raises(UserError, match=r"data\.chat"):
        DataConfig(chat=True, **field)


def test_a_folder_of_files_and_a_local_dataset_hold_the_same_conversations(corpus, tmp_path):
    for number, talks in enumerate((talks_of(4), [turns("Who?", "Two words.")])):
        write_talks(tmp_path / f"{number}.jsonl", talks)
    (tmp_path / "notes.md").write_text("no talk")
    found = [
        prepare(dataclasses.replace(corpus, corpus=name), seed=0, show_progress=False)
        for name in (str(tmp_path), f"hub:{tmp_path}")
    ]
    assert "2 files read (2 .jsonl), 1 not read (1 .md), 5 conversations" in found[0].said
    assert len({dataset.fingerprint for dataset in found}) == 1


# A run.
class Stops(torch_ref.train.Trainer):
    """Is killed in its tenth update."""

    def step(self, *batch):
        if sum(self.counts()) == 9:
            raise KeyboardInterrupt
        return super().step(*batch)


def chat_run(corpus: DataConfig, out: str, trainer: type) -> list[float]:
    """Validation losses of twelve updates."""
    model = ModelConfig(vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16)
    run = RunConfig(
        out=out, steps=12, batch_size=4, sequence_length=48, eval_every=6, save_every=6, log_every=6, model=model,
        data=corpus, prompts=("Who?",), sample_tokens=5,
    )  # fmt: skip
    loop.run(run, framework="torch", make_trainer=trainer)
    return losses_of(out)


def losses_of(out: str) -> list[float]:
    return [record["loss"] for record in read_metrics(Path(out)) if record["kind"] == "validation"]


def test_a_run_trains_on_conversations_and_is_asked_as_a_user_asks(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "plot_runs", lambda *_, **__: None)
    losses = chat_run(corpus, "run", torch_ref.train.Trainer)
    assert losses[-1] < losses[0]
    said = capsys.readouterr().out
    assert "of the training tokens are the assistant's; training: " in said
    assert (tmp_path / "run" / "samples.txt").read_text().startswith("user\nWho?\nassistant\n")
    assert ChatTemplate(tmp_path / "run" / "best").source == CHATML


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_its_conversations(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = chat_run(corpus, "whole", torch_ref.train.Trainer)
    with pytest.raises(KeyboardInterrupt):
        chat_run(corpus, "run", Stops)
    resumed = parse_run_config(["--resume", "run"], framework="torch")
    assert resumed.data.chat
    loop.run(resumed, framework="torch", make_trainer=torch_ref.train.Trainer)
    assert losses_of("run")[-1] == losses[-1]


def test_docstrings_become_conversations(tmp_path, monkeypatch):
    """The script of docs/chat.md on a library of two modules, one of them broken; what it writes is trained on."""
    library, file = tmp_path / "library", tmp_path / "talks.jsonl"
    (library / "tests").mkdir(parents=True)
    says = "Say so many words of a kind that can be heard."
    functions = [f'def f{n}():\n    """{says}\n\n    More."""\n' for n in range(4)]
    (library / "sounds.py").write_text("".join(functions) + "def _hidden():\n    pass\n", encoding="utf-8")
    (library / "broken.py").write_text("def", encoding="utf-8")
    (library / "tests" / "left_out.py").write_text(functions[0], encoding="utf-8")
    script = runpy.run_path(str(ROOT / "docs" / "examples" / "docstrings_to_chat.py"))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    script["main"](file)
    talks = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert [talk[1]["content"] for talk in talks] == [f"What does sounds.f{n} do in Python?" for n in range(4)]
    assert [len(talk) for talk in talks] == [3, 3, 5, 3] and talks[2][3]["content"] == "And sounds.f1?"
    assert all(turn["content"] == says for talk in talks for turn in talk if turn["role"] == "assistant")
    texts, _ = masked(CHATML, talks)
    assert len(texts) == 4 and says in texts[0]
