"""The guide to comparing one's own port: its scripts run as they stand, and what it says is tried."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity_tests.compare import Fused, Rules, compare_modules, copy_weights, copy_weights_to_torch, tap

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
PORTS = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE))
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def words(text: str) -> str:
    """The text with every run of blanks as one."""
    return " ".join(text.split())


@pytest.fixture
def folder(tmp_path):
    """The ports of the page as files."""
    for name, text in PORTS.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A Python of its own in the folder, where this project can be imported."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done


def test_the_page_has_no_other_python():
    assert list(PORTS) == ["mlp", "block", "llama", "training"]
    assert PAGE.count("```python") == len(PORTS)
    assert len(PORTS["llama"].splitlines()) < 80


def test_the_mlp_prints_what_the_page_says(folder):
    done = run(folder, "mlp.py")
    assert done.returncode == 0, done.stderr
    said = re.search(r"It prints\n```\n(.*?)```", PAGE, flags=re.DOTALL)[1]
    assert words(done.stdout) == words(said)


def test_the_wrong_mlp_is_found_where_the_page_says():
    said = re.search(r"^first divergence: .*?(?=```)", PAGE, flags=re.DOTALL | re.MULTILINE)[0].splitlines()
    wrong = PORTS["mlp"].replace("approximate=False", "approximate=True")
    assert wrong != PORTS["mlp"]
    with pytest.raises(AssertionError) as caught:
        exec(compile(wrong, "mlp.py", "exec"), {"__name__": "mlp"})
    found = str(caught.value).splitlines()
    assert found[0] == said[0]
    # Numbers differ between machines.
    for line, other in zip(found, said, strict=False):
        assert re.sub(r"[-\d.e+]+", "#", line) == re.sub(r"[-\d.e+]+", "#", other)


@pytest.mark.slow
def test_the_block_is_compared_by_the_command_of_the_page(folder):
    command = re.search(r"^python (-m parity_tests\.compare .*)$", PAGE, flags=re.MULTILINE)[1]
    done = run(folder, *command.replace("FOLDER", "report").split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no divergence: 12 of 12 parameters, ")
    assert re.search(r"note: outputs only in JAX, .*self_attn\.out_proj", done.stdout)
    assert {"report.html", "report.json"} <= {path.name for path in (folder / "report").iterdir()}
    assert list((folder / "report").glob("*.png"))


@pytest.mark.slow
def test_the_llama_is_the_original(folder):
    done = run(folder, "llama.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no divergence: 21 of 21 parameters, ")
    assert "in float64, float32, all within what rounding explains\n" in done.stdout


@pytest.mark.slow
def test_the_training_step_is_told_what_the_page_says(folder):
    done = run(folder, "training.py")
    assert done.returncode == 1
    said = re.search(r"^first divergence: step 1.*?(?=```)", PAGE, flags=re.DOTALL | re.MULTILINE)[0].splitlines()
    assert len(said) == 4
    for line in (said[0], said[2].partition("[")[0], said[3]):
        assert line.strip() in done.stderr


# What the page says in words


def check(ours, theirs, inputs=X, rules=None, **options):
    return compare_modules(ours, theirs, inputs, rules, dtypes=("float64",), seeds=range(2), **options)


class TorchLayers(torch.nn.Module):
    """A stack, its layers under `h.N.mlp`."""

    def __init__(self) -> None:
        super().__init__()
        self.h = torch.nn.ModuleList(torch.nn.ModuleDict({"mlp": torch.nn.Linear(4, 4)}) for _ in range(3))

    def forward(self, x):
        for layer in self.h:
            x = torch.tanh(layer["mlp"](x))
        return x


def scanned(params, x):
    """The same with stacked weights."""

    def step(x, layer):
        y = tap("layers", x @ layer["kernel"] + layer["bias"])
        return jnp.tanh(y), None

    return jax.lax.scan(step, x, params["layers"])[0]


def listed(params, x):
    """The same layer by layer, under other names."""
    for index, layer in enumerate(params["layers"]):
        x = jnp.tanh(tap(f"layers.{index}.ff", x @ layer["ff"]["kernel"] + layer["ff"]["bias"]))
    return x


def zeros(*leading):
    return {"kernel": np.zeros((*leading, 4, 4), np.float32), "bias": np.zeros((*leading, 4), np.float32)}


@pytest.mark.parametrize(
    ("function", "params", "rules"),
    [
        (scanned, {"layers": zeros(3)}, Rules(stacked={"layers": "h.{}.mlp"})),
        (listed, {"layers": [{"ff": zeros()} for _ in range(3)]}, Rules(names={"layers.{}.ff": "h.{}.mlp"})),
    ],
)
def test_names_with_a_gap_and_stacked_layers(function, params, rules):
    theirs = TorchLayers()
    report = check(copy_weights(theirs, (function, params), rules).module, theirs, X, rules)
    assert report.exit_code == 0, report.verdict()
    assert report.coverage.parameters == (6, 6) and report.coverage.outputs == (4, 4)


class TorchHeads(torch.nn.Module):
    """Two projections whose rows belong to three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (torch.nn.Linear(4, 6, bias=False) for _ in range(2))

    def forward(self, x):
        heads = [one.unflatten(-1, (3, 2)) for one in (self.q(x), self.k(x))]
        return torch.cat(heads, -1).flatten(-2)


def test_parts_that_alternate_head_by_head_and_a_table_to_ignore():
    theirs = TorchHeads()
    rules = Rules(fused={"qk.kernel": Fused(["q.weight", "k.weight"], groups=3)}, ignore=["table"])
    params = {"qk": {"kernel": np.zeros((4, 12), np.float32)}, "table": np.ones(12, np.float32)}
    side = copy_weights(theirs, (lambda params, x: x @ params["qk"]["kernel"], params), rules).module
    report = check(side, theirs, X, rules)
    assert report.exit_code == 0, report.verdict()
    assert report.coverage.parameters == (2, 2)
    before = theirs.q.weight.detach().clone()
    with torch.no_grad():
        theirs.q.weight.zero_()
    copy_weights_to_torch(side, theirs, rules)
    assert torch.equal(theirs.q.weight, before)


class Convolution(nnx.Module):
    def __init__(self) -> None:
        self.conv = nnx.Conv(3, 5, (3, 3), padding="VALID", rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.conv(x)


def test_channels_first_and_last():
    theirs = torch.nn.Sequential()
    theirs.conv = torch.nn.Conv2d(3, 5, 3)
    image = np.random.default_rng(1).standard_normal((2, 3, 7, 6))
    report = check(copy_weights(theirs, Convolution()).module, theirs, [image], Rules(layouts={"*": "NHWC->NCHW"}))
    assert report.exit_code == 0, report.verdict()
    assert report.coverage.outputs == (2, 2) and report.notes == []


class TorchScaled(torch.nn.Module):
    """A layer and a table that is not stored with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor([0.1, 0.2, 0.3]), persistent=False)

    def forward(self, x):
        return self.lin(x) * self.scale


class Scaled(nnx.Module):
    def __init__(self) -> None:
        self.lin = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.lin(x) * jnp.asarray([0.1, 0.2, 0.3], x.dtype)


def test_a_table_in_float32_is_named_and_can_be_given():
    theirs = TorchScaled()
    ours = copy_weights(theirs, Scaled()).module
    report = check(ours, theirs)
    said = "apart by a float32 constant or cast on one side (torch's scale), not by a formula"
    assert said in words(PAGE)
    assert report.exit_code == 0 and said in report.verdict()
    report = check(ours, theirs, constants={"scale": np.array([0.1, 0.2, 0.3])})
    assert report.exit_code == 0 and "float32 constant" not in report.verdict()


class Embedded(nnx.Module):
    def __init__(self) -> None:
        self.emb = nnx.Embed(7, 5, rngs=nnx.Rngs(0))

    def __call__(self, tokens):
        return self.emb(tokens)


def test_a_row_that_torch_does_not_train_is_noted():
    theirs = torch.nn.Sequential()
    theirs.emb = torch.nn.Embedding(7, 5, padding_idx=0)
    report = check(copy_weights(theirs, Embedded()).module, theirs, [np.array([[0, 1, 2]])])
    assert report.exit_code == 0, report.verdict()
    assert any("(padding_idx), JAX does; its gradient is not compared" in note for note in report.notes)
    assert "dtype=float32 of Embed layers is taken as the dtype compared" in report.notes


class Branching(nnx.Module):
    def __init__(self) -> None:
        self.lin = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jax.lax.cond(x.shape[0] > 0, self.lin, lambda x: 2 * self.lin(x), x)


def test_what_is_not_reached_is_noted_and_still_counts():
    theirs = torch.nn.Sequential()
    theirs.lin = torch.nn.Linear(4, 3)
    ours = copy_weights(theirs, Branching()).module
    report = check(ours, theirs)
    assert report.exit_code == 0 and report.coverage.gradients == (2, 2)
    assert any(note.startswith("inside a loop or a function with its own derivative, ") for note in report.notes)
    ours.lin.bias[...] += 1
    assert check(ours, theirs).exit_code == 1


class Twice(nnx.Module):
    """One layer called twice, whose results come in a dict."""

    KEYS: ClassVar = ("first", "second")

    def __init__(self) -> None:
        self.lin = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x, plus=0.0):
        first = self.lin(x + plus)
        return dict(zip(self.KEYS, (first, self.lin(jnp.tanh(first))), strict=True))


class TorchTwice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)

    def forward(self, features):
        first = self.lin(features)
        return {"second": self.lin(torch.tanh(first)), "first": first}


def test_names_of_calls_inputs_and_outputs():
    theirs = TorchTwice()
    ours = copy_weights(theirs, Twice()).module
    report = check(ours, theirs, {"features": X}, jax_inputs={"x": X, "plus": 0.0})
    assert report.exit_code == 0, report.verdict()
    names = {row.name for row in report.rows}
    assert {"forward lin", "forward lin#2", "forward lin.input", "forward output.first"} <= names
    assert {"forward output.second", "backward lin#2", "gradient lin.weight", "gradient input.features"} <= names
    square = lambda out: (out["first"] * out["second"]).mean()  # noqa: E731
    report = check(ours, theirs, [X], loss=(square, square))
    assert report.exit_code == 0 and "forward loss" in {row.name for row in report.rows}
