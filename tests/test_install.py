"""What is installed: extras, locks, and what the Makefile says and fetches."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from locks import write

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKS = sorted((ROOT / "locks").glob("ci-*.txt"))
OURS = PROJECT["name"]


def name_of(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(file: Path) -> dict[str, str]:
    """Version by name; every line is NAME==VERSION or a comment."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", line)] == []
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])
    return dict(line.split("==") for line in lines)


def required(extra: str) -> list[Requirement]:
    """What an extra asks for, with the extras that it names in turn, and the base."""
    wanted = [Requirement(text) for text in EXTRAS[extra]]
    inner = [name for one in wanted if one.name == OURS for name in one.extras]
    return [one for one in wanted if one.name != OURS] + [one for name in inner for one in required(name)]


def applies(requirement: Requirement, python: str, extras: set[str]) -> bool:
    """Whether a requirement holds on Linux with that Python."""
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    marker = requirement.marker
    return marker is None or any(marker.evaluate(environment | {"extra": extra}) for extra in {*extras, ""})


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.stem)
def test_a_lock_holds_every_package_that_we_name_within_its_bounds(file):
    versions, python = locked(file), file.stem.removeprefix("ci-")
    wanted = [Requirement(text) for text in PROJECT["dependencies"]] + required("dev")
    wanted = [one for one in wanted if applies(one, python, set())]
    assert len(wanted) > 25
    assert [one.name for one in wanted if name_of(one.name) not in versions] == []
    assert [str(one) for one in wanted if not one.specifier.contains(versions[name_of(one.name)])] == []


def test_the_lock_of_this_python_holds_what_those_packages_need_in_turn():
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    file = ROOT / "locks" / f"ci-{python}.txt"
    if not file.exists():
        pytest.skip(f"there is no lock for Python {python}")
    versions, seen = locked(file), set()
    waiting = [Requirement(text) for text in PROJECT["dependencies"]] + required("dev")
    wrong = []
    while waiting:
        one = waiting.pop()
        key = (name_of(one.name), frozenset(one.extras))
        if not applies(one, python, set()) or key in seen or write.OF_CUDA.match(key[0]):
            continue
        seen.add(key)
        if key[0] not in versions:
            wrong.append(f"{one} is missing")
        elif not one.specifier.contains(versions[key[0]], prereleases=True):
            wrong.append(f"{one}, not {versions[key[0]]}")
        try:
            inner = [Requirement(text) for text in importlib.metadata.requires(one.name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [each for each in inner if applies(each, python, set(one.extras))]
        waiting = [each for each in waiting if each.marker is None or applies(each, python, set(one.extras))]
    assert wrong == [] and len(seen) > 100


def test_a_lock_is_written_from_what_pip_reports(tmp_path):
    packages = {"Jinja2": "3.1.6", "torch": "2.13.0+cpu", "typing_extensions": "4.16.0", OURS: "0.1.0"}
    packages |= {"nvidia-cublas": "13.1", "triton": "3.7", "cuda-bindings": "13.5", "tritonlike": "1"}
    report = {
        "environment": {"python_full_version": "3.12.1"},
        "install": [{"metadata": {"name": name, "version": version}} for name, version in packages.items()],
    }
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report), encoding="utf-8")
    assert write.lines(report) == ["jinja2==3.1.6", "torch==2.13.0", "tritonlike==1", "typing-extensions==4.16.0"]
    subprocess.run([sys.executable, ROOT / "locks" / "write.py", file, tmp_path / "ci.txt"], check=True)
    assert (tmp_path / "ci.txt").read_text(encoding="utf-8").splitlines() == [
        "# What CI runs on Python 3.12; written by `make lock`.",
        *write.lines(report),
    ]


def make(*arguments: str, path: Path | None = None, dry: bool = True) -> subprocess.CompletedProcess:
    """`make` in an environment that does not exist yet; with `path`, that folder's programs are found first."""
    environment = dict(os.environ) | ({} if path is None else {"PATH": f"{path}:{os.environ['PATH']}"})
    environment = {name: value for name, value in environment.items() if name not in ("TORCH", "LOCK", "MAKEFLAGS")}
    command = ["make", *(["-n"] if dry else []), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_one_variable_takes_pytorchs_cpu_wheel_first():
    for target in ("test", "lint", "parity"):
        said = make(target, "TORCH=cpu", "VENV=nowhere").stdout
        index = said.index("--no-deps --index-url https://download.pytorch.org/whl/cpu 'torch>=")
        assert index < said.index("-e '.[")
        assert "--constraint locks/ci-" in said and "--constraint" not in make(target, "VENV=nowhere", "LOCK=").stdout
    bound = next(text for text in EXTRAS["torch"] if text.startswith("torch"))
    assert f"'{bound}'" in make("test", "TORCH=cpu", "VENV=nowhere").stdout
    refused = make("test", "TORCH=gpu", "VENV=nowhere")
    assert refused.returncode == 2 and "TORCH=gpu is not known; choose TORCH=cpu" in refused.stderr


@pytest.fixture
def pretended(tmp_path):
    """An environment whose Python has no torch and writes down what pip is asked; pip knows these versions of torch."""

    def make_it(versions: str, system: str = "Linux", fails: bool = False) -> tuple[Path, Path]:
        binaries = tmp_path / "venv" / "bin"
        binaries.mkdir(parents=True)
        (binaries / "python").write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncase "$*" in *sys.version_info*) echo 3.11;; '
            f"*find_spec*) exit 1;; *' install '*) echo '  Downloading x.whl (9 MB)'; echo 'Collecting x'; "
            f"exit {int(fails)};; *' index '*) echo 'torch ({versions})';; esac\n",
            encoding="utf-8",
        )
        (tmp_path / "uname").write_text(f"#!/bin/sh\necho {system}\n", encoding="utf-8")
        for file in (binaries / "python", tmp_path / "uname"):
            file.chmod(0o755)
        return tmp_path / "venv", tmp_path

    return make_it


@pytest.mark.parametrize(
    ("versions", "system", "flags", "said", "asked"),
    [
        ("2.15.0", "Linux", [], "PyTorch's CUDA build, 2.7 GB", 1),
        ("2.13.0+cpu", "Linux", [], "about 0.4 GB\n", 1),
        ("2.15.0", "Linux", ["TORCH=cpu"], "PyTorch's CPU wheel, 0.2 GB", 2),
        ("2.15.0", "Darwin", ["TORCH=cpu"], "PyTorch among it", 1),
    ],
)
def test_what_will_be_fetched_is_said_before(versions, system, flags, said, asked, pretended):
    venv, path = pretended(versions, system)
    done = make(f"{venv}/.installed-test", f"VENV={venv}", *flags, path=path, dry=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and ("CUDA build" in done.stdout) == ("CUDA" in said)
    assert "15 to 20 minutes" in done.stdout and "Collecting" not in done.stdout
    lines = (path / "asked").read_text(encoding="utf-8").splitlines()
    installs = [line for line in lines if " install " in line]
    assert len(installs) == asked and done.stdout.count("Downloading x.whl") == asked
    assert installs[-1].endswith("install --constraint locks/ci-3.11.txt -e .[test]")
    assert done.stdout.index(said) < done.stdout.index("Downloading")


def test_what_pip_fails_at_fails(pretended):
    venv, path = pretended("2.13.0+cpu", fails=True)
    done = make(f"{venv}/.installed-dev", f"VENV={venv}", path=path, dry=False)
    assert done.returncode == 2 and not (venv / ".installed-dev").exists()


def test_extras_of_both_cudas_are_there():
    assert [Requirement(EXTRAS[name][0]).extras for name in ("cuda12", "cuda13")] == [{"cuda12"}, {"cuda13"}]
    assert [one.extras for one in required("cuda")] == [{"cuda13"}]
