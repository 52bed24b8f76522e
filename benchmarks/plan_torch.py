"""What an update of torch's side would launch, multiply and move on a GPU, counted without one.

    python -m benchmarks.plan_torch --preset seed --mode torch-eager-lce

The training step of `torch_ref` runs on meta tensors, which have shapes and no values, and every operation it calls is
noted with its operands: eager PyTorch launches each as a kernel of its own, which reads its operands and writes its
results. The rates of paper times are those of `benchmarks.plan`. What torch.compile would fuse is not counted: Inductor
needs a GPU to make it.
"""

import collections
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import job
from benchmarks.plan.targets import Rates, get_target
from benchmarks.tables import table
from harness.cli import end, parse
from harness.surroundings import git_commit
from recipe.config import RunConfig, require
from recipe.params import param_specs
from torch_ref import model as reference_model
from torch_ref.hybrid import clip_by_global_norm
from torch_ref.train import init_state

MODES = ("torch-eager", "torch-eager-lce")
LCE_CHUNK_ASPECT = 2
"""torch's default on a GPU, "aspect_ratio:2": a chunk of linear_cross_entropy has D / 2 tokens."""
NOT_LAUNCHED = frozenset(
    "view _unsafe_view reshape transpose t permute expand slice select unsqueeze squeeze split split_with_sizes unbind "
    "detach alias as_strided empty empty_like empty_strided new_empty new_empty_strided chunk lift_fresh".split()
)
"""Operations that make no kernel: views, and memory that nothing is written to."""


@dataclasses.dataclass(frozen=True)
class PlanTorchConfig:
    """Count what an update of torch's side would do on a GPU that is not here."""

    preset: str = "seed"
    """The model and recipe."""
    batch_size: int | None = None
    """Sequences per micro-batch; None takes the preset's."""
    sequence_length: int | None = None
    """Tokens per sequence; None takes the preset's."""
    accumulation: int | None = None
    """Micro-batches per update; None takes the preset's."""
    dropout: float | None = None
    """Dropout rate; None takes the preset's."""
    mode: str = "torch-eager"
    """torch-eager, or torch-eager-lce with torch's linear_cross_entropy in chunks."""
    target: str = "h100"
    """Whose rates the paper times are made of."""
    out: str = ""
    """File for the record, as JSON; empty writes none."""


@dataclasses.dataclass
class Sum:
    """Operations of one part of an update."""

    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def add(self, flops: float, size: float, rate: float, rates: Rates) -> None:
        self.launches += 1
        self.flops += flops
        self.bytes += size
        self.seconds += max(flops / rate, size / rates.memory, rates.least)

    def times(self, factor: int) -> "Sum":
        return Sum(*(factor * getattr(self, field.name) for field in dataclasses.fields(self)))


class Counter(TorchDispatchMode):
    """Adds up every operation called inside, by part; `phase` names the part of what has no sign of its own."""

    def __init__(self, config: RunConfig, rates: Rates) -> None:
        super().__init__()
        self.config, self.rates, self.phase = config, rates, ""
        self.sums: dict[str, Sum] = collections.defaultdict(Sum)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in NOT_LAUNCHED:
            tensors = [x for x in _tensors((args, kwargs, out)) if x.numel()]
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            wide = any(x.dtype in (torch.float32, torch.float64) for x in _tensors((args, kwargs)))
            rate = self.rates.wide_products if wide else self.rates.products
            self.sums[self.part(name, tensors, bool(flops))].add(flops, sum(map(_size, tensors)), rate, self.rates)
        return out

    def part(self, name: str, tensors: list[torch.Tensor], is_product: bool) -> str:
        model = self.config.model
        if self.phase:
            return self.phase
        sides = {side for x in tensors for side in x.shape}
        if model.vocab_size in sides and (is_product or any(x.dim() < 3 for x in tensors)):
            return "head and loss"
        tokens = (self.config.batch_size, self.config.sequence_length)
        if any(x.dtype == torch.int64 and x.dim() > 1 and x.shape != tokens for x in tensors):
            return "dropout masks"
        if name == "bmm" or any(
            x.dim() == 4 and x.shape[-1] not in (model.head_dim, model.head_dim // 2, 1) for x in tensors
        ):
            return "attention"
        return "linear layers" if is_product else "elementwise"


def _tensors(tree: Any) -> list[torch.Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _size(x: torch.Tensor) -> int:
    """Bytes, an axis that is only repeated counted once."""
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 1) * x.element_size()


class FusedAttention(torch.autograd.Function):
    """A stand-in for SDPA's kernels, on tensors without values: their shapes and their cost alone."""

    counter: Counter
    window: int | None

    @staticmethod
    def forward(ctx, q_BTNH, k_BSKH, v_BSKH):
        ctx.save_for_backward(q_BTNH, k_BSKH, v_BSKH)
        _attention_cost(2, (q_BTNH, k_BSKH, v_BSKH, q_BTNH))
        return torch.empty_like(q_BTNH)

    @staticmethod
    def backward(ctx, grad_BTNH):
        saved = ctx.saved_tensors
        _attention_cost(5, (*saved, *saved, grad_BTNH, grad_BTNH))
        return tuple(torch.empty_like(x) for x in saved)


def _attention_cost(products: int, tensors: tuple[torch.Tensor, ...]) -> None:
    counter, (B, T, N, H) = FusedAttention.counter, tensors[0].shape
    rates, reach = counter.rates, FusedAttention.window or T
    seen = sum(min(t + 1, reach) for t in range(T))
    rate = rates.attention_forward if products == 2 else rates.attention_backward
    counter.sums["attention"].add(products * 2 * B * N * H * seen, sum(map(_size, tensors)), rate, rates)


class ChunkedLoss(torch.autograd.Function):
    """A stand-in for torch's linear_cross_entropy in chunks: three products, and each chunk's logits four times."""

    counter: Counter

    @staticmethod
    def forward(ctx, x_MD, head_VD):
        ctx.save_for_backward(x_MD, head_VD)
        counter, (M, D), V = ChunkedLoss.counter, x_MD.shape, head_VD.shape[0]
        chunk = max(1, min(M, D // LCE_CHUNK_ASPECT))
        for rows in [chunk] * (M // chunk) + [M % chunk] * (M % chunk > 0):
            logits = rows * V * x_MD.element_size()
            # Logits written; read for the softmax and written as its gradient; read by two products.
            passes = {"logits": (2 * rows * V * D, logits), "softmax": (0, 2 * logits)}
            passes |= {name: (2 * rows * V * D, logits + 4 * V * D * (name == "head")) for name in ("x", "head")}
            for flops, size in passes.values():
                counter.sums["head and loss"].add(flops, size, counter.rates.products, counter.rates)
        return x_MD.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        x_MD, head_VD = ctx.saved_tensors
        return torch.empty_like(x_MD), torch.empty_like(head_VD)


def count_update(config: RunConfig, mode: str, rates: Rates) -> dict[str, Sum]:
    """The operations of one update, by part."""
    # Zeros take no memory before they are written, and here nothing writes.
    weights = {name: np.zeros(spec.shape, np.float32) for name, spec in param_specs(config.model).items()}
    state = init_state(dataclasses.replace(config, precision=config.precision), weights, "meta")
    counter = Counter(config, rates)
    FusedAttention.counter = ChunkedLoss.counter = counter
    own = reference_model.fused_attention, reference_model.cross_entropy

    def fused(q_BTNH, k_BSKH, v_BSKH, documents_BT=None, *, window, **_):
        FusedAttention.window = window
        return FusedAttention.apply(q_BTNH, k_BSKH, v_BSKH)

    reference_model.fused_attention = fused
    if mode.endswith(job.ROUNDS_THE_LOSS):
        reference_model.cross_entropy = lambda x_MD, head_VD, *_: ChunkedLoss.apply(x_MD, head_VD.to(x_MD.dtype))
    try:
        tokens = torch.empty(config.batch_size, config.sequence_length, dtype=torch.int64, device="meta")
        key = (1, 2) if config.model.dropout else None
        snapshots = []
        for _ in range(min(2, config.accumulation)):  # the first gradient is kept, later ones are added
            before = {name: dataclasses.replace(sum_) for name, sum_ in counter.sums.items()}
            with counter:
                state.model.loss(tokens, tokens, dropout_key=key).backward()
            snapshots.append(before)
        sums = {name: sum_.times(1) for name, sum_ in counter.sums.items()}
        for name, sum_ in sums.items():
            first = snapshots[-1].get(name, Sum())
            more = config.accumulation - len(snapshots)
            for field in dataclasses.fields(Sum):
                later = getattr(sum_, field.name) - getattr(first, field.name)
                setattr(sum_, field.name, getattr(sum_, field.name) + more * later)
        counter.sums.clear()
        counter.phase = "clip, Muon, AdamW"
        grads = [parameter.grad for parameter in state.model.parameters()]
        with counter:
            if config.accumulation > 1:
                for grad in grads:
                    grad.div_(config.accumulation)
            clip_by_global_norm(grads, config.clip_norm)
        _adamw(state.optimizer.adamw, counter)
        with counter:
            state.optimizer.muon.step()
    finally:
        reference_model.fused_attention, reference_model.cross_entropy = own
    return sums | counter.sums


def _adamw(optimizer: torch.optim.AdamW, counter: Counter) -> None:
    """torch's fused AdamW, which refuses meta tensors: one launch reads p, g, m, v and writes p, m, v."""
    for group in optimizer.param_groups:
        size = 7 * sum(parameter.numel() * parameter.element_size() for parameter in group["params"])
        counter.sums[counter.phase].add(0, size, counter.rates.products, counter.rates)


def record(config: RunConfig, mode: str, target: str) -> dict[str, Any]:
    """All that is counted, for JSON."""
    rates = get_target(target).rates
    require(rates is not None, f"--target {target} has no rates; choose h100.")
    assert rates is not None
    sums = count_update(config, mode, rates)
    seconds, flops = sum(s.seconds for s in sums.values()), job.flops_per_update(config)
    return {
        "mode": mode,
        "torch": torch.__version__,
        "commit": git_commit(),
        "target": target,
        "preset": config.preset,
        "shape": [config.accumulation, config.batch_size, config.sequence_length],
        "dropout": config.model.dropout,
        "parts": {name: dataclasses.asdict(sum_) for name, sum_ in sums.items()},
        "seconds": seconds,
        "tokens_per_second": config.tokens_per_step / seconds,
        "mfu": flops / seconds / rates.products,
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as a table, the longest part first."""
    parts = sorted(record["parts"].items(), key=lambda item: -item[1]["seconds"])
    total = {key: sum(part[key] for _, part in parts) for key in ("launches", "flops", "bytes", "seconds")}
    forms = {"launches": (1, ",.0f"), "flops": (1e12, ".3f"), "bytes": (1e9, ".1f"), "seconds": (1e-3, ".2f")}
    rows = [
        [name, *(format(part[key] / unit, form) for key, (unit, form) in forms.items())]
        for name, part in [*parts, ("all", total)]
    ]
    A, B, T = record["shape"]
    heading = (
        f"{record['mode']}, {record['preset']}, {A} x {B} x {T} tokens, dropout {record['dropout']}, on paper on "
        f"{record['target']}: {record['tokens_per_second']:,.0f} tokens/s, MFU {record['mfu']:.0%}. torch "
        f"{record['torch']}, commit {record['commit']}."
    )
    columns = {"part": "l", "launches": "r", "TFLOP": "r", "GB": "r", "ms": "r"}
    return "\n".join([heading, "", *table(columns, rows)])


def main() -> int:
    """Count, print and write; returns the exit code."""
    options = parse(
        PlanTorchConfig, sys.argv[1:], default=PlanTorchConfig(), prog="python -m benchmarks.plan_torch",
        description="Count what an update of torch's side would do on a GPU that is not here.",
    )  # fmt: skip
    require(options.mode in MODES, f"--mode {options.mode} is not counted; choose {' or '.join(MODES)}.")
    require(not options.out or not Path(options.out).exists(), f"--out {options.out} exists; name a new file.")
    config = job.resolve(
        options.preset,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        accumulation=options.accumulation,
        overrides="",
        dropout=options.dropout,
        seed=0,
        **{"compute": "bfloat16", "newton_schulz": "bfloat16", "matmul": "highest", "attention": "fused"},
    )
    counted = record(config, options.mode, options.target)
    print(markdown(counted))
    if options.out:
        Path(options.out).write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    end(main)
