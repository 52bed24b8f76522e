"""A pytest plugin: every `require` and every `raise UserError` of the product has been seen refusing.

A run of the whole suite fails if one never did: a rule that nobody breaks may as well not be there. Call sites are read
from the source, refusals noted as they happen, in this process and in the workers of pytest-xdist.
"""

import ast
import sys
from pathlib import Path

import pytest

from recipe import config as recipe_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("recipe", "harness", "jax_impl", "torch_ref")

EXCUSED = {
    "harness/web.py serve": "a page runs in a process of its own, tests/test_web.py",
    "harness/web.py texts": "a page runs in a process of its own, tests/test_web.py",
}
"""`file function` -> why no test in this process can reach its refusal."""

refused: set[str] = set()
"""`file:line` of every call site that refused so far."""


def call_sites(source: str, file: str) -> dict[str, str]:
    """`file:line` -> `file function` of every place that may refuse."""
    tree, sites = ast.parse(source), {}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("require", "UserError")):
            continue
        around = [function for function in functions if function.lineno <= node.lineno <= function.end_lineno]
        name = max(around, key=lambda function: function.lineno).name if around else "the module"
        if name != "require":
            sites[f"{file}:{node.lineno}"] = f"{file} {name}"
    return sites


def all_sites() -> dict[str, str]:
    sites = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        sites |= call_sites(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    return sites


def note(frame) -> None:
    """Note the place that a frame, or `require`'s caller, is at."""
    if frame.f_code.co_name == "require":
        frame = frame.f_back
    file = Path(frame.f_code.co_filename)
    if file.is_relative_to(ROOT):
        refused.add(f"{file.relative_to(ROOT)}:{frame.f_lineno}")


def pytest_addoption(parser) -> None:
    parser.addoption("--refusals", action="store_true", help="name every require that none of these tests saw refusing")


def pytest_configure(config) -> None:
    def __init__(self, *args):
        note(sys._getframe(1))
        ValueError.__init__(self, *args)

    recipe_config.UserError.__init__ = __init__


def whole_suite(config) -> bool:
    """Whether nothing was left out by a name, a keyword or a mark."""
    default = "not slow and not gpu and not realweights"
    args = [str(Path(arg)) for arg in config.args]
    return not config.option.keyword and config.option.markexpr == default and args == list(config.getini("testpaths"))


def pytest_sessionfinish(session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # a worker of xdist's
        output["refused"] = sorted(refused)
        return
    asked = session.config.option.refusals
    if asked or (whole_suite(session.config) and not session.shouldstop and session.testsfailed == 0):
        never = {site: name for site, name in all_sites().items() if site not in refused and name not in EXCUSED}
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        for site, name in never.items():
            reporter.write_line(f"never seen refusing: {site} in {name.partition(' ')[2]}", red=True)
        if never and not asked:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    refused.update(getattr(node, "workeroutput", {}).get("refused", []))
