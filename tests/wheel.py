"""`make wheel` ends here: what a wheel holds, and that it trains from an empty folder with no clone around.

`python tests/wheel.py dist/NAME.whl`; the interpreter has the wheel's dependencies. Prints a line and exits with 0.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

PACKAGES = {"harness", "jax_impl", "parity_tests", "recipe", "torch_ref"}
NEEDED = {
    *("qwen_commands.py", "recipe/py.typed", "recipe/render.py", "parity_tests/compare/report.html.jinja"),
    *("jax_impl/api.py", "torch_ref/api.py", "parity_tests/twins.py", "parity_tests/one_update.py"),
}
LARGEST = 500_000
"""Bytes; the code that the commands need has some 400,000 compressed."""
SMALL = (
    *("--data.corpus", "stdlib", "--data.max_documents", "20", "--data.bpe_vocab_size", "300"),
    *("--data.cache_dir", "cache", "--steps", "2", "--batch_size", "2", "--sequence_length", "16"),
    *("--model.hidden_size", "16", "--model.intermediate_size", "16", "--model.num_hidden_layers", "1"),
    *("--model.num_attention_heads", "2", "--model.head_dim", "8", "--sample_tokens", "0", "--out", "runs/a b"),
)
COMMANDS = (
    ("qwen-train-jax", *SMALL),
    ("qwen-generate-jax", "--checkpoint", "runs/a b", "--prompt", "the", "--max-new-tokens", "2"),
    ("qwen-checkpoint", "inspect", "runs/a b"),
    ("qwen-checkpoint", "export", "runs/a b", "exported"),
    ("qwen-plot", "runs/a b", "--out", "runs.png"),
    ("qwen-data", "check", "cache"),
    *((name, "--help") for name in ("qwen-train-torch", "qwen-generate-torch", "compare-models")),
)
"""What runs in an empty folder, with JAX alone."""


def faults(sizes: Mapping[str, int], total: int) -> list[str]:
    """What is wrong with a wheel of these files (bytes, compressed) and of so many bytes in all."""
    wrong = [f"{name} is missing" for name in sorted(NEEDED - set(sizes))]
    for name in sizes:
        top, file = name.partition("/")[0], name.rpartition("/")[2]
        if not (top in PACKAGES or top.endswith(".dist-info") or name == "qwen_commands.py"):
            wrong.append(f"{name} belongs to no package of ours")
        if file.startswith(("test_", "conftest", "mutant", "mutation", "fuzz")) or "/results/" in name:
            wrong.append(f"{name} is of the tests")
    return wrong + [f"{total:,} bytes are more than {LARGEST:,}"] * (total > LARGEST)


def try_out(wheel: Path) -> None:
    """Run the commands of a wheel, installed in a folder of its own; CalledProcessError for one that fails."""
    with tempfile.TemporaryDirectory() as place:
        installed, empty = Path(place, "site"), Path(place, "empty")
        empty.mkdir()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)]
        subprocess.run(pip, check=True)
        environment = os.environ | {"PYTHONPATH": str(installed)}
        for name, *arguments in COMMANDS:
            command = [sys.executable, str(installed / "bin" / name), *arguments]
            done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} {' '.join(arguments)} exits with {done.returncode}:\n{done.stderr}")
            if arguments == ["--help"] and name not in done.stdout:
                raise SystemExit(f"{name} --help does not say its name:\n{done.stdout[:300]}")


def main(wheel: Path) -> None:
    """Look into the wheel, then try it."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.compress_size for entry in archive.infolist()}
    if wrong := faults(sizes, wheel.stat().st_size):
        raise SystemExit(f"{wheel}: {'; '.join(wrong)}")
    try_out(wheel)
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {len(sizes)} files, {len(COMMANDS)} commands run")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
