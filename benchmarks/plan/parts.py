"""To which part of an update a launch belongs, what a kernel that is no product computes, and what it takes on paper.

A launch carries the lines of source that made it, so a part is a file or a function of `jax_impl`. Where XLA fused two
parts, the last operation's line counts; the sum over the parts is exact, the borders between them are not.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks.plan.program import Launch, Program
from benchmarks.plan.targets import Rates
from recipe.config import ModelConfig, RunConfig
from recipe.dropout import DECISIONS
from recipe.params import param_specs

NEWTON_SCHULZ, HEAD, ATTENTION, LINEAR = "Newton-Schulz", "head and loss", "attention", "linear layers"
MASKS, WEIGHTS, COLLECTIVES = "dropout", "weights to 16 bits", "collectives"
SUMS, OPTIMIZER = "gradient sums and small", "clip, AdamW, momentum"

RULES = {
    NEWTON_SCHULZ: r"newton_schulz\.|batches\.",
    HEAD: r"\w*loss\w*\.",
    ATTENTION: r"\w*(attention|flash)\w*\.",
    MASKS: r"random\.(decisions|keep_mask|bits|fold_in|key)",
    LINEAR: r"model\.Linear",
    "SwiGLU": r"model\.(swiglu|Qwen3MLP)",
    "norms, RoPE, residuals": r"model\.(rms_norm|RMSNorm|apply_rope|Qwen3Attention|Qwen3DecoderLayer|Qwen3Model)",
    "embedding": r"model\.Embedding",
    SUMS: r"train\..*(add_gradient|gradient)$",
    OPTIMIZER: r"(hybrid|transforms?|_tree_math)\.",
}
"""Part -> what `file.function` of a frame begins with. Frames are asked from the innermost outwards, rules in order."""

_RULES = {name: re.compile(rule) for name, rule in RULES.items()}


def part(launch: Launch, model: ModelConfig) -> str:
    """The part of an update that a launch belongs to.

    XLA drops the line of a product that it adds to a sum in place; then its shape tells.
    """
    if launch.collective:
        return COLLECTIVES
    if launch.words:
        return MASKS
    found = next((name for frame in launch.frames for name, rule in _RULES.items() if rule.match(str(frame))), None)
    if found is None and launch.products:
        sides = {side for product in launch.products for shape in product[:3] for side in shape.dims}
        return HEAD if model.vocab_size in sides else LINEAR
    if found is None and any(str(frame) == "random.drop" for frame in launch.frames):
        return MASKS  # computed again, it has lost the lines of the part that drops
    if found is None:
        return SUMS if launch.loops else OPTIMIZER
    if found == LINEAR and not launch.products:
        made, weights = launch.instruction.data, matrices(model)
        if made and all(shape.dtype in ("bf16", "f16") and shape.dims in weights for shape in made):
            return WEIGHTS
    return found


@functools.cache
def matrices(model: ModelConfig) -> frozenset[tuple[int, ...]]:
    """Dimensions of the model's matrices, in either order."""
    shapes = {spec.shape for spec in param_specs(model).values() if spec.role == "matrix"}
    return frozenset(shapes | {shape[::-1] for shape in shapes})


class Work(NamedTuple):
    """What a kernel computes that the program's text does not show."""

    flops: float
    rate: str = "products"
    """The field of `Rates` that bounds it."""
    words: float = 0.0
    """Blocks of Threefry."""


def _visible(queries: int, keys: int, window: int) -> float:
    """Pairs of query and key of causal attention, a row of positions each; 0 is no window."""
    if not window:
        return queries * (keys + 1) / 2
    return float(sum(min(position + 1, window) for position in range(queries)))


def _cudnn(launch: Launch) -> Work:
    """cuDNN's attention: two products of visible scores forward, five backward."""
    i = launch.instruction
    B, N, T, S = (int(x) for x in re.findall(r'"(\d+)"', i.attribute(r'"dimensions": ?\[([^\]]*)\]')))
    window = int(i.attribute(r'"sliding_window_length": ?"?(\d+)') or 0)
    backward = "Backward" in i.target
    products = 10 if backward else 4
    head_dim = i.results[0].dims[-1]
    return Work(products * B * N * head_dim * _visible(T, S, window), f"attention_{_way(backward)}")


def _way(backward: bool) -> str:
    return "backward" if backward else "forward"


KERNELS: dict[str, Callable[[Launch], Work]] = {
    r"__cudnn\$fmha": _cudnn,
}
"""Custom call's target, or Pallas kernel's name -> its work. A Pallas kernel that is not here is believed its
`pl.CostEstimate`; one with neither is listed as unknown."""


DECIDING, KEEPING = 80 / 52, 105 / 52
"""What a Threefry block costs attention's kernels over a block alone: with its four comparisons and selections 20
integer instructions a probability, and 26 where the decisions are also packed and written, counted in sm_90a code."""


def _blocks(launch: Launch, exponentials: float) -> float:
    """Threefry blocks of a kernel of attention with dropout: one for four probabilities, none where masks are read."""
    kept = any(shape.dtype == "u8" for shape in launch.shapes)
    written = any(shape.dtype == "u8" for shape in launch.instruction.results)
    return exponentials / DECISIONS * (KEEPING if written else 0.0 if kept else DECIDING)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A `pl.CostEstimate` and the kernel it was given to."""

    name: str
    results: tuple[tuple[int, ...], ...]
    flops: float
    bytes: float
    transcendentals: float = 0.0


def work(launch: Launch, model: ModelConfig, estimates: Mapping[tuple, Estimate] | None = None) -> Work | None:
    """The work of a launch: its products, a formula of `KERNELS`, or an estimate; None if a kernel has none of them."""
    called = launch.kernel or launch.instruction.target
    for pattern, formula in KERNELS.items():
        if called and re.match(pattern, called):
            return formula(launch)
    if launch.kernel:
        key = (launch.kernel, tuple(shape.dims for shape in launch.instruction.results))
        estimate = (estimates or {}).get(key)
        if estimate is None:
            return None
        drops = model.dropout and part(launch, model) == ATTENTION
        return Work(estimate.flops, "kernels", _blocks(launch, estimate.transcendentals) if drops else 0.0)
    wide = any("f32" in (product.left.dtype, product.right.dtype) for product in launch.products)
    return Work(launch.flops, "wide_products" if wide else "products", launch.words)


class Cost(NamedTuple):
    """A launch, `times` an update, with its part and its work; every other number is of one launch."""

    launch: Launch
    part: str
    flops: float
    words: float
    seconds: float
    """The paper time; 0 where the device has no rates."""
    alone: tuple[float, float, float]
    """Seconds that its products, its bytes and its Threefry would take alone."""
    known: bool
    """False for a kernel whose FLOPs nobody states."""


def costs(
    program: Program, config: RunConfig, rates: Rates | None, estimates=None, link_rate: Callable | None = None
) -> list[Cost]:
    """Every launch of the program, with its part, its work and its paper time.

    A launch takes as long as the slowest of its products, its bytes, its random words and the smallest launch; launches
    follow one another. A collective takes what it sends over the links, whose rate for a group of devices `link_rate`
    says.
    """
    found = []
    for launch in program.launches:
        done = work(launch, config.model, estimates)
        flops, rate, words = done or Work(0.0)
        alone, seconds = (0.0, 0.0, 0.0), 0.0
        if rates is not None:
            drawn = words / rates.threefry if rates.threefry else 0.0
            alone = flops / getattr(rates, rate), launch.bytes / rates.memory, drawn
            seconds = max(*alone, rates.least)
            if launch.collective:
                joined = launch.groups[0] if launch.groups else ()
                seconds = max(seconds, launch.sent / (link_rate(joined) if link_rate else rates.links))
        found.append(Cost(launch, part(launch, config.model), flops, words, seconds, alone, done is not None))
    return found
