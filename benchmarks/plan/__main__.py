"""Plan training updates for a device that is not here: `python -m benchmarks.plan --help`."""

import dataclasses
import functools
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import job
from benchmarks.plan import report
from benchmarks.plan.parts import costs
from benchmarks.plan.program import Program
from benchmarks.plan.targets import Target, get_target
from benchmarks.plan.traffic import formula
from harness.cli import end, parse
from harness.surroundings import git_commit, installed_versions
from recipe.config import RunConfig, UserError, require
from recipe.mesh import MeshShape, parse_mesh

SHOWN = ("jax", "jaxlib", "flax", "optax")
"""Packages that can change the program; a target's own come beside them."""


@dataclass(frozen=True)
class PlanConfig:
    """One plan a preset: a table of what the compiled update would launch, move and multiply."""

    preset: str = "seed"
    """The models and recipes, with commas between."""
    target: str = "h100"
    """The device: h100, v5e, v5p, v6e, or host for this machine's own processor, which is counted but not timed."""
    mesh: str = "1"
    """Devices by axis as the run's --mesh, e.g. data=4,fsdp=64; a number N is data=N: the rows of every micro-batch are
    divided, the state is on each."""
    gather: Literal["update", "layer"] = "update"
    """The run's --gather."""
    scan_layers: bool = False
    """The run's --scan_layers."""
    remat: bool = False
    """The run's --precision.remat."""
    batch_size: int | None = None
    """Sequences per micro-batch, of all devices together; None takes the preset's."""
    sequence_length: int | None = None
    """Tokens per sequence, likewise."""
    accumulation: int | None = None
    """Micro-batches per update, likewise."""
    dropout: float | None = None
    """Dropout rate, likewise."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype; parameters stay in float32."""
    newton_schulz: Literal["float32", "bfloat16"] = "bfloat16"
    """Stored dtype of the Newton-Schulz iteration."""
    matmul: Literal["default", "highest"] = "highest"
    """float32 products: highest is true float32; default lets a GPU use TF32."""
    attention: Literal["fused", "explicit"] = "fused"
    """fused is the device's kernel where the model can take it, explicit this project's query blocks."""
    products: Literal["cublas", "triton"] = "cublas"
    """Who multiplies on a GPU: without one nothing is tuned, so all products go one way."""
    option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of XLA's, NAME=VALUE; may stand there several times."""
    overrides: str = ""
    """JSON over the preset, e.g. {"model": {"num_hidden_layers": 1}}."""
    against: str = ""
    """An earlier plan's .json, from which the differences are shown, by part and in total."""
    out: str = ""
    """Writes OUT.md and OUT.json, never over older ones; empty prints the tables only."""
    hlo: str = ""
    """Folder that also gets every compiled program's text."""

    def __post_init__(self) -> None:
        get_target(self.target).topology(self.shape.devices)
        for option in self.option:
            require("=" in option, f"--option {option} is not NAME=VALUE; write e.g. xla_gpu_autotune_level=0.")

    @property
    def compiler_options(self) -> dict[str, str]:
        """The options given."""
        return dict(option.split("=", 1) for option in self.option)

    @property
    def shape(self) -> MeshShape:
        """The mesh."""
        try:
            return parse_mesh(f"data={self.mesh}" if self.mesh.isdecimal() else self.mesh) or MeshShape()
        except ValueError as error:
            raise UserError(f"--{error}") from None

    def resolve(self, preset: str) -> RunConfig:
        """The preset with these settings over it."""
        config = job.resolve(
            preset,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            accumulation=self.accumulation,
            overrides=self.overrides,
            dropout=self.dropout,
            seed=0,
            compute=self.dtype,
            newton_schulz=self.newton_schulz,
            matmul=self.matmul,
            attention=self.attention,
        )
        mesh = str(self.shape) if self.shape.devices > 1 else ""
        precision = dataclasses.replace(config.precision, remat=self.remat)
        return dataclasses.replace(
            config, mesh=mesh, gather=self.gather, scan_layers=self.scan_layers, precision=precision
        )


def plan(options: PlanConfig, preset: str) -> dict[str, Any]:
    """The record of one preset: `report.summarise`, and how it was made."""
    # Here, because jax reads its environment when it is imported, and `prepare` must have set it.
    from benchmarks.plan.compile import compile_update

    target, config = get_target(options.target), options.resolve(preset)
    multiply = {"xla_gpu_enable_triton_gemm": options.products == "triton"} if target.platform == "cuda" else {}
    compiled = compile_update(config, target, options={**multiply, **options.compiler_options})
    if options.hlo:
        folder = Path(options.hlo)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{preset}-{target.name}.hlo.txt").write_text(compiled.text, encoding="utf-8")
    program = Program(compiled.text)
    devices = options.shape.devices
    found = costs(program, config, target.rates, compiled.estimates, functools.partial(target.link_rate, devices))
    versions = installed_versions() | target.versions()
    return {
        "command": shlex.join(["python", "-m", "benchmarks.plan", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "versions": {name: version for name, version in versions.items() if name in (*SHOWN, *target.packages)},
        "products_by": options.products if target.platform == "cuda" else "XLA",
        "options": options.compiler_options,
        "seconds": compiled.seconds,
        **report.summarise(
            program,
            found,
            config,
            target,
            devices=devices,
            memory=compiled.memory,
            state_arrays=compiled.state_arrays,
            code=compiled.code,
            formula=formula(config, compiled.tokens_at_once),
        ),
    }


def prepare(target: Target, devices: int) -> None:
    """Set what JAX reads when it is imported: this process computes nothing, and on the CPU."""
    if "jax" in sys.modules:
        raise RuntimeError("jax is imported already; a plan needs a process of its own.")
    os.environ.update(target.environment, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(devices))


def earlier(path: str, count: int) -> list[dict[str, Any]]:
    """The plans of a file that `--out` wrote, one for each of these presets."""
    try:
        plans = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        plans = None
    if not (isinstance(plans, list) and all(isinstance(one, dict) and "parts" in one for one in plans)):
        raise UserError(f"--against {path} is not a plan; name a .json that --out wrote.")
    require(
        len(plans) == count,
        f"--against {path} holds {len(plans)} plans and --preset names {count}; name as many, in the same order.",
    )
    return plans


def main() -> None:
    """Compile, print the tables and write them."""
    describe = "What XLA makes of an update on a device that is not here: compiled ahead of time and counted, not run."
    options = parse(PlanConfig, sys.argv[1:], prog="benchmarks.plan", description=describe)
    presets = options.preset.split(",")
    for preset in presets:
        options.resolve(preset)  # every mistake before the first minute of compiling
    files = [Path(f"{options.out}{ending}") for ending in (".md", ".json")] if options.out else []
    for file in files:
        require(not file.exists(), f"{file} exists, and results are never overwritten; choose another --out.")
    before = earlier(options.against, len(presets)) if options.against else []
    target = get_target(options.target)
    target.check_installed()
    prepare(target, options.shape.devices)
    plans, texts = [], []
    for index, preset in enumerate(presets):
        plans.append(plan(options, preset))
        texts.append(report.markdown(plans[-1]))
        if before:
            texts.append(report.difference(before[index], plans[-1]))
        print("\n".join(texts[-2 if before else -1 :]), flush=True)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = "\n".join(texts) if file.suffix == ".md" else json.dumps(plans, indent=1, allow_nan=False) + "\n"
        file.write_text(whole, encoding="utf-8")
    if files:
        print("wrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    end(main)
