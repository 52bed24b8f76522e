"""Everything that needs a GPU, in stages of under ten minutes: `python -m benchmarks.gpu --help`.

A stage is one or a few commands, each a process of its own, so that one at a time holds the GPU. A command that fails
or runs out of time keeps what it has written, and the next one begins; run again, a stage does only what is not done.
`--dry_run True` runs the same commands on the CPU, at a size that shows that they run and nothing else; without it a
machine that has no GPU is refused.
"""

import datetime
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.tables import table
from harness.cli import end, parse
from harness.interruption import Terminated
from harness.plot import plot_runs
from harness.runlog import read_metrics
from harness.surroundings import git_commit
from recipe.config import require

ROOT = Path(__file__).resolve().parents[1]

PREAMBLE = """
import flax.nnx, importlib.metadata, json, jax, os, sys, torch
names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")
print(json.dumps({name: importlib.metadata.version(name) for name in names} | {
    "jax devices": [device.device_kind for device in jax.devices()], "torch cuda": torch.version.cuda,
    "torch device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}))
seen = {"JAX": jax.default_backend() == "gpu", "torch": torch.cuda.is_available()}
blind = [name for name, there in seen.items() if not there]
if blind and os.environ.get("PARITY_DEVICE") != "cpu":
    sys.exit(f"{' and '.join(blind)} cannot use the GPU; install the CUDA builds (pip install -e '.[cuda,torch]').")
"""
"""Run before every stage. flax.nnx comes first: it is what an unfit pair of flax and jax breaks. A framework that
cannot use the GPU ends the stage, which would otherwise time the CPU for hours."""

BENCH = "-m benchmarks.throughput --out {out} --exclusive True --dtype bfloat16 --newton_schulz bfloat16"
MEASURED = "-m benchmarks.plan.measured --out {out}"
DETERMINISTIC = shlex.quote('{"precision": {"deterministic": true}}')
SEED = f"{BENCH} --preset seed --batch_size 24 --sequence_length 512 --accumulation 4 --rounds 6"
QWEN3 = f"{BENCH} --preset qwen3-0.6b --batch_size 2 --sequence_length 4096 --accumulation 4 --rounds 4"
# The notebook's 2,000 micro-steps are 500 updates; 500,000 tokens as there, of the embedded plays.
RECIPE = """train_{framework}.py --out {out} --preset seed --data.corpus shakespeare --data.tokenizer bpe
--data.split {split} --data.max_documents None --data.max_characters None --data.max_tokens 500000"""
SPLITS = ("documents", "leaking-windows")
RECIPES = {
    f"recipe-{framework}-{split}": RECIPE.replace("{framework}", framework).replace("{split}", split)
    for split in SPLITS
    for framework in ("jax", "torch")
}

STAGES: dict[str, dict[str, str]] = {
    "tests": {"tests": "-m pytest -m gpu -q -rs parity_tests --junitxml {out}.xml"},
    # Measured time by part beside the paper's, and what XLA's tuner chose, for later plans.
    "plan": {
        "plan-seed": f"{MEASURED} --preset seed",
        "plan-seed-no-dropout": f"{MEASURED} --preset seed --dropout 0",
        "plan-seed-deterministic": f"{MEASURED} --preset seed --overrides {DETERMINISTIC}",
        "plan-qwen3-0.6b": f"{MEASURED} --preset qwen3-0.6b --batch_size 2 --sequence_length 4096",
    },
    "seed": {"seed": f"{SEED} --modes jax,torch-eager,torch-compile,hf,seed --shares True"},
    "seed-lce": {"seed-lce": f"{SEED} --modes jax,torch-eager-lce,torch-compile-lce"},
    "seed-dropout": {"seed-dropout": f"{SEED} --modes jax,torch-eager,torch-compile --dropout 0.1 --shares True"},
    "seed-max": {"seed-max": f"{SEED} --modes jax,torch-eager,torch-compile-max"},
    "seed-xla": {
        f"seed-xla-{name}": f"{SEED} --modes jax --xla_preset {name}"
        for name in ("none", "command-buffers", "latency-hiding", "triton-gemm", "h100")
    },
    "seed-sweep": {"seed-sweep": f"{SEED} --modes jax,torch-eager --batch_size 8,24,72 --rounds 2"},
    "qwen3": {"qwen3": f"{QWEN3} --modes jax,torch-eager --shares True"},
    "qwen3-torch": {"qwen3-torch": f"{QWEN3} --modes torch-eager,torch-compile,hf"},
    "qwen3-lce": {"qwen3-lce": f"{QWEN3} --modes torch-eager-lce,torch-compile-lce"},
    "qwen3-max": {"qwen3-max": f"{QWEN3} --modes torch-eager,torch-compile-max"},
    "qwen3-sweep": {"qwen3-sweep": f"{QWEN3} --modes jax --batch_size 1,2,4,8 --rounds 2"},
    # The batch is small because only the optimizer's parts are of interest.
    "newton-schulz": {
        "newton-schulz": f"{QWEN3} --modes jax,torch-eager,hf,seed --batch_size 1 --sequence_length 128 "
        "--accumulation 1 --shares True"
    },
    **{name: {"run": command} for name, command in RECIPES.items()},
    "recipe-report": {},
    "generation": {"generation": "-m benchmarks.generation --out {out}"},
}
"""Stage -> its commands by name; {out} is the stage's folder and the command's name."""

TINY = json.dumps({"model": {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 128}})
DRY = {
    "benchmarks.throughput": "--preset tiny --batch_size 1 --sequence_length 16 --accumulation 1 --rounds 1 --warmup 1 "
    f"--round_seconds 0 --threads 1 --exclusive False --dtype float32 --overrides {shlex.quote(TINY)}",
    "benchmarks.plan.measured": "--preset tiny --batch_size 1 --sequence_length 16 --accumulation 1 --updates 1 "
    f"--dtype float32 --overrides {shlex.quote(TINY)}",
    "pytest": "-k 'one_newton_schulz or muon_updates'",
    "train": """--steps 4 --accumulation 2 --batch_size 2 --sequence_length 16 --eval_every 2 --sample_tokens 0
    --model.hidden_size 24 --model.intermediate_size 20 --model.num_hidden_layers 1 --model.num_attention_heads 2
    --model.num_key_value_heads 1 --model.head_dim 6 --model.vocab_size 384 --data.bpe_vocab_size 384
    --data.max_characters 5000 --data.max_tokens 5000 --data.validation_tokens 64""",
}
"""What a dry run adds to a command, by a word in it; the last of two equal flags counts."""
DRY_ENVIRONMENT = {
    **{"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "PARITY_DEVICE": "cpu"},
    "TORCHDYNAMO_DISABLE": "1",  # torch.compile takes a minute a mode on a CPU
}

# Seconds between asking a command to stop and making it.
GRACE = 30
ALL_SKIPPED = 5
"""Recorded for tests that were all skipped: pytest's own exit code where it has run none."""
NOTEBOOK = ("the notebook, its own corpus and tokenizer", "1.1146", "75.12%", "3.05", "743.7 on a T4")
"""What the seed notebook printed at the end of its run, on leaking windows."""


@dataclass(frozen=True)
class GpuConfig:
    """Which stages to run, and where their results go."""

    stage: str = ""
    """Comma-separated stages, run in the order given; empty runs all."""
    out: str = ""
    """Folder of the results, one folder a stage; empty is benchmarks/results/gpu-COMMIT, or a new one if dry."""
    limit: int = 540
    """Seconds that a stage may take; what still runs then is interrupted, and what has not begun is left for later."""
    dry_run: bool = False
    """Run everything small on the CPU."""

    def __post_init__(self) -> None:
        for stage in self.stages:
            require(stage in STAGES, f"--stage {stage} is unknown; choose from {', '.join(STAGES)}.")
        require(self.limit > 0, f"--limit {self.limit} must be at least 1; choose e.g. 540.")

    @property
    def stages(self) -> list[str]:
        """The stages to run, in order."""
        return self.stage.split(",") if self.stage else list(STAGES)


def arguments(name: str, text: str, out: Path, *, dry: bool) -> list[str]:
    """The command's arguments for Python; a training run that was interrupted goes on."""
    words = shlex.split(text.replace("{out}", str(out / name)))
    if words[0].startswith("train") and (out / name / "run.json").exists():
        return [words[0], "--resume", str(out / name)]
    return words + [word for key, extra in DRY.items() if dry and key in text for word in shlex.split(extra)]


def all_skipped(results: Path) -> bool:
    """Whether pytest's JUnit file counts tests, all of them skipped: exit code 0 then says nothing."""
    if not results.exists():
        return False
    suites = list(ElementTree.parse(results).getroot().iter("testsuite"))
    tests, skipped = (sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "skipped"))
    return tests == skipped


def run_command(name: str, words: list[str], log: Path, *, seconds: float, dry: bool) -> int:
    """Run Python with these arguments, its output on the terminal and in the log; the exit code, 130 if interrupted."""
    environment = dict(os.environ) | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (DRY_ENVIRONMENT if dry else {})
    print(f"--- {name}" if name == "preamble" else f"--- {name}: {shlex.join(['python', *words])}", flush=True)
    # Sessions of their own: the processes that the command starts are interrupted with it, and tee outlives them.
    tee = subprocess.Popen(["tee", "-a", str(log)], stdin=subprocess.PIPE, start_new_session=True)
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=tee.stdin,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    tee.stdin.close()
    try:
        code = process.wait(timeout=seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, Terminated) as stopped:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not isinstance(stopped, subprocess.TimeoutExpired):
            raise
        code = 130
    tee.wait(timeout=GRACE)
    return code


def run_stage(stage: str, out: Path, *, limit: float, dry: bool) -> bool:
    """Run what is not done of a stage; whether all of it is done now. `status.json` says how each command ended."""
    out.mkdir(parents=True, exist_ok=True)
    started, status_file = time.monotonic(), out / "status.json"
    status = json.loads(status_file.read_text(encoding="utf-8")) if status_file.exists() else {}
    print(f"=== {stage}: results in {out}", flush=True)
    if run_command("preamble", ["-c", PREAMBLE], out / "preamble.log", seconds=limit, dry=dry) != 0:
        return False
    complete = True
    for name, text in STAGES[stage].items():
        module = text.split()[1]
        if module == "benchmarks.generation" and (dry or importlib.util.find_spec(module) is None):
            print(f"--- {name}: left out, {'it has no dry run' if dry else 'there is no such benchmark here'}")
            continue
        if status.get(name, {}).get("code") == 0:
            print(f"--- {name}: done on {status[name]['date']}", flush=True)
            continue
        left, began = limit - (time.monotonic() - started), time.monotonic()
        if left <= 0:
            print(f"--- {name}: no time left; run the stage again", flush=True)
            complete = False
            continue
        code = run_command(name, arguments(name, text, out, dry=dry), out / f"{name}.log", seconds=left, dry=dry)
        if code == 0 and all_skipped(out / f"{name}.xml"):
            print(f"--- {name}: every test was skipped, so nothing has been shown; the log says why", flush=True)
            code = ALL_SKIPPED
        seconds = round(time.monotonic() - began, 1)
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        status[name] = {"code": code, "seconds": seconds, "date": date}
        status_file.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")
        print(f"--- {name}: exit code {code} after {seconds} s", flush=True)
        complete &= code == 0
    for record in ("run.json", "metrics.jsonl"):  # what the report needs; the weights beside them stay where they are
        if (out / "run" / record).exists():
            shutil.copy(out / "run" / record, out / record)
    return complete


def report_recipes(out: Path) -> None:
    """Curves of all recipe runs found, one picture a split, and a table beside the notebook's numbers."""
    lines = [
        "The seed's recipe on the embedded plays, with a byte-level BPE trained on them. The notebook trained on other "
        "text in other tokens, on windows that leak: its numbers are for orientation only.",
        "",
    ]
    rows = [NOTEBOOK]
    for split in SPLITS:
        folders = [out / name for name in RECIPES if name.endswith(split) and (out / name / "metrics.jsonl").exists()]
        for folder in folders:
            last = {record["kind"]: record for record in read_metrics(folder)}
            if {"train", "validation"} <= last.keys():
                values = last["validation"]
                quality = f"{values['loss']:.4f}", f"{values['accuracy']:.2%}", f"{values['perplexity']:.2f}"
                rows.append((f"{folder.name}, update {values['step']}", *quality, f"{last['train']['seconds']:.1f}"))
        if folders:
            plot_runs(folders, out / f"recipe-{split}.png")
    lines += table({"run": "l"} | dict.fromkeys(("validation loss", "accuracy", "perplexity", "seconds"), "r"), rows)
    (out / "recipe.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """Run the stages; 0 if all they should do is done, else 1."""
    describe = "Run what needs a GPU, in stages that can be repeated."
    options = parse(GpuConfig, argv, prog="benchmarks.gpu", description=describe)
    require(
        options.dry_run or machine.has_gpu(),
        "this machine shows no NVIDIA GPU, and on a CPU the stages would take hours and prove nothing; run it where "
        "there is one, or --dry_run True to see that everything runs.",
    )
    if options.out or not options.dry_run:
        out = Path(options.out or f"benchmarks/results/gpu-{str(git_commit())[:12]}").resolve()
    else:
        out = Path(tempfile.mkdtemp(prefix="gpu-dry-run-"))
    undone = []
    for stage in options.stages:
        if not run_stage(stage, out / stage, limit=options.limit, dry=options.dry_run):
            undone.append(stage)
        if stage.startswith("recipe"):
            report_recipes(out)
    print(f"results in {out}" + (f"; not done: {', '.join(undone)}" if undone else ""))
    return 1 if undone else 0


if __name__ == "__main__":
    end(lambda: main(sys.argv[1:]))
