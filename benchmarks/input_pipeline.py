"""Time the input pipeline against the seed notebook's: `python -m benchmarks.input_pipeline --help`.

From text to tokens, and from tokens to the batches of an update, without a model. Both ways take turns in one process,
whose order is reversed every round; torch stands in it for the notebook's DataLoader alone.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import machine, report
from benchmarks.tables import Bar, bars, ranged, table
from harness.cli import end, parse
from recipe.config import DataConfig, require
from recipe.corpus import load_documents
from recipe.data import Dataset, encode_texts
from recipe.presets import get_preset
from recipe.tokenizer import Tokenizer, train_bpe

SHARE = 0.01
"""Share of a step that its input may take."""
COLOURS = {"here": "#0072b2", "notebook": "#009e73"}


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """One benchmark: tokenising and batches, here and as in the notebook."""

    preset: str = "seed"
    """Recipe whose batch size, accumulation and sequence length the batches have."""
    corpus: str = "shakespeare"
    """Text, as --data.corpus of the training programs takes it; it is cut into documents."""
    document_characters: int = 3000
    """Characters of a document, the notebook's limit."""
    vocabulary: int = 8192
    """Vocabulary of the byte-level BPE that is trained on the text."""
    workers: int = 2
    """Processes of the notebook's DataLoader in its second row."""
    rounds: int = 5
    """Measured rounds; everything is timed once in each."""
    batches: int = 200
    """Updates whose batches are made in a round."""
    out: str = ""
    """Results are written to OUT.jsonl, OUT.md and OUT.png, never over older ones; empty prints the table only."""

    def __post_init__(self) -> None:
        for name in ("document_characters", "vocabulary", "rounds", "batches", "workers"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1; choose e.g. 2.")


def _documents(options: InputConfig) -> list[str]:
    """The corpus in pieces of equal length."""
    texts = load_documents(DataConfig(corpus=options.corpus)).texts
    size = options.document_characters
    return [text[start : start + size] for text in texts for start in range(0, len(text), size)]


def _notebook_tokenise(tokenizer: Tokenizer) -> Callable[[list[str]], list[int]]:
    """The notebook's way: transformers' tokenizer, one document after another, into one list."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        theirs = AutoTokenizer.from_pretrained(folder)

    def tokenise(texts: list[str]) -> list[int]:
        tokens = []
        for text in texts:
            tokens.extend(theirs.encode(text, add_special_tokens=False))
        return tokens

    return tokenise


def _ways(options: InputConfig) -> dict[tuple[str, str], Callable[[], int]]:
    """(what, whose) -> a function that does it once and returns the number of tokens it made."""
    import torch  # here, so that a missing one is one line, and none for --help

    from benchmarks.notebook import TextTokenDataset

    recipe = get_preset(options.preset)
    A, B, T = recipe.accumulation, recipe.batch_size, recipe.sequence_length
    texts = _documents(options)
    tokenizer = train_bpe(texts, options.vocabulary)
    notebook_tokenise = _notebook_tokenise(tokenizer)
    tokens = encode_texts(tokenizer, texts)
    require(len(tokens) > A * B * T, f"the text has {len(tokens)} tokens, an update {A * B * T}; name a longer corpus.")

    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "train.npy", tokens, allow_pickle=False)
        mapped = np.load(Path(folder) / "train.npy", mmap_mode="r", allow_pickle=False)
    dataset = Dataset(tokenizer, mapped, mapped[:0], bytes_per_token=1.0, leaking_fraction=None, seed=0)
    windows = TextTokenDataset(tokens.tolist(), T)
    updates = iter(range(10**12))

    def batches_here() -> int:
        made = 0
        for _ in range(options.batches):
            inputs, targets = dataset.batch(next(updates), accumulation=A, batch_size=B, sequence_length=T)
            made += np.ascontiguousarray(inputs).size
            np.ascontiguousarray(targets)
        return made

    def batches_notebook(workers: int) -> Callable[[], int]:
        def batches() -> int:
            # As many micro-batches as an epoch has or as were asked for; starting the worker processes counts.
            made = 0
            loader = torch.utils.data.DataLoader(windows, batch_size=B, shuffle=True, num_workers=workers)
            for index, (inputs, _) in enumerate(loader, start=1):
                made += inputs.numel()
                if index == options.batches * A:
                    break
            return made

        return batches

    return {
        ("tokenising", "here"): lambda: len(encode_texts(tokenizer, texts)),
        ("tokenising", "notebook"): lambda: len(notebook_tokenise(texts)),
        ("batches", "here"): batches_here,
        ("batches", "notebook"): batches_notebook(0),
        ("batches", f"notebook, {options.workers} workers"): batches_notebook(options.workers),
    }


def benchmark(options: InputConfig) -> list[dict[str, Any]]:
    """Run the benchmark and return one row per task and way."""
    require(sys.platform == "linux", f"this runs on {sys.platform}, but the benchmark reads /proc; use Linux.")
    report.check_free(options.out)
    ways, recipe = _ways(options), get_preset(options.preset)
    rates: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for index in tqdm(range(options.rounds + 1), unit="round", disable=None):
        for way in ways if index % 2 == 0 else reversed(ways):
            began = time.perf_counter()
            made = ways[way]()
            if index:  # the first round fills caches
                rates[way].append(made / (time.perf_counter() - began))
        if not sys.stderr.isatty():
            print(f"round {index}/{options.rounds}", file=sys.stderr)
    common = report.circumstances("benchmarks.input_pipeline") | {
        "cores": len(machine.physical_cores()),
        "options": dataclasses.asdict(options),
        "tokens_per_update": recipe.accumulation * recipe.batch_size * recipe.sequence_length,
    }
    rows = []
    for (task, way), own in rates.items():
        # Against the notebook's first row, within each round.
        ratios = [ours / theirs for ours, theirs in zip(own, rates[task, "notebook"], strict=True)]
        values = {
            "rates": own,
            "tokens_per_second": report.spread(own),
            "speed_against_notebook": report.spread(ratios),
        }
        rows.append(common | {"task": task, "way": way} | values)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """What was run and where, then a line per task and way."""
    first = rows[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("numpy", "tokenizers", "torch"))
    text = [
        f"### Input pipeline, {first['options']['preset']}, {first['tokens_per_update']:,} tokens per update",
        "",
        f"`{first['command']}`",
        "",
        f"{first['cpu']}, {first['cores']} cores; {versions}; commit {first['git_commit']}; {first['date']}. "
        f"{len(first['rates'])} rounds in alternating order.",
        "",
        *table(
            {
                **{"task": "l", "way": "l", "million tokens/s, median (min–max)": "r"},
                **{"x notebook (min–max)": "r", "1 % of a step up to, tokens/s": "r"},
            },
            map(_cells, rows),
        ),
    ]
    return "\n".join(text) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    rate = row["tokens_per_second"]
    limit = f"{SHARE * rate['median']:,.0f}" if row["task"] == "batches" else "–"
    speeds = ranged(rate, ",.2f", 1e-6), ranged(row["speed_against_notebook"], ",.2f")
    return [row["task"], row["way"], *speeds, limit]


def plot(rows: list[dict[str, Any]], png: Path) -> None:
    """Bars of tokens per second on a logarithmic axis, one group per task."""
    panels: dict[str, list[Bar]] = {}
    for row in rows:
        rate, ratio = row["tokens_per_second"], row["speed_against_notebook"]["median"]
        label, colour = f"{rate['median'] / 1e6:,.1f} M   {ratio:,.1f} x", COLOURS[row["way"].partition(",")[0]]
        bar = Bar(row["way"], rate["median"], rate["min"], rate["max"], label, colour)
        panels.setdefault(row["task"], []).append(bar)
    quantity = "tokens per second: median round, whiskers slowest to fastest; times the notebook's speed"
    heading = report.heading(rows, lambda row: row["cpu"])
    bars(list(panels.items()), png, quantity=quantity, heading=heading, log=True)


def main(argv: list[str]) -> None:
    """Parse, measure, print the table and write the results."""
    describe = "Time tokenising and the making of batches, here and as the seed notebook does it."
    options = parse(InputConfig, argv, prog="benchmarks.input_pipeline", description=describe)
    report.show(benchmark(options), options.out, table=markdown, bars=plot)


if __name__ == "__main__":
    end(lambda: main(sys.argv[1:]))
