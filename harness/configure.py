"""What a run begins with, whoever asks for it: a preset, a run to go on with or weights to begin with; and its folder.

The command line sets flags over `begun_from`, Python keyword arguments; both leave by `ready`.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

from harness.config_file import ConfigFile
from harness.folders import load_config
from harness.preflight import begun_with, is_begun, is_taken
from harness.state import find_state, read_run, state_folders
from recipe.config import HostsConfig, RunConfig, UserError, require, to_dict
from recipe.hub import pinned, weights_folder
from recipe.lock import locked
from recipe.presets import get_preset
from recipe.reading import flat, short

FREE_ON_RESUME = (
    *("log_every", "eval_every", "save_every", "prompts", "sample_tokens", "tensorboard", "track", "keep"),
    *("data.cache_dir", "mesh", "gather", "scan_layers"),
    *("max_skipped", "divergence_factor", "max_diverging", "on_divergence", "max_rollbacks", "rollback_factor"),
    *("hosts.coordinator", "hosts.count", "hosts.index", "hosts.heartbeat"),
)
"""Fields that a resumed run may change: none of them moves a weight, but for those of a run that diverges."""


def begun_from(
    framework: str, *, preset: str = "", resume: str = "", init: str = "", file: ConfigFile | None = None
) -> tuple[RunConfig, str]:
    """The configuration that changes are made to, and whose values those are, in words.

    It is that of the run to resume; else the preset's (tiny if none is named) with the model of the weights to begin
    with. A file's fields come over that, but before weights that it does not name itself: it was not written for them.
    `framework` is "jax" or "torch". Raises `UserError` for a preset, run, file or folder that is none.
    """
    if resume:
        begun = config = _resumed_config(resume)
        if framework != "jax" and config.mesh:
            print(f"note: the run had the devices {config.mesh}; it goes on with one", file=sys.stderr)
            config = dataclasses.replace(config, mesh="")
        if file is not None:
            config = _as_begun(file.over(config), begun)
        return config, f"of the run in {resume}{f' and of {file.path}' if file else ''}"
    require(
        not (preset and file and file.is_run),
        f"--preset {preset} would change nothing, as a run.json has every field; leave it or --config out.",
    )
    config = get_preset(preset or (file.preset if file else "") or "tiny")
    source = f"those of --preset {config.preset}"
    first = "" if init or file is None else file.init
    if first:
        config, source = _fine_tuning_config(config, first), f"{source} and of the weights in {first}"
        first = config.init
    if file is not None:
        config, source = file.over(config), f"{source} and of {file.path}"
        config = dataclasses.replace(config, init=first)
    if init:
        config, source = _fine_tuning_config(config, init), f"{source} and of the weights in {init}"
    return config, source


def ready(config: RunConfig, framework: str) -> RunConfig:
    """The run as it may begin: on devices that the framework has, in a folder that is free, and the same run as before
    if it is resumed.

    `framework` names the automatic folder. Raises `UserError` or `FileExistsError` with one line, and touches nothing.
    """
    _check_devices(config, framework)
    if config.resume:
        begun = _resumed_config(config.resume)
        config = _as_begun(config, begun)
        _check_same_run(config, begun)
        return config
    return dataclasses.replace(config, out=str(_run_folder(config, framework)))


def _check_devices(config: RunConfig, framework: str) -> None:
    """Raise `UserError` for a mesh or processes that the framework does not have, or that do not go together."""
    hosts, default = dataclasses.asdict(config.hosts), dataclasses.asdict(HostsConfig())
    differing = [name for name in hosts if hosts[name] != default[name]]
    given = f"--hosts.{differing[0]}" if differing else "--mesh"
    require(
        framework == "jax" or not (config.mesh or differing),
        f"{given} is JAX's; PyTorch trains on one device here: leave it out, or run train_jax.py.",
    )
    require(
        not differing or bool(config.mesh),
        f"{given} needs --mesh, which says how the devices of all processes share the work; add e.g. --mesh data=2.",
    )


def _resumed_config(run: str) -> RunConfig:
    """The configuration of the run to go on with, as this folder's; which processes had it is the past."""
    config = find_state(Path(run), read_run)[1][1]
    return dataclasses.replace(config, out=run, resume=run, hosts=HostsConfig())


def _as_begun(config: RunConfig, begun: RunConfig) -> RunConfig:
    """The configuration with the Hub's weights that the run began with named as the run has them, with their commit."""
    same = begun.init.partition("@")[0] == config.init
    return dataclasses.replace(config, init=begun.init) if same else config


def _check_same_run(config: RunConfig, begun: RunConfig) -> None:
    """Raise `UserError` naming every field that would make another run of the one to go on with."""
    old, new = flat(to_dict(begun)), flat(to_dict(config))
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
