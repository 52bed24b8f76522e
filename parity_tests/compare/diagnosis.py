"""Which known term makes two optimizers part: torch's recipe is replayed with one thing changed, until it is JAX's.

A replay is NumPy in float64, on the JAX side's own gradients and parameters, over the whole trajectory; so it errs by
the rounding of the optimizer's arithmetic alone. A variant is named if it reproduces every update, and every slot that
torch has as well, within the allowances of the comparison. Variants stand in a table: to add one, write a function of a
`Place` that returns the hyperparameters or switches it changes, under `@variant(name, remedy, families)`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from parity_tests.compare.errors import some
from parity_tests.compare.tolerance import SAFETY, relative_error

Arrays = Mapping[str, np.ndarray]
Key = tuple[str, str, str]

CLIP_EPSILON = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to the norm that it divides by."""


class Recipe(NamedTuple):
    """What torch's optimizer is."""

    kind: str
    """Class name."""
    settings: Sequence[Mapping[str, Mapping[str, Any]]]
    """By step, one more than were taken: parameter -> hyperparameters of its group."""
    clip: float | None = None
    """Largest global norm of the gradients."""


class Seen(NamedTuple):
    """One step of one side, arrays float64 in torch's names and layout."""

    gradients: Arrays
    before: Arrays
    """Parameters before the step."""
    updates: Arrays
    slots: Mapping[tuple[str, str], np.ndarray]
    """By (torch's slot, parameter), after the step."""
    norm: float
    """Of all gradients together."""


class Trajectory(NamedTuple):
    """All steps of one side."""

    steps: tuple[Seen, ...]


class Place(NamedTuple):
    """Where in a replay a variant is asked what it changes."""

    name: str
    step: int
    """From 0."""
    shape: tuple[int, ...]
    h: Mapping[str, Any]
    """Hyperparameters of torch's group, learning rate as `lr`."""
    recipe: Recipe
    seen: Trajectory
    """The JAX side."""


class Variant(NamedTuple):
    """A known way to differ."""

    name: str
    """Completes "the JAX update is torch's AdamW but with ..."."""
    remedy: str
    """Torch's hyperparameters, as {eps} or {betas[0]}, are filled in."""
    change: Callable[[Place], Mapping[str, Any]]
    """Hyperparameters and switches that it changes there."""
    fallback: bool = False
    """Whether it is named only if no other fits."""


ADAM, SGD, RMS, ADAGRAD, MUON = "adam", "sgd", "rmsprop", "adagrad", "muon"
FAMILIES = {
    "Adam": ADAM,
    "AdamW": ADAM,
    "NAdam": ADAM,
    "SGD": SGD,
    "RMSprop": RMS,
    "Adagrad": ADAGRAD,
    "Muon": MUON,
}
"""Class of torch.optim -> the recipe below."""

_TABLE: dict[str, list[Variant]] = {family: [] for family in (ADAM, SGD, RMS, ADAGRAD, MUON)}
_FITTED: dict[str, list[Callable[[Recipe, Trajectory], Iterator[Variant]]]] = {family: [] for family in _TABLE}
EVERY = tuple(_TABLE)


def variant(name: str, remedy: str, families: Iterable[str] = EVERY):
    """Put a function of a `Place` into the table under a name and a remedy."""

    def put(change: Callable[[Place], Mapping[str, Any]]):
        for family in families:
            _TABLE[family].append(Variant(name, remedy, change))
        return change

    return put


def fitted(families: Iterable[str] = EVERY):
    """Put a function of recipe and JAX trajectory into the table; it yields variants with values taken from there."""

    def put(make: Callable[[Recipe, Trajectory], Iterator[Variant]]):
        for family in families:
            _FITTED[family].append(make)
        return make

    return put


# --- the recipes of torch, with switches; each returns the update and the slots by torch's names


def _adam(h: Mapping[str, Any], g: np.ndarray, p: np.ndarray, state: dict, t: int) -> tuple[np.ndarray, dict]:
    b1, b2 = h["betas"]
    decoupled = h["decay"] != "coupled"
    if not decoupled:
        g = g + h["weight_decay"] * p
    m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g * g
    t = t + h["step_offset"]
    c1 = 1 - b1**t if h["correction"] in ("both", "first") and t else 1.0
    c2 = 1 - b2**t if h["correction"] in ("both", "second") and t else 1.0
    slots = {"exp_avg": m, "exp_avg_sq": v}
    if h["nesterov"] == "torch":  # Dozat's momentum, which grows with the step
        decay = h["momentum_decay"]
        now, then = (b1 * (1 - 0.5 * 0.96 ** (step * decay)) for step in (t, t + 1))
        product = state["product"] = state.get("product", 1.0) * now
        mean = (1 - now) / (1 - product) * g + then / (1 - product * then) * m
    elif h["nesterov"]:
        mean = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    else:
        mean = m / c1
    if h.get("amsgrad"):
        if h["amsgrad"] == "corrected":
            v = state["most"] = np.maximum(state.get("most", 0.0), v / c2)
            c2 = 1.0
        else:
            v = state["most"] = np.maximum(state.get("most", 0.0), v)
        slots["max_exp_avg_sq"] = v
    if h["eps_at"] == "inside":
        root = np.sqrt(v / c2 + h["eps"])
    elif h["eps_at"] == "before":
        root = (np.sqrt(v) + h["eps"]) / math.sqrt(c2)
    elif h["eps_at"] == "both":
        root = np.sqrt(v / c2 + h["eps"]) + h["eps"]
    else:
        root = np.sqrt(v / c2) + h["eps"]
    step = -h["lr"] * mean / np.where(root == 0, 1.0, root)
    return _decayed(h, p, step), slots


def _decayed(h: Mapping[str, Any], p: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The step with decoupled weight decay, if that is how the weights decay."""
    if h["decay"] == "decoupled":
        return step - h["lr"] * h["weight_decay"] * p
    if h["decay"] == "not scaled":
        return step - h["weight_decay"] * p
    if h["decay"] == "after":
        return step - h["lr"] * h["weight_decay"] * (p + step)
    return step


def _sgd(h: Mapping[str, Any], g: np.ndarray, p: np.ndarray, state: dict, t: int) -> tuple[np.ndarray, dict]:
    if h["decay"] == "coupled":
        g = g + h["weight_decay"] * p
    beta = h["momentum"]
    if beta == 0:
        return _decayed(h, p, -h["lr"] * g), {}
    rate, sign = (h["lr"], -1.0) if h["lr_inside"] else (1.0, 1.0)
    g = sign * rate * g
    damped = (1 - beta if h["average"] else 1 - h["dampening"]) * g
    buffer = state["b"] = beta * state["b"] + damped if "b" in state else (damped if h["first_damped"] else g)
    seen = buffer / (1 - beta**t) if h["debias"] else buffer
    if h["nesterov"]:
        seen = (damped if h["average"] else g) + beta * seen
    step = seen if h["lr_inside"] else -h["lr"] * seen
    return _decayed(h, p, step), {"momentum_buffer": buffer}


def _rmsprop(h: Mapping[str, Any], g: np.ndarray, p: np.ndarray, state: dict, t: int) -> tuple[np.ndarray, dict]:
    if h["decay"] == "coupled":
        g = g + h["weight_decay"] * p
    alpha = h["alpha"]
    s = state["s"] = alpha * state.get("s", h["start"]) + (1 - alpha) * g * g
    slots = {"square_avg": s}
    correction = 1 - alpha**t if h["correction"] == "second" else 1.0
    if h["centered"]:
        mean = state["a"] = alpha * state.get("a", 0.0) + (1 - alpha) * g
        slots["grad_avg"] = mean
        s = s / correction - (mean / correction) ** 2
    else:
        s = s / correction
    root = np.sqrt(s + h["eps"]) if h["eps_at"] == "inside" else np.sqrt(np.maximum(s, 0.0)) + h["eps"]
    g = g / np.where(root == 0, 1.0, root)
    if h["momentum"] > 0:
        if h["lr_inside"]:
            g = -h["lr"] * g
        g = state["b"] = h["momentum"] * state.get("b", 0.0) + g
        slots["momentum_buffer"] = g
    return _decayed(h, p, g if h["momentum"] > 0 and h["lr_inside"] else -h["lr"] * g), slots


def _adagrad(h: Mapping[str, Any], g: np.ndarray, p: np.ndarray, state: dict, t: int) -> tuple[np.ndarray, dict]:
    if h["decay"] == "coupled":
        g = g + h["weight_decay"] * p
    s = state["s"] = state.get("s", h["initial_accumulator_value"]) + g * g
    root = np.sqrt(s + h["eps"]) if h["eps_at"] == "inside" else np.sqrt(s) + h["eps"]
    rate = h["lr"] / (1 + (t - 1) * h["lr_decay"])
    return _decayed(h, p, -rate * g / np.where(root == 0, 1.0, root)), {"sum": s}


def _muon(h: Mapping[str, Any], g: np.ndarray, p: np.ndarray, state: dict, t: int) -> tuple[np.ndarray, dict]:
    beta = h["momentum"]
    inner = g if h["heavy_ball"] else (1 - beta) * g
    buffer = state["b"] = beta * state.get("b", 0.0) + inner
    if h["debias"]:
        # optax.contrib.muon: the buffer is corrected for the step to come, the gradient for this one.
        ahead = 1 if h["nesterov"] else 0
        seen, inner = buffer / (1 - beta ** (t + ahead)), inner / (1 - beta**t)
    else:
        seen = buffer
    if h["nesterov"]:
        seen = inner + beta * seen
    rows, columns = p.shape
    x = seen.T if rows > columns else seen
    norm = float(np.linalg.norm(x))
    x = x / (norm + h["eps"] if h["eps_added"] else max(norm, h["eps"]))
    a, b, c = h["ns_coefficients"]
    for _ in range(h["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if rows > columns else x
    scale = {"match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)), "none": 1.0}
    rate = h["lr"] * scale.get(h["adjust_lr_fn"], math.sqrt(max(1, rows / columns)))
    return _decayed(h, p, -rate * x), {"momentum_buffer": buffer}


_RECIPES = {ADAM: _adam, SGD: _sgd, RMS: _rmsprop, ADAGRAD: _adagrad, MUON: _muon}


def _torch_switches(kind: str) -> dict[str, Any]:
    """The switches as torch's own recipe has them."""
    return {
        "decay": "decoupled" if kind in ("AdamW", "Muon") else "coupled",
        "eps_at": "outside",
        "correction": "both" if FAMILIES[kind] == ADAM else "none",
        "step_offset": 0,
        "nesterov": "torch" if kind == "NAdam" else False,
        "lr_inside": False,
        "average": False,
        "first_damped": False,
        "debias": False,
        "start": 0.0,
        "heavy_ball": False,
        "eps_added": False,
        "clip_by": "global",
        "clip_epsilon": CLIP_EPSILON,
    }


# --- the table


@variant(
    "eps inside the root (optax eps_root)",
    "optax.adamw(eps={eps}, eps_root=0), optax.rmsprop(eps={eps}, eps_in_sqrt=False)",
    (ADAM, RMS),
)
def _(at: Place):
    return {"eps_at": "inside"}


@variant(
    "eps inside the root, as optax.adagrad has it", "scale by 1 / (sqrt(sum) + eps) in a transformation", (ADAGRAD,)
)
def _(at: Place):
    return {"eps_at": "inside"}


@variant("eps both inside and outside the root", "give optax eps_root=0", (ADAM,))
def _(at: Place):
    return {"eps_at": "both"}


@variant(
    "eps added before the bias correction", "add eps to sqrt(nu / (1 - b2^t)), as optax.scale_by_adam does", (ADAM,)
)
def _(at: Place):
    return {"eps_at": "before"}


@variant("no bias correction", "divide mu by 1 - b1^t and nu by 1 - b2^t, as optax.scale_by_adam does", (ADAM,))
def _(at: Place):
    return {"correction": "none"}


@variant("no bias correction of the first moment", "divide mu by 1 - b1^t, as optax.scale_by_adam does", (ADAM,))
def _(at: Place):
    return {"correction": "second"}


@variant("no bias correction of the second moment", "divide nu by 1 - b2^t, as optax.scale_by_adam does", (ADAM,))
def _(at: Place):
    return {"correction": "first"}


@variant("bias correction of the second moment", "give optax.rmsprop bias_correction=False", (RMS,))
def _(at: Place):
    return {"correction": "second"}


@variant("bias correction one step behind (t counts from 0)", "count the first update as t=1", (ADAM,))
def _(at: Place):
    return {"step_offset": -1}


@variant("bias correction one step ahead (the first update has t=2)", "count the first update as t=1", (ADAM,))
def _(at: Place):
    return {"step_offset": 1}


@variant("betas swapped", "give optax b1={betas[0]}, b2={betas[1]}", (ADAM,))
def _(at: Place):
    return {"betas": tuple(reversed(at.h["betas"]))}


@variant(
    "Nesterov's momentum as optax.nadam has it", "use optax.adam; torch.optim.NAdam's momentum grows with t", (ADAM,)
)
def _(at: Place):
    return {"nesterov": "optax"}


@variant("no Nesterov momentum", "torch.optim.NAdam has it, with a momentum that grows with t", (ADAM,))
def _(at: Place):
    return {"nesterov": False}


@variant("AMSGrad", "use optax.adam or optax.adamw, or give torch amsgrad=True", (ADAM,))
def _(at: Place):
    return {"amsgrad": True}


@variant("no AMSGrad", "use optax.amsgrad, or give torch amsgrad=False", (ADAM,))
def _(at: Place):
    return {"amsgrad": False}


@variant(
    "AMSGrad's maximum over bias-corrected moments", "optax.amsgrad is not torch's; drop amsgrad on both sides", (ADAM,)
)
def _(at: Place):
    return {"amsgrad": "corrected"} if at.h.get("amsgrad") else {}


@variant(
    "weight decay coupled to the gradient (L2)",
    "use optax.adamw, or put optax.add_decayed_weights after the scaling by moments and before the learning rate",
    (ADAM, MUON),
)
def _(at: Place):
    return {"decay": "coupled"}


@variant(
    "weight decay decoupled from the gradient",
    "chain optax.add_decayed_weights before the momentum or moments; or use torch.optim.AdamW",
)
def _(at: Place):
    return {"decay": "decoupled"}


@variant(
    "weight decay not multiplied by the learning rate", "put optax.add_decayed_weights before scale_by_learning_rate"
)
def _(at: Place):
    return {"decay": "not scaled"}


@variant("weight decay after the step instead of before it", "decay the parameters as they were before the step")
def _(at: Place):
    return {"decay": "after"}


@variant("weight decay on every parameter", "give optax.adamw a mask, or torch no param_groups with weight_decay=0")
def _(at: Place):
    groups = at.recipe.settings[at.step].values()
    return {"weight_decay": max(group["weight_decay"] for group in groups)}


@variant(
    "weight decay on tensors of two axes or more only", "drop the mask, or give torch param_groups with weight_decay=0"
)
def _(at: Place):
    return {"weight_decay": 0.0} if len(at.shape) < 2 else {}


@variant("no weight decay", "give optax weight_decay, or chain optax.add_decayed_weights")
def _(at: Place):
    return {"weight_decay": 0.0}


@variant(
    "the learning rate of the next step", "optax's schedules count from 0, and torch's scheduler steps after the update"
)
def _(at: Place):
    return {"lr": at.recipe.settings[at.step + 1][at.name]["lr"]}


@variant(
    "no 1e-6 in the clipping norm", "torch divides by norm + 1e-6: scale by min(1, clip / (norm + 1e-6)) in JAX too"
)
def _(at: Place):
    return {"clip_epsilon": 0.0}


@variant("clipping tensor by tensor instead of by the global norm", "use optax.clip_by_global_norm")
def _(at: Place):
    return {"clip_by": "tensor"}


@variant(
    "clipping tensor by tensor, without torch's 1e-6", "scale by min(1, clip / (norm + 1e-6)), norm the global one"
)
def _(at: Place):
    return {"clip_by": "tensor", "clip_epsilon": 0.0}


@variant("clipping of every value instead of the norm", "use optax.clip_by_global_norm instead of optax.clip")
def _(at: Place):
    return {"clip_by": "value"}


@variant("no clipping", "chain optax.clip_by_global_norm first; torch's has 1e-6 more in the norm")
def _(at: Place):
    return {"clip_by": "nothing"}


@variant("the learning rate inside the momentum buffer", "put optax.trace before scale_by_learning_rate", (SGD, RMS))
def _(at: Place):
    return {"lr_inside": True}


@variant("momentum averaged, (1 - beta) g, instead of heavy ball", "use optax.trace; optax.ema averages", (SGD,))
def _(at: Place):
    return {"average": True, "first_damped": True}


@variant("momentum averaged and bias-corrected, as optax.ema does", "use optax.trace", (SGD,))
def _(at: Place):
    return {"average": True, "first_damped": True, "debias": True}


@variant("the first gradient dampened as well", "torch starts the buffer at the whole first gradient", (SGD,))
def _(at: Place):
    return {"first_damped": True}


@variant("no dampening of the momentum", "give torch dampening=0; optax.trace has none", (SGD,))
def _(at: Place):
    return {"dampening": 0.0}


@variant("Nesterov's momentum", "give optax.sgd nesterov=False, or torch nesterov=True", (SGD, MUON))
def _(at: Place):
    return {"nesterov": True}


@variant("plain instead of Nesterov's momentum", "give optax nesterov=True, or torch nesterov=False", (SGD, MUON))
def _(at: Place):
    return {"nesterov": False}


@variant("no momentum", "give optax momentum, or chain optax.trace", (SGD, RMS))
def _(at: Place):
    return {"momentum": 0.0}


@variant("a centered second moment", "give optax.rmsprop centered=False, or torch centered=True", (RMS,))
def _(at: Place):
    return {"centered": True}


@variant("a second moment that is not centered", "give optax.rmsprop centered=True, or torch centered=False", (RMS,))
def _(at: Place):
    return {"centered": False}


@variant(
    "a bias correction of the momentum (optax.contrib.muon)",
    "average without correction: optax.ema(debias=False)",
    (MUON,),
)
def _(at: Place):
    return {"debias": True}


@variant("momentum as heavy ball, g, instead of averaged, (1 - beta) g", "average it: optax.ema", (MUON,))
def _(at: Place):
    return {"heavy_ball": True}


@variant("eps added to the norm of the matrix", "divide by max(norm, eps)", (MUON,))
def _(at: Place):
    return {"eps_added": True}


@variant(
    "scale 0.2 sqrt(max(rows, columns)) (consistent_rms)",
    "give optax consistent_rms=None, or torch match_rms_adamw",
    (MUON,),
)
def _(at: Place):
    return {"adjust_lr_fn": "match_rms_adamw"}


@variant(
    "scale sqrt(max(1, rows / columns))", "give optax consistent_rms=0.2, or torch adjust_lr_fn='original'", (MUON,)
)
def _(at: Place):
    return {"adjust_lr_fn": "original"}


@variant("rows and columns swapped in the scale by shape", "rows are outputs: of a JAX kernel the last axis", (MUON,))
def _(at: Place):
    rows, columns = at.shape
    wrong, right = math.sqrt(max(1, columns / rows)), math.sqrt(max(1, rows / columns))
    return {"lr": at.h["lr"] * wrong / right} if at.h["adjust_lr_fn"] in (None, "original") else {}


@variant("no scale by shape", "scale by sqrt(max(1, rows / columns)): optax.contrib.muon does", (MUON,))
def _(at: Place):
    return {"adjust_lr_fn": "none"}


@variant(
    "a bias-corrected momentum and eps=1e-08 added to the norm, as optax.contrib.muon has them",
    "orthogonalize an average without correction, divided by max(norm, {eps})",
    (MUON,),
)
def _(at: Place):
    return {"debias": True, "eps_added": True, "eps": 1e-8}


# --- variants whose value is taken from the JAX side

# The values that libraries have as defaults; a value that only shows inside a root cannot be solved for.
_EPSILONS = (0.0, 1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-12, 1e-15)
_DECAYS = (1e-4, 1e-3, 5e-4, 1e-2, 5e-2, 1e-1)
_CLIPS = (0.1, 0.25, 0.5, 1.0, 5.0, 10.0)


def _constant(name: str, remedy: str, **change) -> Variant:
    return Variant(name, remedy, lambda at: change)


def _values(recipe: Recipe, key: str) -> set:
    return {group[key] for group in recipe.settings[0].values() if key in group}


@fitted((ADAM, RMS, ADAGRAD, MUON))
def _eps(recipe: Recipe, seen: Trajectory) -> Iterator[Variant]:
    for eps in _EPSILONS:
        if {eps} != _values(recipe, "eps"):
            yield _constant(f"eps={eps:g}", f"give torch and optax one eps: torch has {_texts(recipe, 'eps')}", eps=eps)
        if {eps} != _values(recipe, "eps") and FAMILIES[recipe.kind] != MUON:
            yield _constant(
                f"eps={eps:g} inside the root",
                f"add eps={_texts(recipe, 'eps')} after the root: eps_root=0, of optax.rmsprop eps_in_sqrt=False",
                eps=eps,
                eps_at="inside",
            )


def _texts(recipe: Recipe, key: str) -> str:
    return " or ".join(f"{value:g}" for value in sorted(_values(recipe, key)))


@fitted()
def _decay(recipe: Recipe, seen: Trajectory) -> Iterator[Variant]:
    remedy = f"torch has weight_decay={_texts(recipe, 'weight_decay')}; optax.adamw's default is 0.0001"
    for value in dict.fromkeys((*_fit_decay(recipe, seen), *_DECAYS)):
        for how in ("decoupled", "coupled"):
            yield _constant(f"weight_decay={value:g}, {how}", remedy, weight_decay=value, decay=how)


def _fit_decay(recipe: Recipe, seen: Trajectory) -> Iterator[float]:
    """The decoupled decay of the first step that makes up for what torch's recipe lacks without it."""
    name = max(seen.steps[0].updates, key=lambda name: seen.steps[0].before[name].size)
    if name not in recipe.settings[0] or not recipe.settings[0][name]["lr"]:
        return
    plain = Variant("", "", lambda at: {"weight_decay": 0.0})
    for step, update, _ in replay(recipe, seen, name, [plain]):
        p = seen.steps[step].before[name]
        rest = seen.steps[step].updates[name] - update
        yield from _nice(float(-(rest * p).sum() / (p * p).sum() / recipe.settings[0][name]["lr"]))
        return


def _nice(value: float) -> Iterator[float]:
    """A fitted value as a person may have written it, and as it is."""
    if math.isfinite(value):
        yield from dict.fromkeys((float(f"{value:.3g}"), float(f"{value:.6g}"), value))


@fitted((ADAM,))
def _betas(recipe: Recipe, seen: Trajectory) -> Iterator[Variant]:
    """From the first step's moments: (1 - b1) g and (1 - b2) g^2."""
    first = seen.steps[0]
    for name, g in first.gradients.items():
        m, v = first.slots.get(("exp_avg", name)), first.slots.get(("exp_avg_sq", name))
        if m is None or v is None or not g.any():
            continue
        g2 = g * g
        # Without clipping; a clipped gradient scales the moments by the clip and its square.
        b1s, b2s = _nice(1 - float((m * g).sum() / g2.sum())), _nice(1 - float((v * g2).sum() / (g2 * g2).sum()))
        theirs = recipe.settings[0][name]["betas"]
        for b1, b2 in zip(b1s, b2s, strict=False):
            if 0 <= b1 < 1 and 0 <= b2 < 1:
                yield _constant(
                    f"betas=({b1:g}, {b2:g})", f"give optax b1={theirs[0]:g}, b2={theirs[1]:g}", betas=(b1, b2)
                )
        return


@fitted((SGD, MUON, RMS))
def _momentum(recipe: Recipe, seen: Trajectory) -> Iterator[Variant]:
    """From two buffers: b2 - g2 = momentum b1; and from the first averaged one."""
    remedy = f"torch has momentum={_texts(recipe, 'momentum')}"
    values = [0.5, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99]
    for name, g in seen.steps[-1].gradients.items():
        buffers = [one.slots.get(("momentum_buffer", name)) for one in seen.steps[:2]]
        if len(buffers) == 2 and all(one is not None and one.any() for one in buffers):
            rest = buffers[1] - seen.steps[1].gradients[name]
            values += _nice(float((rest * buffers[0]).sum() / (buffers[0] ** 2).sum()))
            g = seen.steps[0].gradients[name]
            if g.any():
                values += _nice(1 - float((buffers[0] * g).sum() / (g * g).sum()))
            break
    for value in dict.fromkeys(values):
        if 0 <= value < 1 and {value} != _values(recipe, "momentum"):
            yield _constant(f"momentum={value:g}", remedy, momentum=value)


@fitted((RMS,))
def _alpha(recipe: Recipe, seen: Trajectory) -> Iterator[Variant]:
    for name, g in seen.steps[0].gradients.items():
        s = seen.steps[0].slots.get(("square_avg", name))
        if s is None or not g.any():
            continue
        for alpha in _nice(1 - float((s * g * g).sum() / (g**4).sum())):
            yield _constant(f"decay={alpha:g}", f"torch has alpha={_texts(recipe, 'alpha')}", alpha=alpha)
        for start in _nice(float((s - (1 - recipe.settings[0][name]["alpha"]) * g * g).mean())):
            begun = start / recipe.settings[0][name]["alpha"]
            yield _constant(f"a second moment that starts at {begun:g}", "give optax initial_scale=0", start=begun)
        return


@fitted((ADAGRAD,))
def _accumulator(recipe: Recipe, seen: Trajectory) -> Iterator[Variant]:
    for name, g in seen.steps[0].gradients.items():
        s = seen.steps[0].slots.get(("sum", name))
        for value in _nice(0.1 if s is None else float((s - g * g).mean())):
            remedy = (
                f"give optax.adagrad initial_accumulator_value={_texts(recipe, 'initial_accumulator_value')}; "
                "its default is 0.1"
            )
            yield _constant(f"initial_accumulator_value={value:g}", remedy, initial_accumulator_value=value)
        return


@fitted((MUON,))
def _newton_schulz(recipe: Recipe, seen: Trajectory) -> Iterator[Variant]:
    theirs = next(iter(recipe.settings[0].values()))
    for steps in range(1, 13):
        if steps != theirs["ns_steps"]:
            yield _constant(f"{steps} Newton-Schulz steps", f"give optax ns_steps={theirs['ns_steps']}", ns_steps=steps)
    for name, found in (("1.5, -0.5, 0", (1.5, -0.5, 0.0)), ("2, -1.5, 0.5", (2.0, -1.5, 0.5))):
        text = f"give optax ns_coeffs={tuple(theirs['ns_coefficients'])}"
        yield _constant(f"Newton-Schulz coefficients ({name})", text, ns_coefficients=found)


@fitted()
def _clips(recipe: Recipe, seen: Trajectory) -> Iterator[Variant]:
    for clip in _CLIPS:
        if clip != recipe.clip:
            remedy = (
                f"torch clips at {recipe.clip:g}" if recipe.clip else "give torch_training clip=..., or do not clip"
            )
            for epsilon in (0.0, CLIP_EPSILON):
                yield _constant(f"clipping of the global norm at {clip:g}", remedy, clip=clip, clip_epsilon=epsilon)


@fitted()
def _rates(recipe: Recipe, seen: Trajectory) -> Iterator[Variant]:
    """Rates by which the JAX updates are torch's recipe's: one rate, another step's, or those of another schedule."""
    name = max(seen.steps[0].updates, key=lambda name: seen.steps[0].before[name].size)
    if name not in recipe.settings[0]:
        return
    theirs = [one[name]["lr"] for one in recipe.settings]
    unit = Variant("", "", lambda at: {"lr": 1.0})
    rates = []
    for step, update, _ in replay(recipe, seen, name, [unit]):
        square = float((update * update).sum())
        rates.append(float((seen.steps[step].updates[name] * update).sum()) / square if square else math.nan)
    if not all(map(math.isfinite, rates)):
        return

    def by_step(values: Sequence[float]) -> Callable[[Place], Mapping[str, Any]]:
        # Groups of other rates keep their ratio to the first.
        def change(at: Place):
            mine = theirs[at.step]
            return {"lr": values[at.step] * (at.h["lr"] / mine if mine else 1.0)}

        return change

    behind = [rates[0], *theirs[: len(rates) - 1]]
    if len(rates) > 1 and len(set(theirs)) > 1:
        yield Variant(
            "the learning rate of the step before",
            "optax's schedules count from 0, and torch's scheduler steps after the update",
            by_step(behind),
        )
    for rate in _nice(rates[-1]):
        if rate < 0:
            yield Variant("the sign of the update: it ascends", "scale by -learning_rate", by_step([rate] * len(rates)))
        else:
            text = ", ".join(f"{value:g}" for value in dict.fromkeys(theirs[:-1]))
            yield Variant(f"learning rate {rate:g}", f"torch has {text}", by_step([rate] * len(rates)))
    single = [float(np.float32(value)) for value in theirs]
    yield Variant("a learning rate rounded to float32", "compute the schedule in the dtype of the run", by_step(single))
    shown = ", ".join(f"{rate:.6g}" for rate in rates[:4])
    listed = ", ".join(f"{rate:.6g}" for rate in theirs[: min(4, len(rates))])
    more = ", ..." if len(rates) > 4 else ""
    yield Variant(f"the learning rates {shown}{more}", f"torch has {listed}{more}", by_step(rates), True)


# --- the replay


def _clipped(recipe: Recipe, how: Mapping[str, Any], seen: Seen, name: str) -> np.ndarray:
    """The gradient of a parameter after the clipping that `how` has."""
    gradient, clip = seen.gradients[name], how.get("clip", recipe.clip)
    if clip is None or how["clip_by"] == "nothing":
        return gradient
    if how["clip_by"] == "value":
        return np.clip(gradient, -clip, clip)
    norm = float(np.linalg.norm(gradient)) if how["clip_by"] == "tensor" else seen.norm
    return gradient * min(1.0, clip / (norm + how["clip_epsilon"])) if norm else gradient


def replay(
    recipe: Recipe, seen: Trajectory, name: str, changes: Sequence[Variant] = ()
) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
    """Step, update and slots of one parameter as torch's recipe, changed by the variants, makes them."""
    family = FAMILIES[recipe.kind]
    state: dict[str, Any] = {}
    for step, one in enumerate(seen.steps):
        h = {**_torch_switches(recipe.kind), **_spoken(recipe.settings[step][name], recipe.kind)}
        for change in changes:
            h |= change.change(Place(name, step, one.before[name].shape, h, recipe, seen))
        g = _clipped(recipe, h, one, name)
        update, slots = _RECIPES[family](h, -g if h.get("maximize") else g, one.before[name], state, step + 1)
        yield step, update, slots


def _spoken(group: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Torch's hyperparameters without what the switches say."""
    values = dict(group)
    if values.pop("decoupled_weight_decay", False):
        values["decay"] = "decoupled"
    return values


def reproduces(
    recipe: Recipe,
    seen: Trajectory,
    changes: Sequence[Variant],
    limits: Sequence[Mapping[Key, float]],
    u: float,
) -> bool:
    """Whether torch's recipe with these changes gives every update and slot of `seen` within rounding.

    An update is the difference of two parameters, each rounded once, so it errs by SAFETY u |parameter| at least.
    """
    with np.errstate(all="ignore"):
        for name in sorted(seen.steps[0].updates, key=lambda name: seen.steps[0].before[name].size):
            if name not in recipe.settings[0]:
                if any(one.updates[name].any() for one in seen.steps):
                    return False
                continue
            for step, update, slots in replay(recipe, seen, name, changes):
                one, limit = seen.steps[step], limits[step]
                size = float(np.linalg.norm(update)) or 1.0
                floor = SAFETY * u * float(np.linalg.norm(one.before[name])) / size
                within = limit.get(("update", "", name), 0.0) + floor
                if one.updates[name].shape != update.shape or not _error(one.updates[name], update) <= within:
                    return False
                for slot, value in slots.items():
                    theirs = one.slots.get((slot, name))
                    allowed = limit.get(("slot", slot, name), 2 * SAFETY * u)
                    if theirs is not None and not _error(theirs, value) <= allowed:
                        return False
    return True


def _error(value: np.ndarray, truth: np.ndarray) -> float:
    return relative_error(value, truth) if value.shape == truth.shape else math.inf


def candidates(recipe: Recipe, seen: Trajectory) -> tuple[list[Variant], list[Variant]]:
    """The variants of the optimizer's family: those of the table, and those with values taken from the JAX side."""
    family = FAMILIES[recipe.kind]
    with np.errstate(all="ignore"):
        return _TABLE[family], [one for make in _FITTED[family] for one in make(recipe, seen)]


def diagnose(
    recipe: Recipe,
    ours: Trajectory | None,
    theirs: Trajectory | None,
    limits: Sequence[Mapping[Key, float]],
    u: float,
) -> str:
    """One line: the known variant of torch's recipe that the JAX side computes, and the remedy.

    `ours` and `theirs` are JAX's and torch's trajectories, `limits` the allowances by step and (kind, slot, parameter),
    u the unit round-off of the comparison. Says so if the recipe is unknown or no variant fits; "" without trajectory.
    """
    if ours is None or theirs is None:
        return ""
    if recipe.kind not in FAMILIES:
        return f"no recipe of torch's {recipe.kind} is known here, so the differing term has no name"
    common = set(ours.steps[0].updates) & set(theirs.steps[0].updates) & set(ours.steps[0].gradients)
    ours, theirs = _only(ours, common), _only(theirs, common)
    for one, other, side, remedy in (
        (ours, theirs, "JAX", "give these parameters to the optimizer, unmasked"),
        (theirs, ours, "torch", "set requires_grad, and give these parameters to the torch optimizer"),
    ):
        still = [name for name in sorted(common) if not _moves(one, name) and _moves(other, name)]
        if still:
            return f"the {side} side never updates {some(still)}; remedy: {remedy}"
    if not reproduces(recipe, theirs, (), limits, u):
        return f"the replay of torch's {recipe.kind} is not torch's own here, so the differing term has no name"
    if reproduces(recipe, ours, (), limits, u):
        return f"on its own gradients the JAX side follows torch's {recipe.kind}: no term of the optimizer differs"
    table, values = candidates(recipe, ours)
    for group in (
        ((one,) for one in table),
        ((one,) for one in values),
        itertools.combinations(table, 2),
        itertools.product(table, values),
        itertools.combinations(values, 2),
    ):
        found = [changes for changes in group if reproduces(recipe, ours, changes, limits, u)]
        if found:
            # A rounded value and the fitted one reproduce the same.
            found = list({tuple(one.name for one in changes): changes for changes in found}.values())
            found = [changes for changes in found if not any(one.fallback for one in changes)] or found
            names = " or ".join(" and ".join(one.name for one in changes) for changes in found[:3])
            first = {"clip": recipe.clip, **next(iter(recipe.settings[0].values()))}
            remedy = "; and ".join(dict.fromkeys(one.remedy.format(**first) for one in found[0]))
            return f"the JAX update is torch's {recipe.kind} but with {names}; remedy: {remedy}"
    return f"no known variant of torch's {recipe.kind}, nor two of them together, reproduces the JAX update"


def _moves(seen: Trajectory, name: str) -> bool:
    return any(one.updates[name].any() for one in seen.steps)


def _only(seen: Trajectory, names: set[str]) -> Trajectory:
    def of(arrays: Arrays) -> Arrays:
        return {name: value for name, value in arrays.items() if name in names}

    return Trajectory(tuple(one._replace(updates=of(one.updates)) for one in seen.steps))


def diagnose_gradients(
    kind: str,
    ours: Mapping[Key, np.ndarray],
    theirs: Mapping[Key, np.ndarray],
    before: Mapping[Key, np.ndarray],
    limits: Mapping[Key, float],
) -> str:
    """One line on losses or gradients of a step that part: a factor, a penalty in the loss, or which of them part.

    Arrays and limits by (kind, slot, parameter); `before` holds the parameters that the JAX side had before the step.
    """
    gradients = [key for key in theirs if key[0] == "gradient" and key in ours]
    gradients = [key for key in gradients if ours[key].shape == theirs[key].shape]
    apart = [key for key in gradients if not _error(ours[key], theirs[key]) <= limits[key]]
    if not gradients:
        return ""
    if not apart:
        return "every gradient agrees: the losses differ by a term that has none; remedy: report one loss on both sides"
    same = [("loss", "", ""), *gradients] if kind == "loss" else gradients
    factor = _ratio([ours[key] for key in same], [theirs[key] for key in same])
    if all(_error(ours[key], factor * theirs[key]) <= limits[key] for key in same):
        what = "loss and every gradient are" if kind == "loss" else "every gradient is"
        return (
            f"in JAX {what} torch's times {factor:.6g}; remedy: one reduction on both sides, a sum or a mean over the "
            "same elements"
        )
    values = {key: before.get(("parameter", *key[1:])) for key in apart}
    if all(value is not None for value in values.values()):
        decay = _ratio([ours[key] - theirs[key] for key in apart], list(values.values()))
        if all(_error(ours[key], theirs[key] + decay * values[key]) <= limits[key] for key in apart):
            return (
                f"the JAX gradient is torch's plus {decay:.6g} times the parameter, in {len(apart)} of "
                f"{len(gradients)}: a penalty in the loss; remedy: the same penalty on both sides"
            )
    if len(apart) == len(gradients):
        return ""
    return f"{len(apart)} of {len(gradients)} gradients part: {some(key[2] for key in apart)}; the others agree"


def _ratio(values: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> float:
    """The factor of least squares between two lists of arrays."""
    square = sum(float((truth * truth).sum()) for truth in truths)
    product = sum(float((value * truth).sum()) for value, truth in zip(values, truths, strict=True))
    return product / square if square else math.nan
