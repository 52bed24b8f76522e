"""What a training command line asks for: a preset, a run to resume or weights to begin with, a file of fields over it,
and flags over that."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.cli import last_value, leaves, parse, run
from harness.config_file import ConfigFile, read_config_file
from harness.folders import load_config
from harness.preflight import begun_with, is_begun, is_taken
from harness.state import find_state, read_run, state_folders
from recipe.config import HostsConfig, RunConfig, UserError, require
from recipe.hub import pinned, weights_folder
from recipe.lock import locked
from recipe.presets import PRESETS, get_preset
from recipe.reading import short

FRAMEWORKS = {"jax": "JAX", "torch": "PyTorch"}
EVERYDAY = """Everyday flags:
  --preset NAME  --config FILE  --out FOLDER  --resume RUN  --init WEIGHTS
  --data.corpus TEXT  --data.tokenizer NAME  --steps INT  --batch-size INT  --accumulation INT
  --sequence-length INT  --muon.learning-rate FLOAT  --adamw.learning-rate FLOAT  --precision.compute DTYPE"""
"""Flags that most runs need, shown before all others."""

FREE_ON_RESUME = (
    *("log_every", "eval_every", "save_every", "prompts", "sample_tokens", "tensorboard", "keep", "data.cache_dir"),
    *("max_skipped", "divergence_factor", "max_diverging", "on_divergence", "max_rollbacks", "rollback_factor"),
    *("mesh", "gather", "scan_layers", "hosts.coordinator", "hosts.count", "hosts.index", "hosts.heartbeat"),
)
"""Fields that a resumed run may change: none of them moves a weight, but for those of a run that diverges."""


def run_command(module: str, train: Callable[[RunConfig], None], *, framework: str) -> int:
    """`python -m MODULE`, which trains like train_jax.py or train_torch.py: returns the exit code."""
    return run(lambda: train(parse_run_config(sys.argv[1:], framework=framework, prog=f"python -m {module}")))


@dataclass(frozen=True)
class TrainCommand(RunConfig):
    """A run, and where else its fields are written down."""

    config: str = ""
    """File of fields, over the preset and under the flags: TOML, YAML or JSON, nested as in a run.json, which may be
    named too, as may its folder (docs/commands.md)."""

    def run_config(self) -> RunConfig:
        """The run alone."""
        return RunConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)})


def parse_run_config(argv: Sequence[str], *, framework: str, prog: str = "") -> RunConfig:
    """The run that `argv` asks for: a preset (or the run to resume), a file's fields and flags over it, then a run
    folder that is free.

    `framework` is "jax" or "torch" and names the automatic folder. Raises `UserError` or `FileExistsError` with one
    line for any mistake, and touches nothing.
    """
    resumed, named = last_value(argv, "--resume"), last_value(argv, "--config")
    file = read_config_file(named) if named else None
    if resumed:
        begun = _resumed_config(resumed, framework)
        default, source = begun, f"of the run in {resumed}"
        if file is not None:
            default, source = _as_begun(file.over(begun), begun), f"{source} and of {named}"
    else:
        default, source = _new_config(argv, file)
    command = parse(
        TrainCommand,
        argv,
        default=TrainCommand(**{field.name: getattr(default, field.name) for field in dataclasses.fields(default)}),
        prog=prog or f"train_{framework}.py",
        description=f"Train with {FRAMEWORKS[framework]}. Presets: {', '.join(PRESETS)}. "
        f"The defaults below are {source}.\n\n{EVERYDAY}",
    )
    config = command.run_config()
    _check_devices(config, argv, framework)
    if resumed:
        config = _as_begun(config, begun)
        _check_same_run(config, begun)
        return config
    if config.init:
        config = dataclasses.replace(config, init=default.init)
    return dataclasses.replace(config, out=str(_run_folder(config, framework)))


def _new_config(argv: Sequence[str], file: ConfigFile | None) -> tuple[RunConfig, str]:
    """What the flags of a new run are laid over, and whose values that are, in words.

    A preset, the weights to begin with, a file: each over the one before. Weights named by a flag come after the file,
    which was not written for them.
    """
    preset, init = last_value(argv, "--preset"), last_value(argv, "--init")
    require(
        not (preset and file and file.is_run),
        f"--preset {preset} would change nothing, as a run.json has every field; leave it or --config out.",
    )
    default = get_preset(preset or (file and file.preset) or "tiny")
    source = f"those of --preset {default.preset}"
    if file is not None and (init or "init" not in file.changes):
        default, source = file.over(default), f"{source} and of {file.path}"
        file = None
    init = init or (file.changes["init"] if file else "")
    if init and isinstance(init, str):
        default, source = _fine_tuning_config(default, init), f"{source} and of the weights in {init}"
        init = default.init
    if file is not None:
        default, source = file.over(default), f"{source} and of {file.path}"
        default = dataclasses.replace(default, init=init)
    return default, source


def _check_devices(config: RunConfig, argv: Sequence[str], framework: str) -> None:
    """Raise `UserError` for a mesh or processes that the framework does not have, or that do not go together."""
    hosts = config.hosts != HostsConfig()
    given = next((flag for flag in argv if flag.startswith("--hosts")), "--mesh").partition("=")[0]
    require(
        framework == "jax" or not (config.mesh or hosts),
        f"{given} is JAX's; PyTorch trains on one device here: leave it out, or run train_jax.py.",
    )
    require(
        not hosts or bool(config.mesh),
        f"{given} needs --mesh, which says how the devices of all processes share the work; add e.g. --mesh data=2.",
    )


def _resumed_config(run: str, framework: str) -> RunConfig:
    """The configuration of the run to go on with, as this folder's; which processes and devices had it is the past."""
    config = find_state(Path(run), read_run)[1][1]
    if framework != "jax" and config.mesh:
        print(f"note: the run had the devices {config.mesh}; it goes on with one", file=sys.stderr)
        config = dataclasses.replace(config, mesh="")
    return dataclasses.replace(config, out=run, resume=run, hosts=HostsConfig())


def _as_begun(config: RunConfig, begun: RunConfig) -> RunConfig:
    """The configuration with the Hub's weights that the run began with named as the run has them, with their commit."""
    same = begun.init.partition("@")[0] == config.init
    return dataclasses.replace(config, init=begun.init) if same else config


def _check_same_run(config: RunConfig, begun: RunConfig) -> None:
    """Raise `UserError` naming every field that would make another run of the one to go on with."""
    old = {name: value for name, _, value in leaves(RunConfig, begun)}
    new = {name: value for name, _, value in leaves(RunConfig, config)}
    differing = [name for name in old if new[name] != old[name] and name not in FREE_ON_RESUME]
    reason = (
        "; the learning-rate schedule spans all steps, so other --steps are another run" if "steps" in differing else ""
    )
    listed = ", ".join(f"{name}={new[name]} (begun with {old[name]})" for name in differing)
    require(
        not differing,
        f"--resume {config.resume} cannot change {listed}{reason}; leave it out, or begin a new run with "
        f"--init {Path(begun.out) / 'last'}.",
    )


def _fine_tuning_config(preset: RunConfig, init: str) -> RunConfig:
    """The preset with the model of the weights to begin with, and their tokenizer if they bring one.

    A name on the Hub is recorded with the commit that was taken.
    """
    folder = weights_folder(init)
    model = dataclasses.replace(load_config(folder), dropout=preset.model.dropout)
    source = pinned(init, folder)
    brings = (folder / "tokenizer.json").is_file()
    data = dataclasses.replace(preset.data, tokenizer=source if brings else preset.data.tokenizer)
    length = min(preset.sequence_length, model.max_position_embeddings)
    return dataclasses.replace(preset, init=source, model=model, data=data, sequence_length=length)


def _run_folder(config: RunConfig, framework: str) -> Path:
    """The folder of the run: `--out` if it is free, else the first free of runs/PRESET-FRAMEWORK, -2, -3 ...

    Free is also one whose run was killed before its first save: an automatic folder if it was the same run.
    """
    if not config.out:
        return _first_free(Path("runs") / f"{config.preset}-{framework}", config)
    out = Path(config.out)
    try:
        taken = is_taken(out)
    except OSError as error:  # such as a name that is too long
        raise UserError(f"--out {short(str(out))} cannot be a folder ({error.strerror}); choose another.") from None
    if taken:
        other = _first_free(out if out.name.strip(".") else Path("runs") / "new", config)
        what = "already holds files, and a run never overwrites any" if out.is_dir() else "is a file"
        go_on = f"go on with it by --resume {out}, or " if out.is_dir() and state_folders(out) else ""
        raise FileExistsError(f"--out {out} {what}; {go_on}choose another folder, e.g. --out {other}.")
    for parent in out.parents:
        if parent.exists():
            require(parent.is_dir(), f"--out {out} lies under {parent}, which is a file; choose a folder's path.")
            break
    return out


def _first_free(folder: Path, config: RunConfig) -> Path:
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if _is_free(path, config))


def _is_free(path: Path, config: RunConfig) -> bool:
    """Whether a run may be put there without a word: nothing is there, or this very run, killed before its first save.

    The vocabulary is not compared, which the text may raise.
    """
    if not path.exists():
        return True
    if is_taken(path):
        return False
    with locked(path) as held:
        if not held:
            return not any(path.iterdir())
    try:
        begun = dataclasses.replace(config, hosts=HostsConfig())  # of which a run's files know nothing
        return not is_begun(path) or not begun_with(path, begun, but=["model.vocab_size"])
    except UserError:  # a run.json that cannot be read is not this run's
        return False
