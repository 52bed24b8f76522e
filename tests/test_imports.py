"""Who may import whom, read from the source and then tried with the other framework out of reach."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("recipe", "harness", "jax_impl", "torch_ref", "parity_tests", "benchmarks", "tests")
FILES = sorted(ROOT.glob("*.py")) + sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
TORCH = {"torch", "torchvision", "tensorboardX"}  # tensorboardX imports torch where it can
HEAVY = {"transformers", "datasets"}  # transformers imports torch where it can; both are extras
NEVER = {
    "recipe": JAX | TORCH | {"harness", "jax_impl", "torch_ref", "parity_tests", "benchmarks"},
    "harness": JAX | TORCH | {"jax_impl", "torch_ref", "parity_tests", "benchmarks"},
    "jax_impl": TORCH | HEAVY | {"torch_ref", "parity_tests"},
    "train_jax.py": TORCH | HEAVY | {"torch_ref", "parity_tests"},
    "torch_ref": JAX | HEAVY | {"jax_impl", "parity_tests"},
    "train_torch.py": JAX | HEAVY | {"jax_impl", "parity_tests"},
}
"""First part of a path in the tree -> modules that nothing there imports, not even inside a function."""

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def area(file: Path) -> str:
    return file.relative_to(ROOT).parts[0]


def label(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of all modules imported anywhere in the tree, by statement or by name in a string."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return {name.partition(".")[0] for name in found}


def at_import(tree: ast.Module) -> ast.Module:
    """The module without the bodies of its functions: what runs when it is imported."""

    class DropFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

    return DropFunctions().visit(ast.parse(ast.unparse(tree)))


def breaches(tree: ast.Module, where: str) -> set[str]:
    """Modules that a file of this area imports and must not."""
    found = imports(tree) & NEVER.get(where, set())
    if where in ("recipe", "harness"):
        found |= imports(at_import(tree)) & HEAVY
    return found


def dotted_imports(tree: ast.AST) -> set[str]:
    """Dotted names of all modules imported anywhere in the tree; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or nothing."""
    done, path = set(), []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(graph[module] & set(graph)):
            if found := visit(other):
                return found
        path.pop()
        done.add(module)
        return []

    return next((found for module in graph if (found := visit(module))), [])


def unsafe(tree: ast.AST) -> list[str]:
    """Uses of pickle in any guise: loading such a file runs whatever it says."""
    found = sorted(imports(tree) & UNSAFE_MODULES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [name for name in ("torch.load", "torch.save") if ast.unparse(node.func) == name]
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                    found.append(f"allow_pickle={ast.unparse(keyword.value)}")
    return found


def test_the_tree_was_found():
    areas = {area(file) for file in FILES}
    assert {"recipe", "harness", "jax_impl", "torch_ref", "train_jax.py", "train_torch.py", "tests"} <= areas


@pytest.mark.parametrize("file", FILES, ids=label)
def test_no_file_imports_the_other_half(file):
    assert breaches(ast.parse(file.read_text(encoding="utf-8")), area(file)) == set()


@pytest.mark.parametrize("package", ["recipe", "harness", "jax_impl", "torch_ref"])
def test_no_circle_of_imports(package):
    files = [file for file in FILES if area(file) == package]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    graph = {name: dotted_imports(tree) - {name, package} for name, tree in zip(names, trees, strict=True)}
    assert len(graph) > 5 and circle(graph) == []


def test_the_circle_check_can_fail():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("file", [f for f in FILES if area(f) in ("recipe", "harness")], ids=label)
def test_nothing_of_ours_is_imported_inside_a_function(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = dotted_imports(tree) - dotted_imports(at_import(tree))
    assert not {name for name in inside if name.partition(".")[0] in PACKAGES}


def test_only_entries_import_a_command():
    importers = set()
    for file in FILES:
        if area(file) in ("tests", "parity_tests") or "commands" in file.parts:
            continue
        if any(name.startswith("harness.commands.") for name in dotted_imports(ast.parse(file.read_text("utf-8")))):
            importers.add(label(file))
    modules = {f"{package}/{name}.py" for package in ("jax_impl", "torch_ref") for name in ("generate", "train")}
    assert importers == {"train_jax.py", "train_torch.py", "qwen_commands.py"} | modules


@pytest.mark.parametrize("file", FILES, ids=label)
def test_no_file_uses_pickle(file):
    assert unsafe(ast.parse(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "where", "found"),
    [
        ("import torch.nn as nn", "jax_impl", {"torch"}),
        ("def f():\n    from torch_ref import muon", "jax_impl", {"torch_ref"}),
        ("import importlib\nimportlib.import_module('jax.numpy')", "torch_ref", {"jax"}),
        ("from transformers import AutoTokenizer", "recipe", {"transformers"}),
        ("class A:\n    import datasets", "recipe", {"datasets"}),
        ("def f():\n    import datasets", "recipe", set()),
        ("import torch, jax", "parity_tests", set()),
        ("from . import torch", "jax_impl", set()),
    ],
)
def test_the_import_check_can_fail(source, where, found):
    assert breaches(ast.parse(source), where) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from dill import load", ["dill"]),
        ("torch.load('x', weights_only=True)", ["torch.load"]),
        ("np.load('x', allow_pickle=True)", ["allow_pickle=True"]),
        ("np.load('x', allow_pickle=False)", []),
        ("np.load('x', mmap_mode='r')", []),
    ],
)
def test_the_pickle_check_can_fail(source, found):
    assert unsafe(ast.parse(source)) == found


BLOCKED_IMPORT = """
    import importlib
    import sys

    blocked, modules = set(sys.argv[1].split(",")), sys.argv[2].split(",")

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in blocked:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())
    for module in modules:
        importlib.import_module(module)
    print(*modules)
"""


def modules_of(where: str) -> list[str]:
    """Dotted names of all modules of a package, or of the one script."""
    files = [file for file in FILES if area(file) == where]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


@pytest.mark.parametrize("where", NEVER)
def test_a_half_imports_with_the_other_uninstalled(where):
    modules = modules_of(where)
    assert modules
    blocked = NEVER[where] | HEAVY
    command = [sys.executable, "-c", textwrap.dedent(BLOCKED_IMPORT), ",".join(sorted(blocked)), ",".join(modules)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.split()) == (0, modules), done.stderr


COMPARE = "parity_tests.compare"
HANDED_OVER = {"transformers", "flax", "equinox", "optax"}
"""Libraries of whoever compares a port: imported inside a function, if a model of theirs is handed over."""


def of_others(tree: ast.Module) -> set[str]:
    """What a file of the comparison imports and must not: ours outside it, or a library of models at import."""
    ours = {name for name in dotted_imports(tree) if name.partition(".")[0] in PACKAGES}
    outside = {name for name in ours if not f"{name}.".startswith(f"{COMPARE}.")}
    return outside | (imports(at_import(tree)) & HANDED_OVER)


COMPARE_FILES = [file for file in FILES if label(file).startswith(COMPARE.replace(".", "/") + "/")]


@pytest.mark.parametrize("file", COMPARE_FILES, ids=label)
def test_the_comparison_of_ports_imports_nothing_else_of_ours(file):
    assert of_others(ast.parse(file.read_text(encoding="utf-8"))) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from parity_tests.compare.rules import Rules", set()),
        ("import parity_tests.compare.rules", set()),
        ("from parity_tests import twins", {"parity_tests", "parity_tests.twins"}),
        ("def f():\n    from recipe import params", {"recipe", "recipe.params"}),
        ("import flax.nnx as nnx", {"flax"}),
        ("class A:\n    from transformers import LlamaConfig", {"transformers"}),
        ("def f():\n    import equinox", set()),
    ],
)
def test_the_check_of_the_comparison_can_fail(source, found):
    assert of_others(ast.parse(source)) == found


@pytest.mark.slow
def test_the_comparison_of_ports_imports_with_the_rest_out_of_reach():
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in COMPARE_FILES]
    assert {COMPARE, f"{COMPARE}.__main__", f"{COMPARE}.modules"} <= set(names)
    blocked = HANDED_OVER | {"recipe", "harness", "jax_impl", "torch_ref", "benchmarks", "tests", "datasets"}
    command = [sys.executable, "-c", textwrap.dedent(BLOCKED_IMPORT), ",".join(sorted(blocked)), ",".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.split()) == (0, names), done.stderr


MUON = "jax_impl.muon"
MUON_NEEDS = {"jax", "optax", *sys.stdlib_module_names}
"""What the library of Muon may import besides itself."""


def beyond_muon(tree: ast.AST) -> set[str]:
    """What a file of Muon's imports and must not, anywhere in it: a library, or ours outside its folder."""
    ours = {name for name in dotted_imports(tree) if name.partition(".")[0] in PACKAGES}
    # `from . import a` stays inside; `from .. import a` does not.
    above = {"." * node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 1}
    return {name for name in ours if not f"{name}.".startswith(f"{MUON}.")} | (
        imports(tree) - MUON_NEEDS - set(PACKAGES) | above
    )


MUON_FILES = [file for file in FILES if label(file).startswith(MUON.replace(".", "/") + "/")]


@pytest.mark.parametrize("file", MUON_FILES, ids=label)
def test_muon_imports_jax_and_optax_alone(file):
    assert beyond_muon(ast.parse(file.read_text(encoding="utf-8"))) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import functools, jax.numpy as jnp\nfrom optax import chain", set()),
        ("from jax_impl.muon.matrices import Matrix", set()),
        ("from . import matrices", set()),
        ("import numpy as np", {"numpy"}),
        ("def f():\n    import flax.nnx", {"flax"}),
        ("from jax_impl import hybrid", {"jax_impl", "jax_impl.hybrid"}),
        ("from jax_impl.muonlike import f", {"jax_impl.muonlike", "jax_impl.muonlike.f"}),
        ("from recipe.config import require", {"recipe.config", "recipe.config.require"}),
        ("from .. import backend", {".."}),
    ],
)
def test_the_check_of_muon_can_fail(source, found):
    assert beyond_muon(ast.parse(source)) == found


def test_muon_imports_and_runs_with_everything_else_out_of_reach():
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in MUON_FILES]
    assert {MUON, f"{MUON}.matrices", f"{MUON}.newton_schulz"} <= set(names)
    # jax and optax bring numpy and chex themselves.
    others = {"flax", "equinox", "orbax", "tyro", "tqdm", "matplotlib", "tokenizers"}
    blocked = (set(PACKAGES) - {"jax_impl"}) | TORCH | HEAVY | others
    update = """
        import jax, jax_impl.muon

        transformation = jax_impl.muon.muon(0.1)
        params = {"a": jax.numpy.ones((3, 5))}
        transformation.update(params, transformation.init(params))
        print(*(name for name in sys.modules if name.startswith("jax_impl.") and ".muon" not in name))
    """
    script = textwrap.dedent(BLOCKED_IMPORT) + textwrap.dedent(update)
    command = [sys.executable, "-c", script, ",".join(sorted(blocked)), ",".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.split()) == (0, names), done.stderr


PLAN_FILES = [file for file in FILES if label(file).startswith("benchmarks/plan/")]


def test_a_plan_needs_no_torch_and_jax_in_one_room_alone():
    """What counts and prints is read without a framework, and a missing package is said before one is loaded."""
    trees = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in PLAN_FILES}
    assert {name for name, tree in trees.items() if imports(tree) & (TORCH | HEAVY | {"torch_ref"})} == set()
    assert {name for name, tree in trees.items() if imports(at_import(tree)) & (JAX | {"jax_impl"})} == {"compile"}


def test_the_blocker_blocks():
    command = [sys.executable, "-c", textwrap.dedent(BLOCKED_IMPORT), "numpy", "recipe.params"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and "No module named 'numpy'" in done.stderr
