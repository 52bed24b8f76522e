"""A model of power loss: what a disk would hold, had the power gone at any file operation of a program that runs.

After SQLite's crash tests. The program runs for real; beside it, the model knows what it has forced to disk: which
bytes of a file by its last fsync, which names in a folder by the folder's. Files and folders are followed by inode.
"""

import functools
import hashlib
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ASSUMPTIONS = ("journalled", "unsynced", "some")
"""journalled: every name as it is, of what was written to files since their last fsync a random part or nothing.
unsynced: nothing but what was forced to disk, neither bytes nor names.
some: of the changes of names since, the first so many, and of files a part, as in journalled."""

TWO_PATHS = {"os.rename", "os.link", "os.symlink"}
CHANGES = TWO_PATHS | {"open", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}

Image = dict[str, bytes | None]
"""Contents by path below the root; a folder has none."""


class Node:
    """A file or a folder, for as long as it exists on the disk of the model."""

    def __init__(self, folder: bool) -> None:
        self.folder, self.path = folder, Path()
        self.names: dict[str, Node] = {}
        """Of a folder, as the program sees it."""
        self.forced_names: dict[str, Node] = {}
        self.bytes = self.forced_bytes = b""


class Change(NamedTuple):
    """A name in a folder that has come to mean another node, or none."""

    folder: Node
    name: str
    node: Node | None


class Power:
    """Watches everything below a folder that exists while the block runs; `images` tells what could be left of it.

    Changes that threads make at one and the same time count as one. Files with several names and mapped memory are
    beyond it.
    """

    def __init__(self, root: Path, images_folder: Path, seed: int = 0) -> None:
        self.root, self.images_folder = root.absolute(), images_folder
        self.operations: list[str] = []
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._taken: list[tuple[int, str, str]] = []
        self._images: dict[str, Image] = {}
        self._top = Node(folder=True)
        self._nodes: dict[int, Node] = {self.root.stat().st_ino: self._top}
        self._changes: list[list[Change]] = []
        """Those of names that are not forced to disk, in order; what is in one list happens at once."""

    def __enter__(self) -> "Power":
        self._look()
        for node in self._nodes.values():
            node.forced_names, node.forced_bytes = dict(node.names), node.bytes
        self._changes = []
        self._original = {name: getattr(os, name) for name in ("fsync", "fdatasync") if hasattr(os, name)}
        for name, original in self._original.items():
            setattr(os, name, functools.partial(self._force, original=original))
        HOOK.power = self
        return self

    def __exit__(self, *_) -> None:
        HOOK.power = None
        for name, original in self._original.items():
            setattr(os, name, original)
        self.moment("the end")

    def images(self) -> Iterator[tuple[int, str, str, Path]]:
        """Number and description of the operation that the power loss came before, assumption, path of the image.

        The last ones are of the end, when every operation is done. Images that are equal have one path; it is there
        from the first of them on, to be copied.
        """
        for number, assumption, digest in self._taken:
            path = self.images_folder / digest
            if not path.exists():
                path.mkdir(parents=True)
                for name, data in self._images[digest].items():
                    (path / name).mkdir() if data is None else (path / name).write_bytes(data)
            yield number, self.operations[number], assumption, path

    def moment(self, description: str) -> None:
        """Take the images of the power going now."""
        with self._lock:
            self._look()
            for assumption in ASSUMPTIONS:
                image = self._image(assumption)
                digest = hashlib.sha256(repr(sorted(image.items())).encode()).hexdigest()[:16]
                self._images.setdefault(digest, image)
                self._taken.append((len(self.operations), assumption, digest))
            self.operations.append(description)

    def named(self, path: Path) -> str:
        """The path as operations are described by it: from the root, if it lies below."""
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)

    def _look(self) -> None:
        """See what the program has done to names and bytes since the last look."""
        while True:
            try:
                seen: dict[int, Node] = {}
                names = dict(self._walk(self.root, seen))
                break
            except FileNotFoundError:  # gone between two glances, by another thread
                continue
        self._nodes = seen
        changes = []
        for folder, now in names.items():
            changed = [name for name in folder.names | now if folder.names.get(name) is not now.get(name)]
            changes += [Change(folder, name, now.get(name)) for name in changed]
            folder.names = now
        if changes:
            self._changes.append(changes)

    def _walk(self, path: Path, seen: dict[int, Node]) -> Iterator[tuple[Node, dict[str, Node]]]:
        """The folders from `path` down, each with its names; files have their bytes noted."""
        folder, names = self._node(path, path.stat().st_ino, seen, folder=True), {}
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                below = path / entry.name
                if entry.is_dir(follow_symlinks=False):
                    yield from self._walk(below, seen)
                else:
                    self._node(below, entry.inode(), seen, folder=False).bytes = below.read_bytes()
                names[entry.name] = seen[entry.inode()]
        yield folder, names

    def _node(self, path: Path, inode: int, seen: dict[int, Node], *, folder: bool) -> Node:
        """What has this inode, known or new; the number of what was removed may come again, of the other kind, too."""
        known = self._nodes.get(inode)
        seen[inode] = known if known is not None and known.folder == folder else Node(folder)
        seen[inode].path = path
        return seen[inode]

    def _force(self, handle: int, original: Callable[[int], None]) -> None:
        """fsync, seen from here."""
        found = os.fstat(handle)
        with self._lock:
            self._look()
            node = self._nodes.get(found.st_ino) if found.st_dev == self.root.stat().st_dev else None
            if node is None:  # elsewhere, or without a name
                original(handle)
                return
            self.moment(f"fsync {self.named(node.path)}")
            original(handle)
            self._look()
            node.forced_names, node.forced_bytes = dict(node.names), node.bytes
            kept = ([change for change in changes if change.folder is not node] for changes in self._changes)
            self._changes = [changes for changes in kept if changes]

    def _image(self, assumption: str) -> Image:
        names: dict[Node, dict[str, Node]] = {}
        if assumption == "some":
            for changes in self._changes[: self._random.randint(0, len(self._changes))]:
                for folder, name, node in changes:
                    names.setdefault(folder, dict(folder.forced_names)).pop(name, None)
                    if node is not None:
                        names[folder][name] = node
        image: Image = {}

        def lay_down(folder: Node, below: str) -> None:
            now = folder.names if assumption == "journalled" else names.get(folder, folder.forced_names)
            for name, node in sorted(now.items()):
                if node.folder:
                    image[below + name] = None
                    lay_down(node, f"{below}{name}/")
                else:
                    image[below + name] = node.forced_bytes if assumption == "unsynced" else self._part(node)

        lay_down(self._top, "")
        return image

    def _part(self, file: Node) -> bytes:
        """What may be on the disk of a file: what was forced there, or what is written, as far as the disk came."""
        appended = file.bytes.startswith(file.forced_bytes)
        if file.bytes == file.forced_bytes or self._random.random() < 0.5:
            return file.forced_bytes
        return file.bytes[: self._random.randint(len(file.forced_bytes) if appended else 0, len(file.bytes))]


class Hook:
    """Tells the model, if there is one at work, of the operations to come."""

    def __init__(self) -> None:
        self.power: Power | None = None

    def __call__(self, event: str, args: tuple) -> None:
        power = self.power
        if power is None or event not in CHANGES:
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        named = args[: 2 if event in TWO_PATHS else 1]
        paths = [Path(os.fsdecode(path)) for path in named if isinstance(path, bytes | str | os.PathLike)]
        # A path that is relative, perhaps to an open folder, counts wherever it leads.
        if any(not path.is_absolute() or path.is_relative_to(power.root) for path in paths):
            power.moment(f"{event.removeprefix('os.')} {' '.join(map(power.named, paths))}")


HOOK = Hook()
sys.addaudithook(HOOK)  # for the life of the process: a hook cannot be taken away
