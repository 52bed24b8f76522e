"""The GPU suite without a GPU: stages, resumption, and a dry run of everything."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.throughput import MODES, ThroughputConfig
from harness import cli

ROOT = Path(__file__).resolve().parents[1]


def test_every_mode_is_timed_at_both_models():
    for preset in ("seed", "qwen3-0.6b"):
        commands = [c for stage in gpu.STAGES.values() for c in stage.values() if f"--preset {preset} " in c + " "]
        flags = [flags.split()[0] for c in commands for flags in c.split("--modes ")[1:]]
        assert {mode for text in flags for mode in text.split(",")} == MODES.keys(), preset


def test_no_stage_is_unknown_and_mistakes_are_named():
    assert gpu.GpuConfig().stages == list(gpu.STAGES)
    assert gpu.GpuConfig(stage="seed,tests").stages == ["seed", "tests"]
    with pytest.raises(ValueError, match="--stage sed is unknown; choose from tests, plan, seed, "):
        gpu.GpuConfig(stage="sed")
    with pytest.raises(ValueError, match="--limit 0 must be at least 1"):
        gpu.GpuConfig(limit=0)


def test_a_dry_run_changes_sizes_and_nothing_else(tmp_path):
    text = gpu.STAGES["qwen3"]["qwen3"]
    full, dry = (gpu.arguments("qwen3", text, tmp_path, dry=dry) for dry in (False, True))
    assert dry[: len(full)] == full
    values = dict(zip(dry[2::2], dry[3::2], strict=True))
    assert values["--preset"] == "tiny" and values["--modes"] == "jax,torch-eager" and values["--shares"] == "True"
    options = {flag.removeprefix("--"): value for flag, value in values.items()}
    assert options.keys() <= ThroughputConfig.__dataclass_fields__.keys()


def test_an_interrupted_training_run_goes_on(tmp_path):
    text = gpu.STAGES["recipe-jax-documents"]["run"]
    begun = gpu.arguments("run", text, tmp_path, dry=True)
    assert begun[:3] == ["train_jax.py", "--out", str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert gpu.arguments("run", text, tmp_path, dry=True) == ["train_jax.py", "--resume", str(tmp_path / "run")]


@pytest.fixture
def three_commands(monkeypatch):
    commands = {
        "good": "-c \"print('one')\"",
        "bad": '-c "raise SystemExit(3)"',
        "slow": '-c "import time; time.sleep(60)"',
    }
    monkeypatch.setitem(gpu.STAGES, "trial", commands)
    monkeypatch.setattr(gpu, "PREAMBLE", "print('versions')")


@pytest.mark.slow
def test_a_failure_stops_nothing_and_only_it_is_repeated(three_commands, tmp_path, capfd):
    out = tmp_path / "trial"
    assert not gpu.run_stage("trial", out, limit=3, dry=True)
    status = json.loads((out / "status.json").read_text())
    assert [status[name]["code"] for name in ("good", "bad", "slow")] == [0, 3, 130], "the slow one is interrupted"
    assert (out / "good.log").read_text() == "one\n" and (out / "preamble.log").read_text() == "versions\n"
    gpu.STAGES["trial"] |= {"bad": '-c "pass"', "slow": '-c "pass"'}
    capfd.readouterr()
    assert gpu.run_stage("trial", out, limit=30, dry=True)
    assert "--- good: done on" in capfd.readouterr().out
    assert (out / "good.log").read_text() == "one\n", "not run again"


def test_a_broken_installation_ends_the_stage_before_it_begins(three_commands, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PREAMBLE", "import no_such_module")
    assert not gpu.run_stage("trial", tmp_path, limit=30, dry=True)
    assert not (tmp_path / "good.log").exists() and "no_such_module" in (tmp_path / "preamble.log").read_text()


@pytest.mark.parametrize(("skipped", "code"), [(3, gpu.ALL_SKIPPED), (2, 0)])
def test_tests_that_were_all_skipped_have_not_succeeded(skipped, code, monkeypatch, tmp_path, capfd):
    text = f"<testsuites><testsuite tests='3' skipped='{skipped}'/></testsuites>"
    write = f"import pathlib; pathlib.Path(r'{{out}}.xml').write_text({text!r})"
    monkeypatch.setitem(gpu.STAGES, "trial", {"tests": shlex.join(["-c", write])})
    monkeypatch.setattr(gpu, "PREAMBLE", "")
    assert gpu.run_stage("trial", tmp_path, limit=30, dry=True) == (code == 0)
    assert json.loads((tmp_path / "status.json").read_text())["tests"]["code"] == code
    assert ("every test was skipped" in capfd.readouterr().out) == (code != 0)


def test_what_pytest_writes_of_skipped_tests_is_understood(tmp_path):
    file = tmp_path / "test_trial.py"
    file.write_text("import pytest\n@pytest.mark.skip(reason='trial')\ndef test_one(): pass\n")
    for body, expected in (("", True), ("def test_two(): pass\n", False)):
        file.write_text(file.read_text() + body)
        arguments = ["-q", "-c", str(tmp_path / "none.ini"), "--rootdir", str(tmp_path), "--junitxml", "o.xml"]
        (tmp_path / "none.ini").write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, str(file)]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        assert gpu.all_skipped(tmp_path / "o.xml") == expected
    assert not gpu.all_skipped(tmp_path / "missing.xml"), "another command than pytest"


def test_without_a_gpu_only_a_dry_run_begins(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.machine, "has_gpu", lambda: False)
    monkeypatch.setattr(gpu, "run_stage", lambda *_, **__: True)
    arguments = ["--stage", "tests", "--out", str(tmp_path / "out")]
    assert cli.run(lambda: gpu.main(arguments)) == 2
    error = capsys.readouterr().err
    assert "--dry_run True" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
    assert cli.run(lambda: gpu.main([*arguments, "--dry_run", "True"])) == 0
    monkeypatch.setattr(gpu.machine, "has_gpu", lambda: True)
    assert cli.run(lambda: gpu.main(arguments)) == 0


def test_a_framework_that_cannot_use_the_gpu_ends_the_stage(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    for device, code in (("cpu", 0), ("", 1)):
        command = [sys.executable, "-c", gpu.PREAMBLE]
        settings = environment | {"PARITY_DEVICE": device}
        done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
        assert done.returncode == code, done.stderr
    assert "JAX and torch cannot use the GPU" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_dry_run_of_everything(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry_run", "True", "--limit", "1200", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == gpu.STAGES.keys()
    for stage, commands in gpu.STAGES.items():
        for name, text in commands.items():
            if "benchmarks.throughput" in text:
                assert (tmp_path / stage / f"{name}.jsonl").stat().st_size and (
                    tmp_path / stage / f"{name}.png"
                ).exists()
    table = (tmp_path / "recipe.md").read_text()
    assert "1.1146" in table and all(f"| {name}, update 4 |" in table for name in gpu.RECIPES)
    assert (tmp_path / "recipe-documents.png").exists() and (tmp_path / "recipe-leaking-windows.png").exists()
