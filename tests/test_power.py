"""Power lost at any file operation: no cache lies, no state is unusable, no record before the one resumed from is lost.

What a disk may hold then is told by the model in tests/power.py, which is tested here first.
"""

import dataclasses
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import recipe.data
from harness.runlog import read_metrics
from recipe.config import DataConfig, RunConfig, UserError
from recipe.data import prepare
from recipe.durable import fcntl, sync
from recipe.reading import short
from tests.power import ASSUMPTIONS, Power
from tests.test_loop import Killed, assert_same_runs, config, elsewhere, kill_at, no_picture, resumed, train  # noqa: F401

pytestmark = pytest.mark.skipif(fcntl is None, reason="where no folder can be forced to disk, nothing is promised")


def left(path: Path) -> dict[str, str]:
    """What an image holds, by path; folders are left out."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): file.read_text(encoding="utf-8") for file in files}


def write(file: Path, text: str, *, force: bool = False, mode: str = "w") -> None:
    with open(file, mode, encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        if force:
            os.fsync(stream.fileno())


def write_and_force(root: Path) -> None:
    write(root / "new", "text", force=True)


def write_and_force_all(root: Path) -> None:
    write_and_force(root)
    sync(root)


def replace(root: Path, *, file: bool = True, folder: bool = True) -> None:
    """The classical way, and what is left out of it."""
    write(root / ".new", "text", force=file)
    (root / ".new").replace(root / "old")
    if folder:
        sync(root)


def append(root: Path) -> None:
    write(root / "old", "+synced", force=True, mode="a")
    write(root / "old", "+more", mode="a")


def remove_and_force(root: Path) -> None:
    (root / "old").unlink()
    sync(root)


def make_folders(root: Path) -> None:
    (root / "a").mkdir()
    write(root / "a" / "b", "text", force=True)
    sync(root / "a")


def move_folder(root: Path) -> None:
    make_folders(root)
    sync(root)
    (root / "a").rename(root / "c")


def always(images: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The same by every assumption."""
    return {assumption: images for assumption in ASSUMPTIONS}


OLD, NEW = {"old": "old"}, {"new": "text"}
SEQUENCES: dict[str, tuple[Callable[[Path], None], dict[str, list[dict[str, str]]]]] = {
    "nothing": (lambda root: None, {"journalled": [OLD], "unsynced": [OLD], "some": [OLD]}),
    "written": (
        lambda root: write(root / "new", "text"),
        {"journalled": [OLD | {"new": "text"[:end]} for end in range(5)], "unsynced": [OLD]},
    ),
    "written and forced": (write_and_force, {"journalled": [OLD | NEW], "unsynced": [OLD], "some": [OLD, OLD | NEW]}),
    "and its folder": (write_and_force_all, always([OLD | NEW])),
    "replaced": (replace, always([{"old": "text"}])),
    "replaced, its folder not forced": (
        lambda root: replace(root, folder=False),
        {
            "journalled": [{"old": "text"}],
            "unsynced": [OLD],
            "some": [OLD, OLD | {".new": "text"}, {"old": "text"}],
        },
    ),
    "replaced, itself not forced": (
        lambda root: replace(root, file=False),
        {"journalled": [{"old": "text"[:end]} for end in range(5)], "unsynced": [{"old": ""}]},
    ),
    "appended": (
        append,
        {
            "journalled": [{"old": "old+synced" + "+more"[:end]} for end in range(6)],
            "unsynced": [{"old": "old+synced"}],
        },
    ),
    "overwritten": (
        lambda root: write(root / "old", "text"),
        {"journalled": [OLD, *({"old": "text"[:end]} for end in range(5))], "unsynced": [OLD]},
    ),
    "removed": (lambda root: (root / "old").unlink(), {"journalled": [{}], "unsynced": [OLD], "some": [OLD, {}]}),
    "removed and forced": (remove_and_force, always([{}])),
    "folders, the upper one not forced": (
        make_folders,
        {"journalled": [OLD | {"a/b": "text"}], "unsynced": [OLD], "some": [OLD, OLD | {"a/b": "text"}]},
    ),
    "a folder moved": (
        move_folder,
        {
            "journalled": [OLD | {"c/b": "text"}],
            "unsynced": [OLD | {"a/b": "text"}],
            "some": [OLD | {"a/b": "text"}, OLD | {"c/b": "text"}],
        },
    ),
    "from another thread": (
        lambda root: in_a_thread(write_and_force_all, root),
        always([OLD | NEW]),
    ),
}
"""Operations in a folder that holds `old`, and by assumption what may be left in the end."""


def in_a_thread(function: Callable[[Path], None], root: Path) -> None:
    thread = threading.Thread(target=function, args=(root,))
    thread.start()
    thread.join()


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """The power never goes in earnest here, and hundreds of runs would wait for the disk longest."""
    monkeypatch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("case", SEQUENCES)
def test_the_model_leaves_what_a_disk_may_hold(case, root, tmp_path):
    run, allowed = SEQUENCES[case]
    met: dict[str, list] = {assumption: [] for assumption in ASSUMPTIONS}
    for seed in range(60):
        shutil.rmtree(root)
        root.mkdir()
        write(root / "old", "old")
        with Power(root, tmp_path / f"images{seed}", seed) as power:
            run(root)
        for number, _, assumption, path in power.images():
            if number == len(power.operations) - 1 and left(path) not in met[assumption]:
                met[assumption].append(left(path))
    for assumption, images in allowed.items():
        assert sorted(map(sorted, map(dict.items, met[assumption]))) == sorted(map(sorted, map(dict.items, images)))


def test_the_model_counts_every_operation_and_the_images_come_before_it(root, tmp_path):
    with Power(root, tmp_path / "images") as power:
        replace(root)
        (root / "folder").mkdir()
    assert power.operations == [*("open .new", "fsync .new", "rename .new old", "fsync .", "mkdir folder", "the end")]
    images = list(power.images())
    assert [number for number, *_ in images] == [number for number in range(6) for _ in ASSUMPTIONS]
    journalled = [path for _, _, assumption, path in images if assumption == "journalled"]
    assert [".new" in left(path) for path in journalled] == [False, True, True, False, False, False]
    assert [path.joinpath("folder").is_dir() for path in journalled] == [False] * 5 + [True]
    write(root / "new", "unwatched")
    assert len(power.operations) == 6 and os.fsync is power._original["fsync"]


def test_what_was_removed_is_not_taken_for_what_has_its_inode_now(root, tmp_path):
    write(root / "old", "old")
    with Power(root, tmp_path / "images") as power:
        (root / "old").unlink()
        write(root / "new", "text")
        write(root / "other", "text")
    *_, unsynced = (left(path) for _, _, assumption, path in power.images() if assumption == "unsynced")
    assert unsynced == OLD


@pytest.mark.parametrize("before", ["nothing", "a damaged entry", "what a killed builder left"])
def test_no_power_loss_makes_the_cache_lie_or_useless(before, config, root, tmp_path, monkeypatch):  # noqa: F811
    data = dataclasses.replace(config.data, cache_dir=str(root / "cache"))
    right = prepare(dataclasses.replace(data, cache_dir=str(tmp_path / "right")), seed=0, show_progress=False)
    (entry,) = (tmp_path / "right").iterdir()
    if before == "a damaged entry":
        shutil.copytree(entry, root / "cache" / entry.name)
        (root / "cache" / entry.name / "train.npy").write_bytes(b"")
    elif before == "what a killed builder left":
        shutil.copytree(entry, root / "cache" / f".building-{entry.name}")
    with Power(root, tmp_path / "images") as power:
        prepare(data, seed=0, show_progress=False)
    checked: dict[Path, bool] = {}
    built: list[bool] = []
    encode_texts = recipe.data.encode_texts
    monkeypatch.setattr(recipe.data, "encode_texts", lambda *a, **k: built.append(True) or encode_texts(*a, **k))
    for number, operation, assumption, image in power.images():
        if image not in checked:
            shutil.rmtree(root)
            shutil.copytree(image, root)
            built.clear()
            assert_same_data(data, right)
            assert [path.name for path in (root / "cache").iterdir()] == [entry.name], f"{assumption}, {operation}"
            checked[image] = bool(built)
        if number == len(power.operations) - 1:
            assert not checked[image], f"{assumption}: an entry that was built is there"
    assert any(checked.values()), "some are from before the entry is there"


def assert_same_data(data: DataConfig, right: recipe.data.Dataset) -> None:
    found = prepare(data, seed=0, show_progress=False)
    np.testing.assert_array_equal(found.train_tokens, right.train_tokens)
    np.testing.assert_array_equal(found.validation_tokens, right.validation_tokens)
    assert found.tokenizer.identity == right.tokenizer.identity
    assert found.bytes_per_token == right.bytes_per_token


RHYTHMS = {"evaluated more often": (1, 2), "saved more often": (2, 1)}
"""Updates between evaluations and between saves."""


@pytest.fixture(params=["evaluated more often", pytest.param("saved more often", marks=pytest.mark.slow)])
def rhythm(request, config, tmp_path, root) -> RunConfig:  # noqa: F811
    """A run to be watched; an uninterrupted one like it lies in `other` already."""
    eval_every, save_every = RHYTHMS[request.param]
    config = dataclasses.replace(config, steps=4, eval_every=eval_every, save_every=save_every)
    train(elsewhere(config, tmp_path))
    return dataclasses.replace(config, out=str(root / "run"))


def test_a_run_that_loses_power_goes_on_bit_for_bit(rhythm, root, tmp_path, capsys, record_property):
    with Power(root, tmp_path / "images") as power:
        train(rhythm)
    outcomes = check_images(power, rhythm, tmp_path, capsys)
    record_property("file operations", len(power.operations))
    record_property("images", len(outcomes))
    assert {0, rhythm.steps} <= set(outcomes), "some are from before the first save, and some of the end"


def test_a_resumed_run_that_loses_power_goes_on_bit_for_bit(rhythm, root, tmp_path, capsys):
    with pytest.raises(Killed):
        train(rhythm, kill_at(3))
    with Power(root, tmp_path / "images") as power:
        train(resumed(rhythm))
    check_images(power, rhythm, tmp_path, capsys, safe=3 // rhythm.save_every * rhythm.save_every)


def check_images(power: Power, config: RunConfig, tmp_path: Path, capsys, safe: int = 0) -> list[int | str]:  # noqa: F811
    """The outcomes of all images that differ, once no moment is seen to be wrong.

    An image that holds a state is gone on from, another one begun again. What was once forced to disk stays: no image
    resumes from an earlier state than one that was `safe` before, by the assumption under which the least is; in the
    end all is.
    """
    outcomes: dict[Path, int | str] = {}
    wrong: dict[str, list[str]] = {}
    for operation, moments in itertools.groupby(power.images(), key=lambda image: image[:2]):
        least = safe if operation[1] != "the end" else config.steps
        for _, _, assumption, image in moments:
            if image not in outcomes:
                shutil.rmtree(power.root)
                shutil.copytree(image, power.root)
                outcomes[image] = outcome(config, str(tmp_path / "other"), capsys)
            found = outcomes[image]
            if isinstance(found, int) and found < least:
                found = f"goes on from step {found}, although step {least} was safe"
            if isinstance(found, str):
                wrong.setdefault(found[:60], []).append(f"{operation[0]} {operation[1]} ({assumption}): {found}")
            elif assumption == "unsynced":
                safe = max(safe, found)
    count, moments = sum(map(len, wrong.values())), len(ASSUMPTIONS) * len(power.operations)
    kinds = [f"{len(places)} times, first before {places[0]}" for places in wrong.values()]
    assert not wrong, "\n".join([f"{count} of {moments} moments are wrong", *kinds])
    return list(outcomes.values())


def outcome(config: RunConfig, other: str, capsys) -> int | str:  # noqa: F811
    """The step from which the run goes on to what it should be, 0 for the beginning; else what is wrong, in a line."""
    try:
        step = go_on(config)
        assert_same_runs(config.out, other)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {short(str(error).replace(config.out, 'RUN'), 300)}"
    finally:
        said = "".join(capsys.readouterr())
    return step if "lacks" not in said else "the log lacks records"


def go_on(config: RunConfig) -> int:  # noqa: F811
    """Resume the run, or begin it again if it has no state; the step from which it goes on."""
    try:
        train(resumed(config))
    except UserError as error:
        if "is finished" in str(error):
            return config.steps
        if "no state to go on from" not in str(error) and "is not a folder" not in str(error):
            raise
        train(config)
        return 0
    return [record["step"] for record in read_metrics(config.out) if record["kind"] == "resume"][-1]
