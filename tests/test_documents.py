"""The documents show what exists, and the evidence kept with them stays small."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 100_000
"""Bytes of a tracked result: tables and rows are smaller, and whoever clones the project pays for every byte."""


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows and that are there; without git (a source archive) every file that matches."""
    listed = subprocess.run(["git", "ls-files", "-z", "--", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    return [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]


DOCUMENTS = tracked("*.md", "docs/*.md", "benchmarks/*.md")


def links(document: Path) -> list[str]:
    """Targets of links and images outside code, those with a scheme left out."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(document: Path) -> set[str]:
    """What `#...` may name in a document: its headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(document: Path) -> list[str]:
    """Relative links to a file that does not exist or a heading that it does not have."""
    dead = []
    for target in links(document):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document):
    assert dead_links(document) == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading: two\n")
    text = "[a](there.md#a-heading-two) [b](there.md#no) ![c](gone.png) [d](https://e.org) `[e](code.md)`\n"
    (tmp_path / "page.md").write_text(text + "```\n[f](block.md)\n```\n[g](#nowhere)\n")
    assert dead_links(tmp_path / "page.md") == ["there.md#no", "gone.png", "#nowhere"]


def test_the_documents_are_all_looked_at():
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "docs/parity.md", "docs/performance.md", "benchmarks/README.md"} <= names


def test_results_are_small_and_every_picture_is_shown():
    results = tracked("benchmarks/results/**")
    assert results
    assert {str(path.relative_to(ROOT)): size for path in results if (size := path.stat().st_size) > LIMIT} == {}
    shown = {(document.parent / target).resolve() for document in DOCUMENTS for target in links(document)}
    pictures = [path for path in [*results, *tracked("docs/**")] if path.suffix in (".png", ".svg", ".jpg", ".html")]
    assert [str(path.relative_to(ROOT)) for path in pictures if path not in shown] == []
