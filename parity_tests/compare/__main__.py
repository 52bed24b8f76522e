"""`python -m parity_tests.compare MODULE:FUNCTION`: compare the pair of models that a function of yours returns.

Exit code 0: equal, as far as rounding tells, and nothing left out; 1: a divergence, or a parameter that one side alone
has; 2: a mistake, in one line.
"""

import argparse
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parity_tests.compare.errors import CompareError, first_line, require

DESCRIPTION = """\
Compare a JAX model (Flax NNX, Linen, Equinox, a function) with a torch module, tensor by tensor: weights, every
submodule's output, cotangents, gradients. FUNCTION takes no arguments and returns (jax_side, torch_module, inputs) or
(jax_side, torch_module, inputs, rules), or a dict of the arguments of parity_tests.compare.compare_modules.
"""

INSTALLED = "compare-models"
"""The command that an installation has for this."""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    installed = Path(sys.argv[0]).name.removesuffix(".exe") == INSTALLED
    parser = argparse.ArgumentParser(
        INSTALLED if installed else "python -m parity_tests.compare",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pair", metavar="MODULE:FUNCTION", help="e.g. my_port:pair or path/to/my_port.py:pair")
    parser.add_argument(
        "--dtypes",
        default="float64,float32",
        help="of float64, float32 and bfloat16, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--rules", default="", metavar="FILE", help="JSON of save_rules, beside those of FUNCTION")
    parser.add_argument("--partial", action="store_true", help="accept parameters that one side alone has")
    parser.add_argument("--out", default="", metavar="FOLDER", help="write report.html, report.json and pictures there")
    return parser


def load_pair(spec: str) -> Callable[[], Any]:
    """The function that `MODULE:FUNCTION` names. Raises `CompareError` for what is not there."""
    where, colon, name = spec.rpartition(":")
    require(bool(colon and where and name), f"{spec!r} must be MODULE:FUNCTION; write e.g. my_port:pair.")
    try:
        if where.endswith(".py"):
            require(Path(where).is_file(), f"{where} is no file; name the file that holds {name}.")
            found = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules[found.name] = module
            sys.path.insert(0, str(Path(where).resolve().parent))
            found.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(where)
    except CompareError:
        raise
    except SystemExit as error:
        what = "put what it runs under if __name__ == '__main__'"
        raise CompareError(f"{where} ends Python while it is imported; {what}.") from error
    except Exception as error:  # Somebody else's module.
        raise CompareError(f"{where} cannot be imported: {first_line(error)}; mend it first.") from error
    function = getattr(module, name, None)
    require(callable(function), f"{where} has no function {name}; name one that returns the pair.")
    return function


def arguments_of(made: Any) -> dict[str, Any]:
    """Arguments of `compare_modules` from what the function returned."""
    from parity_tests.compare.modules import compare_modules

    if isinstance(made, Mapping):
        known = list(inspect.signature(compare_modules).parameters)
        unknown = [name for name in made if name not in known]
        require(
            not unknown,
            f"the function returns the key {unknown[0]!r}; known are {', '.join(known)}." if unknown else "",
        )
        missing = [name for name in known[:3] if name not in made]
        require(not missing, f"the function returns no {', '.join(missing)}; return them." if missing else "")
        return dict(made)
    good = isinstance(made, tuple | list) and len(made) in (3, 4)
    require(good, "the function must return (jax_side, torch_module, inputs) or (..., rules), or a dict of arguments.")
    return dict(zip(("jax_side", "torch_module", "inputs", "rules"), made, strict=False))


def run(options: argparse.Namespace) -> int:
    """Compare and print; returns the exit code."""
    from parity_tests.compare.modules import compare_modules
    from parity_tests.compare.rules import as_rules, load_rules

    out = Path(options.out)
    taken = bool(options.out) and out.exists() and (not out.is_dir() or any(out.iterdir()))
    what = "already holds files" if out.is_dir() else "is a file"
    require(not taken, f"--out {options.out} {what}; name a new folder.")
    rules = load_rules(options.rules) if options.rules else None
    function = load_pair(options.pair)
    try:
        made = function()
    except CompareError:
        raise
    except (Exception, SystemExit) as error:  # Somebody else's function.
        raise CompareError(f"{options.pair} fails: {first_line(error)}; it must return the pair of models.") from error
    arguments = arguments_of(made)
    if rules is not None:
        require(
            not as_rules(arguments.get("rules")).names, f"{options.pair} returns rules and --rules is given; use one."
        )
        arguments["rules"] = rules
    arguments |= {"dtypes": tuple(options.dtypes.split(",")), "title": arguments.get("title", options.pair)}
    report = compare_modules(**arguments, **({"partial": True} if options.partial else {}))
    report.show(options.out)
    return report.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; a mistake is one line on stderr and exit code 2."""
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except CompareError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
