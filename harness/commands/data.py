"""`python -m harness.commands.data`: `build` tokenises a corpus before it is trained on, `check` reads what is cached
again."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from harness import cli
from recipe.cache import check_entry
from recipe.config import DataConfig, UserError, require
from recipe.data import CACHED, prepare
from recipe.reading import read_json, short, take
from recipe.streaming import TOKENIZER_FILES, check_streamed


@dataclass(frozen=True)
class BuildCommand:
    """Tokenise a corpus into the cache, as a training run with these flags would."""

    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    """Seed of the run: with split documents it draws what is held out."""


@dataclass(frozen=True)
class CheckCommand:
    """Compare the hash of every cached file with the one it was written with."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """An entry of the cache, or the cache."""


def build(data: DataConfig, seed: int) -> list[str]:
    """Lines that say what is there now."""
    dataset = prepare(data, seed=seed, show_progress=True)
    return [
        *([f"corpus     {dataset.said}"] if dataset.said else []),
        f"tokens     {len(dataset.train_tokens):,} to train on, {len(dataset.validation_tokens):,} held out, "
        f"vocabulary {dataset.tokenizer.vocab_size:,}, {dataset.bytes_per_token:.3f} bytes each",
        f"text       {dataset.fingerprint}",
    ]


def check(folder: Path) -> str:
    """A line on an entry of which every byte is as it was written; UserError or OSError, which says what is not."""
    file = folder / "manifest.json"
    manifest = read_json(file)
    if "sha256" not in manifest:
        manifest = check_streamed(folder)
        count = sum(len(manifest[side]["shards"]) for side in ("train", "validation"))
        tokens = sum(manifest[side]["tokens"] for side in ("train", "validation"))
        return f"sound      {folder}: {tokens:,} tokens in {count} shards"
    names = CACHED if "train_tokens" in manifest else TOKENIZER_FILES
    manifest = check_entry(folder, take(manifest, "options", dict, str(file)), names)
    tokens = [f"{manifest[name]:,}" for name in ("train_tokens", "validation_tokens") if name in manifest]
    what = f"{' + '.join(tokens)} tokens" if tokens else "a tokenizer"
    return f"sound      {folder}: {what}"


def main() -> None:
    """`python -m harness.commands.data build [--data.corpus ...]` or `check FOLDER`."""
    command = cli.parse_command(
        {"build": BuildCommand, "check": CheckCommand},
        sys.argv[1:],
        prog=cli.called_as("python -m harness.commands.data"),
        description="Tokenise a corpus, or look whether what was tokenised is still what it was.",
    )
    if isinstance(command, BuildCommand):
        print("\n".join(build(command.data, command.seed)))
        return
    folder = Path(command.folder)
    whole = [folder] if (folder / "manifest.json").is_file() else sorted(folder.glob("[!.]*/manifest.json"))
    entries = [place if place.is_dir() else place.parent for place in whole]
    require(
        bool(entries),
        f"{folder} is no entry of the cache and holds none; name a folder with a manifest.json, or the cache.",
    )
    damaged = []
    for entry in entries:
        try:
            print(check(entry))
        except (UserError, OSError) as error:
            reason = str(error).partition(";")[0]
            print(f"DAMAGED    {entry}: {short(reason, 300)}")
            damaged.append(reason)
    require(not damaged, f"{'; '.join(damaged)}: remove what is damaged, and the next run builds it again.")


if __name__ == "__main__":
    cli.end(main)
