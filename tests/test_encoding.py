"""No file's text depends on the machine's locale: whoever opens one says in which encoding."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("recipe", "harness", "jax_impl", "torch_ref", "parity_tests", "benchmarks")
NO_TEXT = ("os.open", "Image.open")
OPENING, WHOLE = ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"), ("read_text", "write_text")


def without_encoding(source: str) -> list[int]:
    """Lines that open a file as text, or read or write one whole, without saying in which encoding."""
    lines = []
    for node in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        texts = [part.value for part in given if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        binary = any(re.fullmatch("[rwxa+]*b[rwxa+]*", text) for text in texts)
        says = any(keyword.arg == "encoding" for keyword in node.keywords)
        takes_text = name in WHOLE or (name in OPENING and not binary and ast.unparse(node.func) not in NO_TEXT)
        if takes_text and not says:
            lines.append(node.lineno)
    return lines


def test_every_file_is_opened_with_its_encoding():
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    assert len(files) > 50
    found = [f"{f.relative_to(ROOT)}:{n}" for f in files for n in without_encoding(f.read_text(encoding="utf-8"))]
    assert not found, "pass encoding='utf-8'"


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("open(x)", True),
        ("open(x, 'w')", True),
        ("path.open('a')", True),
        ("path.write_text('b')", True),
        ("path.read_text()", True),
        ("open(x, 'rb')", False),
        ("open(x, mode='xb')", False),
        ("open(x, encoding='utf-8')", False),
        ("path.read_text(encoding='utf-8')", False),
        ("os.open(x, os.O_RDONLY)", False),
    ],
)
def test_the_check_knows_text_from_bytes(line, wrong):
    assert without_encoding(line) == [1] * wrong
