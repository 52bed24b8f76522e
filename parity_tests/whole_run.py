"""Whole training runs, update by update: `python -m parity_tests.whole_run --out FOLDER`.

The full recipe on a small model and a text that can be learnt: accumulation, dropout, a clip that clips, Muon and AdamW
at the seed's rates, warm-up and cosine, tied embedding, the recipe's own initial weights. The truth is torch_ref in
float64. In float64 JAX must follow it to rounding; float32 and bfloat16 drift, in both frameworks alike, and the report
says how far.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from harness import cli
from harness.surroundings import git_commit, installed_versions
from parity_tests.cases import AWKWARD, BFLOAT16, FLOAT32, FLOAT64, run_config
from parity_tests.compare.tolerance import relative_error
from parity_tests.sides import Arrays, JaxTraining, TorchTraining
from recipe.config import AdamWConfig, MuonConfig, PrecisionConfig, RunConfig, require
from recipe.params import init_params

MODEL = dataclasses.replace(AWKWARD, hidden_size=24, dropout=0.1)
STEPS = 300
SIDES = {"jax": JaxTraining, "torch": TorchTraining}
PRECISIONS = {
    "float64": FLOAT64,
    "float32": FLOAT32,
    "float32, bfloat16 Newton-Schulz": dataclasses.replace(FLOAT32, newton_schulz="bfloat16"),
    "bfloat16": BFLOAT16,
}


def whole_run_config(precision: PrecisionConfig, seed: int = 3, steps: int = STEPS) -> RunConfig:
    """The recipe at the seed's rates, three micro-batches of 2 x 7 tokens per update."""
    optimizers = dict(muon=MuonConfig(learning_rate=0.01), adamw=AdamWConfig(learning_rate=0.001))
    return run_config(MODEL, precision, steps=steps, clip_norm=1.0, seed=seed, **optimizers)


@functools.cache
def batch(step: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A text that can be learnt: four tokens in five are the one before plus five, the fifth is any."""
    generator = np.random.default_rng((seed, step))
    shape = (3, 2)
    tokens = [generator.integers(0, MODEL.vocab_size, shape)]
    for _ in range(7):
        surprise = generator.random(shape) < 0.2
        other = generator.integers(0, MODEL.vocab_size, shape)
        tokens.append(np.where(surprise, other, (tokens[-1] + 5) % MODEL.vocab_size))
    tokens = np.stack(tokens, axis=-1).astype(np.int32)
    return tokens[..., :-1], tokens[..., 1:]


def updates(side: str, precision: PrecisionConfig, seed: int = 3, steps: int = STEPS) -> Iterator[dict[str, Arrays]]:
    """After each update: metrics, weights and optimizer slots, by kind and name."""
    config = whole_run_config(precision, seed, steps)
    training = SIDES[side](config, init_params(config.model, seed))
    for step in range(steps):
        metrics = training.step(*batch(step, seed))
        yield {
            "metric": {name: np.array(value) for name, value in metrics.items()},
            "weight": training.weights(),
            **training.slots(),
        }


def drift(entry: dict[str, Arrays], truth: dict[str, Arrays]) -> dict[str, float]:
    """Largest relative error of any array of each kind."""
    return {kind: max(relative_error(entry[kind][name], true[name]) for name in true) for kind, true in truth.items()}


@dataclass(frozen=True)
class WholeRunCommand:
    """Train 300 updates in both frameworks and every precision, and report how far each is from float64."""

    out: str = ""
    """Files OUT.json, OUT.md and OUT.png, never over older ones; empty prints the table only."""
    seeds: int = 3
    """Runs of each precision, with other weights, text and dropout."""
    steps: int = STEPS
    """Updates."""

    def __post_init__(self) -> None:
        require(self.seeds > 0, f"seeds={self.seeds} must be at least 1; choose e.g. 3.")
        require(self.steps > 0, f"steps={self.steps} must be at least 1; choose e.g. {STEPS}.")
        for suffix in (".json", ".md", ".png") if self.out else ():
            file = Path(self.out + suffix)
            require(not file.exists(), f"{file} exists and is never overwritten; choose another --out.")


def measure(seeds: int, steps: int) -> dict[str, dict[str, list]]:
    """By precision and side, for every seed: drift by kind after each update, and the losses."""
    found = {name: {side: [] for side in SIDES} for name in PRECISIONS}
    bar = tqdm(total=seeds * (2 * len(PRECISIONS) - 1), unit="run", disable=not sys.stderr.isatty())
    for seed in range(seeds):
        truths = list(updates("torch", FLOAT64, seed, steps))
        for name, precision in PRECISIONS.items():
            for side in SIDES:
                runs = truths if (name, side) == ("float64", "torch") else updates(side, precision, seed, steps)
                drifts, losses = [], []
                for entry, truth in zip(runs, truths, strict=True):
                    drifts.append({kind: float(f"{error:.3g}") for kind, error in drift(entry, truth).items()})
                    losses.append(float(entry["metric"]["loss"]))
                found[name][side].append({"drift": drifts, "loss": losses})
                bar.update()
    bar.close()
    return found


def table(found: dict) -> str:
    """Largest drift of any weight and of any optimizer slot, smallest to largest over the seeds."""
    lines = [
        "| precision | side | weights | optimizer slots | loss | last 20 losses, mean |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, sides in found.items():
        for side, runs in sides.items():
            if (name, side) == ("float64", "torch"):
                continue
            cells = [name, side]
            for kinds in (("weight",), ("mu", "exp_avg", "exp_avg_sq")):
                worst = [max(entry[kind] for entry in run["drift"] for kind in kinds) for run in runs]
                cells.append(f"{min(worst):.1e} – {max(worst):.1e}")
            truths = [run["loss"] for run in found["float64"]["torch"]]
            apart = [
                max(abs(a - b) for a, b in zip(run["loss"], true, strict=True))
                for run, true in zip(runs, truths, strict=True)
            ]
            final = [np.mean(run["loss"][-20:]) for run in runs]
            cells += [f"{min(apart):.1e} – {max(apart):.1e}", f"{min(final):.4f} – {max(final):.4f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(found: dict, path: Path) -> None:
    """Losses, and drift of the weights against the update, both sides in every precision."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=110)
    losses, drifts = figure.subplots(1, 2)
    colours = dict(zip(found, ("black", "#1f77b4", "#2ca02c", "#d62728"), strict=True))
    for name, sides in found.items():
        for side, runs in sides.items():
            style = dict(color=colours[name], linestyle="-" if side == "jax" else ":", label=f"{side}, {name}")
            steps = np.arange(1, len(runs[0]["loss"]) + 1)
            losses.plot(steps, np.mean([run["loss"] for run in runs], axis=0), linewidth=1, **style)
            weights = np.array([[entry["weight"] for entry in run["drift"]] for run in runs])
            if weights.any():
                drifts.plot(steps, weights.max(axis=0), linewidth=1.2, **style)
                drifts.fill_between(steps, weights.min(axis=0), weights.max(axis=0), color=colours[name], alpha=0.15)
    losses.set(title="Loss, mean over the seeds", xlabel="update", ylabel="nats per token")
    drifts.set(title="Largest relative distance of any weight from float64", xlabel="update", yscale="log")
    drifts.legend(fontsize=7)
    figure.savefig(path)


def main(command: WholeRunCommand) -> int:
    """Measure, print the table, write the files."""
    found = measure(command.seeds, command.steps)
    text = table(found)
    print(text)
    if command.out:
        base = Path(command.out)
        base.parent.mkdir(parents=True, exist_ok=True)
        commit, versions = git_commit(), installed_versions()
        values = {"steps": command.steps, "seeds": command.seeds, "commit": commit, "versions": versions, "runs": found}
        base.with_suffix(".json").write_text(json.dumps(values) + "\n", encoding="utf-8")
        which = f"`python -m parity_tests.whole_run`: {command.steps} updates, {command.seeds} seeds; commit {commit}; "
        which += ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "torch")) + ".\n\n"
        base.with_suffix(".md").write_text(which + text, encoding="utf-8")
        picture(found, base.with_suffix(".png"))
        print(f"wrote {base}.json, {base}.md, {base}.png")
    return 0


if __name__ == "__main__":
    options = dict(prog="python -m parity_tests.whole_run", description="Drift of whole runs from float64.")
    cli.end(lambda: main(cli.parse(WholeRunCommand, sys.argv[1:], **options)))
