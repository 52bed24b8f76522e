"""Time greedy generation side by side: `python -m benchmarks.generation --help`.

One process per mode, each with the same fresh weights and prompts; the driver imports no framework. For each batch size
it asks the workers in turn and reverses the order every round, so that noise and clock drift hit all alike.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import job, machine, report
from benchmarks.driver import Meter, Worker, cores_for, launch
from benchmarks.tables import Bar, bars, ranged, table
from harness.cli import end, parse
from recipe.config import RunConfig, require, to_dict
from recipe.params import param_counts

COLOURS = {
    "jax": "#0072b2",
    "torch": "#e69f00",
    "torch-recompute": "#d55e00",
    "hf": "#7f7f7f",
    "hf-static": "#cc79a7",
}
"""Mode -> its colour in every picture (Okabe and Ito's palette)."""

BASELINE = "hf"


@dataclass(frozen=True)
class GenerationConfig:
    """One benchmark: a table with one row per batch size and mode."""

    preset: str = "seed"
    """The model; its weights are fresh, which changes no speed."""
    batch_sizes: str = "1,8"
    """Comma-separated: prompts generated from at once."""
    prompt_tokens: int = 32
    """Tokens of each prompt."""
    new_tokens: int = 128
    """Tokens generated for each prompt; no stop token ends it earlier."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    modes: str = "jax,torch,torch-recompute,hf"
    """Comma-separated: jax and torch (both cached), torch-recompute (the seed's loop), hf, hf-static (compiled)."""
    rounds: int = 5
    """Measured rounds; every mode is timed once in each."""
    warmup: int = 1
    """Rounds after the first call, which compiles, that do not count."""
    threads: int = 0
    """CPU cores each worker is pinned to; 0 is every physical core."""
    strict: bool = False
    """Fail instead of marking a row as noisy."""
    seed: int = 0
    """Seeds weights and prompts."""
    overrides: str = ""
    """JSON over the preset, e.g. {"model": {"num_hidden_layers": 1}}."""
    out: str = ""
    """Results are written to OUT.jsonl, OUT.md and OUT.png, never over older ones; empty prints the table only."""

    def __post_init__(self) -> None:
        for mode in self.mode_list:
            require(mode in COLOURS, f"--modes {mode} is unknown; choose from {', '.join(COLOURS)}.")
        require(
            len(set(self.mode_list)) == len(self.mode_list), f"--modes {self.modes} names one twice; name each once."
        )
        sizes = self.batch_sizes.split(",")
        require(all(map(str.isdigit, sizes)) and "0" not in sizes, f"--batch-sizes {self.batch_sizes} is not like 1,8.")
        for name in ("prompt_tokens", "new_tokens", "rounds"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1; choose e.g. 32.")
        for name in ("warmup", "threads"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be at least 0; choose e.g. 1.")

    @property
    def mode_list(self) -> list[str]:
        """The modes in the order given."""
        return self.modes.split(",")


class GenerationWorker(Worker):
    """A worker process that generates."""

    def __init__(self, mode: str, config: RunConfig, new_tokens: int, cpus: list[int]) -> None:
        # Cold compilation, and memory taken as needed: two frameworks may share one GPU.
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        super().__init__(mode, launch("benchmarks.generation_worker", environment, cpus))
        self.send({"mode": mode, "config": to_dict(config), "new_tokens": new_tokens})


def agreement(rows: list[list[int]], reference: list[list[int]]) -> float:
    """The share of tokens before the first one of their row that differs from the reference's."""
    same = [np.cumprod(np.array(row) == np.array(other)).sum() for row, other in zip(rows, reference, strict=True)]
    return float(sum(same) / sum(map(len, reference)))


def summarise(first: dict, answers: list[dict], baseline: list[dict], tokens: int) -> dict[str, Any]:
    """Statistics of one mode at one batch size; ratios are taken within a round."""
    times = report.spread([answer["seconds"] for answer in answers])
    ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in zip(answers, baseline, strict=True)]
    return {
        "seconds": times,
        "tokens_per_second": tokens / times["median"],
        "speed_against_baseline": report.spread(ratios),
        "first_token_seconds": report.spread([answer["first_seconds"] for answer in answers]),
        "compile_seconds": max(0.0, first["seconds"] - times["median"]),
        "rounds": [{name: answer[name] for name in ("seconds", "first_seconds", "foreign")} for answer in answers],
    }


def benchmark(options: GenerationConfig) -> list[dict[str, Any]]:
    """Run the benchmark and return one row per batch size and mode."""
    cpus = cores_for(options.threads)
    report.check_free(options.out)
    precision = {"compute": options.dtype, "newton_schulz": "float32", "matmul": "highest", "attention": "explicit"}
    shape = {"batch_size": None, "sequence_length": None, "accumulation": None}
    settings = {"overrides": options.overrides, "dropout": 0.0, "seed": options.seed}
    config = job.resolve(options.preset, **shape, **settings, **precision)
    total, limit = options.prompt_tokens + options.new_tokens, config.model.max_position_embeddings
    require(total <= limit, f"{total} tokens exceed the model's {limit} positions; lower --new-tokens.")
    print(
        f"{machine.cpu_name()}; pinned to {len(cpus)} cores; {param_counts(config.model).total:,} parameters",
        flush=True,
    )

    workers: list[GenerationWorker] = []
    try:
        for mode in options.mode_list:
            workers.append(GenerationWorker(mode, config, options.new_tokens, cpus))
        return _measure(options, config, workers, cpus)
    finally:
        for worker in workers:
            worker.close()


def _measure(
    options: GenerationConfig, config: RunConfig, workers: list[GenerationWorker], cpus: list[int]
) -> list[dict]:
    described = {worker.mode: worker.receive() for worker in workers}
    for key in ("backend", "threads"):
        values = {mode: answer["environment"][key] for mode, answer in described.items()}
        require(
            len(set(values.values())) == 1, f"{key} differs: {values}; set OMP_NUM_THREADS, XLA_FLAGS or --threads."
        )
    require(len({answer["weights"] for answer in described.values()}) == 1, "the workers' weights differ.")
    on_gpu = described[workers[0].mode]["environment"]["backend"] == "gpu"
    meter = Meter(cpus, guard=not on_gpu, strict=options.strict)
    baseline = BASELINE if BASELINE in options.mode_list else workers[0].mode
    common = report.circumstances("benchmarks.generation") | {
        "cores": len(cpus),
        "preset": options.preset,
        "dtype": options.dtype,
        "model": to_dict(config)["model"],
        "parameters": param_counts(config.model).total,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "baseline": baseline,
    }
    rows = []
    for batch in map(int, options.batch_sizes.split(",")):
        generator = np.random.Generator(np.random.Philox(key=[options.seed, batch]))
        prompts = generator.integers(0, config.model.vocab_size, (batch, options.prompt_tokens)).tolist()
        firsts, answers = {}, {worker.mode: [] for worker in workers}
        for worker in workers:
            worker.ask("prompts", prompts=prompts)
            firsts[worker.mode] = first = meter.once(worker, 1)
            print(f"batch {batch}, {worker.mode}: first call {first['seconds']:.1f} s", flush=True)
            for _ in range(options.warmup):
                meter.once(worker, 1)
        for index in range(options.rounds):
            for worker in workers if index % 2 == 0 else reversed(workers):
                answers[worker.mode].append(meter.quietest(worker, 1))
            times = ", ".join(f"{mode} {answer[-1]['seconds']:.2f} s" for mode, answer in answers.items())
            print(f"batch {batch}, round {index + 1}/{options.rounds}: {times}", flush=True)
        for mode in answers:
            rows.append(
                common
                | {"batch_size": batch, "mode": mode, **described[mode]}
                | summarise(firsts[mode], answers[mode], answers[baseline], batch * options.new_tokens)
                | {
                    "agreement": agreement(answers[mode][-1]["rows"], answers[baseline][-1]["rows"]),
                    "noisy": any(meter.noisy(answer) for answer in answers[mode]),
                }
            )
    return rows


def title(row: dict[str, Any]) -> str:
    """What was run: preset, batch, tokens, dtype."""
    tokens = f"{row['prompt_tokens']} + {row['new_tokens']} tokens"
    return f"{row['preset']}, batch {row['batch_size']}, {tokens}, {row['dtype']}"


def device(row: dict[str, Any]) -> str:
    """The GPU's name, or the CPU's with the cores in use."""
    place = row["environment"]
    return f"{row['cpu']}, {row['cores']} in use" if place["backend"] == "cpu" else place["device"]


def groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each command and batch size."""
    keys = [(row["command"], row["date"], row["batch_size"]) for row in rows]
    return [[row for row, own in zip(rows, keys, strict=True) if own == key] for key in dict.fromkeys(keys)]


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table per batch size: what was run and where, then a line per mode."""
    text = []
    for group in groups(rows):
        first = group[0]
        versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("jax", "flax", "torch", "transformers"))
        text += [
            f"### {title(first)}",
            "",
            f"`{first['command']}`",
            "",
            f"{device(first)}; {versions}; commit {first['git_commit']}; {first['date']}. "
            f"{len(first['rounds'])} rounds in alternating order, greedy; {first['parameters']:,} parameters.",
            "",
            *table(
                {
                    **{"mode": "l", "tokens/s, median (min–max)": "r", f"x {first['baseline']} (min–max)": "r"},
                    **{"first token, ms": "r", "compile, s": "r", "same tokens": "r", "noise": "l"},
                },
                map(_cells, group),
            ),
            "",
        ]
    return "\n".join(text)


def _cells(row: dict[str, Any]) -> list[str]:
    tokens, times = row["batch_size"] * row["new_tokens"], row["seconds"]
    foreign = max(answer["foreign"] for answer in row["rounds"])
    return [
        row["mode"],
        f"{row['tokens_per_second']:,.1f} ({tokens / times['max']:,.1f}–{tokens / times['min']:,.1f})",
        ranged(row["speed_against_baseline"], ".2f"),
        f"{1e3 * row['first_token_seconds']['median']:,.0f}",
        f"{row['compile_seconds']:.1f}",
        f"{row['agreement']:.0%}",
        f"{'**noisy**, ' if row['noisy'] else ''}others used up to {foreign:.2f} cores",
    ]


def plot(rows: list[dict[str, Any]], png: Path) -> None:
    """Bars of tokens per second, whiskers from the slowest to the fastest round, one group per batch size."""
    panels = []
    for group in groups(rows):
        drawn = []
        for row in group:
            rate, tokens = row["tokens_per_second"], row["batch_size"] * row["new_tokens"]
            label = f"{rate:,.0f}   {row['speed_against_baseline']['median']:.2f} x {row['baseline']}"
            label += "   noisy" if row["noisy"] else ""
            ends = tokens / row["seconds"]["max"], tokens / row["seconds"]["min"]
            drawn.append(Bar(row["mode"], rate, *ends, label, COLOURS[row["mode"]]))
        panels.append((title(group[0]), drawn))
    quantity = "generated tokens per second: median round, whiskers slowest to fastest"
    bars(panels, png, quantity=quantity, heading=report.heading(rows, device))


def main(argv: list[str]) -> None:
    """Parse, measure, print the tables and write the results."""
    describe = "Time greedy generation: JAX and torch with their caches, the whole sequence again, transformers."
    options = parse(GenerationConfig, argv, prog="benchmarks.generation", description=describe)
    report.show(benchmark(options), options.out, table=markdown, bars=plot)


if __name__ == "__main__":
    end(lambda: main(sys.argv[1:]))
