"""What is forced to disk, in which order, and what a disk that refuses makes of it."""

import errno
import os
from pathlib import Path

import pytest

from recipe import durable
from recipe.durable import fcntl, make_folder, sync, sync_below, write_whole

pytestmark = pytest.mark.skipif(fcntl is None, reason="looks at the folders that are forced to disk")


@pytest.fixture
def forced(monkeypatch) -> list[tuple[int, int]]:
    """Device and inode of what is forced to disk, in order."""
    done = []

    def note(handle: int) -> None:
        done.append(identity(handle))

    monkeypatch.setattr(durable, "_force", note)
    return done


def identity(path: Path | int) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def test_everything_in_a_folder_is_forced_before_the_folder(tmp_path, forced):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("a", "b/d", "b/c/e"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    sync_below(tmp_path)
    assert forced == [identity(tmp_path / name) for name in ("a", "b/c/e", "b/c", "b/d", "b", ".")]


def test_a_link_in_a_folder_is_followed_once(tmp_path, forced):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "again").symlink_to(tmp_path / "folder")
    sync_below(tmp_path / "folder")
    assert forced == [identity(tmp_path / "folder")] * 2


@pytest.mark.parametrize("there", [0, 1, 3])
def test_each_new_folder_is_forced_by_name_from_the_top(there, tmp_path, forced, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [Path("."), Path("a"), Path("a/b"), Path("a/b/c")]
    folders[there].mkdir(parents=True, exist_ok=True)
    make_folder(folders[-1])
    assert folders[-1].is_dir()
    assert forced == [identity(folder) for folder in folders[there:-1]]
    make_folder(folders[-1])
    assert len(forced) == 3 - there, "nothing is new the second time"


def test_a_file_is_forced_before_it_takes_its_place_and_its_folder_after(tmp_path, forced, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    replace = Path.replace

    def look(scratch: Path, target: Path) -> Path:
        assert forced == [identity(scratch)] and scratch.read_bytes() == b"new" and file.read_bytes() == b"old"
        return replace(scratch, target)

    monkeypatch.setattr(Path, "replace", look)
    write_whole(file, b"new")
    assert file.read_bytes() == b"new" and forced == [identity(file), identity(tmp_path)]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("where", ["write_bytes", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_file_that_cannot_be_written_leaves_the_older_one_and_nothing_else(where, error, tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_whole(file, b"old")

    def fail(path: Path, *args) -> None:
        path.touch()
        raise error

    monkeypatch.setattr(Path, where, fail)
    with pytest.raises(type(error)):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, *durable.CANNOT])
def test_a_disk_that_refuses_is_heard_and_a_folder_it_cannot_force_passed_over(code, tmp_path, monkeypatch):
    def fsync(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.delattr("recipe.durable.fcntl.F_FULLFSYNC", raising=False)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match=os.strerror(code)):
        sync(file)
    if code in durable.CANNOT:
        sync(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync(tmp_path)


@pytest.mark.parametrize("code", [0, errno.ENOTSUP, errno.EIO])
def test_the_drives_own_cache_is_emptied_where_fsync_leaves_it_out(code, tmp_path, monkeypatch):
    """As on macOS, on a file system there that does not know how, and on a disk that fails."""
    calls = []

    def full(handle: int, command: int) -> None:
        calls.append(command)
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("recipe.durable.fcntl.F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr("recipe.durable.fcntl.fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync"))
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync(tmp_path)
    else:
        sync(tmp_path)
    assert calls == ([51, "fsync"] if code == errno.ENOTSUP else [51])


def test_without_folders_to_force_files_are_forced_all_the_same(tmp_path, monkeypatch):
    """As on Windows, which wants a file opened for writing."""
    done, opened, original = [], [], os.open
    monkeypatch.setattr(durable, "fcntl", None)
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(identity(handle)))
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(flags) or original(path, flags))
    sync_below(tmp_path)
    assert done == [identity(tmp_path / "file")] and opened == [os.O_RDWR]
