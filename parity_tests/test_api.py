"""Both frameworks from Python: the same names, the same text, the same logits; docs/python.md and the notebook run."""

import importlib
import inspect
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest

import jax_impl.api
import torch_ref.api
from parity_tests.cases import AWKWARD, FLOAT64, random_tokens, random_weights
from parity_tests.compare.montecarlo import allowances, amplification
from parity_tests.compare.tolerance import check
from parity_tests.sides import TorchModel, x64

ROOT = Path(__file__).resolve().parents[1]
SIDES = {"jax": jax_impl.api, "torch": torch_ref.api}
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FEW = {
    "steps": 4,
    "sequence_length": 64,
    "model": {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    "data": {"max_documents": 3, "bpe_vocab_size": 512},
}
"""What stands for the steps of the front page."""
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
PACKAGES = {"jax": "jax_impl", "torch": "torch_ref"}


@pytest.fixture
def away(tmp_path, monkeypatch):
    """An empty folder to work in, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN_FROM_SCRATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def blocks(page: str) -> list[str]:
    """The page's blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)


def notebook_cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def run_all(sources: list[str], side: str) -> dict:
    """The names that these texts leave, run one after another, with `side` in place of JAX."""
    names: dict = {"__name__": "page"}
    for number, source in enumerate(sources, start=1):
        exec(compile(source.replace("jax_impl", PACKAGES[side]), f"block {number}", "exec"), names)
    return names


def test_both_have_the_same_names_and_signatures():
    assert jax_impl.api.__all__ == torch_ref.api.__all__
    for name in jax_impl.api.__all__:
        ours, theirs = (getattr(api, name) for api in SIDES.values())
        assert ours is theirs or inspect.signature(ours) == inspect.signature(theirs), name
        assert inspect.getdoc(ours).replace("runs/PRESET-jax", "") == inspect.getdoc(theirs).replace(
            "runs/PRESET-torch", ""
        )


@pytest.mark.parametrize("side", SIDES)
def test_logits_of_a_prompt_are_the_models(side):
    """In float64, of a length that is padded and of one that is not; `Generator.logits` rounds to float32 at last."""
    tokens, weights = random_tokens(AWKWARD, 64, seed=1), random_weights(AWKWARD)
    make_generator = importlib.import_module(f"{PACKAGES[side]}.generate").make_generator
    with x64(FLOAT64):
        generator = make_generator(AWKWARD, FLOAT64, weights)
        padded, whole = (generator.forward(tokens[None, :n])[0] for n in (50, 64))
        rounded = generator.logits(tokens[:50].tolist())

    def compute():
        return {"logits": TorchModel(AWKWARD, FLOAT64, random_weights(AWKWARD)).logits(tokens[None])[0]}

    truths, kappas = amplification(compute)
    allowance = allowances(kappas, "float64")["logits"]
    check("logits", whole, truths["logits"], allowance)
    check("padded", padded, truths["logits"][:50], allowance)
    check("rounded", rounded, truths["logits"][:50], allowance + 2.0**-24)
    assert rounded.dtype == np.float32


def test_the_page_runs_as_it_stands(away, capsys):
    page = run_all(blocks(PAGE), "jax")
    out = capsys.readouterr().out
    for printed in re.findall(r"^ *print\((?:model|error)\)  # (.*)$", PAGE, flags=re.MULTILINE):
        assert printed in out
    # The command goes on with the prompt as `generate` does.
    from harness.commands.generate import GenerateCommand, generate_text
    from jax_impl.generate import make_generator

    sampled = page["model"].generate("The history of", max_new_tokens=40, seed=1)
    command = GenerateCommand(checkpoint="runs/small", prompt=("The history of",), max_new_tokens=40, seed=1)
    assert generate_text(command, make_generator) == 0
    assert capsys.readouterr().out == f"The history of{sampled}\n"
    # PyTorch, on the same folder.
    other = torch_ref.api.load("runs/small")
    assert other.generate("The history of", max_new_tokens=40, seed=1) == sampled
    assert other.generate("The history of", max_new_tokens=20, temperature=0.0) == page["greedy"]


def test_the_front_page_runs(away, capsys):
    (block,) = [block for block in blocks(README) if "jax_impl.api" in block]
    assert block.count("steps=100") == 1
    names = run_all([f"FEW = {FEW}\n" + block.replace("steps=100", "**FEW")], "jax")
    assert names["logits"].shape[1] == names["model"].config.vocab_size and len(names["run"].losses) == 4
    assert str(names["run"].best) in capsys.readouterr().out


def test_the_notebook_runs_in_the_other_framework_too(away):
    sources = ["".join(cell["source"]) for cell in notebook_cells() if cell["cell_type"] == "code"]
    names = run_all(sources, "torch")
    assert names["run"].losses.shape == (40,) and names["run"].losses[-1] < names["run"].losses[0]
    assert (away / "runs/quickstart/loss.png").is_file()


def test_the_notebook_is_small_and_shows_what_it_printed():
    cells = [cell for cell in notebook_cells() if cell["cell_type"] == "code"]
    assert NOTEBOOK.stat().st_size < 100_000
    assert all(cell["outputs"] for cell in cells if "import numpy" in "".join(cell["source"]) or cell is cells[0])
    kinds = {kind for cell in cells for output in cell["outputs"] for kind in output.get("data", {})}
    assert "image/png" in kinds and not any(o["output_type"] == "error" for cell in cells for o in cell["outputs"])


@pytest.mark.slow
def test_the_notebook_runs_in_a_notebook(away):
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[notebook]' runs notebooks")
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebook]' runs notebooks")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(away)}}).execute()
    assert (away / "runs/quickstart/best/model.safetensors").is_file()


SMALL = dict(
    steps=4, batch_size=2, sequence_length=16, eval_every=2, save_every=2, sample_tokens=0, prompts=["a"],
    model=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=4),
    data=dict(corpus="notes.txt", bpe_vocab_size=300, validation_tokens=64),
)  # fmt: skip


def test_a_run_in_a_thread_and_one_that_is_stopped(away, monkeypatch):
    """Python hears signals in the main thread alone; there Ctrl-C is an exception that a program outlives."""
    import signal

    import torch_ref.train

    (away / "notes.txt").write_text("a quick brown fox jumps over the lazy dog\n" * 200, encoding="utf-8")
    found = []
    config = torch_ref.api.make_config(**SMALL, out="thread")
    thread = threading.Thread(target=lambda: found.append(torch_ref.api.train(config)))
    thread.start()
    thread.join()
    assert found and found[0].losses.shape == (4,) and str(found[0].folder) == "thread"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    step = torch_ref.train.Trainer.step

    def interrupted(self, *batch):
        if sum(self.counts()) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after step 3; go on with: python"):
        patch.setattr(torch_ref.train.Trainer, "step", interrupted)
        torch_ref.api.train(torch_ref.api.make_config(**SMALL, out="stopped"))
    signal.signal(signal.SIGINT, before)
    again = torch_ref.api.train(torch_ref.api.make_config(resume="stopped"))
    np.testing.assert_array_equal(again.losses, found[0].losses)
    assert again.best == found[0].best
