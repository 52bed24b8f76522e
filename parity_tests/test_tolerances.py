"""No hand-picked tolerance anywhere in the tree: every place that could hold one is counted, with the reason it may."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("parity_tests", "tests", "benchmarks", "recipe", "harness", "jax_impl", "torch_ref")
COMPARING = {
    *("allclose", "isclose", "assert_allclose", "approx", "assert_close", "assert_almost_equal"),
    *("assert_array_almost_equal", "assert_trees_all_close", "assertAlmostEqual"),
}
SMALL = 1e-2

ALLOWED = {
    "parity_tests/newton_schulz_error.py noise": "asks whether a matrix is symmetric, and bounds nothing",
    "parity_tests/test_training.py test_three_hundred_updates_agree_in_float64": "the promise of the README itself",
}
"""Function that holds one -> why."""


def tolerances(source: str) -> list[tuple[int, str]]:
    """Line and text of every comparison that takes a tolerance or compares with a small float."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            keywords = {keyword.arg for keyword in node.keywords}
            if name in COMPARING or keywords & {"atol", "rtol", "abs_tol", "rel_tol"}:
                found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Compare) and any(
            isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops
        ):
            for part in (node.left, *node.comparators):
                for one in ast.walk(part):
                    if isinstance(one, ast.Constant) and isinstance(one.value, float) and 0 < one.value < SMALL:
                        found.append((node.lineno, ast.unparse(node)))
    return found


def function_of(source: str, line: int) -> str:
    """Name of the innermost function around a line."""
    around = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= node.end_lineno
    ]
    return max(around, key=lambda node: node.lineno).name if around else "the module"


def test_tolerances_are_derived():
    sites = {}
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for line, text in tolerances(source):
            sites.setdefault(f"{path.relative_to(ROOT)} {function_of(source, line)}", []).append(f"{line}: {text}")
    unexpected = {site: texts for site, texts in sites.items() if site not in ALLOWED}
    assert not unexpected, "derive these from unit round-off (parity_tests/compare/tolerance.py)"
    assert sites.keys() == ALLOWED.keys(), "the list names a place that is gone"


def test_the_count_sees_them():
    planted = """
def check(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert torch.allclose(a, b)
    assert abs(a - b) < 1e-3
    assert a == pytest.approx(b)
    assert helper(a, b, atol=limit)
    assert 0.5 < a <= 3
"""
    assert [line for line, _ in sorted(tolerances(planted))] == [3, 4, 5, 6, 7]
