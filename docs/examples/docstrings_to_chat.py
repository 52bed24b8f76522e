"""Conversations to fine-tune on, out of Python's own documentation: `python docs/examples/docstrings_to_chat.py FILE`.

Each record asks what a function or class of the standard library does, or how two of one module differ, and answers
with the first paragraphs of their docstrings. Nothing is downloaded; 3.11 makes some fourteen hundred records.
"""

import ast
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SYSTEM = "You answer questions about Python's standard library in a sentence or two."
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "pydoc_data"}
LONGEST = 400
"""Characters of an answer; a longer first paragraph is no short answer."""


def first_paragraph(docstring: str | None) -> str:
    """It in one line; empty if there is none, or none that is a sentence of a fit length."""
    text = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return text if 20 <= len(text) <= LONGEST and re.match(r"[A-Z].*\.$", text) else ""


def documented(library: Path) -> Iterator[list[tuple[str, str]]]:
    """Of each module the (name, first paragraph) of its public functions and classes."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT & set(parts) or any(part.startswith("_") for part in parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few files are broken on purpose
            continue
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
        found = [(".".join((*parts, node.name)), first_paragraph(ast.get_docstring(node))) for node in nodes]
        yield [(name, text) for name, text in found if text]


def conversations(library: Path) -> Iterator[dict]:
    """Records of one question each, and for two neighbours in a module one of two questions."""
    for module in documented(library):
        for index, (name, text) in enumerate(module):
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"What does {name} do in Python?"},
                {"role": "assistant", "content": text},
            ]
            if index % 3 == 2:
                other, more = module[index - 1]
                messages += [
                    {"role": "user", "content": f"And {other}?"},
                    {"role": "assistant", "content": more},
                ]
            yield {"messages": messages}


def main(file: Path) -> None:
    """Write them, one a line."""
    records = list(conversations(Path(sysconfig.get_paths()["stdlib"])))
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    print(f"{len(records):,} conversations in {file}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/examples/docstrings_to_chat.py FILE.jsonl")
    main(Path(sys.argv[1]))
