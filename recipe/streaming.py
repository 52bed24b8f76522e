"""Corpora larger than memory: documents stream through a tokenizer into shards, and a build that was killed goes on.

The entry of a corpus is named by what is known without reading it; manifest.json has the hash of every shard and of
every file that was read. A stamp beside it has their sizes, times and inodes: while these stay, nothing is read again.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from recipe.cache import (
    check_hashes,
    key_of,
    publish,
    read_manifest,
    read_sealed,
    scratch_of,
    sealed,
    tell_damage,
    workplace_of,
    writing,
)
from recipe.config import DataConfig, UserError, require
from recipe.corpus import require_text
from recipe.durable import make_folder, sync, write_whole
from recipe.mixture import Term, apportion
from recipe.reading import read_json, short, take
from recipe.shards import SHARD_TOKENS, Shards, ShardWriter
from recipe.sources import SIDES, Piece, Place, Source, is_held_out, stat_of
from recipe.tokenizer import Tokenizer, library_version, load_tokenizer, train_bpe

FORMAT = 1
"""Raised when the meaning of the files, or of a document, changes."""
SAMPLE = 2**25
"""Characters of training documents of which a BPE is made."""
SAMPLE_AT_ONCE = 2**16
"""Characters that its trainer is given at once: it holds 256 such texts."""
BYTES_AT_ONCE = 2**20
"""Of documents that are tokenised together, in parallel."""
BYTES_BETWEEN_COMMITS = 2**24
"""Of documents, after which all that was made of them is on disk: what a killed build has to do again."""
SECONDS_BETWEEN_LINES = 60
TOKENIZER_FILES = {"tokenizer.json"}


class Part(NamedTuple):
    """One corpus of a dataset, tokenised."""

    corpus: str
    train: Shards
    validation: Shards
    bytes_per_token: float
    """Of the held-out text."""
    hashes: list[str]
    """SHA-256 of the training shards."""
    said: str
    """What was read of it."""


def prepare_parts(
    config: DataConfig, terms: Sequence[Term], tokenizer: Tokenizer | None, cache: Path, show_progress: bool
) -> tuple[Tokenizer, list[Part]]:
    """The tokenizer and every corpus of a configuration, from the cache or built into it.

    `tokenizer` is None for a BPE made of the first SAMPLE characters to train on, of a mixture in proportion.
    """
    sources = [Source(config, term.corpus) for term in terms]
    if tokenizer is None:
        tokenizer = _trained(config, sources, [term.weight for term in terms], cache, show_progress)
    return tokenizer, [_prepare_part(source, tokenizer, cache, show_progress) for source in sources]


def _trained(
    config: DataConfig, sources: list[Source], weights: list[Fraction], cache: Path, show_progress: bool
) -> Tokenizer:
    """The BPE of a sample of the training documents, from its cache entry or built into it.

    The entry is named by the files' times, too: of a file that was only touched the same BPE is made again.
    """
    options = {
        "format": FORMAT,
        "tokenizer": f"bpe {config.bpe_vocab_size} of {SAMPLE} by tokenizers {library_version()}",
        "sources": [source.options() | {"stat": source.stats()} for source in sources],
        "weights": list(map(str, weights)),
    }
    folder = cache / key_of(options)
    if read_manifest(folder, options, TOKENIZER_FILES, tell=True) is None:
        with contextlib.ExitStack() as building:
            with writing(cache):
                make_folder(cache)
                scratch = building.enter_context(scratch_of(folder, show_progress))
            if read_manifest(folder, options, TOKENIZER_FILES) is None:
                shares = apportion(weights, SAMPLE)
                samples = (_sample(source, share, show_progress) for source, share in zip(sources, shares, strict=True))
                trained = train_bpe(itertools.chain.from_iterable(samples), config.bpe_vocab_size)
                with writing(cache):
                    trained.save(scratch)
                    publish(folder, scratch, {"options": options}, TOKENIZER_FILES)
    return load_tokenizer(folder)


def _sample(source: Source, characters: int, show_progress: bool) -> Iterator[str]:
    """The first so many characters to train on, in pieces that a trainer can hold many of."""
    # A bar on a terminal, one plain line elsewhere.
    hidden = None if show_progress else True
    corpus = short(source.corpus)
    with tqdm(total=characters, unit="char", unit_scale=True, desc=f"tokenizer of {corpus}", disable=hidden) as bar:
        if show_progress and bar.disable:
            print(f"making a tokenizer of {corpus}: at most {characters:,} characters", file=sys.stderr)
        for piece in source.documents(Place()):
            if is_held_out(piece.text, source.config.validation_fraction):
                continue
            text = piece.text[:characters]
            characters -= len(text)
            bar.update(len(text))
            for first in range(0, len(text), SAMPLE_AT_ONCE):
                yield text[first : first + SAMPLE_AT_ONCE]
            if not characters:
                return


def _prepare_part(source: Source, tokenizer: Tokenizer, cache: Path, show_progress: bool) -> Part:
    options = source.options() | {
        "format": FORMAT,
        "shard_tokens": SHARD_TOKENS,
        "tokenizer": hashlib.sha256(tokenizer.identity.encode()).hexdigest(),
        "max_tokens": source.config.max_tokens,
    }
    folder = cache / key_of(options)
    manifest = read_entry(folder, options, source, show_progress)
    if manifest is None:
        with writing(cache):
            make_folder(cache)
        with contextlib.ExitStack() as building:
            with writing(cache):
                place = building.enter_context(workplace_of(folder, show_progress))
            manifest = read_entry(folder, options, source, show_progress=False)
            if manifest is not None:
                shutil.rmtree(place, ignore_errors=True)
            else:
                manifest = read_entry(place, options, source, show_progress=False)  # killed when all was done but this:
                if manifest is None:
                    manifest = _Build(source, tokenizer, options, place, show_progress).run()
                with writing(cache):
                    (place / "progress.json").unlink(missing_ok=True)
                    write_stamp(place, manifest, source)
                    shutil.rmtree(folder, ignore_errors=True)
                    place.rename(folder)
                    sync(folder.parent)
    sides = {side: [(folder / name, tokens) for name, tokens, _ in manifest[side]["shards"]] for side in SIDES}
    dtype = np.dtype(manifest["dtype"])
    return Part(
        source.corpus,
        Shards(sides["train"], dtype),
        Shards(sides["validation"], dtype),
        manifest["validation"]["bytes"] / manifest["validation"]["tokens"],
        [digest for *_, digest in manifest["train"]["shards"]],
        manifest["said"],
    )


def read_entry(folder: Path, options: dict, source: Source, show_progress: bool) -> dict[str, Any] | None:
    """The manifest of an entry whose files and whose corpus are what they were; None if it must be built.

    Hashes are compared only of files that the stamp does not know as they are now. With `show_progress`, what is wrong
    is named on stderr.
    """
    if not os.path.lexists(folder):
        return None
    try:
        manifest = read_sealed(folder / "manifest.json", options)
        stamp = _read_stamp(folder, manifest)
        hashes = shard_hashes(manifest)
        unknown = {name: hashes[name] for name in hashes if stamp["files"].get(name) != stat_of(folder / name)}
        if unknown and show_progress:
            print(f"note: comparing the hashes of {len(unknown)} files in {short(str(folder), 300)}", file=sys.stderr)
        check_hashes(folder, unknown)
    except (OSError, UserError) as error:
        if show_progress:
            tell_damage(folder, error)
        return None
    touched = _touched(source, manifest["sources"], stamp["sources"])
    changed = [index for index in touched if source.hash(index) != manifest["sources"][source.files[index][1]]]
    if changed:
        if show_progress:
            print(
                f"note: {short(str(source.files[changed[0]][0]), 300)} is not what {short(str(folder), 300)} was made "
                "of; that is built again",
                file=sys.stderr,
            )
        return None
    if unknown or touched:
        write_stamp(folder, manifest, source)
    return manifest


def _touched(source: Source, hashes: dict[str, str], stats: dict[str, list[int]]) -> list[int]:
    """The files, of those with known hashes, that are not as they were by size, time and inode."""
    indices = (index for index, (_, name) in enumerate(source.files) if name in hashes)
    return [index for index in indices if stats.get(source.files[index][1]) != source.stat(index)]


def shard_hashes(manifest: dict[str, Any]) -> dict[str, str]:
    """Name -> SHA-256 of every shard of an entry."""
    return {name: digest for side in SIDES for name, _, digest in manifest[side]["shards"]}


def _read_stamp(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The stamp of an entry; one that knows nothing if it is damaged, missing, or another's."""
    with contextlib.suppress(OSError, UserError):
        return read_sealed(folder / "stamp.json", {"manifest": manifest["checksum"]})
    return {"files": {}, "sources": {}}


def write_stamp(folder: Path, manifest: dict[str, Any], source: Source) -> None:
    """Note by what a change of the shards, or of the files they were made of, is noticed.

    Where it cannot be written, hashes are compared at every start.
    """
    with contextlib.suppress(OSError, UserError):
        stats = {path.name: stat_of(path) for path in map(folder.joinpath, shard_hashes(manifest))}
        known = {name: stat_of(path) for path, name in source.files if name in manifest["sources"]}
        stamp = {"options": {"manifest": manifest["checksum"]}, "files": stats, "sources": known}
        write_whole(folder / "stamp.json", sealed(stamp))


def check_streamed(folder: Path) -> dict[str, Any]:
    """The manifest of an entry whose every byte is as it was written; UserError or OSError, which says what is not."""
    manifest = read_json(folder / "manifest.json")
    options = take(manifest, "options", dict, str(folder / "manifest.json"))
    manifest = read_sealed(folder / "manifest.json", options)
    check_hashes(folder, shard_hashes(manifest))
    return manifest


class _Build:
    """Documents into shards, committed as they come; what a killed build left is gone on from."""

    def __init__(self, source: Source, tokenizer: Tokenizer, options: dict, place: Path, show_progress: bool) -> None:
        self.source, self.tokenizer, self.options, self.place = source, tokenizer, options, place
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.show_progress = show_progress
        self.at = Place()
        self.sources: dict[str, tuple[str, list[int]]] = {}
        """SHA-256 and stat of each file that reading has come to."""
        self.unchanged = 0
        """Files that were read and were still the same after that."""
        self.documents, self.bytes = dict.fromkeys(SIDES, 0), dict.fromkeys(SIDES, 0)
        with writing(place.parent):
            self.writers = self._go_on()

    def run(self) -> dict[str, Any]:
        """Read to the end; the manifest, written to the folder. UserError if either side has no document."""
        limit, since, full = self.options["max_tokens"], 0, False
        with self._progress() as progress:
            for batch in _batches(self._from(self.at)):
                full = self._take(batch, limit)
                since += sum(piece.size for piece in batch)
                progress(self.source.position(self.at))
                if full:
                    break
                if since >= BYTES_BETWEEN_COMMITS:
                    self._commit()
                    since = 0
        if not full and self.source.exhausted:
            self._know(len(self.source.files))  # those without any text, too
        self._check_unchanged()
        self._require_both_sides()
        with writing(self.place.parent):
            return self._finish()

    def _from(self, at: Place) -> Iterator[Piece]:
        """The documents from a place on; a file is hashed before the first of it is read."""
        if self.source.corpus.startswith("hub:"):  # Which of the files a record is of is not known.
            self._know(len(self.source.files))
        for piece in self.source.documents(at):
            if piece.after is not None and self.source.files:
                self._know(piece.after.file + 1)
            yield piece

    def _know(self, files: int) -> None:
        """Hash those of the first so many files that are not known yet."""
        for index in range(len(self.sources), files):
            before = self.source.stat(index)
            self.sources[self.source.files[index][1]] = self.source.hash(index), before

    def _take(self, batch: list[Piece], limit: int | None) -> bool:
        """Tokenise documents and append them to their sides; whether training has all the tokens it may have.

        Nothing is read beyond the document that fills it, or the first one that is held out if that comes later.
        """
        fraction = self.source.config.validation_fraction
        made: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
        room = None if limit is None else limit - self.writers["train"].tokens
        for piece, ids in zip(batch, self.tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
            side = "validation" if is_held_out(piece.text, fraction) else "train"
            if room == 0 and (side == "train" or self.documents["validation"]):
                continue
            tokens = np.array([*ids, self.tokenizer.eos_id], self.dtype)
            if side == "train" and room is not None:
                tokens = tokens[:room]
                room -= len(tokens)
            made[side].append(tokens)
            self.documents[side] += 1
            self.bytes[side] += piece.size
        with writing(self.place.parent):
            for side, parts in made.items():
                if parts:
                    self.writers[side].append(np.concatenate(parts))
        if batch[-1].after is not None:
            self.at = batch[-1].after
        return room == 0 and self.documents["validation"] > 0

    def _commit(self) -> None:
        """Force all that was made to disk, and then that it was."""
        self._check_unchanged()
        with writing(self.place.parent):
            for writer in self.writers.values():
                writer.sync()
            sync(self.place)
            tally = self.source.tally
            progress = {
                "options": self.options,
                "place": list(self.at),
                "sources": {name: [digest, stat] for name, (digest, stat) in self.sources.items()},
                "documents": self.documents,
                "bytes": self.bytes,
                "tally": {"empty": tally.empty, "surrogates": tally.surrogates},
                **{side: writer.state for side, writer in self.writers.items()},
            }
            write_whole(self.place / "progress.json", sealed(progress))

    def _go_on(self) -> dict[str, ShardWriter]:
        """The writers, where a build that was killed has left them; from the beginning if that is of no use."""
        try:
            progress = read_sealed(self.place / "progress.json", self.options)
            self._check_known(progress["sources"])
            check_hashes(self.place, {name: digest for side in SIDES for name, _, digest in progress[side]["shards"]})
            writers = {side: ShardWriter(self.place, side, self.dtype, progress[side]) for side in SIDES}
        except (OSError, UserError):
            for file in self.place.iterdir():
                file.unlink()
            return {side: ShardWriter(self.place, side, self.dtype) for side in SIDES}
        self.at = Place(*progress["place"])
        self.documents, self.bytes = progress["documents"], progress["bytes"]
        self.source.tally.empty = progress["tally"]["empty"]
        self.source.tally.surrogates = progress["tally"]["surrogates"]
        if self.show_progress:
            done = sum(self.bytes.values())
            print(f"going on after {done:,} bytes of {short(self.source.corpus, 300)}", file=sys.stderr)
        return writers

    def _check_known(self, sources: dict[str, list]) -> None:
        """Raise UserError if a file that was read is another by now; one that was only touched is read and compared."""
        for index, (path, name) in enumerate(self.source.files[: len(sources)]):
            digest, stat = sources[name]
            now = self.source.stat(index)
            require(now == stat or self.source.hash(index) == digest, f"{path} has changed; begin again.")
            self.sources[name] = digest, now

    def _check_unchanged(self) -> None:
        """Raise UserError if a file that is being read, or was, has changed since its hash was taken."""
        for index in range(self.unchanged, len(self.sources)):
            path, name = self.source.files[index]
            require(
                self.source.stat(index) == self.sources[name][1],
                f"data.corpus: {short(str(path), 300)} changed while it was read; start again when it is whole.",
            )
        self.unchanged = max(0, len(self.sources) - 1)

    def _require_both_sides(self) -> None:
        """Raise UserError if nothing is to be trained on, or nothing held out."""
        count, fraction = sum(self.documents.values()), self.source.config.validation_fraction
        corpus = short(self.source.corpus, 300)
        require_text(count > 0, self.source.corpus, self.source.tally.said())
        require(
            self.documents["validation"] > 0,
            f"data.split=hashed holds out none of the {count:,} documents of {corpus} at validation_fraction={fraction}"
            "; raise that, or pass --data.split documents.",
        )
        require(
            self.documents["train"] > 0,
            f"data.split=hashed holds out all of the {count:,} documents of {corpus} at validation_fraction={fraction}"
            "; lower that, or pass --data.split documents.",
        )

    def _finish(self) -> dict[str, Any]:
        for writer in self.writers.values():
            writer.close()
        held_out = self.documents["validation"]
        tally, count = self.source.tally.said(), sum(self.documents.values())
        manifest = {
            "options": self.options,
            "dtype": self.dtype.str,
            "vocab_size": self.tokenizer.vocab_size,
            **{
                side: {
                    "documents": self.documents[side],
                    "bytes": self.bytes[side],
                    "tokens": writer.tokens,
                    "shards": writer.shards,
                }
                for side, writer in self.writers.items()
            },
            "sources": {name: digest for name, (digest, _) in self.sources.items()},
            "said": f"{tally}{', ' if tally else ''}{count:,} documents, {held_out:,} of them held out",
        }
        write_whole(self.place / "manifest.json", sealed(manifest))
        return read_sealed(self.place / "manifest.json", self.options)

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Callable[[int], None]]:
        """A function to tell how far reading has come: a bar on a terminal, a line a minute elsewhere."""
        hidden = None if self.show_progress else True
        corpus, total, said = short(self.source.corpus), self.source.size, time.monotonic()
        begin = self.source.position(self.at)
        bar = tqdm(total=total, initial=begin, unit="B", unit_scale=True, desc=f"tokenising {corpus}", disable=hidden)
        of = "" if total is None else f" of {total:,} bytes"
        if self.show_progress and bar.disable:
            print(f"tokenising {corpus}{of}", file=sys.stderr)

        def progress(position: int) -> None:
            nonlocal said
            bar.update(position - bar.n)
            if self.show_progress and bar.disable and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"tokenising {corpus}: {position:,}{of} so far", file=sys.stderr)

        with bar:
            yield progress


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Documents in lists of some BYTES_AT_ONCE, each up to a place from which reading can go on."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.size
        if size >= BYTES_AT_ONCE and piece.after is not None:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
