"""Time Muon's update alone against other people's: `python -m benchmarks.muon_speed --help`.

One JAX process and one torch process, the same matrices and gradients in both; the driver imports no framework. It
times one whole update (momentum, orthogonalisation, scale, weights) of every row in turn and reverses the order every
round; ratios are taken within a round, so that what slows a whole round cancels. Pinned to one core, CPU time counts:
it leaves out what other programs took of the core. On several cores it would count threads that only wait.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks import machine, report
from benchmarks.driver import Meter, Worker, cores_for, launch
from benchmarks.muon_speed_worker import DTYPES, STEPS, Shapes
from benchmarks.tables import ranged, table
from harness.cli import end, parse
from recipe.config import require
from recipe.params import param_specs
from recipe.presets import get_preset

PROCESSES = {"jax": "benchmarks.muon_speed_jax", "torch": "benchmarks.muon_speed_torch"}
BASELINE = "ours"
ENDINGS = (".json", ".md")
GRAM_SEGMENTS = (2, 1, 2)
"""Steps between the Gram form's restarts, five in all."""
ALLOWED = 0.15
"""By how much a first update may differ from `ours`, in the relative Frobenius norm. Roundings of every operation to
bfloat16 make 5 %; one step more or less, another scale or another table of coefficients 30 % and more."""


class Row(NamedTuple):
    """What stands in one row of the table."""

    process: str
    what: str
    iterates_in: str | None = None
    """Dtype of Newton-Schulz where it is not `--dtype`."""
    gram: bool = False
    theirs: bool = True


ROWS = {
    "ours": Row("jax", "`jax_impl.muon.muon`", theirs=False),
    "ours-gram": Row("jax", "the same, `gram=True`", gram=True, theirs=False),
    "ours-batched": Row("jax", "the same as `ours`, `batched=True`, the default on accelerators", theirs=False),
    "ours-default": Row("jax", "the same as `ours`, without compiler options", theirs=False),
    "optax": Row("jax", "`optax.contrib.muon` given float32, and so in float32", iterates_in="float32"),
    "optax-bfloat16": Row("jax", "`optax.contrib.muon`, weights and all in bfloat16", iterates_in="bfloat16"),
    "torch-ref": Row("torch", "`torch_ref.muon.Muon`", theirs=False),
    "torch-ref-gram": Row("torch", "the same, `gram=True`", gram=True, theirs=False),
    "torch": Row("torch", "`torch.optim.Muon`, bfloat16 only", iterates_in="bfloat16"),
    "torch-compile": Row("torch", "the same, `torch.compile(step)`", iterates_in="bfloat16"),
    "dion": Row("torch", "dion's form: matrices of one shape stacked, `baddbmm`"),
    "dion-compile": Row("torch", "the same, its iteration under `torch.compile` as in dion"),
    "notebook": Row("torch", "the notebook's loop, its iteration under `torch.compile` as there"),
}
"""Every row by its name, in the order of the table."""


@dataclasses.dataclass(frozen=True)
class MuonSpeedConfig:
    """One benchmark: a table with one row per implementation of Muon."""

    preset: str = "seed"
    """The model whose matrices are updated."""
    layers: int = 0
    """Only the matrices of so many layers, from the first on; 0 is all."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the Newton-Schulz iteration, where a row has the choice; weights and momentum are float32."""
    rows: str = ",".join(ROWS)
    """Comma-separated: the rows of the table; `ours`, which the others are divided by, must be among them."""
    rounds: int = 7
    """Measured rounds; every row is timed once in each."""
    warmup: int = 1
    """Rounds after the first update, which compiles, that do not count."""
    updates: int = 1
    """Updates of a measurement; more of them for small matrices."""
    threads: int = 0
    """CPU cores each process is pinned to; 0 is every physical core."""
    seed: int = 0
    """Seeds the gradients."""
    out: str = ""
    """Results are written to OUT.json and OUT.md, never over older ones; empty prints the table only."""

    def __post_init__(self) -> None:
        for name in self.row_list:
            require(name in ROWS, f"--rows {name} is unknown; choose from {', '.join(ROWS)}.")
        require(len(set(self.row_list)) == len(self.row_list), f"--rows {self.rows} names one twice; name each once.")
        require(BASELINE in self.row_list, f"--rows {self.rows} lacks {BASELINE}, which all are divided by; add it.")
        for name in ("rounds", "updates"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)} must be at least 1; choose e.g. 7.")
        for name in ("layers", "warmup", "threads", "seed"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)} must be at least 0; choose e.g. 1.")

    @property
    def row_list(self) -> list[str]:
        """The rows in the order given."""
        return self.rows.split(",")


def matrices(preset: str, layers: int = 0) -> dict[str, tuple[int, int]]:
    """Muon's matrices of a preset by name, (fan_out, fan_in); of its first layers if a number of them is given."""
    model = get_preset(preset).model
    require(
        layers <= model.num_hidden_layers,
        f"--layers {layers} exceeds the {model.num_hidden_layers} layers of {preset}; lower it, or 0 for all.",
    )
    some = dataclasses.replace(model, num_hidden_layers=layers or model.num_hidden_layers)
    return {name: spec.shape for name, spec in param_specs(some).items() if spec.role == "matrix"}


def flops(shapes: Iterable[tuple[int, int]], *, gram: bool) -> float:
    """Operations of Newton-Schulz's products in one update, a multiply-add counting two; n <= m are a matrix's sides.

    Plain: 4 n^2 m + 2 n^3 a step. Gram, where it is less: in each segment of s steps X X^T and Q X, 4 n^2 m together,
    and s products for B, 2 (s - 1) for the next A, s - 1 for the next Q, of 2 n^3 each.
    """
    total = 0.0
    for shape in shapes:
        n, m = sorted(shape)
        plain = STEPS * (4.0 * n * n * m + 2.0 * n**3)
        in_gram = sum(4.0 * n * n * m + (s + 3 * (s - 1)) * 2.0 * n**3 for s in GRAM_SEGMENTS)
        total += min(plain, in_gram) if gram else plain
    return total


class _Process(Worker):
    """A process that runs the rows of one framework."""

    def __init__(self, framework: str, job: dict[str, Any], cpus: list[int]) -> None:
        # Memory taken as needed: two frameworks may share one GPU.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        super().__init__(framework, launch(PROCESSES[framework], environment, cpus))
        self.send(job)


class _Timed:
    """A row in its process, with the face that `Meter` asks."""

    def __init__(self, row: str, process: _Process) -> None:
        self.mode, self.row, self.process = row, row, process

    def ask(self, do: str, **values) -> dict[str, Any]:
        return self.process.ask(do, row=self.row, **values)


def benchmark(options: MuonSpeedConfig) -> dict[str, Any]:
    """Run the benchmark: the circumstances, and under `rows` one record per row."""
    cpus = cores_for(options.threads)
    shapes = matrices(options.preset, options.layers)
    report.check_free(options.out, ENDINGS)
    print(
        f"{machine.cpu_name()}; pinned to {len(cpus)} cores; {len(shapes)} matrices, "
        f"{flops(shapes.values(), gram=False):.4g} FLOPs per update",
        flush=True,
    )
    before = report.circumstances("benchmarks.muon_speed") | {"load_average_before": os.getloadavg()}
    processes: dict[str, _Process] = {}
    try:
        job = {"shapes": shapes, "seed": options.seed, "dtype": options.dtype, "cores": len(cpus)}
        for name in dict.fromkeys(ROWS[row].process for row in options.row_list):
            processes[name] = _Process(name, job, cpus)
        measured = _measure(options, shapes, processes, cpus)
        return before | measured | {"load_average_after": os.getloadavg()}
    finally:
        for process in processes.values():
            process.close()


def _measure(
    options: MuonSpeedConfig, shapes: Shapes, processes: dict[str, _Process], cpus: list[int]
) -> dict[str, Any]:
    described = {name: process.receive() for name, process in processes.items()}
    for name, answer in described.items():
        print(f"{name}: {json.dumps(answer)}", flush=True)
    for key in ("backend", "threads", "gradients"):
        values = {name: answer[key] for name, answer in described.items()}
        require(
            len(set(values.values())) == 1, f"{key} differs: {values}; set OMP_NUM_THREADS, XLA_FLAGS or --threads."
        )
    rows = {name: _Timed(name, processes[ROWS[name].process]) for name in options.row_list}
    compared, first_seconds = _first_updates(rows)
    rates = []
    meter = Meter(cpus, guard=False, strict=False)
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for index in range(-options.warmup, options.rounds):
        for name in rows if index % 2 == 0 else reversed(rows):
            answer = meter.once(rows[name], options.updates)
            if index >= 0:
                each = {key: answer[key] / options.updates for key in ("seconds", "busy_seconds")}
                answers[name].append(answer | each)
        rates.append({name: process.ask("product_rates") for name, process in processes.items()})
        if index >= 0:
            times = ", ".join(f"{name} {1e3 * own[-1]['seconds']:.0f} ms" for name, own in answers.items())
            print(f"round {index + 1}/{options.rounds}: {times}", flush=True)
    best = {dtype: max(rate[dtype] for pair in rates for rate in pair.values()) for dtype in DTYPES}
    seconds, busy = (
        {name: [answer[key] for answer in own] for name, own in answers.items()} for key in ("seconds", "busy_seconds")
    )
    counted = busy if len(cpus) == 1 else seconds
    records = []
    for name in rows:
        dtype = ROWS[name].iterates_in or options.dtype
        work = flops(shapes.values(), gram=ROWS[name].gram)
        times = report.spread(seconds[name])
        records.append(
            {
                "row": name,
                "what": ROWS[name].what,
                "newton_schulz": dtype,
                "flops": work,
                "seconds": seconds[name],
                "seconds_per_update": times,
                "against_ours": _ratios(seconds[name], seconds[BASELINE]),
                "cpu_seconds": busy[name],
                "cpu_seconds_per_update": report.spread(busy[name]),
                "cpu_against_ours": _ratios(busy[name], busy[BASELINE]),
                "floor_seconds": work / best[dtype],
                "share_of_floor": work / best[dtype] / statistics.median(counted[name]),
                "first_update_seconds": first_seconds[name],
                "first_update_difference": compared[name],
                "foreign_cores": [answer["foreign"] for answer in answers[name]],
            }
        )
    return {
        "options": dataclasses.asdict(options),
        "cores": len(cpus),
        "processes": described,
        "layers": get_preset(options.preset).model.num_hidden_layers,
        "shapes": list(shapes.values()),
        "product_flops_per_second": rates,
        "best_product_flops_per_second": best,
        "rows": records,
    }


def _ratios(own: list[float], others: list[float]) -> dict[str, float]:
    """Time over the other's time of the same round."""
    return report.spread([mine / theirs for mine, theirs in zip(own, others, strict=True)])


def _first_updates(rows: dict[str, _Timed]) -> tuple[dict[str, float], dict[str, float]]:
    """Each row's first update, from weights of zero, against that of `ours`; and its seconds, compilation included.

    Momentum stands at the first gradient then, so that all recipes mean the same direction.
    """
    seconds, differences, reference = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(rows, key=lambda name: name != BASELINE):
            file = Path(folder) / f"{name}.npz"
            seconds[name] = rows[name].ask("first", file=str(file))["seconds"]
            with np.load(file, allow_pickle=False) as loaded:
                made = dict(loaded)
            reference = reference or made
            differences[name] = max(
                float(np.linalg.norm(made[key] - reference[key]) / np.linalg.norm(reference[key])) for key in reference
            )
            print(f"{name}: first update {seconds[name]:.1f} s, off by {differences[name]:.2g}", flush=True)
            require(
                bool(differences[name] <= ALLOWED),  # false for nan
                f"{name}'s first update differs from that of {BASELINE} by {differences[name]:.3g}, where rounding "
                f"explains {ALLOWED}; nothing was timed. Mend one of them, or leave it out of --rows.",
            )
            file.unlink()
    return differences, seconds


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """`ours` and `ours-gram` against the fastest row of other people's that iterates in the same dtype."""
    dtype, clock = result["options"]["dtype"], "cpu_seconds" if result["cores"] == 1 else "seconds"
    known = {row["row"]: row for row in result["rows"]}
    others = [row for name, row in known.items() if ROWS[name].theirs and row["newton_schulz"] == dtype]
    if not others:
        return {}
    best = min(others, key=lambda row: statistics.median(row[clock]))
    ours = {name: known[name] for name in (BASELINE, "ours-gram") if name in known}
    return {"best": best["row"], **{name: _ratios(row[clock], best[clock]) for name, row in ours.items()}}


def markdown(result: dict[str, Any]) -> str:
    """What was run and where, a line per row, and how ours stands to the best of the others."""
    options, rows = result["options"], result["rows"]
    shapes, factor = by_shape(result["shapes"]), result["layers"] / (options["layers"] or result["layers"])
    layers = options["layers"] or result["layers"]
    clock = "CPU time" if result["cores"] == 1 else "time"
    cores = "1 core" if result["cores"] == 1 else f"{result['cores']} cores"
    share = f"{layers} of {result['layers']} layers"
    frameworks = ", ".join(process["framework"] for process in result["processes"].values())
    rates = ", ".join(
        f"{name} {dtype} {max(pair[name][dtype] for pair in result['product_flops_per_second']) / 1e9:.0f}"
        for name in result["processes"]
        for dtype in DTYPES
    )
    given = ", ".join(f"{name}={value}" for name, value in result["processes"]["jax"]["compiler_options"].items())
    loads = [result[f"load_average_{when}"][0] for when in ("before", "after")]
    foreign = [value for row in rows for value in row["foreign_cores"]]
    where = result["cpu"] if result["processes"]["jax"]["backend"] == "cpu" else result["processes"]["jax"]["device"]
    text = [
        f"### Muon's update, {options['preset']}, {share}, {options['dtype']}, {cores}",
        "",
        f"`{result['command']}`",
        "",
        f"{where}, {cores} in use; {frameworks}; commit {result['git_commit']}; {result['date']}. "
        f"{len(rows[0]['seconds'])} rounds in alternating order, updates per measurement {options['updates']}, "
        f"warm-up rounds {options['warmup']}. Others used {statistics.median(foreign):.2f} of the cores "
        f"in the median measurement, {max(foreign):.2f} at most; load average {loads[0]:.1f} before, {loads[1]:.1f} "
        f"after. Matrices: {shapes}{f'; all layers are {factor:.3g} times as much' if factor > 1 else ''}. "
        f"Best square products, GFLOP/s: {rates}; floor = FLOPs / the better rate of the dtype. "
        f"Compiler options of the JAX rows, as in training: {given or 'none'}.",
        "",
        *table(
            {
                **{"row": "l", "what": "l", "iterates in": "l", "GFLOP": "r", "ms, median (min–max)": "r"},
                **{"CPU ms, median (min–max)": "r", "time / ours (min–max)": "r", "CPU time / ours (min–max)": "r"},
                **{f"floor / {clock}": "r", "first update off by": "r"},
            },
            map(_cells, rows),
        ),
    ]
    found = verdict(result)
    if found:
        text += [
            "",
            f"Best of the others in {options['dtype']}, by {clock}: `{found['best']}`. "
            + " ".join(f"`{name}` takes {ranged(found[name], '.2f')} of its time." for name in found if name != "best"),
        ]
    return "\n".join(text) + "\n"


def by_shape(shapes: list[list[int]]) -> str:
    """Shapes (fan_out, fan_in) and how many there are of each."""
    keys = [tuple(shape) for shape in shapes]
    return ", ".join(f"{keys.count(key)} of {key[0]} x {key[1]}" for key in dict.fromkeys(keys))


def _cells(row: dict[str, Any]) -> list[str]:
    difference = "–" if row["row"] == BASELINE else f"{row['first_update_difference']:.1g}"
    return [
        *(row["row"], row["what"], row["newton_schulz"], f"{row['flops'] / 1e9:,.1f}"),
        *(ranged(row[f"{clock}seconds_per_update"], ",.0f", 1e3) for clock in ("", "cpu_")),
        *(ranged(row[f"{clock}against_ours"], ".2f") for clock in ("", "cpu_")),
        *(f"{row['share_of_floor']:.0%}", difference),
    ]


def main(argv: list[str]) -> None:
    """Parse, measure, print the table and write the results."""
    describe = "Time one update of Muon: ours, optax's, torch's, dion's batched form and the notebook's loop."
    options = parse(MuonSpeedConfig, argv, prog="benchmarks.muon_speed", description=describe)
    result = benchmark(options)
    print()
    print(markdown(result))
    contents = json.dumps(result, allow_nan=False), markdown(result)
    for ending, content in zip(ENDINGS, contents, strict=True) if options.out else ():
        path = Path(f"{options.out}{ending}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    end(lambda: main(sys.argv[1:]))
