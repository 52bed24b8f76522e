"""Optimized HLO text as the launches of one update: how often each runs, what it reads, writes and multiplies.

Standard library alone. The text is what `compiled.as_text()` gives: a line for an instruction, a block for a
computation, and before them tables that name the source line of each. docs/plan.md says how bytes are counted.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

SIZES = {
    **{"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2},
    **{"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16},
}
"""Bytes of an element; token and opaque types take none."""

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("partition-id", "replica-id", "iota"),
}
"""Instructions that launch nothing, or nothing worth counting."""
SLICES = {"dynamic-slice", "slice", "gather"}
"""Instructions that read as much of their first operand as they return."""
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Instructions that write in place -> which operand says how much."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
LIBRARIES = ("cublas", "cudnn")
"""In the targets of calls whose one-dimensional byte results are workspace, not data."""
ROUNDS, GROUP = 20, 4
"""Threefry-2x32 rotates once a round, by a shift left and one right, and gives one word a block here; a kernel with
fewer shifts than a group of rounds has them for something else."""

_SHAPE = re.compile(r"\b(" + "|".join(SIZES) + r")\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_TABLE_ROW = re.compile(r"^(\d+) (.*)$")


class Shape(NamedTuple):
    """An array's dtype, as HLO writes it, and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return SIZES[self.dtype] * self.elements

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Frame(NamedTuple):
    """A line of the source that made an instruction: the file's name without its folder and ending, the function."""

    file: str
    function: str

    def __str__(self) -> str:
        return f"{self.file}.{self.function}"


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    op: str
    results: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    """What stands between the parentheses."""
    attributes: str
    """What follows them."""
    root: bool

    def attribute(self, pattern: str) -> str:
        """The first group of the pattern in the attributes, or nothing."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def called(self) -> str:
        """The computation of a fusion or call."""
        return self.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")

    @property
    def op_name(self) -> str:
        """JAX's path of transformations and primitives."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def base(self) -> str:
        """The operation, an asynchronous one's start taken for the whole."""
        return self.op.removesuffix("-start")

    @property
    def data(self) -> tuple[Shape, ...]:
        """The results without a library's workspace."""
        if not any(library in self.target for library in LIBRARIES):
            return self.results
        return tuple(s for s in self.results if not (s.dtype in ("s8", "u8") and len(s.dims) <= 1))


class Product(NamedTuple):
    """A matrix product; a multiply-add counts two FLOPs."""

    left: Shape
    right: Shape
    result: Shape
    flops: int

    @property
    def dtypes(self) -> str:
        return f"{self.left.dtype} x {self.right.dtype} -> {self.result.dtype}"


class Loop(NamedTuple):
    """A `while`: its trips (0 if only the device knows them), how often it starts, what it hands from trip to trip."""

    name: str
    op_name: str
    trips: int
    starts: int
    carried: tuple[Shape, ...]


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, library call or collective, `times` an update; every other number is of one launch."""

    instruction: Instruction
    times: int
    loops: tuple[str, ...]
    """The loops around it, outermost first."""
    frames: tuple[Frame, ...]
    """The source that made it, innermost first."""
    bytes: int
    """Read and written."""
    shapes: tuple[Shape, ...]
    """All arrays that it reads or writes."""
    products: tuple[Product, ...] = ()
    words: int = 0
    """32-bit words of Threefry."""
    payload: int = 0
    """Bytes of a collective's whole: the larger of what a device hands in and what it gets."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Which devices of the mesh, counted along it, a collective joins; empty where the text does not say."""

    @property
    def flops(self) -> int:
        """Of its matrix products."""
        return sum(product.flops for product in self.products)

    @property
    def collective(self) -> str:
        """Which collective it is, or nothing."""
        return self.instruction.base if self.instruction.base in COLLECTIVES else ""

    @property
    def sent(self) -> int:
        """Bytes that leave a device in a collective: in a ring of g (g-1)/g of the whole, twice for an all-reduce."""
        ways = len(self.groups[0]) if self.groups else 0
        whole = self.payload * (1 + (self.collective == "all-reduce"))
        return whole * (ways - 1) // ways if ways else whole

    @property
    def overlaps(self) -> bool | None:
        """Whether other work goes on while a collective runs, as XLA has scheduled it; None if it does not say."""
        if said := self.instruction.attribute(r'"is_sync":(true|false)'):
            return said == "false"
        return self.instruction.op.endswith("-start") or None

    @property
    def kernel(self) -> str:
        """The name of a kernel written by hand (Pallas's `name=`), or nothing."""
        if "triton" not in self.instruction.target and "mosaic" not in self.instruction.target:
            return ""
        # JAX's older calls hold an opaque configuration, but their path has the name.
        path = re.search(r"(\w+)\)*/pallas_call$", self.instruction.op_name)
        return self.instruction.attribute(r'\bname ?= ?"([^"]+)"') or (path.group(1) if path else "unnamed")


class Program:
    """An optimized HLO module, read from its text."""

    def __init__(self, text: str) -> None:
        self.header = text[: text.index("\n")] if "\n" in text else text
        self._frames = _source_frames(text)
        self._computations, entry = _computations(text)
        if not entry:
            raise ValueError("the text has no ENTRY computation; hand over what compiled.as_text() gives.")
        self._tables = {name: {i.name: i for i in body} for name, body in self._computations.items()}
        self.loops: list[Loop] = []
        self.branches: list[str] = []
        """Conditionals, of which the branch that moves most bytes is counted."""
        self.launches = tuple(self._walk(entry, 1, ()))

    @property
    def aliased(self) -> int:
        """Results that are written over donated arguments."""
        return self.header.count("-alias)")

    def arrays(self) -> set[Shape]:
        """Every array that a launch reads or writes: what has an address in memory."""
        return {shape for launch in self.launches for shape in launch.shapes}

    def _walk(self, name: str, times: int, loops: tuple[str, ...]) -> Iterator[Launch]:
        for i in self._computations[name]:
            if i.op in FREE or i.op.endswith(("-done", "-update")):
                continue
            if i.op == "while":
                trips = self._trips(i)
                self.loops.append(Loop(i.name, i.op_name, trips, times, i.results))
                yield from self._walk(i.attribute(r"body=%?([\w.\-]+)"), times * max(trips, 1), (*loops, i.name))
            elif i.op in ("call", "async-start") and i.called in self._computations:
                yield from self._walk(i.called, times, loops)
            elif i.op == "conditional":
                self.branches.append(i.name)
                named = i.attribute(r"branch_computations=\{([^}]*)\}") or i.attributes
                branches = [b for b in re.findall(r"%([\w.\-]+)", named) if b in self._computations]
                ways = [tuple(self._walk(branch, times, loops)) for branch in branches]
                yield from max(ways, key=lambda way: sum(launch.bytes for launch in way), default=())
            else:
                yield self._launch(name, i, times, loops)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: XLA says so, or, of JAX's loops that count from 0, the number they compare with."""
        if known := loop.attribute(r'known_trip_count\\?"?: ?\{\\?"n\\?": ?\\?"(\d+)'):
            return int(known)
        table = self._tables.get(loop.attribute(r"condition=%?([\w.\-]+)"), {})
        root = next((i for i in table.values() if i.root), None)
        if root is None or root.op != "compare" or root.attribute(r"direction=(\w+)") != "LT":
            return 0
        limit = table.get(root.operands[-1])
        return int(limit.arguments) if limit and limit.op == "constant" and limit.arguments.isdecimal() else 0

    def _launch(self, where: str, i: Instruction, times: int, loops: tuple[str, ...]) -> Launch:
        table = self._tables[where]
        inside = list(self._inside(i.called)) if i.op == "fusion" else [(where, i)]
        products, shifted, frames = [], [], self._frames_of(i)
        for name, inner in inside:
            if inner.op in ("dot", "convolution") or "cublas" in inner.target:
                products.append(_product(inner, self._tables[name]))
                frames = self._frames_of(inner) or frames
            elif inner.op == "shift-left" and inner.results:
                shifted.append(inner.results[0].elements)
        if not frames:
            frames = next((found for _, inner in reversed(inside) if (found := self._frames_of(inner))), ())
        read = tuple(shape for o in i.operands if o in table for shape in table[o].results)
        payload = max(_size(read), _size(_handed_back(i))) if i.base in COLLECTIVES else 0
        return Launch(
            instruction=i,
            times=times,
            loops=loops,
            frames=frames,
            bytes=self._bytes(i, table),
            shapes=(*i.data, *read),
            products=tuple(products),
            words=sum(shifted) // ROUNDS if len(shifted) >= GROUP else 0,
            payload=payload,
            groups=device_groups(i.attributes) if i.base in COLLECTIVES else (),
        )

    def _inside(self, name: str) -> Iterator[tuple[str, Instruction]]:
        for i in self._computations[name]:
            yield name, i
            if i.op in ("fusion", "call") and i.called:
                yield from self._inside(i.called)

    def _frames_of(self, i: Instruction) -> tuple[Frame, ...]:
        return self._frames.get(int(i.attribute(r"stack_frame_id=(\d+)") or 0), ())

    def _bytes(self, i: Instruction, table: dict[str, Instruction]) -> int:
        """Read and written: a slice counts as the slice, an update in place as what it writes."""
        if i.op != "fusion":
            sizes = [sum(s.bytes for s in table[o].results) for o in i.operands if o in table]
            if i.op in SLICES:
                return 2 * _size(i.data) + sum(sizes[1:])
            if i.op in UPDATES:
                return 2 * sizes[UPDATES[i.op]] + (sizes[1] if i.op == "scatter" else 0)
            return sum(sizes) + _size(_handed_back(i))
        body, inner = self._computations[i.called], self._tables[i.called]
        read = sum(_read(p, body) for p in body if p.op == "parameter")
        roots = [inner[o] for root in body if root.root for o in root.operands if root.op == "tuple"]
        roots = roots or [root for root in body if root.root]
        return read + sum(_written(root, inner) for root in roots)


def device_groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """The groups of a collective: written out, or as a grid of all devices that is turned and cut into rows."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        count, ways, dims = int(found[1]), int(found[2]), [int(size) for size in found[3].split(",")]
        order = [int(axis) for axis in (found[4] or "").split(",") if axis] or list(range(len(dims)))
        steps = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
        places = itertools.product(*(range(dims[axis]) for axis in order))
        flat = [sum(at * steps[axis] for at, axis in zip(place, order, strict=True)) for place in places]
        return tuple(tuple(flat[row * ways : (row + 1) * ways]) for row in range(count))
    found = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    rows = re.findall(r"\{([\d,]+)\}", found[1]) if found else []
    return tuple(tuple(int(device) for device in row.split(",")) for row in rows)


def _users(name: str, body: list[Instruction]) -> Iterator[tuple[Instruction, str]]:
    """Who uses a value inside a fusion, and under which name; a bitcast is looked through."""
    for user in body:
        if name in user.operands:
            yield from _users(user.name, body) if user.op == "bitcast" else [(user, name)]


def _read(parameter: Instruction, body: list[Instruction]) -> int:
    """Bytes that a fusion reads of a parameter."""
    users = list(_users(parameter.name, body))
    whole = _size(parameter.results)
    if users and all(user.operands[0] == name and user.op in UPDATES for user, name in users):
        return 0
    if users and all(user.operands[0] == name and user.op in SLICES for user, name in users):
        return min(whole, sum(_size(user.results) for user, _ in users))
    return whole


def _written(root: Instruction, inner: dict[str, Instruction]) -> int:
    """Bytes that a fusion writes for one of its results."""
    made = root
    while made.op == "bitcast":
        made = inner[made.operands[0]]
    return _size(inner[made.operands[UPDATES[made.op]]].results if made.op in UPDATES else root.results)


def _handed_back(i: Instruction) -> tuple[Shape, ...]:
    """The results of an instruction; what starts an asynchronous collective lists its operands before them."""
    if i.base in COLLECTIVES and i.op not in (i.base, "all-reduce-start"):
        return i.results[len(i.operands) : 2 * len(i.operands)]
    return i.data


def _size(shapes) -> int:
    return sum(shape.bytes for shape in shapes)


def _product(i: Instruction, table: dict[str, Instruction]) -> Product:
    """A dot, a cuBLAS call, or a convolution, which is what a TPU makes of a dot."""
    left, right = (table[o].results[0] for o in i.operands[:2])
    result = i.results[0]
    if i.op == "convolution":
        return Product(left, right, result, _convolution(i, left, right))
    summed = i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or i.attribute(
        r'"lhs_contracting_dimensions":\[([^\]]*)\]'
    )
    depth = math.prod(left.dims[int(axis)] for axis in re.findall(r"\d+", summed))
    return Product(left, right, result, 2 * result.elements * depth)


def _convolution(i: Instruction, left: Shape, right: Shape) -> int:
    """FLOPs of a convolution, padding and the holes of a dilation left out.

    A TPU writes every dot as one: a batch becomes a dimension that is dilated so far that each place sees one weight.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->", i.attributes)
    if labels is None:
        raise ValueError(f"the convolution {i.name} has no dim_labels; this text is not of a known version of XLA.")
    inputs, kernel = labels.groups()
    window = {key: i.attribute(rf"window={{[^}}]*\b{key}=([\d_x\-]+)") for key in _WINDOW}
    pairs = left.dims[inputs.index("b")] * right.dims[kernel.index("o")] * right.dims[kernel.index("i")]
    for axis in range(len(inputs) - 2):
        values = {key: text.split("x")[axis] if text else _WINDOW[key] for key, text in window.items()}
        low, high = map(int, values.pop("pad").split("_"))
        sizes = {key: int(value) for key, value in values.items()}
        pairs *= _taps(left.dims[inputs.index(str(axis))], low, high, **sizes)
    return 2 * pairs


_WINDOW = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
"""What a convolution's window has for each dimension, and what it is if it does not say."""


@functools.cache
def _taps(length: int, low: int, high: int, size: int, stride: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """How many (result, weight) pairs along one dimension meet an element of the input."""
    dilated = (length - 1) * lhs_dilate + 1
    results = (low + dilated + high - (size - 1) * rhs_dilate - 1) // stride + 1
    places = (result * stride + tap * rhs_dilate - low for result in range(results) for tap in range(size))
    return sum(0 <= place < dilated and place % lhs_dilate == 0 for place in places)


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(Shape(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _SHAPE.findall(text))


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the text's first one."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and letter == ")":
            return index
    return len(text)


def _instruction(root: bool, name: str, rest: str) -> Instruction:
    cut = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:cut], rest[cut:].strip()
    op, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    arguments = rest[:end]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, op.strip(), _shapes(kind), operands, arguments, rest[end + 1 :], root)


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Every computation by name, and the name of the one that is called first."""
    computations: dict[str, list[Instruction]] = {}
    body: list[Instruction] | None = None
    entry = ""
    for line in text.splitlines():
        if body is not None and (found := _INSTRUCTION.match(line)):
            body.append(_instruction(bool(found.group(1)), found.group(2), found.group(3)))
        elif head := _COMPUTATION.match(line):
            body = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            body = None
    return computations, entry


def _rows(text: str, title: str) -> dict[int, str]:
    """A numbered table of the module's head, by number."""
    start = text.find(f"\n{title}\n")
    if start < 0:
        return {}
    lines = iter(text[start + len(title) + 2 :].splitlines())
    rows = {}
    while found := _TABLE_ROW.match(next(lines, "")):
        rows[int(found.group(1))] = found.group(2)
    return rows


def _source_frames(text: str) -> dict[int, tuple[Frame, ...]]:
    """Frame id -> the calls that led to it, innermost first."""
    files, functions = _rows(text, "FileNames"), _rows(text, "FunctionNames")
    locations = {
        key: (int(_value(row, "file_name_id")), int(_value(row, "function_name_id")))
        for key, row in _rows(text, "FileLocations").items()
    }
    rows = _rows(text, "StackFrames")
    frames = {
        key: (int(_value(row, "file_location_id")), int(_value(row, "parent_frame_id"))) for key, row in rows.items()
    }
    # jaxlib 0.10 writes a parent's number plus one, so that 1 is nobody; the first frame, its own parent, shows it.
    shift = int(any(parent == key for key, (_, parent) in frames.items()))

    @functools.cache
    def calls(key: int) -> tuple[Frame, ...]:
        if key not in frames:
            return ()
        location, parent = frames[key]
        file, function = locations[location]
        stem = files[file].strip('"').rpartition("/")[2].removesuffix(".py")
        own = Frame(stem, functions[function].strip('"'))
        above = parent - shift
        return (own, *(calls(above) if above < key else ()))

    return {key: calls(key) for key in sorted(frames)}


def _value(row: str, name: str) -> str:
    found = re.search(rf"{name}=(\d+)", row)
    return found.group(1) if found else "0"
