"""Does it train better? AdamW, Muon and its relatives on one small model: `python -m benchmarks.muon_training --help`.

Every optimizer gets the same number of learning rates on one seed; its best then runs on several others, once for equal
updates and once for the updates that fit into plain Muon's time. What is finished is a line of OUT.jsonl and is not run
again, so that a stopped benchmark goes on where it was and a longer grid costs only what is new in it.
"""

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from benchmarks import job, report
from benchmarks.tables import table
from harness.cli import end, parse
from harness.loop import fit_vocabulary
from recipe.baselines import ngram_baselines
from recipe.config import RunConfig, require
from recipe.data import Dataset, prepare
from recipe.params import param_counts
from recipe.reading import short

if TYPE_CHECKING:  # it imports JAX, for which --help and a refusal do not wait
    from benchmarks.muon_variants import Trial

OPTIMIZERS = (
    *("adamw", "adamw_fast", "adamw_apart"),
    *("muon", "gram", "polar_express", "normuon", "decay", "cautious", "moonlight"),
)
UPDATES_PER_ROUND = 2
ONCE_IN = 20
"""The loss of training is kept of every so many updates."""
SMALLEST_DIFFERENCE = 0.01
"""Of the time per update; a smaller one gives no run of its own."""
COLOURS = ("#0072b2", "#56b4e9", "#004466", "#d55e00", "#e69f00", "#cc79a7", "#009e73", "#7f7f7f", "#999933", "#000000")
MARKS = "osp^vPX*dD"


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """One comparison: a table with a row per optimizer."""

    preset: str = "tiny"
    """The model and all of the recipe that has no flag here; dropout is off."""
    optimizers: str = ",".join(OPTIMIZERS)
    """Comma-separated; muon must be among them, for the others are measured against it."""
    steps: int = 100
    """Updates of a run, and of plain Muon's in the comparison at equal time."""
    batch_size: int = 4
    """Sequences of an update."""
    sequence_length: int = 128
    """Tokens of a sequence."""
    muon_rates: str = "0.01,0.02,0.04,0.08"
    """Comma-separated: rates of the matrices that each variant of Muon tries, Moonlight times 0.36 for its scale."""
    adamw_rates: str = "0.001,0.002,0.004,0.008"
    """Comma-separated, as many: rates of everything that AdamW tries (of the matrices alone in adamw_apart)."""
    tuning_seed: int = 0
    """Seed of the tuning's runs."""
    seeds: str = "1,2,3"
    """Comma-separated: seeds of the runs at the best rate; a seed is of both weights and order of the data."""
    validation_tokens: int = 16_384
    """Held-out tokens that a run ends on, always the same."""
    rounds: int = 11
    """Rounds in which the time per update of all optimizers is taken in turn."""
    compute: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the model's matrix products."""
    newton_schulz: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the Newton-Schulz iteration."""
    overrides: str = ""
    """JSON over the preset, e.g. {"model": {"num_hidden_layers": 1}}."""
    out: str = ""
    """OUT.jsonl holds what is finished and is continued; OUT.md and OUT.png are made from it. Empty keeps nothing."""

    def __post_init__(self) -> None:
        for name in self.names:
            require(name in OPTIMIZERS, f"--optimizers {short(name)} is unknown; choose from {', '.join(OPTIMIZERS)}.")
        require(len(set(self.names)) == len(self.names), f"--optimizers {self.optimizers} names one twice.")
        require("muon" in self.names, f"--optimizers {self.optimizers} must have muon, against which the rest stand.")
        for field in ("steps", "batch_size", "sequence_length", "validation_tokens", "rounds"):
            require(getattr(self, field) >= 1, f"{field}={getattr(self, field)} must be at least 1; choose e.g. 100.")
        for field in ("muon_rates", "adamw_rates"):
            rates = _numbers(getattr(self, field), float)
            fine = rates and all(math.isfinite(rate) and rate > 0 for rate in rates) and len(set(rates)) == len(rates)
            require(bool(fine), f"--{field} {short(getattr(self, field))} is not like 0.01,0.02: each above 0, once.")
        muon_trials, adamw_trials = (len(_numbers(rates, float)) for rates in (self.muon_rates, self.adamw_rates))
        require(
            muon_trials == adamw_trials,
            f"--muon_rates are {muon_trials} and --adamw_rates {adamw_trials}; give both as many, for equal trials.",
        )
        seeds = _numbers(self.seeds, int)
        fine = seeds and all(0 <= seed < 2**32 for seed in (*seeds, self.tuning_seed)) and len(set(seeds)) == len(seeds)
        require(bool(fine), f"--seeds {short(self.seeds)} is not like 1,2,3: each in [0, 2**32), once.")

    @property
    def names(self) -> list[str]:
        """The optimizers in the order given."""
        return self.optimizers.split(",")

    def settings(self) -> dict[str, Any]:
        """What runs must share to stand in one table, besides what each of them says itself."""
        names = (
            "preset",
            "batch_size",
            "sequence_length",
            "validation_tokens",
            "compute",
            "newton_schulz",
            "overrides",
        )
        return {name: getattr(self, name) for name in names}


def _numbers(text: str, kind: type) -> list:
    """The comma-separated numbers, or none if one of them is none."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        return []


class Finished:
    """The lines of OUT.jsonl: those that are there, and each new one as soon as it is known."""

    def __init__(self, options: TrainingConfig) -> None:
        self.file = Path(f"{options.out}.jsonl") if options.out else None
        self.lines: list[dict[str, Any]] = []
        if self.file and self.file.exists():
            whole = self.file.read_text(encoding="utf-8")
            whole = whole[: whole.rfind("\n") + 1]  # a line that was cut off is not finished
            try:
                self.lines = [json.loads(line) for line in whole.splitlines()]
                settings = [line["settings"] for line in self.lines if line["kind"] == "session"]
            except (json.JSONDecodeError, KeyError, TypeError):
                settings = []
            require(bool(settings), f"{self.file} is not this benchmark's; choose another --out.")
            for name, value in options.settings().items():
                require(
                    settings[0].get(name) == value,
                    f"{self.file} has runs of {name}={settings[0].get(name)}, not {value}; choose another --out.",
                )
            self.file.write_text(whole, encoding="utf-8")
        elif self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Keep the line, on disk before anything else is begun."""
        self.lines.append(line)
        if self.file:
            with open(self.file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, allow_nan=False) + "\n")
        return line

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The first line with these values, or None."""
        return next((line for line in self.lines if wanted.items() <= line.items()), None)


def rates_of(options: TrainingConfig, name: str) -> list[float]:
    """The grid of one optimizer, in rising order."""
    from benchmarks.muon_variants import VARIANTS, is_muon

    rates = _numbers(options.muon_rates if is_muon(name) else options.adamw_rates, float)
    return sorted(float(f"{rate * VARIANTS[name].times:.6g}") for rate in rates)


def loss_of(line: Mapping[str, Any]) -> float:
    """A run's held-out loss; infinity if it came to none."""
    return math.inf if line["loss"] is None else line["loss"]


class Bench:
    """The model, the data, the compiled updates and what is finished."""

    def __init__(self, options: TrainingConfig) -> None:
        self.options, self.finished = options, Finished(options)
        config = job.resolve(
            options.preset,
            batch_size=options.batch_size,
            sequence_length=options.sequence_length,
            accumulation=1,
            overrides=options.overrides,
            seed=options.tuning_seed,
            dropout=0.0,
            compute=options.compute,
            newton_schulz=options.newton_schulz,
            matmul="highest",
            attention="explicit",
        )
        self.dataset: Dataset = prepare(config.data, seed=options.tuning_seed, show_progress=True)
        self.config: RunConfig = fit_vocabulary(config, self.dataset.tokenizer.vocab_size)
        self.dataset.check_length(options.sequence_length)
        sizes = options.batch_size, options.sequence_length, options.validation_tokens
        self.held_out = list(self.dataset.validation_batches(*sizes))
        self._held_out_loss: Any = None
        self._trials: dict[str, Trial] = {}
        self._has_begun = False

    def trial(self, name: str) -> "Trial":
        """The optimizer's program, compiled when it is first called."""
        from benchmarks.muon_variants import Trial

        self._begin()
        if name not in self._trials:
            self._trials[name] = Trial(self.config, name)
        return self._trials[name]

    def run(self, name: str, rate: float, seed: int, steps: int, progress: str) -> dict[str, Any]:
        """The line of this run, which is made if there is none."""
        key = dict(optimizer=name, rate=rate, seed=seed, steps=steps)
        found = self.finished.find(kind="run", **key)
        if found is not None:
            return found
        began = time.perf_counter()
        params, losses = self.trial(name).run(self.dataset, rate=rate, seed=seed, steps=steps)
        held_out = self._held_out_loss(params)
        took = time.perf_counter() - began
        says = f"{name}, rate {rate:g}, seed {seed}, {steps} updates: {held_out:.4f} nats per held-out token"
        print(f"{progress}: {says} ({took:.0f} s)", file=sys.stderr, flush=True)
        kept = [round(loss, 4) if math.isfinite(loss) else None for loss in losses[::ONCE_IN]]
        loss = held_out if math.isfinite(held_out) else None
        return self.finished.add({"kind": "run", **key, "loss": loss, "training": kept, "seconds": round(took, 1)})

    def time(self) -> dict[str, Any]:
        """Seconds per update of every optimizer, round by round: all in turn, the order reversed every round."""
        names = self.options.names
        found = self.finished.find(kind="timing", optimizers=names)
        if found is not None:
            return found
        sizes = dict(batch_size=self.options.batch_size, sequence_length=self.options.sequence_length)
        batch = self.dataset.batch(0, accumulation=1, **sizes)
        states = {name: self.trial(name).init(self.options.tuning_seed) for name in names}
        wall: dict[str, list[float]] = {name: [] for name in names}
        busy: dict[str, list[float]] = {name: [] for name in names}
        for index in tqdm(range(self.options.rounds + 1), unit="round", disable=None):
            for name in names if index % 2 == 0 else reversed(names):
                began = time.perf_counter(), time.process_time()
                for _ in range(UPDATES_PER_ROUND):
                    states[name], loss = self.trial(name).update(
                        states[name], batch, rates_of(self.options, name)[0], 1.0
                    )
                    float(loss)
                if index:  # the first round compiles and fills caches
                    wall[name].append(round((time.perf_counter() - began[0]) / UPDATES_PER_ROUND, 5))
                    busy[name].append(round((time.process_time() - began[1]) / UPDATES_PER_ROUND, 5))
            if not sys.stderr.isatty():
                print(f"timing, round {index}/{self.options.rounds}", file=sys.stderr, flush=True)
        return self.finished.add({"kind": "timing", "optimizers": names, "seconds": wall, "cpu_seconds": busy})

    def _begin(self) -> None:
        """Before the first computation of this process: its circumstances."""
        if self._has_begun:
            return
        from benchmarks.muon_variants import make_held_out_loss

        self._has_begun, self._held_out_loss = True, make_held_out_loss(self.config, self.held_out)
        counts = param_counts(self.config.model)
        self.finished.add(
            {
                "kind": "session",
                "settings": self.options.settings(),
                **report.circumstances("benchmarks.muon_training"),
                "parameters": counts._asdict(),
                "other_rate": self.config.adamw.learning_rate,
                "training_tokens": len(self.dataset.train_tokens),
                "held_out_tokens": sum(targets_BT.size for _, targets_BT in self.held_out),
                "baselines": ngram_baselines(self.dataset),
            }
        )


def benchmark(options: TrainingConfig) -> list[dict[str, Any]]:
    """Run what is not finished; what stands in the table, a row per optimizer."""
    bench, seeds = Bench(options), _numbers(options.seeds, int)
    grids = {name: rates_of(options, name) for name in options.names}
    trials = [(name, rate) for name, rates in grids.items() for rate in rates]
    tuning: dict[str, list[dict[str, Any]]] = {name: [] for name in grids}
    for index, (name, rate) in enumerate(trials, start=1):
        progress = f"tuning {index}/{len(trials)}"
        tuning[name].append(bench.run(name, rate, options.tuning_seed, options.steps, progress))
    best = {name: min(lines, key=loss_of)["rate"] for name, lines in tuning.items()}
    chosen = [(seed, name) for seed in seeds for name in grids]
    equal_updates: dict[str, list[dict[str, Any]]] = {name: [] for name in grids}
    for index, (seed, name) in enumerate(chosen, start=1):
        line = bench.run(name, best[name], seed, options.steps, f"equal updates {index}/{len(chosen)}")
        equal_updates[name].append(line)
    seconds = bench.time()["seconds"]
    times = {name: time_against(seconds[name], seconds["muon"]) for name in grids}
    fitting = {name: updates_that_fit(options.steps, ratio) for name, ratio in times.items()}
    chosen = [(seed, name) for seed in seeds for name in grids if fitting[name] != options.steps]
    equal_time = {name: [] if fitting[name] != options.steps else equal_updates[name] for name in grids}
    for index, (seed, name) in enumerate(chosen, start=1):
        line = bench.run(name, best[name], seed, fitting[name], f"equal time {index}/{len(chosen)}")
        equal_time[name].append(line)
    sessions = [line for line in bench.finished.lines if line["kind"] == "session"]
    return [
        {
            "optimizer": name,
            "grid": [[line["rate"], loss_of(line)] for line in tuning[name]],
            "rate": best[name],
            "equal_updates": [loss_of(line) for line in equal_updates[name]],
            "equal_time": [loss_of(line) for line in equal_time[name]],
            "time": times[name],
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "updates": fitting[name],
            "baseline": [loss_of(line) for line in equal_updates["muon"]],
            "options": options,
            "sessions": sessions,
        }
        for name in grids
    ]


def time_against(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Time per update over the baseline's of the same round: median and quartiles."""
    ratios = sorted(own / theirs for own, theirs in zip(seconds, baseline, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"low": low, "median": median, "high": high}


def updates_that_fit(steps: int, ratio: Mapping[str, float]) -> int:
    """Updates in the time of so many of the baseline's; just as many where the ratio is 1 within its noise.

    Within the noise: one lies between the quartiles, or the median is within `SMALLEST_DIFFERENCE` of it.
    """
    if ratio["low"] <= 1 <= ratio["high"] or abs(ratio["median"] - 1) < SMALLEST_DIFFERENCE:
        return steps
    return max(1, round(steps / ratio["median"]))


def mean_and_range(values: Sequence[float], form: str) -> str:
    """`mean (min to max)`."""
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def markdown(rows: list[dict[str, Any]]) -> str:
    """What was run and where, then a line per optimizer."""
    from benchmarks.muon_variants import VARIANTS

    options, first = rows[0]["options"], rows[0]["sessions"][0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("jax", "flax", "optax"))
    commits = ", ".join(dict.fromkeys(str(session["git_commit"])[:12] for session in rows[0]["sessions"]))
    cpus = "; ".join(dict.fromkeys(session["cpu"] for session in rows[0]["sessions"]))
    seeds = _numbers(options.seeds, int)
    trials = len(rows[0]["grid"])
    lines = []
    for row in rows:
        name, against = row["optimizer"], row["time"]
        differences = [own - muon for own, muon in zip(row["equal_updates"], row["baseline"], strict=True)]
        in_time = [own - muon for own, muon in zip(row["equal_time"], row["baseline"], strict=True)]
        rates = [rate for rate, _ in row["grid"]]
        at_edge = trials > 1 and row["rate"] in (rates[0], rates[-1])
        is_baseline, is_same = name == "muon", row["updates"] == options.steps
        lines.append(
            [
                VARIANTS[name].says,
                f"{row['rate']:g}" + (" (edge)" if at_edge else ""),
                mean_and_range(row["equal_updates"], ".3f"),
                "–" if is_baseline else mean_and_range(differences, "+.3f"),
                "1" if is_baseline else f"{against['median']:.2f} ({against['low']:.2f} to {against['high']:.2f})",
                f"{row['updates']}" + (" (noise)" if is_same and not is_baseline else ""),
                "–" if is_same else mean_and_range(in_time, "+.3f"),
            ]
        )
    baselines = ", ".join(f"{name} {nats:.2f}" for name, nats in first["baselines"].items())
    text = [
        f"### Muon and others, {options.preset}, {options.steps} updates of {options.batch_size} x "
        f"{options.sequence_length} tokens",
        "",
        f"`{rows[0]['sessions'][-1]['command']}`",
        "",
        f"{cpus}; {versions}; commit {commits}; {first['date']}.",
        f"{first['parameters']['total']:,} parameters, {first['parameters']['muon']:,} of them in matrices; "
        f"{options.compute}, Newton-Schulz {options.newton_schulz}. {first['training_tokens']:,} tokens to train on, "
        f"of which a run sees {options.steps * options.batch_size * options.sequence_length:,}. Losses are nats per "
        f"token on the same {first['held_out_tokens']:,} held-out tokens (on all of them: {baselines}). {trials} rates "
        f"each on seed {options.tuning_seed}, the best on seeds {', '.join(map(str, seeds))}; what is not a matrix has "
        f"the rate {first['other_rate']:g}, except under AdamW on everything. Mean (min to max) over the seeds; "
        f"differences are between runs of one seed. Time: median (quartiles) of {options.rounds} rounds.",
        "",
        *table(
            {
                **{"optimizer": "l", "best rate": "r", "held-out loss": "r", "minus Muon's, equal updates": "r"},
                **{"time of an update / Muon's": "r", "updates in Muon's time": "r", "minus Muon's, equal time": "r"},
            },
            lines,
        ),
    ]
    return "\n".join(text) + "\n"


def plot(rows: list[dict[str, Any]], png: Path) -> None:
    """A dot per optimizer and seed: losses, what sets Muon's variants apart; then the tuning, loss over rate."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from benchmarks.muon_variants import VARIANTS, is_muon

    options = rows[0]["options"]
    figure = Figure(figsize=(14, 1.8 + 0.4 * len(rows)), layout="constrained")
    dots, apart, curves = figure.subplots(1, 3, width_ratios=(3, 2, 3))

    def draw(axes, values: Sequence[float], place: float, colour: str, **style: Any) -> None:
        axes.plot(values, [place] * len(values), "o", color=colour, markersize=5, **style)
        axes.plot([statistics.fmean(values)] * 2, [place - 0.2, place + 0.2], color=colour, linewidth=1.5)

    for position, row in enumerate(rows):
        name = row["optimizer"]
        colour, mark = COLOURS[OPTIMIZERS.index(name)], MARKS[OPTIMIZERS.index(name)]
        draw(dots, row["equal_updates"], position - 0.15, colour)
        if row["updates"] != options.steps:
            draw(dots, row["equal_time"], position + 0.25, colour, markerfacecolor="white")
        if is_muon(name):
            differences = [own - muon for own, muon in zip(row["equal_updates"], row["baseline"], strict=True)]
            draw(apart, differences, position - 0.15, colour)
        points = [(rate / row["rate"], loss) for rate, loss in row["grid"] if math.isfinite(loss)]
        curves.plot(*zip(*points, strict=True), marker=mark, markersize=4, linewidth=1, color=colour, label=name)
    dots.set_yticks(range(len(rows)), [VARIANTS[row["optimizer"]].says for row in rows])
    apart.set_yticks(range(len(rows)), [""] * len(rows))
    for axes in (dots, apart):
        axes.set_ylim(len(rows) - 0.5, -0.5)
    dots.set(xlabel="held-out loss (nats per token)", title=f"Seeds {options.seeds}")
    apart.set(xlabel="minus Muon's of the same seed", title=f"Variants of Muon, {options.steps} updates")
    dots.plot([], [], "o", color="0.4", label=f"{options.steps} updates")
    dots.plot([], [], "o", color="0.4", markerfacecolor="white", label=f"in the time of Muon's {options.steps}")
    dots.legend(fontsize="x-small", framealpha=0.9, loc="lower right")
    curves.set_xscale("log", base=2)
    multiples = sorted({round(math.log2(rate / row["rate"])) for row in rows for rate, _ in row["grid"]})
    curves.set_xticks([2.0**power for power in multiples], [f"{2.0**power:g}" for power in multiples])
    curves.xaxis.set_minor_locator(NullLocator())
    curves.set(
        xlabel="rate over the optimizer's best", ylabel="held-out loss", title=f"Tuning, seed {options.tuning_seed}"
    )
    curves.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axes in (dots, apart, curves):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(report.heading(rows[0]["sessions"], lambda session: session["cpu"]), fontsize=9)
    figure.savefig(png, dpi=80)


def main(argv: list[str]) -> None:
    """Parse, run what is missing, print the table and write table and picture."""
    describe = "Train one small model with AdamW, Muon and its relatives, each tuned, and compare held-out losses."
    options = parse(TrainingConfig, argv, prog="benchmarks.muon_training", description=describe)
    rows = benchmark(options)
    print()
    print(markdown(rows))
    if options.out:
        Path(f"{options.out}.md").write_text(markdown(rows), encoding="utf-8")
        plot(rows, Path(f"{options.out}.png"))
        print(f"wrote {options.out}.jsonl, {options.out}.md, {options.out}.png")


if __name__ == "__main__":
    end(lambda: main(sys.argv[1:]))
