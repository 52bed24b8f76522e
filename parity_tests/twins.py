"""The report of the project's own twins: jax_impl, torch_ref and, where it can express the model, transformers.

The truth is torch_ref in float64. Allowances are measured: the same computation runs again in float64 with a rounding
of the dtype in question at every operation (`montecarlo.py`), the optimizer's in the dtypes that it keeps.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import jax_impl.attention
import torch_ref.attention
import torch_ref.hybrid
import torch_ref.muon.batches
import torch_ref.train
from harness.folders import find_weights, load_folder
from harness.hf_config import to_hf_config
from harness.surroundings import git_commit, installed_versions
from parity_tests.cases import PRECISIONS, random_tokens, random_weights
from parity_tests.compare.functions import make_rows
from parity_tests.compare.montecarlo import SEEDS, allowances, amplification, noise_of, rounded
from parity_tests.compare.report import Report
from parity_tests.compare.tolerance import may_turn
from parity_tests.contract import process_contract
from parity_tests.rope_noise import rounded_rope_tables
from parity_tests.sides import Arrays, JaxModel, JaxTraining, TorchModel, TorchTraining, x64
from parity_tests.taps import (
    jax_model_taps,
    operations,
    qwen3_operations,
    torch_model_taps,
    training_taps,
    transformers_taps,
)
from recipe.config import ModelConfig, PrecisionConfig, RunConfig, UserError, require
from recipe.contract import NOT_THERE, UNIT_ROUNDOFF, PrecisionContract, dropout_of, require_same
from recipe.params import param_specs
from recipe.presets import get_preset
from recipe.reading import short, some
from recipe.tokenizer import load_tokenizer
from torch_ref.model import rope_table

Dtype = Literal["float64", "float32", "bfloat16"]


@dataclass(frozen=True)
class TwinOptions:
    """Compare the twins tensor by tensor and print the first one that rounding does not explain."""

    preset: str = "tiny"
    """Recipe whose model, optimizer and schedule are compared, on random weights that keep activations O(1)."""
    weights: str = ""
    """Run folder or Hugging Face folder (Qwen3 or Llama) to compare on instead of random weights."""
    dtype: tuple[Dtype, ...] = ("float64", "float32", "bfloat16")
    """Compute dtypes, one after the other."""
    batch_size: int = 2
    """Rows per micro-batch."""
    sequence_length: int = 48
    """Tokens per row."""
    text: str = ""
    """Text whose tokens are compared, in one row; random tokens without it. Needs --weights with a tokenizer.json."""
    backward: bool = True
    """Compare cotangents and gradients as well; off, a big model needs a third of the memory."""
    steps: int | None = None
    """Optimizer updates to compare; 3 by default, 0 with --weights."""
    dropout: float = 0.0
    """Dropout rate of the comparison; transformers has none of it and is left out if it is not 0."""
    seed: int = 0
    """Of random weights and tokens."""
    out: str = ""
    """Folder for report.json, report.html and the pictures; nothing is written without it."""

    def __post_init__(self) -> None:
        require(bool(self.dtype), "--dtype has no value; name float64, float32 or bfloat16.")
        for name in ("batch_size", "sequence_length"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1; choose e.g. 2.")
        require(self.steps is None or self.steps >= 0, f"steps={self.steps} must be at least 0; 0 compares no updates.")
        require(self.backward or not self.steps, f"steps={self.steps} needs gradients; drop --backward False.")
        require(not self.text or bool(self.weights), "--text needs --weights, whose tokenizer reads it.")
        taken = bool(self.out) and Path(self.out).exists() and any(Path(self.out).iterdir())
        require(not taken, f"--out {self.out} already holds files; name a new folder.")


@dataclass(frozen=True)
class Subject:
    """What is compared: a recipe, its weights, its tokens."""

    config: RunConfig
    weights: Arrays
    tokens: np.ndarray
    """(B, T + 1)"""
    steps: int
    backward: bool
    folder: Path | None = None
    """Where the weights come from; transformers opens it by itself."""

    @property
    def inputs_BT(self) -> np.ndarray:
        return self.tokens[:, :-1]

    @property
    def targets_BT(self) -> np.ndarray:
        return self.tokens[:, 1:]

    @property
    def dropout_seed(self) -> int | None:
        return self.config.seed if self.config.model.dropout else None

    def training(self, precision: PrecisionConfig) -> RunConfig:
        """The recipe's run in this precision: every update sees the whole batch, once per micro-batch."""
        return dataclasses.replace(self.config, precision=precision)

    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """A batch for each update; each is the first one, its rows rolled, so that no two are alike."""
        A = self.config.accumulation
        rolled = [[np.roll(self.tokens, step * A + a, axis=1) for a in range(A)] for step in range(self.steps)]
        return [(np.stack(batch)[..., :-1], np.stack(batch)[..., 1:]) for batch in rolled]


def compare_twins(options: TwinOptions) -> Report:
    """The report that the options ask for."""
    title = f"jax_impl, torch_ref and transformers on {options.weights or options.preset}"
    return compare_subject(make_subject(options), options.dtype, title=title, settings=dataclasses.asdict(options))


def compare_subject(subject: Subject, dtypes: Sequence[str], *, title: str, settings: Mapping | None = None) -> Report:
    """Every tap of the forward and backward pass and of the updates, in every dtype."""
    model = subject.config.model
    rows, contracts, notes = [], {}, []
    theirs = None if model.dropout else make_transformers(subject)
    if theirs is None:
        notes.append("transformers is left out: it has no dropout at these places")
    for dtype in _progress(dtypes):
        precision = PRECISIONS[dtype]
        contracts |= twin_contracts(dtype, precision, subject, with_transformers=theirs is not None)
        truth, kappas = amplification(lambda dtype=dtype: reference(subject, dtype), dtype, seeds=_progress(SEEDS))
        kinds = operations(truth, qwen3_operations(_names(truth, "forward")))
        sides = {"jax": jax_arrays(subject, precision)}
        limits = {"jax": _with_free_signs(truth, allowances(kappas, dtype))}
        if dtype != "float64":
            sides["torch"], limits["torch"] = torch_arrays(subject, precision), limits["jax"]
        if theirs is not None and dtype != "float64":
            # Its rotary table is computed in float32, whose error grows with the position.
            roundings = max(1.0, frequency_error(model) / UNIT_ROUNDOFF[dtype])
            model_only = dataclasses.replace(subject, steps=0)
            with rounded_rope_tables(roundings):
                _, kappas = amplification(
                    lambda dtype=dtype, only=model_only: reference(only, dtype), dtype, seeds=_progress(SEEDS)
                )
            sides["transformers"] = transformers_arrays(theirs, subject, dtype)
            limits["transformers"] = allowances(kappas, dtype)
        rows += make_rows(dtype, truth, sides, limits, kinds)
    if theirs is not None and "float64" in dtypes:
        notes.append(
            "transformers is not compared in float64: its norms, RoPE and softmax compute in float32 there too"
        )
    settings = {**(settings or {}), "parameters": sum(weight.size for weight in subject.weights.values())}
    recorded = {side: dataclasses.asdict(contract) for side, contract in contracts.items()}
    return Report(
        title, rows, recorded, settings, notes, about={"commit": git_commit(), "versions": installed_versions()}
    )


def make_subject(options: TwinOptions) -> Subject:
    """The recipe, weights and tokens that the options name; raises `UserError` for what does not fit together."""
    config = get_preset(options.preset)
    steps = (0 if options.weights or not options.backward else 3) if options.steps is None else options.steps
    tokenizer = folder = None
    if options.weights:
        folder = find_weights(options.weights)
        model, stored = load_folder(folder)
        weights = {name: np.asarray(weight, np.float64) for name, weight in stored.items()}
        if options.text:
            tokenizer = load_tokenizer(folder)
    else:
        # What a row of the table is does not matter here, and thousands of them would only cost time.
        model = dataclasses.replace(config.model, vocab_size=min(config.model.vocab_size, 1024))
        weights = random_weights(model, options.seed)
    model = dataclasses.replace(model, dropout=options.dropout)
    if tokenizer is None:
        length = options.sequence_length + 1
        tokens = random_tokens(model, options.batch_size, length, seed=options.seed + 1)
    else:
        tokens = np.array([tokenizer.encode(options.text)], np.int32)
        require(tokens.shape[1] > 1, f"--text {options.text!r} has {tokens.shape[1]} tokens; give at least two.")
        require(tokens.max() < model.vocab_size, f"--text has tokens beyond the model's {model.vocab_size} rows.")
    limit = model.max_position_embeddings
    require(tokens.shape[1] - 1 <= limit, f"{tokens.shape[1] - 1} tokens exceed max_position_embeddings={limit}.")
    config = dataclasses.replace(
        config,
        model=model,
        seed=options.seed,
        accumulation=min(config.accumulation, 2),
        batch_size=tokens.shape[0],
        sequence_length=tokens.shape[1] - 1,
    )
    return Subject(config, weights, tokens, steps, options.backward, folder)


def reference(subject: Subject, dtype: str) -> Arrays:
    """torch_ref in float64, rounding at random wherever a run in `dtype` rounds if `rounding_noise` is active."""
    precision = PRECISIONS["float64"]
    weights = subject.weights
    if dtype == "bfloat16":
        # The compute dtype's copies of the weights; float32 holds the weights as they are.
        weights = {name: rounded(weight) for name, weight in weights.items()}
    with rounded_rope_tables():
        side = TorchModel(subject.config.model, precision, weights)
        arrays = model_arrays(torch_model_taps, side, subject)
    del side
    if subject.steps:
        with rounded_rope_tables(), _optimizer_noise(PRECISIONS[dtype]):
            arrays |= training_taps(TorchTraining(subject.training(precision), subject.weights), subject.batches())
    return arrays


@contextlib.contextmanager
def _optimizer_noise(precision: PrecisionConfig) -> Iterator[None]:
    """Context in which the noise inside the optimizer is that of its own dtypes: state and parameters keep theirs, and
    Newton-Schulz has one of its own."""

    def rounding_in(dtype: str, function: Callable) -> Callable:
        def with_noise(*args, **kwargs):
            with noise_of(dtype, precision.compute):
                return function(*args, **kwargs)

        return with_noise

    patches = (
        (torch_ref.muon.batches, "orthogonalize_via_newton_schulz", precision.newton_schulz),
        (torch_ref.hybrid.MuonWithAdamW, "step", precision.params),
        (torch_ref.train, "clip_by_global_norm", precision.params),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, dtype in patches:
            original = getattr(owner, name)
            setattr(owner, name, rounding_in(dtype, original))
            stack.callback(setattr, owner, name, original)
        yield


def model_arrays(taps: Callable, side, subject: Subject) -> Arrays:
    """Flat taps of one side's model on the subject's batch."""
    return taps(
        side, subject.inputs_BT, subject.targets_BT, dropout_seed=subject.dropout_seed, backward=subject.backward
    ).flat()


def jax_arrays(subject: Subject, precision: PrecisionConfig) -> Arrays:
    """All that jax_impl leaves."""
    arrays = model_arrays(jax_model_taps, JaxModel(subject.config.model, precision, subject.weights), subject)
    if subject.steps:
        arrays |= training_taps(JaxTraining(subject.training(precision), subject.weights), subject.batches())
    return arrays


def torch_arrays(subject: Subject, precision: PrecisionConfig) -> Arrays:
    """All that torch_ref leaves."""
    arrays = model_arrays(torch_model_taps, TorchModel(subject.config.model, precision, subject.weights), subject)
    if subject.steps:
        arrays |= training_taps(TorchTraining(subject.training(precision), subject.weights), subject.batches())
    return arrays


def make_transformers(subject: Subject):
    """transformers' own model in float32, with its plainest attention: from the folder, whatever we read there, or, of
    weights without one, from the config.json that we would write."""
    model = subject.config.model
    if subject.folder is not None:
        theirs, missing, unexpected = _open_folder(subject.folder)
    else:
        values = to_hf_config(model)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        state = {name: torch.tensor(subject.weights[name], dtype=torch.float32) for name in param_specs(model)}
        missing, unexpected = theirs.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if model.tie_word_embeddings else set()
    require(
        not unexpected and set(missing) <= tied,
        f"transformers has other weights: it misses {some(sorted(missing)) or 'none'} and does not expect "
        f"{some(sorted(unexpected)) or 'any'} of ours; compare a folder that it opens whole.",
    )
    # The row of a padding token has no gradient there; in the comparison it is a token like any other.
    theirs.model.embed_tokens.padding_idx = None
    return theirs


def _open_folder(folder: Path):
    """transformers' model of a folder, and the names of weights that it misses and does not expect."""
    try:
        theirs, info = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # Its checks of a folder raise some twenty kinds.
        reason = short(str(error).strip().partition("\n")[0] or type(error).__name__, 200)
        raise UserError(f"transformers does not open {folder}: {reason}; mend the folder, or drop --weights.") from None
    return theirs, info["missing_keys"], info["unexpected_keys"]


def transformers_arrays(theirs, subject: Subject, dtype: str) -> Arrays:
    """All that transformers leaves of one forward and backward pass, in its own way of using the dtype."""
    theirs.to(getattr(torch, dtype))
    try:
        # `to` leaves the rotary frequencies where they are: in float32 as from_pretrained has them.
        theirs.model.rotary_emb.inv_freq = theirs.model.rotary_emb.original_inv_freq.float()
        return transformers_taps(theirs, subject.inputs_BT, subject.targets_BT, backward=subject.backward).flat()
    finally:
        theirs.float()


def frequency_error(model: ModelConfig) -> float:
    """Largest relative error of rotary frequencies that are computed in float32, as transformers computes them.

    Of our own reading of the base: taken from transformers' model, it would allow for another base.
    """
    exponents_R = torch.arange(0, model.head_dim, 2).float() / model.head_dim
    cos, sin = rope_table(model, 2)
    exact_R = np.arctan2(sin[1], cos[1])
    return float(np.abs((1.0 / model.rope_theta**exponents_R).double().numpy() / exact_R - 1.0).max())


def twin_contracts(
    dtype: str, precision: PrecisionConfig, subject: Subject, *, with_transformers: bool
) -> dict[str, PrecisionContract]:
    """The contracts of the sides, made to agree; raises `UserError` with the difference otherwise."""
    dropout = dropout_of(subject.config.model.dropout)
    in_use = {"jax": jax_impl.attention.attention_in_use, "torch": torch_ref.attention.attention_in_use}
    with x64(precision):
        ours = {
            side: process_contract(
                side,
                f"{side} {dtype}",
                precision,
                dropout=dropout,
                attention=in_use[side](precision, subject.config.model.dropout),
            )
            for side in ("jax", "torch")
        }
        # Explicit and fused attention are one function, and each side is judged by the float64 truth.
        require_same(ours["jax"], ours["torch"], except_for=("attention",))
        contracts = {f"{side} {dtype}": contract for side, contract in ours.items()}
        if with_transformers and dtype != "float64":
            options = dict(params=dtype, newton_schulz=NOT_THERE, attention="eager")
            name = f"transformers {dtype}"
            contracts[name] = process_contract("torch", name, precision, **options)
            require_same(ours["jax"], contracts[name], except_for=("params", "attention"))
    return contracts


def _with_free_signs(truth: Arrays, limits: dict[str, float]) -> dict[str, float]:
    """The allowances, widened where Adam divides a moment that rounding may send through zero.

    A moment that `may_turn` moves its update by up to twice its size, and the parameter by as much.
    """
    widened, moved = dict(limits), {}
    for name, moments in truth.items():
        step, _, parameter = name.partition(" exp_avg ")
        if not parameter:
            continue
        update, value = truth[f"{step} update {parameter}"], truth[f"{step} parameter {parameter}"]
        extra = 2.0 * np.linalg.norm(update[may_turn(moments, limits[name])])
        moved[parameter] = moved.get(parameter, 0.0) + extra
        widened[f"{step} update {parameter}"] += extra / np.linalg.norm(update)
        widened[f"{step} parameter {parameter}"] += moved[parameter] / np.linalg.norm(value)
    return widened


def _names(arrays: Arrays, phase: str) -> list[str]:
    return [name.removeprefix(phase + " ") for name in arrays if name.startswith(phase + " ")]


def _progress(items):
    """The items behind a bar on a terminal."""
    return tqdm(items, leave=False, disable=not sys.stderr.isatty())


def main(options: TwinOptions) -> int:
    """Print verdict and table, write the report if asked to; returns 0 if everything is explained, 1 otherwise."""
    report = compare_twins(options)
    report.show(options.out)
    return report.exit_code
