"""Time training updates of both frameworks side by side: `python -m benchmarks.throughput --help`.

One process per mode, each with the same weights, batches and precision; the driver imports no framework. It steps the
workers in turn and reverses the order every round, so that noise and clock drift hit all alike; or, `--exclusive`,
gives each the machine to itself, twice, the second time in reverse order. `--jax-step` and `--torch-step` time steps of
one's own instead (`benchmarks.pair`).
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from benchmarks import job, machine, pair, report
from benchmarks.driver import (
    Meter,
    Worker,
    WorkerEnded,
    cold_environment,
    cores_for,
    flags_of,
    launch,
    refuse_a_busy_gpu,
)
from harness.cli import parse, run
from recipe.config import RunConfig, require, to_dict

MODES = {
    "jax": "benchmarks.worker_jax",
    "torch-eager": "benchmarks.worker_torch",
    "torch-compile": "benchmarks.worker_torch",
    "torch-compile-max": "benchmarks.worker_torch",
    "torch-eager-lce": "benchmarks.worker_torch",
    "torch-compile-lce": "benchmarks.worker_torch",
    "hf": "benchmarks.worker_torch",
    "seed": "benchmarks.worker_torch",
}
"""Mode -> the module of its worker."""

XLA_PRESETS = {
    "none": "",
    # Loops and branches join the CUDA graphs that hold plain kernels by default.
    "command-buffers": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
    "latency-hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "triton-gemm": "--xla_gpu_triton_gemm_any=true",
}
XLA_PRESETS["h100"] = " ".join(flags for flags in XLA_PRESETS.values() if flags)
"""Flags of XLA's GPU compiler that may help, by name; none has been measured yet, and all are off by default."""

BASELINE = "torch-eager"
# The parts of an update are timed this often, for this share of a round each; the median counts.
PART_ROUNDS, PART_SHARE = 5, 0.25
OF_A_PAIR = ("jax_step", "torch_step", "rounds", "warmup", "round_seconds", "threads", "strict", "out")
"""Options that go with steps of one's own; the others describe this project's."""


@dataclass(frozen=True)
class ThroughputConfig:
    """One benchmark: a table with one row per mode."""

    preset: str = "tiny"
    """The model and recipe to time."""
    batch_size: str = ""
    """Sequences per micro-batch; several with commas between make a sweep; empty takes the preset's."""
    sequence_length: str = ""
    """Tokens per sequence, likewise; every length is run with every batch size."""
    accumulation: int | None = None
    """Micro-batches per update; None takes the preset's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters stay in float32."""
    newton_schulz: Literal["float32", "bfloat16"] = "bfloat16"
    """Stored dtype of the Newton-Schulz iteration."""
    matmul: Literal["default", "highest"] = "highest"
    """float32 products: highest is true float32; default lets a GPU use TF32."""
    attention: Literal["fused", "explicit"] = "fused"
    """fused is the framework's kernel where it has one (SDPA, cuDNN), explicit this project's query blocks."""
    dropout: float = 0.0
    """Dropout rate; hf has none, and with it jax alone has a fused attention."""
    modes: str = "jax,torch-eager,torch-compile"
    """Comma-separated: jax, torch-eager, torch-compile, torch-compile-max (max-autotune, GPU only),
    torch-eager-lce and torch-compile-lce (torch's linear_cross_entropy in chunks), hf (its Qwen3), seed (the seed
    notebook's path)."""
    rounds: int = 5
    """Measured rounds; every mode is timed once in each."""
    warmup: int = 2
    """Rounds after the first update that do not count."""
    round_seconds: float = 1.0
    """A measurement lasts about this long at least, in whole updates, the same number for every mode."""
    threads: int = 0
    """CPU cores each worker is pinned to; 0 is every physical core."""
    shares: bool = False
    """Also time the optimizer, the loss head and attention alone."""
    cold_warm: bool = False
    """Also start every mode a second time, with the compilation cache its first start has filled."""
    exclusive: bool = False
    """One worker at a time, each started twice: for a GPU whose memory does not hold all of them. A mode that fails,
    for want of memory say, is left out of the table."""
    xla_preset: str = "none"
    """XLA flags of the jax mode, by name: none, command-buffers, latency-hiding, triton-gemm, or h100 for all."""
    strict: bool = False
    """Fail instead of marking a row as noisy."""
    seed: int = 0
    """Seeds weights and batches."""
    overrides: str = ""
    """JSON over the preset, e.g. {"model": {"num_hidden_layers": 1}}."""
    out: str = ""
    """Results are written to OUT.jsonl, OUT.md and OUT.png (a sweep's curves to OUT-scaling.png), never over older
    ones; empty prints the table only."""
    jax_step: str = ""
    """A step of your own in JAX, MODULE:FUNCTION or FILE.py:FUNCTION, timed against --torch-step instead of the modes;
    what the function is: benchmarks/README.md."""
    torch_step: str = ""
    """Its opponent in torch."""

    def __post_init__(self) -> None:
        if self.jax_step or self.torch_step:
            for name, other in (("jax_step", "torch_step"), ("torch_step", "jax_step")):
                flags = f"--{name} and --{other}".replace("_", "-")
                require(bool(getattr(self, name)), f"{flags} go together, as MODULE:FUNCTION or FILE.py:FUNCTION.")
            for one in fields(self):
                value, default = getattr(self, one.name), one.default
                require(
                    one.name in OF_A_PAIR or default is MISSING or value == default,
                    f"--{one.name.replace('_', '-')} {value} is of this project's own model and does not go with "
                    "--jax-step; leave it out.",
                )
        modes = self.mode_list
        for mode in modes:
            require(mode in MODES, f"--modes {mode} is unknown; choose from {', '.join(MODES)}.")
        require(len(set(modes)) == len(modes), f"--modes {self.modes} names a mode twice; name each once.")
        require(self.rounds >= 1, f"--rounds {self.rounds} must be at least 1; choose e.g. 5.")
        require(self.warmup >= 1, f"--warmup {self.warmup} must be at least 1; choose e.g. 2.")
        require(self.round_seconds >= 0, f"--round-seconds {self.round_seconds} must be at least 0; choose e.g. 1.")
        require(self.threads >= 0, f"--threads {self.threads} must be at least 0; choose 0 for all physical cores.")
        for mode in ("hf", "seed"):
            require(
                mode not in modes or self.dropout == 0,
                f"--dropout {self.dropout} excludes mode {mode}; use 0 or drop it.",
            )
        require(
            self.xla_preset in XLA_PRESETS,
            f"--xla-preset {self.xla_preset} is unknown; choose from {', '.join(XLA_PRESETS)}.",
        )
        require(
            not self.exclusive or self.rounds >= 2,
            f"--rounds {self.rounds} must be at least 2 with --exclusive, one for each visit; choose e.g. 6.",
        )
        for name in ("batch_size", "sequence_length"):
            for text in getattr(self, name).split(",") if getattr(self, name) else []:
                require(
                    text.isdecimal() and int(text) > 0,
                    f"--{name} {getattr(self, name)} must be whole numbers of at least 1 with commas between; "
                    "choose e.g. 2,8.",
                )

    @property
    def mode_list(self) -> list[str]:
        """The modes in the order given."""
        return self.modes.split(",")

    @property
    def shapes(self) -> list[tuple[int | None, int | None]]:
        """Every (batch size, sequence length) to run; None is the preset's."""
        batches, lengths = (
            [int(text) for text in sizes.split(",")] if sizes else [None]
            for sizes in (self.batch_size, self.sequence_length)
        )
        return [(batch, length) for length in lengths for batch in batches]


class ModeWorker(Worker):
    """A worker process of one mode, with a compilation cache of its own."""

    def __init__(self, mode: str, config: RunConfig, cpus: list[int], cache: Path, xla_flags: str = "") -> None:
        environment = cold_environment(cache)
        if mode == "jax" and xla_flags:
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {xla_flags}".strip()
        self.flags = flags_of(environment, cache)
        launched = time.perf_counter()
        super().__init__(mode, launch(MODES[mode], environment, cpus))
        self.send({"mode": mode, "config": to_dict(config), "launched": launched})


@dataclass
class Measured:
    """What is known of one mode."""

    description: dict[str, Any]
    flags: dict[str, str]
    first: dict[str, float]
    first_step: dict[str, float]
    """Seconds from the start of the process to the end of the first update, by the state of the cache."""
    answers: list[dict[str, float]] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    ceiling: float = 0.0


def throughput(options: ThroughputConfig) -> list[dict[str, Any]]:
    """Run the benchmark and return one row per shape and mode; raises ValueError where modes cannot be compared."""
    cpus = cores_for(options.threads)
    configs = [
        job.resolve(
            options.preset,
            batch_size=batch_size,
            sequence_length=sequence_length,
            accumulation=options.accumulation,
            overrides=options.overrides,
            dropout=options.dropout,
            seed=options.seed,
            compute=options.dtype,
            newton_schulz=options.newton_schulz,
            matmul=options.matmul,
            attention=options.attention,
        )
        for batch_size, sequence_length in options.shapes
    ]
    report.check_free(options.out)
    for config in configs:
        job.check_foreseen(config, options.mode_list, cpus=len(cpus), on_gpu=machine.has_gpu())
    rows = []
    for config in configs:
        flops = job.flops_per_update(config)
        print(
            f"{machine.cpu_name()}; pinned to {len(cpus)} cores; {config.accumulation} x {config.batch_size} x "
            f"{config.sequence_length} tokens, {flops:.4g} FLOPs per update",
            flush=True,
        )
        with tempfile.TemporaryDirectory() as caches:
            rows += _Benchmark(options, config, cpus, Path(caches)).run()
    return rows


class _Benchmark:
    """All modes at one shape."""

    def __init__(self, options: ThroughputConfig, config: RunConfig, cpus: list[int], caches: Path) -> None:
        self.options, self.config, self.cpus, self.caches = options, config, cpus, caches
        self.measured: dict[str, Measured] = {}
        self.failed: dict[str, str] = {}
        self.gpu_before = machine.gpu_state()
        self.meter = Meter(cpus, guard=True, strict=options.strict)

    def run(self) -> list[dict[str, Any]]:
        """One row per mode that could be measured."""
        options = self.options
        refuse_a_busy_gpu(self.gpu_before, options.strict)
        if options.exclusive:
            half = options.rounds // 2
            for mode in options.mode_list:
                self._alone(mode, options.rounds - half, parts=False)
            for mode in reversed(list(self.measured)):
                self._alone(mode, half, parts=options.shares)
        else:
            self._visit(options.mode_list, options.rounds, parts=options.shares)
            if options.cold_warm:
                for mode in self.measured:
                    self._visit([mode], 0, parts=False)
        require(bool(self.measured), f"--modes {options.modes}: none could be measured ({self.failed}); change them.")
        return self._rows()

    def _alone(self, mode: str, rounds: int, *, parts: bool) -> None:
        """A visit of one mode; if its process ends early, it is left out, unless only its parts were missing."""
        try:
            self._visit([mode], rounds, parts=parts)
        except WorkerEnded as error:
            self.failed[mode] = str(error)
            print(f"{mode}: {error}", flush=True)
            if mode in self.measured and len(self.measured[mode].answers) < self.options.rounds:
                del self.measured[mode]

    def _visit(self, modes: list[str], rounds: int, *, parts: bool) -> None:
        """Start these modes together, compare, and measure so many rounds; without rounds only the first update."""
        workers: list[ModeWorker] = []
        described = {}
        try:
            for mode in modes:
                flags = XLA_PRESETS[self.options.xla_preset]
                workers.append(ModeWorker(mode, self.config, self.cpus, self.caches / mode, flags))
                described[mode] = workers[-1].receive()  # one after another, as starting is timed
            self._begin(workers, described)
            if rounds and workers:
                self._measure(workers, rounds)
            if parts and workers:
                self._time_parts(workers)
        finally:
            for worker in workers:
                worker.close()

    def _begin(self, workers: list[ModeWorker], described: dict[str, dict]) -> None:
        """The contract and the first update of each; a mode that this backend does not have is closed and removed."""
        for mode, answer in described.items():
            print(f"{mode}: {json.dumps(answer['contract'])}", flush=True)
        known = {mode: one.description for mode, one in self.measured.items()}
        job.check_contracts({mode: answer["contract"] for mode, answer in (known | described).items()})
        self.meter.guard = any(answer["contract"]["backend"] == "cpu" for answer in described.values())
        for worker in [worker for worker in workers if worker.mode == "torch-compile-max" and self.meter.guard]:
            print("torch-compile-max: skipped, as max-autotune needs a GPU", flush=True)
            workers.remove(worker)
            worker.close()
        firsts = {mode: one.first for mode, one in self.measured.items()}
        for worker in workers:
            first = self.meter.once(worker, 1)
            seconds = described[worker.mode]["start_seconds"] + first["seconds"]
            state = "warm" if worker.mode in self.measured else "cold"
            print(
                f"{worker.mode}, {state} cache: first update {first['seconds']:.2f} s, with the start {seconds:.2f} s, "
                f"loss {first['loss']:.9g}",
                flush=True,
            )
            firsts[worker.mode] = first
            if state == "cold":
                self.measured[worker.mode] = Measured(described[worker.mode], worker.flags, first, {})
            self.measured[worker.mode].first_step[state] = seconds
        if firsts:
            differences = job.check_first_updates(self.config, firsts)
            print(f"first losses differ by {differences['loss']:.2e} nats, gradients by {differences['grad_norm']:.2e}")

    def _measure(self, workers: list[ModeWorker], rounds: int) -> None:
        """Warm-up and rounds, the order reversed every other one; then memory and ceiling."""
        options = self.options
        for worker in workers:
            memory = {"to_first": worker.ask("memory"), "reset": worker.ask("reset_memory")["done"]}
            self.measured[worker.mode].memory = self.measured[worker.mode].memory or memory
        seconds = options.round_seconds
        for answers in self.meter.rounds(workers, rounds=rounds, warmup=options.warmup, seconds=seconds):
            for mode, answer in answers.items():
                self.measured[mode].answers.append(answer)
        for worker in workers:
            one = self.measured[worker.mode]
            one.memory.setdefault("steady", worker.ask("memory"))
            one.ceiling = max(one.ceiling, worker.ask("ceiling")["flops_per_second"])
            print(f"{worker.mode}: ceiling {one.ceiling / 1e9:.1f} GFLOP/s", flush=True)

    def _time_parts(self, workers: list[ModeWorker]) -> None:
        """The parts of an update alone, the order reversed every other time."""
        seconds = PART_SHARE * self.options.round_seconds
        for index in range(PART_ROUNDS):
            for worker in workers if index % 2 == 0 else reversed(workers):
                self.measured[worker.mode].parts.append(worker.ask("parts", seconds=seconds))
        for worker in workers:
            medians = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in self._part_seconds(worker.mode).items())
            print(f"{worker.mode}: alone, per update: {medians}", flush=True)

    def _part_seconds(self, mode: str) -> dict[str, float]:
        times = self.measured[mode].parts
        return {name: statistics.median(part[name] for part in times) for name in times[0]} if times else {}

    def _rows(self) -> list[dict[str, Any]]:
        options, config, measured = self.options, self.config, self.measured
        noise = {mode: self.meter.noise(one.answers, self.gpu_before) for mode, one in measured.items()}
        require(not (options.strict and any(noise.values())), f"too noisy: {noise}; quieten it or drop --strict.")
        skipped = {mode: one.answers[-1]["skipped"] for mode, one in measured.items() if one.answers[-1]["skipped"]}
        require(not skipped, f"updates were skipped as not finite: {skipped}; times of left-out work mean nothing.")
        ceiling = max(one.ceiling for one in measured.values())
        flops, part_flops = job.flops_per_update(config), job.part_flops(config)
        firsts = {mode: one.first for mode, one in measured.items()}
        common = report.circumstances("benchmarks.throughput") | {
            "cores": len(self.cpus),
            "gpu_before": self.gpu_before,
            "gpu_after": machine.gpu_state(),
            "preset": options.preset,
            "dtype": options.dtype,
            "config": to_dict(config),
            "exclusive": options.exclusive,
            "xla_preset": options.xla_preset,
            "flop_formula": job.FLOP_FORMULA,
            "flops_per_update": flops,
            "tokens_per_update": config.tokens_per_step,
            "ceiling_flops_per_second": ceiling,
            "first_update_differences": job.check_first_updates(config, firsts),
            "first_update_allowances": job.first_update_allowances(config, firsts),
            "failed": self.failed,
        }
        baseline = BASELINE if BASELINE in measured else next(iter(measured))
        seconds = {mode: [a["seconds"] / a["updates"] for a in one.answers] for mode, one in measured.items()}
        rows = []
        for mode, one in measured.items():
            statistics_of_mode = report.summarise(
                mode,
                seconds=seconds[mode],
                baseline_seconds=seconds[baseline],
                flops=flops,
                tokens=config.tokens_per_step,
                ceiling=ceiling,
            )
            step = statistics_of_mode["seconds_per_update"]["median"]
            parts = {
                name: {"seconds": alone, "share": alone / step, "flops": part_flops[name]}
                for name, alone in self._part_seconds(mode).items()
            }
            own = {
                "baseline": baseline,
                "updates_per_measurement": one.answers[0]["updates"],
                "first_update_seconds": one.first["seconds"],
                "first_step_seconds": one.first_step,
                "first_loss": one.first["loss"],
                "first_grad_norm": one.first["grad_norm"],
                "last_loss": one.answers[-1]["loss"],
                "own_ceiling_flops_per_second": one.ceiling,
                "parts": parts,
                "memory": one.memory,
                "flags": one.flags,
                "foreign_cores": [answer["foreign"] for answer in one.answers],
                "noisy": bool(noise[mode]),
                "noise": noise[mode],
            }
            rows.append(common | statistics_of_mode | own | one.description)
        return rows


def main(argv: list[str]) -> None:
    """Parse, measure, print the table and write the results."""
    describe = "Time training updates of JAX and torch side by side: same weights, batches and precision."
    options = parse(ThroughputConfig, argv, prog="benchmarks.throughput", description=describe)
    if options.jax_step:
        how = {name: getattr(options, name) for name in ("rounds", "warmup", "round_seconds", "threads", "strict")}
        report.check_free(options.out)
        timed = pair.time_pair(options.jax_step, options.torch_step, **how)
        report.show(timed.rows, options.out, table=pair.markdown, bars=pair.plot)
        return
    rows = throughput(options)
    report.show(rows, options.out, table=report.markdown, bars=report.plot, curves=report.plot_scaling)


def command_line() -> int:
    """The exit code: 0 done, 1 failed, 2 the user's mistake or modes that cannot be compared."""
    return run(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(command_line())
