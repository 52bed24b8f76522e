"""Two models on the same inputs: weights, outputs, cotangents, gradients, and how much of them was compared."""

import contextlib
import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch

from parity_tests.compare.errors import CompareError, first_line, require, some
from parity_tests.compare.functions import make_rows
from parity_tests.compare.jax_side import JaxSide
from parity_tests.compare.montecarlo import SEEDS, SMALLEST_NOISE, allowances, amplification
from parity_tests.compare.precision import UNIT_ROUNDOFF, check_dtypes, settings, versions
from parity_tests.compare.progress import progress
from parity_tests.compare.report import Coverage, Report, Row
from parity_tests.compare.rules import Arrangement, Rules, as_rules, layout_of, make_plan, pattern, unstack
from parity_tests.compare.tolerance import SAFETY, relative_error
from parity_tests.compare.torch_side import TorchSide, arguments, filled, rounding_of_float32
from parity_tests.compare.walk import LOSS, MAIN, Arrays, is_input, output_name

Losses = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def compare_modules(
    jax_side: Any,
    torch_module: torch.nn.Module,
    inputs: Any,
    rules: Rules | Mapping[str, str] | None = None,
    *,
    name_map: Mapping[str, str] | None = None,
    jax_inputs: Any = None,
    call: Callable | None = None,
    loss: Losses | None = None,
    dtypes: Sequence[str] = ("float64", "float32"),
    partial: bool = False,
    constants: Mapping[str, np.ndarray] | None = None,
    seeds: Iterable[int] = SEEDS,
    title: str = "JAX against torch",
) -> Report:
    """Run both models on the same inputs and compare everything that has a name on both sides.

    `jax_side`: an NNX module, (Linen module, variables) or a bound one, an Equinox module, or (function, params).
    `inputs`: what the torch module is called with: a sequence of arguments, a dict of keyword arguments, or one array;
    `jax_inputs`, if the JAX side is to get others: another layout, other names, flags. `call(model, *inputs)` is how
    the JAX model is called. `rules` (or `name_map`, names alone) say which JAX array is which tensor.
    `loss`: (of JAX's output, of torch's output), each a scalar; without it every output is weighed by random numbers.
    `constants`: float64 values of torch buffers that are stored in float32.

    The truth is the torch module in float64; allowances come from Monte-Carlo arithmetic on it. Exit code 1 for a
    divergence and, unless `partial`, for a parameter that one side alone has and for rules that match nothing. Neither
    model is changed. Raises `CompareError`, one line, for what cannot be compared.
    """
    dtypes, rules, seeds = check_dtypes(dtypes), as_rules(rules, name_map), tuple(seeds)
    require(bool(seeds), "seeds is empty; give a range of at least one.")
    comparison = _Comparison(jax_side, torch_module, inputs, rules, jax_inputs, call, loss, constants)
    rows, contracts = comparison.weight_rows(dtypes[0]), {}
    with _highest():
        for dtype in dtypes:
            rows += comparison.rows(dtype, seeds)
            contracts |= settings(dtype)
    asked = {"dtypes": list(dtypes), "inputs": {name: list(x.shape) for name, x in comparison.torch.given().items()}}
    return Report(
        title,
        rows,
        contracts,
        asked,
        comparison.notes(),
        coverage=comparison.coverage(),
        partial=partial,
        explained=comparison.explained,
        about={"versions": versions()},
    )


def assert_same(
    jax_side: Any,
    torch_module: torch.nn.Module,
    inputs: Any,
    rules: Rules | Mapping[str, str] | None = None,
    **options: Any,
) -> Report:
    """`compare_modules` for a test: raises AssertionError with the verdict unless the exit code is 0."""
    report = compare_modules(jax_side, torch_module, inputs, rules, **options)
    if report.exit_code:
        raise AssertionError(report.verdict())
    return report


@contextlib.contextmanager
def _highest() -> Iterator[None]:
    """Context in which torch's float32 products are float32's; JAX's are set where a program is traced."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Output(NamedTuple):
    """An output that both sides have."""

    theirs: str
    ours: str
    arrangement: Arrangement
    shape: tuple[int, ...]
    """Of torch's."""
    inexact: bool


class _Comparison:
    """Both sides, how their names belong together, and what was found on the way."""

    def __init__(self, jax_side, torch_module, inputs, rules, jax_inputs, call, loss, constants) -> None:
        require(
            loss is None or (isinstance(loss, tuple | list) and len(loss) == 2 and all(map(callable, loss))),
            "loss must be two functions: (of the JAX model's output, of the torch module's output).",
        )
        ours, theirs = loss or (None, None)
        self.rules, self.has_loss = rules, loss is not None
        self.torch = TorchSide(torch_module, inputs, constants, theirs)
        self.jax = JaxSide(jax_side, _turned(inputs, rules) if jax_inputs is None else jax_inputs, call, ours)
        self.plan = make_plan(
            rules,
            self.jax.shapes(),
            self.jax.model.state,
            self.torch.tensors,
            self.torch.aliases,
            jax_modules=self.jax.model.modules,
            torch_modules=self.torch.modules,
            values=(self.jax.values(), self.torch.values()),
        )
        self._require_common()
        self.shapes = {name: one.shape for name, one in self.torch.tensors.items()}
        self.ignored = [pattern(one) for one in rules.ignore]
        self.remarks: list[str] = []
        self.explained = ""
        self.carried: set[str] = set()
        self.problems: list[str] = []
        self.arranged: dict[str, Arrangement] = {}
        self.ours_of: dict[str, tuple[str, ...]] = {}
        self.seen: dict[str, set[str]] = {"jax": set(), "torch": set()}
        self._measured: dict[tuple, tuple[Arrays, dict[str, float]]] = {}
        self.outputs = self._outputs()
        self.input_axes = self._input_axes()

    def _require_common(self) -> None:
        """Refuse two sides none of whose parameters have a name in common: a map was forgotten."""
        mine = [part.name for link in self.plan.links for part in link.parts]
        if not mine and self.plan.only_jax and self.plan.only_torch and not self.plan.problems:
            raise CompareError(
                f"no name is common to both sides: JAX has {some(self.plan.only_jax)}, torch "
                f"{some(self.plan.only_torch)}; pass rules={{JAX path: torch path}}."
            )

    # What is compared

    def _outputs(self) -> list[_Output]:
        """The outputs of both sides, key by key; of a lone array the other's main one."""
        theirs = {key: x for key, x in self.torch.run("float64", False, wide=True).outputs.items() if key != LOSS}
        ours = {key: shape for key, shape in self.jax.output_shapes("float64").items() if key != LOSS}
        require(bool(theirs), "the torch module returns no tensor; return one.")
        if len(ours) == 1 or len(theirs) == 1:
            pairs = [(_main(theirs), _main(ours))]
        else:
            pairs = [(key, key) for key in theirs if key in ours]
            if not pairs:
                pairs = list(zip(theirs, ours, strict=False))
        lone = []
        for side, keys, mine in (("torch", theirs, 0), ("JAX", ours, 1)):
            alone = [output_name(key) for key in keys if key not in {pair[mine] for pair in pairs}]
            if alone:
                self.remarks.append(f"outputs of the {side} side alone, not compared: {', '.join(alone)}")
                lone.append(f"{', '.join(alone)} of the {side} side")
        if len(lone) == 2:
            self.problems.append(f"outputs without a partner: {' and '.join(lone)}; give them the same names")
        found, values = [], None
        for their, our in pairs:
            truth, (shape, kind) = theirs[their], ours[our]
            declared = self._declared(output_name(their), len(shape))
            arrangement = Arrangement()
            if declared is not None and tuple(shape[axis] for axis in declared) == truth.shape:
                arrangement = Arrangement(axes=declared)
            elif shape != truth.shape and np.prod(shape) == truth.size:
                values = self.jax.run("float64", None).outputs if values is None else values
                arrangement = self._best(output_name(their), values[our], truth, None)
            inexact = np.issubdtype(truth.dtype, np.inexact) and jnp.issubdtype(kind, jnp.inexact)
            found.append(_Output(their, our, arrangement, truth.shape, bool(inexact)))
        return found

    def _best(self, name: str, value: np.ndarray, truth: np.ndarray, declared) -> Arrangement:
        """The order of axes in which an output is nearest to the truth, among those that are plausible."""
        options = []
        if declared is not None and tuple(value.shape[axis] for axis in declared) == truth.shape:
            options.append(Arrangement(axes=declared))
        if value.shape == truth.shape:
            options.append(Arrangement())
        known = len(options)
        if not options and value.size == truth.size:
            options.append(Arrangement(after=truth.shape))
            if value.ndim == truth.ndim <= 5:
                orders = itertools.permutations(range(value.ndim))
                options += [
                    Arrangement(axes=axes)
                    for axes in orders
                    if tuple(value.shape[axis] for axis in axes) == truth.shape
                ]
        if not options:
            return Arrangement()
        best = (
            min(options, key=lambda one: relative_error(one.to_torch(value), truth)) if len(options) > 1 else options[0]
        )
        if not known:
            how = f"in the order of axes {best.axes}" if best.axes else "in torch's shape"
            self.remarks.append(
                f"{name} has the shape {value.shape} in JAX and {truth.shape} in torch, and is compared {how}; a "
                "layout rule says which is meant"
            )
        return best

    def _among_equals(self, name: str, value: np.ndarray, truth: np.ndarray, u: float) -> Arrangement:
        """As it is, unless that is far off and in another order of axes, whose sizes are equal, half the digits agree.

        Of a module's output inside the model: what is computed from it tells whether that order is the right one.
        """
        as_is = Arrangement()
        if not 2 <= value.ndim <= 5 or len(set(value.shape)) == value.ndim or relative_error(value, truth) <= u**0.5:
            return as_is
        for axes in itertools.permutations(range(value.ndim)):
            one = Arrangement(axes=axes)
            turned = one.to_torch(value)
            if turned.shape == truth.shape and relative_error(turned, truth) <= u**0.5:
                self.remarks.append(f"{name} is compared in the order of axes {axes}; a layout rule says what is meant")
                return one
        return as_is

    def _input_axes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Input of torch -> the JAX input that is it, and the order of axes in which it is."""
        theirs, ours = self.torch.given(), self.jax.given()
        pairs = {name: name for name in theirs if name in ours}
        if not pairs:
            pairs = dict(zip(theirs, ours, strict=False))
        found = {}
        for name, other in pairs.items():
            truth, value = theirs[name], ours[other]
            if not np.issubdtype(truth.dtype, np.inexact) or value.ndim != truth.ndim > 5:
                continue
            for axes in itertools.permutations(range(value.ndim)):
                fits = value.ndim == truth.ndim and tuple(value.shape[axis] for axis in axes) == truth.shape
                if fits and np.array_equal(value.transpose(axes), truth):
                    found[name] = (other, axes)
                    break
        return found

    # The two sides

    def _their_objective(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.has_loss:
            return outputs[LOSS]
        terms = []
        for one in self.outputs:
            if one.inexact:
                out, weight = outputs[one.theirs], cotangent(one.theirs, one.shape)
                parts = [out.real, out.imag] if out.is_complex() else [out]
                for part, factor in zip(parts, (weight, -weight), strict=False):
                    terms.append((part * torch.tensor(factor.astype(np.float64)).to(part.dtype)).sum())
        require(bool(terms), "no output of real numbers is common to both sides; pass loss=.")
        return sum(terms[1:], terms[0])

    def _our_objective(self, outputs: dict[str, Any]):
        if self.has_loss:
            return outputs[LOSS]
        total = 0.0
        for one in self.outputs:
            out, weight = outputs[one.ours], cotangent(one.theirs, one.shape)
            if not one.inexact or out.size != weight.size:  # another shape is a divergence by itself
                continue
            weight = one.arrangement.to_jax(weight, out.shape)
            parts = [jnp.real(out), jnp.imag(out)] if jnp.iscomplexobj(out) else [out]
            for part, factor in zip(parts, (weight, -weight), strict=False):
                total = total + (part * jnp.asarray(factor, part.dtype)).sum()
        return total * jnp.ones(())

    def _theirs(self, dtype: str, **options) -> Arrays:
        """The torch side, flat; a parameter without a gradient has one of zeros."""
        run = self.torch.run(dtype, self._their_objective, **options)
        zeros = {name: np.zeros(one.shape) for name, one in self.torch.tensors.items() if one.is_parameter}
        run = run._replace(
            outputs={one.theirs: run.outputs[one.theirs] for one in self.outputs if self._is_judged(one, dtype)},
            gradients={name: run.gradients.get(name, zero) for name, zero in zeros.items()},
            inputs={name: run.inputs[name] for name in self.input_axes if name in run.inputs},
            loss=run.loss if self.has_loss else None,
        )
        return run.flat()

    def _is_judged(self, one: _Output, dtype: str) -> bool:
        """Whole numbers, such as the index of a largest logit, are judged where rounding cannot turn them."""
        return one.inexact or dtype == "float64"

    def _ours(self, dtype: str, truth: Arrays, factors: Mapping[str, np.ndarray] | None = None) -> Arrays:
        """The JAX side under torch's names and in torch's layout."""
        run = self.jax.run(dtype, self._our_objective, factors=factors)
        found: Arrays = {}
        steps = self._steps(run.forward, truth)
        for phase, arrays in (("forward", run.forward), ("backward", run.backward)):
            for name, array in arrays.items():
                split = unstack(name, array, self.rules)
                if name in steps:
                    split = dict(zip(steps[name], array, strict=True))
                elif len(split) > 1 and all(np.shape(truth.get(f"forward {one}")) == array.shape for one in split):
                    # What all layers of a vmap take in: one array, whose cotangent is the sum of theirs.
                    split = dict.fromkeys(split, array) if phase == "forward" else {}
                for theirs, one in split.items():
                    found.setdefault(f"{phase} {theirs}", one)
                    self.ours_of.setdefault(theirs, (name,))
        for name in [name for name in found if name in truth]:
            phase, _, tensor = name.partition(" ")
            if tensor not in self.arranged:
                declared = self._declared(tensor, found[name].ndim)
                arrangement = self._best(tensor, found[name], truth[name], declared)
                if declared is None and found[name].shape == truth[name].shape:
                    arrangement = self._among_equals(tensor, found[name], truth[name], UNIT_ROUNDOFF[dtype])
                self.arranged[tensor] = arrangement
            turned = _arranged(self.arranged[tensor], found[name], truth[name], phase)
            if turned is None:
                del found[name]
            else:
                found[name] = turned
        for one in self.outputs:
            if self._is_judged(one, dtype):
                found[f"forward {output_name(one.theirs)}"] = self._turned_output(one, run.outputs[one.ours])
        if self.has_loss:
            found["forward loss"] = run.loss
        gradients = self._gradients(run.gradients)
        for name, row in self.torch.padding.items():
            first = self.torch.aliases.get(name, name)
            expected = truth.get(f"gradient {first}")
            if first in gradients and expected is not None and gradients[first].shape == expected.shape:
                if not np.array_equal(gradients[first][row], expected[row]):
                    self.remarks.append(
                        f"row {row} of {first}: torch does not train it (padding_idx), JAX does; its gradient is not "
                        "compared"
                    )
                gradients[first] = gradients[first].copy()
                gradients[first][row] = expected[row]
        found |= {f"gradient {name}": array for name, array in gradients.items()}
        for name, (other, axes) in self.input_axes.items():
            if other in run.inputs:
                found[f"gradient {name}"] = run.inputs[other].transpose(axes)
        return found

    def _steps(self, forward: Arrays, truth: Arrays) -> dict[str, list[str]]:
        """JAX's name of an output of one module that a scan runs at every step -> torch's names, one for each step."""
        found, calls = {}, {}
        for name, array in forward.items():
            names = list(unstack(name, array, self.rules))
            base = names[0].partition("#")[0] if len(names) == 1 else ""
            called = calls.get(base, 0)
            true = np.shape(truth.get(f"forward {base}"))
            if base and array.shape[1:] == true and array.ndim == len(true) + 1 and array.shape[0] > 1:
                every = [f"{base}#{called + step}" if called + step > 1 else base for step in range(1, len(array) + 1)]
                if f"forward {every[-1]}" in truth:
                    found[name] = every
                    called += len(array) - 1
            calls[base] = called + 1
        return found

    def _declared(self, tensor: str, ndim: int) -> tuple[int, ...] | None:
        """The layout that the rules give an output, under torch's name or the JAX side's."""
        return layout_of(self.rules, (tensor, *self.ours_of.get(tensor, ()), "*"), ndim)

    @staticmethod
    def _turned_output(one: _Output, value: np.ndarray) -> np.ndarray:
        try:
            return one.arrangement.to_torch(value)
        except ValueError:
            return value

    def _gradients(self, gradients: Arrays) -> Arrays:
        """Gradients under torch's names; those of arrays that torch ties add up."""
        found: Arrays = {}
        for link in self.plan.links:
            if all(part.source in gradients for part in link.parts):
                for name, array in link.to_torch(gradients, self.shapes).items():
                    same = name in found and found[name].shape == array.shape
                    found[name] = found[name] + array if same else array
        return found

    # The judgement

    def weight_rows(self, dtype: str) -> list[Row]:
        """A row per parameter and buffer: whether both sides hold the same numbers."""
        ours, theirs = self.jax.values(), self.torch.values()
        truth: Arrays = {}
        values: Arrays = {}
        for link in self.plan.links:
            for name, array in link.to_torch(ours, self.shapes).items():
                label = f"weight {name}" if f"weight {name}" not in truth else f"weight {name} ({link.parts[0].name})"
                truth[label], values[label] = theirs[name], array
        order = {name: index for index, name in enumerate(theirs)}
        names = sorted(truth, key=lambda name: order[name.split(" ")[1]])
        limit = dict.fromkeys(names, allowances({"": 1.0}, dtype)[""])
        for name in names:
            # What is not trained may have been computed, and rounded, by either side for itself.
            tensor = name.split(" ")[1]
            width = "float32" if theirs[tensor].dtype in (np.float32, np.complex64) else "float64"
            if not self.torch.tensors[tensor].is_parameter:
                limit[name] = max(limit[name], allowances({"": 1.0}, width, erring=2)[""])
            if np.array_equal(values[name], theirs[tensor]):
                self.carried.add(tensor)
        rows = make_rows(dtype, {name: truth[name] for name in names}, {"jax": values}, {"jax": limit})
        return [dataclasses.replace(row, inputs=()) for row in rows]

    def _amplification(self, dtype: str, seeds: tuple[int, ...]) -> tuple[Arrays, dict[str, float]]:
        """The truth and kappa; one measurement serves all dtypes whose noise is the same."""
        key = (max(UNIT_ROUNDOFF[dtype], SMALLEST_NOISE), self.torch.is_finer_than(dtype))
        if key not in self._measured:
            noisy = dtype != "float64"
            compute = lambda: self._theirs(dtype, wide=True, noisy=noisy)  # noqa: E731
            draws = progress(seeds, f"{dtype}: draws of rounding noise")
            self._measured = {key: amplification(compute, dtype, seeds=draws, decompose=True)}
        return self._measured[key]

    def rows(self, dtype: str, seeds: tuple[int, ...]) -> list[Row]:
        """A row per tensor of the truth that the JAX side has too."""
        truth, kappas = self._amplification(dtype, seeds)
        truth = {name: x for name, x in truth.items() if not self._is_ignored(name)}
        limit = allowances({name: max(1.0, kappas[name]) for name in truth}, dtype)
        ours = self._ours(dtype, truth)
        self.seen["torch"] |= truth.keys()
        self.seen["jax"] |= {name for name in ours if not self._is_ignored(name)}
        for name in [name for name in ours if is_input(name) and np.shape(ours[name]) != np.shape(truth.get(name))]:
            del ours[name]
        common = {name: truth[name] for name in truth if name in ours}
        void = [name for name, true in common.items() if np.isnan(true).any()]
        if void:
            self.problems.append(f"not a number on the torch side itself: {some(void)}; choose other inputs")
        for one in self.outputs:
            if not one.inexact:
                limit[f"forward {output_name(one.theirs)}"] = 0.0
        sides = {"jax": ours}
        if dtype != "float64":
            try:
                sides["torch"] = self._theirs(dtype, wide=False)
            except Exception as error:  # An operation that torch lacks in this dtype on a CPU.
                self.remarks.append(f"torch itself does not run in {dtype}: {first_line(error)}")
        if "torch" in sides:
            # The reference is the measure: where it errs more than the noise says, it is not a fault of the port.
            for name in common:
                own = relative_error(sides["torch"][name], truth[name])
                limit[name] = max(limit[name], SAFETY * own) if np.isfinite(own) else limit[name]
        rows = make_rows(dtype, common, sides, dict.fromkeys(sides, limit))
        if dtype == "float64" and any(row.beyond for row in rows):
            rows = self._explain(rows, common, limit)
        return rows

    def _is_ignored(self, name: str) -> bool:
        return any(one.match(name.partition(" ")[2]) for one in self.ignored)

    def _explain(self, rows: list[Row], truth: Arrays, limit: dict[str, float]) -> list[Row]:
        """Rows whose allowance has what a float32 constant or cast on one side explains, if it explains any.

        A constant is moved by one rounding of float32, on its own side, and what that does is measured. A cast cannot
        be moved; it is taken to do what float32 does to the whole computation.
        """
        same = {part.source for link in self.plan.links for part in link.parts if self.carried.issuperset(link.names)}
        buffers = self.torch.rounded_buffers(self.carried)
        states = [name for name in self.jax.rounded_state() if name not in same]
        captured, casts = self.jax.rounded_constants(), self.jax.float32
        names = [f"torch's {name}" for name in buffers]
        names += [f"an array of shape {shape} in the torch module's code" for shape in sorted(self.torch.held)]
        names += [f"JAX's {name}" for name in states] + list(captured.values()) + casts
        if not names:
            return rows
        effect = dict.fromkeys(truth, 0.0)

        def widen(found: Arrays, reference: Arrays) -> None:
            for name in truth:
                error = relative_error(found[name], reference[name])
                effect[name] = max(effect[name], error) if np.isfinite(error) else effect[name]

        ours = self._ours("float64", truth) if states or captured else {}
        for seed in range(4):
            if buffers or self.torch.held:
                shapes = {name: tuple(self.torch.buffers[name].shape) for name in buffers}
                factors = {name: rounding_of_float32(shape, seed) for name, shape in shapes.items()}
                widen(self._theirs("float64", wide=True, factors=factors, seed=seed), truth)
            if states or captured:
                shapes = {name: np.shape(self.jax.model.state[name]) for name in states}
                shapes |= {name: shape for name, shape in self.jax.constant_shapes().items() if name in captured}
                factors = {name: rounding_of_float32(shape, seed) for name, shape in shapes.items()}
                widen(self._ours("float64", truth, factors), ours)
        if casts:
            ratio = UNIT_ROUNDOFF["float32"] / UNIT_ROUNDOFF["float64"]
            effect = {name: max(one, limit[name] * ratio) for name, one in effect.items()}
        wider = {name: limit[name] + SAFETY * effect[name] for name in truth}
        explained = [row.with_allowance("jax", wider[row.name]) for row in rows]
        saved = [before for before, row in zip(rows, explained, strict=True) if before.beyond and not row.beyond]
        if not saved:
            return rows
        worst = max(saved, key=lambda row: row.errors["jax"])
        self.explained = (
            f"in float64 up to {worst.errors['jax']:.1e} ({worst.name}) apart by a float32 constant or cast on one "
            f"side ({some(names)}), not by a formula"
        )
        return explained

    # The account

    def coverage(self) -> Coverage:
        """How much of what has a name was compared."""
        placed = {name for link in self.plan.links for name in link.names}
        parameters = [name for name, one in self.torch.tensors.items() if one.is_parameter]
        parameters = [name for name in parameters if not self._is_ignored(f"weight {name}")]
        done = sum(name in placed for name in parameters)

        def count(phase: str) -> tuple[int, int]:
            mine, theirs = (
                {n for n in self.seen[side] if n.startswith(phase + " ") and not is_input(n)}
                for side in ("jax", "torch")
            )
            return len(mine & theirs), len(mine | theirs)

        gradients = {name for name in self.seen["jax"] if name.startswith("gradient ")}
        found = sum(f"gradient {name}" in gradients for name in parameters)
        every = len(parameters) + len(self.plan.only_jax)
        return Coverage(
            parameters=(done, every),
            outputs=count("forward"),
            gradients=(found, every),
            only_jax=self.plan.only_jax,
            only_torch=self.plan.only_torch,
            problems=(*self.plan.problems, *dict.fromkeys(self.problems)),
        )

    def notes(self) -> list[str]:
        """What a reader must know to judge the numbers."""
        notes = [*self.remarks]
        for side, other in (("torch", "jax"), ("jax", "torch")):
            alone = [n for n in sorted(self.seen[side] - self.seen[other]) if n.startswith("forward ")]
            alone = [name.removeprefix("forward ") for name in alone if not is_input(name)]
            if alone:
                notes.append(f"outputs only in {'JAX' if side == 'jax' else 'torch'}, not compared: {', '.join(alone)}")
        if self.jax.unreached:
            notes.append(
                f"inside a loop or a function with its own derivative, not compared: {some(self.jax.unreached)}"
            )
        return list(dict.fromkeys([*notes, *self.jax.notes]))


def _arranged(arrangement: Arrangement, value: np.ndarray, truth: np.ndarray, phase: str) -> np.ndarray | None:
    """A JAX output in torch's layout; None for what cannot be compared.

    Where one side has a row per batch and the other one for all, the values are those of every row, and the cotangents
    sums of different things. An input of another size is that of a port which pads or joins elsewhere.
    """
    if value.size == truth.size:
        try:
            return arrangement.to_torch(value)
        except ValueError:
            return value
    try:
        joint = np.broadcast_shapes(value.shape, truth.shape)
    except ValueError:
        return value
    if joint not in (value.shape, truth.shape):
        return value
    if phase == "backward":
        return None
    if joint == truth.shape:
        return np.broadcast_to(value, joint)
    # Of all rows the one that is furthest from the truth.
    axes = tuple(range(len(joint) - truth.ndim)) + tuple(
        axis
        for axis in range(len(joint) - truth.ndim, len(joint))
        if truth.shape[axis - len(joint) + truth.ndim] == 1 < joint[axis]
    )
    rows = np.moveaxis(value, axes, range(len(axes))).reshape(-1, *truth.shape)
    return max(rows, key=lambda row: relative_error(row, truth))


def _turned(inputs: Any, rules: Rules) -> Any:
    """The torch module's inputs in the layout that the rules declare for JAX."""
    args, kwargs = arguments(inputs)

    def turned(name, value):
        axes = layout_of(rules, (name, "*"), value.ndim) if isinstance(value, np.ndarray) else None
        return value if axes is None else value.transpose(np.argsort(axes))

    args, kwargs = filled(args, kwargs, turned)
    return kwargs or tuple(args)


def _main(keys: Iterable[str]) -> str:
    """The key of the result among several outputs."""
    keys = list(keys)
    return next((key for key in MAIN if key in keys), keys[0])


def cotangent(key: str, shape: Iterable[int]) -> np.ndarray:
    """What an output is multiplied by before it is summed: random, so that no gradient cancels by symmetry."""
    generator = np.random.default_rng(zlib.crc32(key.encode()))
    return np.asarray(generator.standard_normal(tuple(shape))).astype(np.float32)
