"""The whole configuration as frozen dataclasses, validated at birth; every field is a command-line flag.

`ModelConfig` carries the field names of Hugging Face's `config.json` for Qwen3. A value a user got wrong raises
`UserError`, a ValueError with the value, the rule and the remedy.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from recipe.dropout import RESOLUTION, threshold
from recipe.mesh import parse_mesh
from recipe.mixture import parse_mixture

Dtype = Literal["float32", "bfloat16", "float64"]

PROFILE_AFTER = 3
"""Updates before a trace begins: the first one compiles, the next ones still fill caches."""
LARGEST_COUNT = 2**14
"""Layers and heads, whose names are made one by one, are no more than this: beyond any model's."""
LARGEST_WHOLE = 2**31
"""No whole number of a configuration reaches this: shapes and counts beyond it fit no array."""


class UserError(ValueError):
    """A mistake of the user's: the command line prints its one line and exits with 2. Any other ValueError is a bug."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds; the message gives value, rule and remedy."""
    if not condition:
        raise UserError(message)


def expected(hint: Any) -> str:
    """A field's type in words."""
    if get_origin(hint) is Annotated:
        return expected(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("None" if part is NoneType else expected(part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a tuple, each part {expected(get_args(hint)[0])}"
    if get_origin(hint) is list:
        return f"a list, each part {expected(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"an object, each value {expected(get_args(hint)[1])}"
    words = {int: "a whole number (int)", float: "a number (float)", bool: "True or False (bool)", str: "a text (str)"}
    return words.get(hint) or f"a {hint.__name__}"


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type; an int is a float too, a bool is neither."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(part, get_args(hint)[0]) for part in value)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(fits(part, get_args(hint)[0]) for part in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(fits(part, get_args(hint)[1]) for part in value.values())
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


# A configuration is built often, its class once. To mypy a class is not hashable, hence two ignored complaints below.
_type_hints = functools.cache(get_type_hints)


def check_types(owner: Any, prefix: str = "") -> None:
    """Raise `UserError` for the first field of a dataclass whose value is not of its type.

    Every `__post_init__` begins with it: Python itself checks nothing, and run.json may hold anything.
    """
    for field_ in dataclasses.fields(owner):
        value, hint = getattr(owner, field_.name), _type_hints(type(owner))[field_.name]  # type: ignore[arg-type]
        require(
            fits(value, hint),
            f"{prefix}{field_.name}={value!r} must be {expected(hint)}; {_choose(owner, field_.name)}.",
        )


def _choose(owner: Any, name: str) -> str:
    """The remedy that fits a field: its default, written as its type is."""
    fields = {field_.name: field_ for field_ in dataclasses.fields(owner)}
    default = fields[name].default
    return "choose another" if default is dataclasses.MISSING else f"choose e.g. {default!r}"


def _require_number(owner: object, names: tuple[str, ...], holds: Callable[[float], bool], rule: str) -> None:
    """Each name is a field as its flag has it, such as `muon.beta`."""
    for name in names:
        field_name = name.rpartition(".")[2]
        value = getattr(owner, field_name)
        hint = _type_hints(type(owner))[field_name]  # type: ignore[arg-type]
        kind = "whole" if hint is int else "finite"
        require(
            math.isfinite(value) and holds(value),
            f"{name}={value} must be a {kind} number {rule}; {_choose(owner, field_name)}.",
        )
        require(
            hint is not int or value < LARGEST_WHOLE,
            f"{name}={value} must be a whole number below {LARGEST_WHOLE}; {_choose(owner, field_name)}.",
        )


def _require_positive(owner: object, *names: str) -> None:
    _require_number(owner, names, lambda value: value > 0, "above 0")


def _require_rate(owner: object, *names: str) -> None:
    _require_number(owner, names, lambda value: value >= 0, "of at least 0")


def _require_fraction(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name.rpartition(".")[2])
        require(0 <= value < 1, f"{name}={value} must lie in [0, 1); choose e.g. 0.1, or 0 to switch it off.")


def divisors(n: int) -> list[int]:
    """The divisors of n in rising order, for error messages that offer a remedy."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


@dataclass(frozen=True)
class ModelConfig:
    """A Qwen3 dense decoder, named as in transformers' `Qwen3Config`."""

    vocab_size: int = 8192
    """Rows of the embedding table. Training raises it to the tokenizer's size, rounded up to a multiple of 128."""
    hidden_size: int = 256
    """Width of the residual stream (D)."""
    intermediate_size: int = 768
    """Width of the SwiGLU hidden layer (F)."""
    num_hidden_layers: int = 4
    """Transformer blocks."""
    num_attention_heads: int = 4
    """Query heads (N)."""
    num_key_value_heads: int = 2
    """Key/value heads (K); must divide the query heads."""
    head_dim: int = 64
    """Width of one head (H); independent of hidden_size / num_attention_heads; even, because RoPE turns pairs."""
    max_position_embeddings: int = 1024
    """Longest sequence the model is meant for; longer input is an error."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside every RMSNorm."""
    tie_word_embeddings: bool = True
    """Whether the output head is the embedding table."""
    attention_bias: bool = False
    """Whether q, k, v and o projections have a bias."""
    qk_norm: bool = True
    """RMSNorm on queries and keys before RoPE (Qwen3). False gives Llama's block."""
    sliding_window: int | None = None
    """Keys a query sees, itself included; None sees all earlier ones."""
    max_window_layers: int = 0
    """The sliding window, if set, applies to layers from this index on."""
    initializer_range: float = 0.02
    """Standard deviation of the initial matrices and embeddings."""
    dropout: float = 0.0
    """Rate at the embedding output, attention probabilities, FFN hidden, both residual branches and before the head."""

    def __post_init__(self) -> None:
        check_types(self)
        _require_positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rope_theta",
            "rms_norm_eps",
        )
        _require_rate(self, "initializer_range", "max_window_layers")
        _require_fraction(self, "dropout")
        require(
            self.dropout == 0.0 or 0 < threshold(self.dropout) < RESOLUTION,
            f"dropout={self.dropout} must be 0 or a rate that 16 bits tell from 0 and 1; choose 0, or at least 2e-5.",
        )
        for name in ("num_hidden_layers", "num_attention_heads"):
            count = getattr(self, name)
            require(
                count <= LARGEST_COUNT,
                f"{name}={count} must be at most {LARGEST_COUNT}, beyond any model's; {_choose(self, name)}.",
            )
        n, k = self.num_attention_heads, self.num_key_value_heads
        choices = " or ".join(map(str, divisors(n)))
        require(n % k == 0, f"num_attention_heads={n} is not a multiple of num_key_value_heads={k}; choose {choices}.")
        require(
            self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} must be even, because RoPE rotates pairs; choose an even number.",
        )
        window = self.sliding_window
        require(
            window is None or window > 0,
            f"sliding_window={window} must be at least 1; leave it out for full attention.",
        )

    def window_of_layer(self, layer: int) -> int | None:
        """Keys that a query of this layer sees (itself included), or None for all earlier ones."""
        return self.sliding_window if layer >= self.max_window_layers else None


@dataclass(frozen=True)
class MuonConfig:
    """Muon on the matrices of the blocks (Keller Jordan, https://kellerjordan.github.io/posts/muon/)."""

    learning_rate: float = 0.01
    """Peak rate; an update of a matrix has singular values near this times sqrt(max(1, fan_out/fan_in))."""
    beta: float = 0.95
    """Momentum: an exponential moving average without bias correction."""
    nesterov: bool = True
    """Orthogonalise the average of gradient and momentum instead of the momentum."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    eps: float = 1e-7
    """Added to the Frobenius norm before the iteration."""
    weight_decay: float = 0.0
    """Decoupled decay, times the learning rate."""

    def __post_init__(self) -> None:
        check_types(self, "muon.")
        _require_rate(self, "muon.learning_rate", "muon.weight_decay", "muon.eps")
        _require_fraction(self, "muon.beta")
        _require_positive(self, "muon.ns_steps")


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW on everything that is not a block's matrix: embeddings, head, norms, biases."""

    learning_rate: float = 0.001
    """Peak rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of embeddings and head, times the learning rate."""
    decay_norms: bool = False
    """Also decay norm scales and biases, as the seed notebook did."""

    def __post_init__(self) -> None:
        check_types(self, "adamw.")
        _require_rate(self, "adamw.learning_rate", "adamw.weight_decay", "adamw.eps")
        _require_fraction(self, "adamw.beta1", "adamw.beta2")


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up and cosine decay, counted in optimizer updates, shared by both optimizers."""

    warmup_fraction: float = 0.05
    """Share of the updates spent warming up."""
    final_factor: float = 0.1
    """Learning-rate factor the cosine ends at."""

    def __post_init__(self) -> None:
        check_types(self, "schedule.")
        _require_fraction(self, "schedule.warmup_fraction")
        require(
            0 <= self.final_factor <= 1,
            f"schedule.final_factor={self.final_factor} must lie in [0, 1]; choose e.g. 0.1.",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes windows."""

    corpus: str = "shakespeare"
    """shakespeare (38 embedded plays), stdlib (Python's documentation), a file or folder (.txt, .md, .jsonl, .parquet),
    or hub:OWNER/NAME[/SUBSET]; with split hashed also a mixture: 0.7*a.jsonl + 0.3*hub:OWNER/NAME."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and Hub documents."""
    tokenizer: str = "bpe"
    """bpe trains a byte-level BPE on the training documents; else a tokenizer.json, a folder with one, a Hub name."""
    bpe_vocab_size: int = 8192
    """Vocabulary of the trained BPE."""
    max_documents: int | None = None
    """Keep the first so many documents."""
    max_characters: int | None = None
    """Cut each document after so many characters."""
    max_tokens: int | None = None
    """Keep the first so many tokens."""
    split: Literal["documents", "hashed", "leaking-windows"] = "documents"
    """documents holds out whole documents, or the end of the longest where none fits, all read into memory; hashed
    those that a hash of their text says, streaming any amount (docs/data.md); leaking-windows is the seed's:
    overlapping windows split at random."""
    validation_fraction: float = 0.05
    """Share of the characters (hashed: of the documents; or of the windows) held out, above 0 and below 1; of the
    plays, unless hashed, always the same two."""
    validation_tokens: int = 32_768
    """Token budget of one evaluation."""
    chat: bool = False
    """The corpus is conversations (JSONL or hub: records with messages, each a role and a content), written by the
    tokenizer folder's chat template; only the assistant's words are trained on (docs/chat.md)."""
    document_mask: bool = False
    """Tokens see those of their own document alone, also where a row has several; conversations always do."""
    cache_dir: str = ""
    """Token and tokenizer cache; empty is $QWEN_FROM_SCRATCH_CACHE or ~/.cache/qwen-from-scratch."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        _require_positive(self, "data.bpe_vocab_size", "data.validation_tokens")
        require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction={self.validation_fraction} must lie above 0 and below 1, as something is always "
            "held out; choose e.g. 0.05.",
        )
        require(self.corpus.strip() != "", "data.corpus='' names nothing; choose e.g. 'shakespeare'.")
        try:
            mixture = parse_mixture(self.corpus)
        except ValueError as error:
            raise UserError(str(error)) from None
        require(
            mixture is None or self.split == "hashed",
            f"data.corpus={self.corpus[:200]!r} is a mixture, which data.split={self.split} does not hold out from; "
            "pass --data.split hashed, or ./ before a path that begins like this.",
        )
        require(
            self.bpe_vocab_size >= 257,
            f"data.bpe_vocab_size={self.bpe_vocab_size} must be at least 257 (the bytes and one); choose e.g. 8192.",
        )
        for name in ("max_documents", "max_characters", "max_tokens"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < LARGEST_WHOLE,
                f"data.{name}={value} must be at least 1 and below {LARGEST_WHOLE}; leave it out for no limit.",
            )
        require(
            not self.chat or self.split == "documents",
            f"data.chat holds out whole conversations, which data.split={self.split} does not; leave that out.",
        )
        require(
            not self.chat or (self.max_characters is None and self.max_tokens is None),
            "data.chat takes whole conversations, and data.max_characters and data.max_tokens cut texts; leave them "
            "out, or pass --data.max_documents.",
        )

    @property
    def packed(self) -> bool:
        """Whether batches say which document each token is of."""
        return self.chat or self.document_mask


@dataclass(frozen=True)
class PrecisionConfig:
    """Every dtype, by name, and which way the model is computed: nothing here depends on the backend."""

    params: Dtype = "float32"
    """Parameters, accumulated gradients, optimizer state; training wants float32 or wider."""
    compute: Dtype = "float32"
    """Operands of the matrix products and the activations between them; products accumulate in float32 or wider."""
    newton_schulz: Dtype = "bfloat16"
    """Stored arrays of the Newton-Schulz iteration."""
    matmul: Literal["default", "highest"] = "highest"
    """float32 products: highest is true float32; default lets a GPU use TF32."""
    attention: Literal["explicit", "fused"] = "explicit"
    """explicit goes in query blocks; fused is a kernel where there is one, else explicit: in JAX, on a GPU in 16 bits,
    cuDNN's or with dropout this project's (`jax_impl/attention_kernel.py`); in torch SDPA, without dropout."""
    remat: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them: a third more work in the
    blocks for less memory. XLA's CPU backend undoes most of it (docs/performance.md)."""
    deterministic: bool = False
    """Only kernels that give the same bits every time; a GPU's fastest, such as cuDNN's backward pass, add in no fixed
    order. A CPU's always do."""

    def __post_init__(self) -> None:
        check_types(self, "precision.")
        require(
            self.params != "float64" or self.compute == "float64",
            f"precision.params=float64 needs precision.compute=float64, not {self.compute}; set both or neither.",
        )


@dataclass(frozen=True)
class HostsConfig:
    """The processes of one JAX run, of which each has devices of its own; one process needs none of this."""

    coordinator: str = ""
    """ADDRESS:PORT of process 0, where the processes find each other; auto asks SLURM, Open MPI, GKE or the TPU pod
    that started them; empty is a run of one process."""
    count: int | None = None
    """Processes in all; auto knows."""
    index: int | None = None
    """Number of this process, from 0; auto knows."""
    heartbeat: int = 100
    """Seconds without a sign of life after which a process counts as dead. One that dies in an update is noticed at
    once."""

    def __post_init__(self) -> None:
        check_types(self, "hosts.")
        _require_positive(self, "hosts.heartbeat")
        plain = self.coordinator not in ("", "auto")
        require(
            self.coordinator in ("", "auto") or ":" in self.coordinator,
            f"hosts.coordinator={self.coordinator} must be ADDRESS:PORT or auto; choose e.g. 10.0.0.1:1234.",
        )
        require(
            not plain or (self.count is not None and self.index is not None),
            f"hosts.coordinator={self.coordinator} needs --hosts.count and --hosts.index, those of all processes and "
            "of this one; give both, or --hosts.coordinator auto.",
        )
        require(
            plain or (self.count is None and self.index is None),
            "hosts.count and hosts.index need --hosts.coordinator ADDRESS:PORT, where the processes find each other; "
            "give it, or leave them out.",
        )
        require(
            not plain or (self.count or 0) > (self.index or 0) >= 0,
            f"hosts.index={self.index} must lie in [0, hosts.count={self.count}); number the processes from 0.",
        )


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    preset: str = "tiny"
    """Name of the preset this run started from."""
    out: str = ""
    """Run folder; it must not hold a run already. Empty is runs/PRESET-FRAMEWORK."""
    init: str = ""
    """Weights folder to begin with (Hugging Face's, or a run's best/ or last/); its model and tokenizer become the
    defaults. Empty draws new weights."""
    resume: str = ""
    """Run folder to go on with, begun by either framework; its configuration becomes the default, and what would make
    it another run is refused."""
    steps: int = 100
    """Optimizer updates."""
    accumulation: int = 1
    """Micro-batches per update (A)."""
    batch_size: int = 8
    """Sequences per micro-batch (B)."""
    sequence_length: int = 256
    """Tokens per sequence (T)."""
    clip_norm: float = 1.0
    """Largest global gradient norm, over all parameters."""
    seed: int = 0
    """Seeds the initial weights, the data order, dropout and the samples."""
    log_every: int = 10
    """Updates between log lines."""
    eval_every: int = 100
    """Updates between evaluations on held-out text; the last update is always evaluated."""
    save_every: int = 100
    """Updates between saves of the state in last/, from which --resume goes on; the last update is always saved."""
    prompts: tuple[str, ...] = ("ROMEO:", "First Citizen:", "To be, or not")
    """Prompts of the samples at the end of the run."""
    sample_tokens: int = 100
    """Tokens per sample; 0 writes none."""
    max_skipped: int = 20
    """Updates skipped in a row, because their gradients were not finite, after which `on_divergence` acts. Never more
    than half of a run's updates, rounded up."""
    divergence_factor: float = 3.0
    """A training loss above this many times its running median, or not finite, counts as diverging. A median below 1
    nat counts as 1."""
    max_diverging: int = 20
    """Updates of diverging loss in a row after which `on_divergence` acts. Never more than half of a run's updates,
    rounded up."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """stop ends the run with an error and leaves its evidence in divergence-N.json; rollback leaves it too, returns to
    the last sound state and goes on with the batches after the bad ones, at smaller rates."""
    max_rollbacks: int = 3
    """Rollbacks of one run; the next divergence stops it."""
    rollback_factor: float = 0.5
    """Both learning rates are multiplied by it at each rollback; above 0 and at most 1."""
    keep: int = 2
    """States kept: last/ and the ones before it, in earlier/."""
    mesh: str = ""
    """Devices of a JAX run by axis, e.g. data=2,fsdp=4,tensor=1: data and fsdp divide the rows of a micro-batch, fsdp
    also what is kept of each matrix, tensor heads, feed-forward width and vocabulary. Empty is one device."""
    gather: Literal["update", "layer"] = "update"
    """When what fsdp divides is gathered: update once for all micro-batches, which sends least; layer where each layer
    needs it, micro-batch by micro-batch, which holds least."""
    scan_layers: bool = False
    """In JAX a loop over the layers instead of one after another, traced in a third of the time; best with remat, as
    what is kept of each layer goes through stacks. The same update (docs/scaling.md has what it costs)."""
    profile_steps: int = 0
    """Updates to trace, after the first 3, into the run folder's profile/ (docs/performance.md); 0 traces none."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events, events.out.tfevents.* in the run folder; needs the extra
    `tensorboard`: pip install -e '.[tensorboard]'."""
    track: Literal["", "trackio", "wandb"] = ""
    """Tracker that is given the same metrics while the run goes on: trackio, whose database is on this machine, or
    wandb; needs the package of that name (docs/commands.md). Empty is none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)

    def __post_init__(self) -> None:
        check_types(self)
        _require_positive(
            self,
            *("steps", "accumulation", "batch_size", "sequence_length", "clip_norm"),
            *("log_every", "eval_every", "save_every", "max_skipped", "max_diverging", "max_rollbacks", "keep"),
        )
        _require_rate(self, "sample_tokens", "profile_steps")
        _require_number(self, ("divergence_factor",), lambda value: value > 1, "above 1")
        _require_number(self, ("rollback_factor",), lambda value: 0 < value <= 1, "above 0 and at most 1")
        require(
            self.profile_steps == 0 or PROFILE_AFTER + self.profile_steps <= self.steps,
            f"profile_steps={self.profile_steps} needs steps of at least {PROFILE_AFTER + self.profile_steps}, as the "
            f"first {PROFILE_AFTER} are not traced; raise --steps or lower it.",
        )
        require(
            0 <= self.seed < 2**32,
            f"seed={self.seed} must lie in [0, 2**32), the width of a Threefry key word; choose e.g. 0.",
        )
        require(
            self.precision.params != "bfloat16",
            "precision.params=bfloat16 is too coarse to train: updates would round away; choose float32 and "
            "precision.compute=bfloat16.",
        )
        limit = self.model.max_position_embeddings
        require(
            self.sequence_length <= limit,
            f"sequence_length={self.sequence_length} exceeds model.max_position_embeddings={limit}; "
            "lower the one or raise the other.",
        )
        try:
            mesh = parse_mesh(self.mesh)
        except ValueError as error:
            raise UserError(str(error)) from None
        require(
            mesh is None or self.batch_size % mesh.rows == 0,
            f"batch_size={self.batch_size} does not divide among the data * fsdp = {mesh and mesh.rows} devices of "
            f"mesh={self.mesh}; choose a multiple of {mesh and mesh.rows}.",
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer update: A * B * T."""
        return self.accumulation * self.batch_size * self.sequence_length

    def with_vocab_size(self, vocab_size: int) -> "RunConfig":
        """The same run with the model's vocabulary set."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=vocab_size))


def to_dict(config: RunConfig) -> dict:
    """Nested plain dict of a run's configuration, for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict) -> RunConfig:
    """Inverse of `to_dict`; an unknown field raises `TypeError`, a bad value `ValueError`."""
    parts = {
        "model": ModelConfig,
        "muon": MuonConfig,
        "adamw": AdamWConfig,
        "schedule": ScheduleConfig,
        "data": DataConfig,
        "precision": PrecisionConfig,
        "hosts": HostsConfig,
    }
    nested = {name: part(**values[name]) for name, part in parts.items() if name in values}
    flat = {name: value for name, value in values.items() if name not in parts}
    if "prompts" in flat:
        flat["prompts"] = tuple(flat["prompts"])
    return RunConfig(**flat, **nested)
