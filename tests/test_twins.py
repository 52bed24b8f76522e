"""The twins are twins: same files, same public names in the same order, and the exceptions with their reasons."""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
JAX, TORCH = ROOT / "jax_impl", ROOT / "torch_ref"

ONE_SIDED_FILES = {
    "attention_kernel.py": "a GPU's attention with dropout; torch has no such kernel",
    "backend.py": "what is fast on one machine is a matter of JAX's alone",
    "exchange.py": "torch_ref runs on one device",
    "loss_kernel.py": "a GPU's loss in tiles; torch has no such kernel",
    "muon/matrices.py": "torch's layout is one: (fan_out, fan_in, ...)",
    "muon/sharded.py": "torch_ref runs on one device",
    "gather.py": "torch's states are never divided",
    "scan.py": "torch compiles nothing",
    "sharded_states.py": "as gather.py",
    "processes.py": "torch_ref runs in one process",
    "sharding.py": "torch_ref runs on one device",
    "traffic.py": "torch_ref runs on one device",
}
ONE_SIDED = {
    "attention.py": {"chunk_count": "XLA must be told to stay in the caches"},
    "generate.py": {
        "HeldLinear": "XLA multiplies few rows faster with the weights first; torch's layout is that already",
        "held_dtype": "XLA's CPU backend has no fast bfloat16 product of a matrix and a vector",
        "held_params": "JAX keeps parameters and structure apart, torch has both in `held_model`",
        "held_structure": "as held_params",
        "held_model": "as held_params",
    },
    "loss.py": {
        "is_in_kernel": "a GPU's loss in tiles is JAX's alone",
        "peak_and_total": "torch's cross_entropy does both",
        "logits": "JAX's product needs no second rounding, so the model calls `product` itself",
    },
    "hybrid.py": {
        "qwen_matrices": "optax partitions by a function of the path, torch by groups of parameters",
        "scale_by_adam": "optax's bias correction is too coarse; torch's own AdamW is not",
        "adamw_groups": "torch's AdamW takes groups of parameters, optax a mask",
        "muon_with_adamw": "torch's is the class `MuonWithAdamW`",
        "MuonWithAdamW": "as muon_with_adamw",
    },
    "muon/alias.py": {
        "muon": "an alias in optax; torch's is the class `Muon`",
        "Muon": "as muon",
        "muon_or": "torch's optimizers stand side by side",
        "MultiSteps": "in torch a loop around `backward`",
    },
    "muon/batches.py": {"Shardings": "only JAX's matrices lie on a mesh"},
    "muon/newton_schulz.py": {"checked": "jax.jit must be able to hold on to a table"},
    "muon/transforms.py": {
        "ScaleByMuonState": "optax keeps a transformation's state apart",
        "scale_by_muon": "momentum and Newton-Schulz in one transformation; in torch `Muon.step` calls both",
        "scale_by_momentum": "as scale_by_muon",
        "scale_by_fan_ratio": "a transformation in optax, a factor in torch",
        "fan_ratio": "as scale_by_fan_ratio",
        "scale_by_consistent_rms": "as scale_by_fan_ratio",
        "consistent_rms": "as scale_by_fan_ratio",
        "ScaleByNeuronNormState": "as ScaleByMuonState",
        "add_cautious_decayed_weights": "a transformation in optax; torch's is `cautious_decayed_weights`",
        "cautious_decayed_weights": "as add_cautious_decayed_weights",
        "Heads": "a path in a tree says where optax finds heads; torch is given the weight",
    },
    "products.py": {
        "Rounded": "JAX rounds weights once for all micro-batches, torch as it comes to them",
        "gradient_like": "as Rounded",
        "in_memory": "XLA's CPU backend has fast kernels for one layout",
        "product_held": "as in_memory",
    },
    "random.py": {
        "Key": "jax.random has a type of its own",
        "threefry_2x32": "jax.random brings Threefry, torch does not",
        "decisions": "JAX keeps four decisions a byte for its backward pass; torch makes its mask in one step",
    },
    "train.py": {
        "abstract_state": "a mesh's state is read onto its devices, which must be told where",
        "restore_sharded": "as abstract_state",
    },
    "weights.py": {
        "Params": "in torch a module holds its parameters",
        "hf_name": "a Flax kernel has another name than Hugging Face's weight; torch's names are Hugging Face's",
        "flax_path": "as hf_name",
        "param_paths": "as hf_name",
        "hf_shape": "as hf_name",
        "in_torch_layout": "as hf_name",
        "with_slots": "optax's state is a tree to be built anew",
        "to_array": "torch has no NumPy bfloat16",
        "model_structure": "JAX keeps parameters and structure apart",
        "bind": "as model_structure",
    },
}
"""Public names that one twin alone has, and why."""


def name_of(file: Path, half: Path) -> str:
    """A file's path inside its half."""
    return file.relative_to(half).as_posix()


def public(file: Path) -> list[str]:
    """Functions, classes and constants at the top of a file, in order, without private ones."""
    names = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def differences(ours: list[str], theirs: list[str], exceptions: dict[str, str]) -> list[str]:
    """What is out of order or on one side alone, exceptions left out; and exceptions that are none."""
    alike = [[name for name in names if name not in exceptions] for names in (ours, theirs)]
    wrong = [line for line in difflib.ndiff(*alike) if line[0] in "+-"]
    return wrong + [f"no exception: {name}" for name in exceptions if (name in ours) == (name in theirs)]


def common_words(ours: str, theirs: str) -> float:
    """Share of words and signs that two texts have in common, in order."""
    a, b = (re.findall(r"\w+|[^\w\s]", text) for text in (ours, theirs))
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return 2 * sum(block.size for block in blocks) / (len(a) + len(b))


def test_the_same_files():
    ours, theirs = ({name_of(file, half) for file in half.rglob("*.py")} for half in (JAX, TORCH))
    assert ours ^ theirs == set(ONE_SIDED_FILES)


@pytest.mark.parametrize(
    "name", sorted(name_of(file, TORCH) for file in TORCH.rglob("*.py") if file.name != "__init__.py")
)
def test_the_same_names_in_the_same_order(name):
    assert differences(public(JAX / name), public(TORCH / name), ONE_SIDED.get(name, {})) == []


def test_the_comparison_can_fail():
    assert differences(["a", "b"], ["b", "a"], {}) and differences(["a"], [], {}) and differences([], ["a"], {})
    assert differences(["a"], ["a"], {"a": "why"}) == ["no exception: a"]
    assert differences(["a", "b"], ["b"], {"a": "why"}) == []


def test_only_the_table_of_machines_asks_for_the_backend():
    asking = {file.name for file in JAX.rglob("*.py") if re.search(r"default_backend|\.platform\b", file.read_text())}
    assert asking - {"attention.py", "train.py"} == {"backend.py"}  # those two print the platform, and decide nothing
    assert "default_backend" not in (JAX / "attention.py").read_text() + (JAX / "train.py").read_text()


def test_the_model_files_can_be_read_side_by_side():
    """docs/tour.md quotes the figures: `python -m pytest tests/test_twins.py -s` prints them."""
    ours, theirs = (half / "model.py" for half in (JAX, TORCH))
    lines = [len(file.read_text().splitlines()) for file in (ours, theirs)]
    share = common_words(ours.read_text(), theirs.read_text())
    print(f"model.py: {lines[0]} and {lines[1]} lines, {share:.1%} of words in common")
    assert max(lines) <= 250 and share >= 0.85
