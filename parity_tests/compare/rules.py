"""Which JAX array is which torch tensor, and in which layout: a few rules, kept as JSON beside a port.

Names are paths joined by dots. Known without a rule are the leaf names of the common libraries (`kernel` is a
transposed `weight`, `scale` and `embedding` are called `weight`, `mean` is `running_mean`), convolutions,
`nnx.MultiHeadAttention` and transformers' `Conv1D`. What differs otherwise is said by `Rules`.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parity_tests.compare.errors import CompareError, require, some

Arrays = Mapping[str, np.ndarray]

ALIASES = {
    **dict.fromkeys(("kernel", "scale", "embedding", "w", "gamma"), "weight"),
    **dict.fromkeys(("b", "beta"), "bias"),
    "mean": "running_mean",
    "var": "running_var",
}
"""Last part of a JAX name -> torch's, where torch has no parameter of the JAX name."""

KERNELS = ("kernel", "w")
"""Leaves that hold (fan_in, fan_out), as `x @ kernel` wants it; torch's `weight` is (fan_out, fan_in)."""


@dataclass(frozen=True)
class Fused:
    """A parameter that holds several of the other side, one after the other along the axis of outputs."""

    parts: tuple[str, ...]
    groups: int = 1
    """In so many groups (heads), each of which holds its share of every part: (q0 k0 v0)(q1 k1 v1)..."""

    def __post_init__(self) -> None:
        require(
            not isinstance(self.parts, str) and all(isinstance(one, str) for one in self.parts),
            f"Fused(parts={self.parts!r}) must be a list of parameters; write e.g. ['q.kernel', 'k.kernel'].",
        )
        object.__setattr__(self, "parts", tuple(self.parts))
        require(len(self.parts) > 1, f"Fused(parts={list(self.parts)}) must name at least two parameters; use names.")
        require(self.groups >= 1, f"Fused(groups={self.groups}) must be at least 1; give the number of heads.")


@dataclass(frozen=True)
class Rules:
    """What a port renames, stacks, fuses and lays out in another order. `{}` stands for one part of a path."""

    names: Mapping[str, str] = field(default_factory=dict)
    """JAX path, of a parameter or a module, or a prefix of such paths -> torch path."""
    stacked: Mapping[str, str] = field(default_factory=dict)
    """JAX prefix whose arrays have a leading axis of layers (nnx.scan, nn.scan) -> torch path with one `{}`."""
    fused: Mapping[str, Fused | Sequence[str]] = field(default_factory=dict)
    """Parameter of one side -> the parameters of the other that it holds."""
    layouts: Mapping[str, str] = field(default_factory=dict)
    """Name, or `*` for every output -> order of axes in JAX and in torch: "NHWC->NCHW", for a kernel "HWIO->OIHW".
    Several are separated by commas; the one of as many axes is taken."""
    ignore: Sequence[str] = ()
    """Parameters of either side, or prefixes, that have no partner by design: constants held as parameters."""

    def __post_init__(self) -> None:
        for name in ("names", "stacked", "layouts"):
            value = getattr(self, name)
            good = isinstance(value, Mapping) and all(isinstance(one, str) for pair in value.items() for one in pair)
            require(good, f"Rules.{name}={value!r} must map names to names; give e.g. {{'a.b': 'c'}}.")
        require(
            isinstance(self.fused, Mapping), f"Rules.fused={self.fused!r} must map a parameter to a list of its parts."
        )
        parts = {key: one if isinstance(one, Fused) else _fused(key, one) for key, one in self.fused.items()}
        object.__setattr__(self, "fused", parts)
        require(
            not isinstance(self.ignore, str) and all(isinstance(one, str) for one in self.ignore),
            f"Rules.ignore={self.ignore!r} must be a list of names; write e.g. ['rope.table'].",
        )
        object.__setattr__(self, "ignore", tuple(self.ignore))
        for key, target in self.stacked.items():
            require(
                target.count("{}") == 1,
                f"Rules.stacked[{key!r}]={target!r} must have one {{}} for the layer; write e.g. 'layers.{{}}'.",
            )
        for key, value in self.layouts.items():
            for one in _split(value):
                permutation(one, f"Rules.layouts[{key!r}]")


def as_rules(rules: Rules | Mapping | None, name_map: Mapping[str, str] | None = None) -> Rules:
    """Rules as they are, or made of a plain dict of names; `name_map` is added to the names."""
    if rules is None:
        rules = Rules()
    elif isinstance(rules, Mapping):
        rules = Rules(names=rules)
    good = isinstance(rules, Rules)
    require(good, f"rules={type(rules).__name__} must be Rules or a dict of names; pass Rules(names=...).")
    good = name_map is None or isinstance(name_map, Mapping)
    require(good, f"name_map={name_map!r} must map names to names; give e.g. {{'a.b': 'c'}}.")
    return dataclasses.replace(rules, names={**rules.names, **name_map}) if name_map else rules


def save_rules(rules: Rules, path: str | Path) -> None:
    """Write the rules as JSON. Raises `CompareError` if the file is there and says something else."""
    path, text = Path(path), json.dumps(dataclasses.asdict(as_rules(rules)), indent=1) + "\n"
    if path.exists():
        require(path.read_text(encoding="utf-8") == text, f"{path} holds other rules; remove it, or name a new file.")
    path.write_text(text, encoding="utf-8")


def load_rules(path: str | Path) -> Rules:
    """The rules in a file of `save_rules`. Raises `CompareError` for a file that is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CompareError(f"{path} cannot be read: {error.strerror}; name a file of save_rules.") from None
    except ValueError as error:
        raise CompareError(f"{path} is no JSON: {error}; name a file of save_rules.") from None
    known = [one.name for one in dataclasses.fields(Rules)]
    require(isinstance(values, dict), f"{path} must hold an object with some of {', '.join(known)}.")
    unknown = sorted(values.keys() - set(known))
    require(not unknown, f"{path} has the unknown field {some(unknown)}; known are {', '.join(known)}.")
    return Rules(**values)


def _fused(key: str, value) -> Fused:
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - {"parts", "groups"})
        require(not unknown and "parts" in value, f"Rules.fused[{key!r}] must have parts and may have groups.")
        return Fused(**value)
    require(
        not isinstance(value, str) and isinstance(value, Sequence),
        f"Rules.fused[{key!r}]={value!r} must be a list of parameters; write e.g. ['q.kernel', 'k.kernel'].",
    )
    return Fused(tuple(value))


def _split(layouts: str) -> list[str]:
    return [one.strip() for one in layouts.split(",")]


def permutation(layout: str, where: str) -> tuple[int, ...]:
    """Axes of the JAX array in torch's order: (0, 3, 1, 2) of "NHWC->NCHW"."""
    ours, arrow, theirs = layout.partition("->")
    good = bool(arrow) and sorted(ours) == sorted(theirs) and len(set(ours)) == len(ours) > 0
    require(good, f"{where}={layout!r} must be two orders of the same letters; write e.g. 'NHWC->NCHW'.")
    return tuple(ours.index(axis) for axis in theirs)


def layout_of(rules: Rules, names: Iterable[str], ndim: int) -> tuple[int, ...] | None:
    """The declared permutation of a tensor of so many axes under any of its names, or of every output (`*`)."""
    for name in names:
        for one in _split(rules.layouts[name]) if name in rules.layouts else ():
            axes = permutation(one, name)
            if len(axes) == ndim:
                return axes
    return None


def pattern(rule: str) -> re.Pattern:
    """A rule's key as a pattern for the beginning of a path; it ends where a part of the path ends."""
    return re.compile(r"([^.#]+)".join(re.escape(one) for one in rule.split("{}")) + r"(?=$|[.#])")


def fill(target: str, values: Sequence[str]) -> str:
    """The target with its `{}` filled in order. Raises `CompareError` if their numbers differ."""
    require(
        target.count("{}") == len(values),
        f"the rule for {target!r} has {target.count('{}')} '{{}}' and its key {len(values)}; write as many in both.",
    )
    pieces = target.split("{}")
    return pieces[0] + "".join(value + piece for value, piece in zip(values, pieces[1:], strict=True))


class Renamed(NamedTuple):
    """A JAX path in torch's names."""

    name: str
    rule: str
    """Key of the rule that was used, or "" for none."""
    whole: bool
    """Whether the rule named the whole path."""


def rename(path: str, names: Mapping[str, str]) -> Renamed:
    """The path with its longest matching prefix replaced."""
    for key in sorted(names, key=len, reverse=True):
        found = pattern(key).match(path) if key else None
        if found:
            head, rest = fill(names[key], found.groups()), path[found.end() :]
            if not head and not re.fullmatch(r"\.input(#\d+)?", rest):
                rest = rest.removeprefix(".")  # a wrapper that torch lacks
            return Renamed(head + rest, key, found.end() == len(path))
        if key == "" and path:
            return Renamed(f"{names[key]}.{path}", key, False)
    return Renamed(path, "", False)


class Part(NamedTuple):
    """One JAX array, or one layer's slice of a stacked one."""

    name: str
    """Its path, with the layer's number where it is stacked."""
    source: str
    """The array that it is, or is a slice of."""
    index: int | None
    target: Renamed
    """In torch's names, before the last part is translated."""

    def take(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        array = arrays[self.source]
        return array if self.index is None else array[self.index]


@dataclass(frozen=True)
class Arrangement:
    """From a JAX array's layout to torch's: reshape, permute, flip, reshape; each None where it does nothing."""

    before: tuple[int, ...] | None = None
    axes: tuple[int, ...] | None = None
    flipped: tuple[int, ...] = ()
    after: tuple[int, ...] | None = None

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        array = array if self.before is None else array.reshape(self.before)
        array = array if self.axes is None else array.transpose(self.axes)
        array = np.flip(array, self.flipped) if self.flipped else array
        return array if self.after is None else array.reshape(self.after)

    def to_jax(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse; `shape` is the JAX array's."""
        start = shape if self.before is None else self.before
        middle = start if self.axes is None else tuple(start[axis] for axis in self.axes)
        array = array.reshape(middle)
        array = np.flip(array, self.flipped) if self.flipped else array
        array = array if self.axes is None else array.transpose(np.argsort(self.axes))
        return array.reshape(shape)


class Link(NamedTuple):
    """JAX arrays and the torch tensors that hold the same numbers."""

    parts: tuple[Part, ...]
    names: tuple[str, ...]
    arrangements: tuple[Arrangement, ...]
    """Of each part; of a part that holds several tensors, to their concatenation."""
    groups: int = 1
    axis: int = 0
    """Along which torch's tensors are concatenated."""

    def to_torch(self, arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """The JAX arrays under torch's names and in torch's layout; shapes that do not fit are left as they are."""
        values = []
        for part, arrangement in zip(self.parts, self.arrangements, strict=True):
            array = part.take(arrays)
            try:
                values.append(arrangement.to_torch(array))
            except ValueError:
                values.append(array)
        if len(self.names) == 1:
            return {self.names[0]: values[0] if len(values) == 1 else join(values, self.groups, self.axis)}
        sizes = [shapes[name][self.axis] for name in self.names]
        return dict(zip(self.names, cut(values[0], sizes, self.groups, self.axis), strict=True))

    def to_jax(
        self, tensors: Arrays, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[tuple[str, int | None], np.ndarray]:
        """Torch's tensors as the JAX arrays (or layers of them), by (source, index); `shapes` of the parts."""
        values = [tensors[name] for name in self.names]
        whole = values[0] if len(values) == 1 else join(values, self.groups, self.axis)
        if len(self.parts) > 1:
            outputs = []
            for part, arrangement in zip(self.parts, self.arrangements, strict=True):
                shape = shapes[part.name]
                outputs.append(arrangement.to_torch(np.empty(shape, np.int8)).shape[self.axis])
            pieces = cut(whole, outputs, self.groups, self.axis)
        else:
            pieces = [whole]
        return {
            (part.source, part.index): arrangement.to_jax(piece, shapes[part.name])
            for part, arrangement, piece in zip(self.parts, self.arrangements, pieces, strict=True)
        }


def join(values: Sequence[np.ndarray], groups: int, axis: int) -> np.ndarray:
    """Concatenate along the axis, group by group."""
    if groups == 1:
        return np.concatenate(values, axis)
    split = [np.split(value, groups, axis) for value in values]
    return np.concatenate([split[part][group] for group in range(groups) for part in range(len(values))], axis)


def cut(whole: np.ndarray, sizes: Sequence[int], groups: int, axis: int) -> list[np.ndarray]:
    """The inverse of `join`, for parts of these sizes along the axis."""
    ends = np.cumsum([size // groups for size in sizes])[:-1]
    pieces = [np.split(group, ends, axis) for group in np.split(whole, groups, axis)]
    return [np.concatenate([piece[part] for piece in pieces], axis) for part in range(len(sizes))]


@dataclass(frozen=True)
class Plan:
    """How the parameters and states of the two sides belong together."""

    links: tuple[Link, ...]
    only_jax: tuple[str, ...]
    only_torch: tuple[str, ...]
    problems: tuple[str, ...]
    """Rules that match nothing, one line each."""


class TorchTensor(NamedTuple):
    """What the plan must know of a torch parameter or buffer."""

    shape: tuple[int, ...]
    owner: str
    """Class name of the module that holds it."""
    is_parameter: bool


def make_plan(
    rules: Rules,
    jax_shapes: Mapping[str, tuple[int, ...]],
    jax_state: Iterable[str],
    tensors: Mapping[str, TorchTensor],
    aliases: Mapping[str, str],
    *,
    jax_modules: Iterable[str] = (),
    torch_modules: Iterable[str] = (),
    values: tuple[Arrays, Arrays] | None = None,
) -> Plan:
    """Match every JAX array (parameters and `jax_state`) with torch's tensors.

    `aliases` are further torch names of tied tensors -> their first name. `values` of both sides decide between two
    layouts of one shape, where the name does not.
    """
    jax_modules, state = list(jax_modules), set(jax_state)
    problems, used = [], set()
    parts = _parts(rules, jax_shapes, problems)
    links, taken, placed = [], set(), set()

    def shape_of(part: Part) -> tuple[int, ...]:
        shape = jax_shapes[part.source]
        return shape if part.index is None else shape[1:]

    def find(part: Part) -> str | None:
        name = part.target.name
        if name not in tensors and name not in aliases:
            head, _, leaf = name.rpartition(".")
            name = f"{head}.{ALIASES.get(leaf, leaf)}" if head else ALIASES.get(leaf, leaf)
        return name if name in tensors or name in aliases else None

    def arranged(part: Part, shape: tuple[int, ...], name: str, piece: slice | None = None) -> Arrangement:
        declared = layout_of(rules, (part.name, part.source, name), len(shape_of(part)))
        if declared is not None:
            return Arrangement(axes=declared, after=shape)
        options = arrangements(part.name.rpartition(".")[2], shape_of(part), shape, tensors[name].owner)
        if values is not None and len(options) > 1 and piece is None:
            mine, theirs = part.take(values[0]), values[1][name]
            for option in options:
                if np.array_equal(option.to_torch(mine), theirs):
                    return option
        return options[0]

    by_name = {part.name: part for part in parts}
    for key, fused in rules.fused.items():
        found = _fused_links(key, fused, by_name, tensors, shape_of, arranged)
        if not found:
            problems.append(_no_match(f"fused rule {key!r}", key, [*tensors, *by_name]))
        for link in found:
            links.append(link)
            placed |= {part.name for part in link.parts}
            taken |= set(link.names)
            used |= {part.target.rule for part in link.parts}
    for part in parts:
        if part.name in placed:
            continue
        name = find(part)
        first = aliases.get(name, name)
        tied = name in aliases or part.target.whole
        if first is None or (first in taken and not tied):
            continue
        used.add(part.target.rule)
        placed.add(part.name)
        taken.add(first)
        links.append(Link((part,), (first,), (arranged(part, tensors[first].shape, first),)))

    problems += _unused(rules, used, parts, jax_modules, list(torch_modules), tensors, aliases)
    ignored = [pattern(one) for one in rules.ignore]
    for key, one in zip(rules.ignore, ignored, strict=True):
        if not any(one.match(name) for name in [*jax_shapes, *by_name, *tensors]):
            problems.append(_no_match(f"ignore rule {key!r}", key, [*by_name, *tensors]))

    def left(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if not any(one.match(name) for one in ignored))

    only_jax = left(part.name for part in parts if part.name not in placed and part.source not in state)
    only_torch = left(name for name, one in tensors.items() if one.is_parameter and name not in taken)
    return Plan(tuple(links), only_jax, only_torch, tuple(problems))


def _parts(rules: Rules, shapes: Mapping[str, tuple[int, ...]], problems: list[str]) -> list[Part]:
    """The JAX arrays, stacked ones layer by layer."""
    parts, used = [], set()
    for source, shape in shapes.items():
        for key, target in rules.stacked.items():
            found = pattern(key).match(source)
            if found and shape:
                used.add(key)
                rest = source[found.end() :]
                for layer in range(shape[0]):
                    name = f"{source[: found.end()]}.{layer}{rest}"
                    inner = rename(name, rules.names)
                    inner = inner if inner.rule else Renamed(target.replace("{}", str(layer)) + rest, key, False)
                    parts.append(Part(name, source, layer, inner))
                break
        else:
            parts.append(Part(source, source, None, rename(source, rules.names)))
    for key in rules.stacked:
        if key not in used:
            problems.append(_no_match(f"stacked rule {key!r}", key, list(shapes)))
    return parts


def unstack(name: str, array: np.ndarray, rules: Rules) -> dict[str, np.ndarray]:
    """An output recorded inside a scanned layer as one output per layer, under torch's names."""
    for key, target in rules.stacked.items():
        found = pattern(key).match(name)
        if found and array.ndim:
            return {target.replace("{}", str(i)) + name[found.end() :]: array[i] for i in range(array.shape[0])}
    renamed = rename(name, rules.names).name
    return {renamed: array} if renamed else {}


def _fused_links(key, fused, parts: Mapping[str, Part], tensors, shape_of, arranged) -> list[Link]:
    """A link for every torch tensor, or JAX array, that the key names."""
    links, one = [], pattern(key)
    for name, tensor in tensors.items():
        found = one.fullmatch(name)
        if not found:
            continue
        names = [fill(part, found.groups()) for part in fused.parts]
        missing = [part for part in names if part not in parts]
        require(
            not missing,
            f"Rules.fused[{key!r}] names {some(missing)}, which the JAX side lacks"
            f"{_close(missing[0], parts) if missing else ''}; write parameters of the JAX side.",
        )
        axis = 1 if tensor.owner == "Conv1D" and len(tensor.shape) == 2 else 0
        own = [parts[part] for part in names]
        sizes = [int(np.prod(shape_of(part))) for part in own]
        require(
            sum(sizes) == int(np.prod(tensor.shape)),
            f"Rules.fused[{key!r}]: {name} has {int(np.prod(tensor.shape)):,} elements and its parts {sum(sizes):,}; "
            "name the parts that it holds.",
        )
        rest = int(np.prod(tensor.shape)) // tensor.shape[axis]
        _check_groups(key, fused.groups, [size / rest for size in sizes])
        shapes = [_with(tensor.shape, axis, size // rest) for size in sizes]
        ways = tuple(arranged(part, shape, name, slice(None)) for part, shape in zip(own, shapes, strict=True))
        links.append(Link(tuple(own), (name,), ways, fused.groups, axis))
    for name, part in parts.items() if not links else ():
        found = one.fullmatch(name)
        if not found:
            continue
        names = tuple(fill(other, found.groups()) for other in fused.parts)
        missing = [other for other in names if other not in tensors]
        require(
            not missing,
            f"Rules.fused[{key!r}] names {some(missing)}, which the torch side lacks"
            f"{_close(missing[0], tensors) if missing else ''}; write parameters of the torch side.",
        )
        first = tensors[names[0]]
        axis = 1 if first.owner == "Conv1D" and len(first.shape) == 2 else 0
        whole = _with(first.shape, axis, sum(tensors[other].shape[axis] for other in names))
        require(
            int(np.prod(whole)) == int(np.prod(shape_of(part))),
            f"Rules.fused[{key!r}]: {name} has {int(np.prod(shape_of(part))):,} elements and its parts "
            f"{int(np.prod(whole)):,}; name the parts that it holds.",
        )
        _check_groups(key, fused.groups, [tensors[other].shape[axis] for other in names])
        links.append(Link((part,), names, (arranged(part, whole, names[0], slice(None)),), fused.groups, axis))
    return links


def _check_groups(key: str, groups: int, outputs: Sequence[float]) -> None:
    """Refuse parts that are no whole number of outputs in every group."""
    bad = [size for size in outputs if size % groups]
    text = ", ".join(f"{size:g}" for size in outputs)
    require(not bad, f"Rules.fused[{key!r}]: parts of {text} outputs cannot be cut into groups={groups}; give heads.")


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def arrangements(leaf: str, ours: tuple[int, ...], theirs: tuple[int, ...], owner: str) -> list[Arrangement]:
    """The layouts that a JAX array of this name and shape may have beside a torch tensor; the likeliest first."""
    if len(theirs) < 2 or np.prod(ours) != np.prod(theirs):
        return [Arrangement(after=theirs) if np.prod(ours) == np.prod(theirs) else Arrangement()]
    O, I = theirs[0], theirs[1]  # noqa: E741
    as_is, transposed = Arrangement(), Arrangement(axes=(1, 0))
    if len(theirs) == 2:
        flat = Arrangement(before=(I, O), axes=(1, 0))
        if owner == "Conv1D":
            # transformers' Conv1D holds (fan_in, fan_out), as a kernel does.
            return [transposed] if leaf == "weight" and ours == (I, O) else [Arrangement(after=theirs)]
        if len(ours) == 2 and ours != (I, O):
            return [as_is]
        if leaf in KERNELS:
            return [flat]
        if ours == theirs and O != I:
            return [as_is]
        if leaf in ("weight", "embedding", "scale"):
            return [as_is] if ours == theirs else [flat]
        return [flat, as_is] if ours == theirs else [flat]
    spatial = len(theirs) - 2
    if len(ours) == 2 and np.prod(theirs[2:]) == 1:  # a Dense layer for a convolution of width one
        return [Arrangement(before=(I, O), axes=(1, 0), after=theirs)]
    if len(ours) != len(theirs):
        return [Arrangement(after=theirs)]
    ahead = tuple(range(spatial))
    straight = Arrangement(axes=(spatial + 1, spatial, *ahead))
    if owner.startswith("ConvTranspose"):
        # torch's is (in, out, spatial) and runs the kernel backwards.
        inner = Arrangement(axes=(spatial, spatial + 1, *ahead), flipped=tuple(range(2, 2 + spatial)))
        found = [one for one in (inner, straight) if one.to_torch(np.empty(ours, np.int8)).shape == theirs]
        return found or [as_is]
    fits = straight.to_torch(np.empty(ours, np.int8)).shape == theirs
    if leaf in KERNELS and fits:
        return [straight]
    return [as_is] if ours == theirs and leaf == "weight" else [straight, as_is] if fits else [as_is]


def _unused(rules, used, parts, jax_modules, torch_modules, tensors, aliases) -> list[str]:
    """A line for every rule of names that matches nothing of JAX's, or leads to nothing of torch's."""
    problems = []
    paths = [*(part.name for part in parts), *(part.source for part in parts), *jax_modules]
    theirs = [*tensors, *aliases, *torch_modules]
    for key, target in rules.names.items():
        found = [match for path in paths if (match := pattern(key).match(path))] if key else [None]
        if not found:
            problems.append(_no_match(f"name rule {key!r}", key, paths))
            continue
        for match in found:
            filled = target if match is None else fill(target, match.groups())
            if filled and not any(name == filled or name.startswith(filled + ".") for name in theirs):
                problems.append(_no_match(f"name rule {key!r}: torch path {filled!r}", filled, theirs))
                break
    for key in rules.layouts:
        part = re.sub(r"(#\d+|\.input(#\d+)?)$", "", key)
        if part not in {"*", *paths, *theirs} and not re.match(r"(input|output)(\.|$)", key):
            problems.append(_no_match(f"layout rule {key!r}", key, [*paths, *theirs]))
    return problems


def _no_match(what: str, name: str, names: Iterable[str]) -> str:
    return f"{what} matches nothing{_close(name, names)}"


def _close(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?` if some prefix of the names is close."""
    prefixes = {".".join(one.split(".")[:depth]) for one in names for depth in range(1, one.count(".") + 2)}
    found = difflib.get_close_matches(name, sorted(prefixes), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
