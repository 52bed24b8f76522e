"""Named taps on both twins, without a change to either model: activations, cotangents, gradients, updates.

A tap is called by the module's Hugging Face path. In torch it is a hook; in JAX the modules' `__call__` is replaced
while the model is traced, so the value leaves the jitted function as one more result, and a zero added at the tap
collects the cotangent as its gradient. A module that hands on a child's very output (self_attn hands on o_proj's) gets
no second tap.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import jax_impl.model
import jax_impl.weights
import torch_ref.model
import torch_ref.weights
from harness.divergence import INPUT_NAMES
from jax_impl import random as jax_random
from parity_tests.compare.jax_side import patched_calls
from parity_tests.compare.report import Operation
from parity_tests.compare.torch_side import torch_taps
from parity_tests.compare.walk import FunctionTap, Walk, to_numpy
from parity_tests.sides import Arrays, JaxModel, JaxTraining, TorchModel, TorchTraining, x64
from recipe.params import param_specs
from torch_ref import random as torch_random

ROPE_NAMES = ("q_rope", "k_rope")
JAX_ROPE = FunctionTap(jax_impl.model, "apply_rope", ROPE_NAMES)
TORCH_ROPE = FunctionTap(torch_ref.model, "apply_rope", ROPE_NAMES)


class Taps(NamedTuple):
    """What one loss and its backward pass leave, each in execution order; narrow dtypes are widened to float32."""

    forward: Arrays
    backward: Arrays
    gradients: Arrays

    def flat(self) -> Arrays:
        """One dict: `forward NAME`, then `backward NAME`, then `gradient NAME`."""
        parts = {"forward": self.forward, "backward": self.backward, "gradient": self.gradients}
        return {f"{phase} {name}": array for phase, arrays in parts.items() for name, array in arrays.items()}


@contextlib.contextmanager
def jax_taps(
    model: nnx.Module,
    perturbations: Mapping[str, jax.Array] | None = None,
    *,
    functions: Iterable[FunctionTap] = (),
) -> Iterator[dict[str, jax.Array]]:
    """Context in which calling `model` fills the yielded dict, tap by tap; open it inside the function that is traced.

    `perturbations` are added at the taps of their names. Taps do not reach through `jax.jit`, `nnx.scan` or `nnx.remat`
    inside the model: their values would not leave that trace.
    """
    taps: dict[str, jax.Array] = {}

    def record(name, value, to_common):
        taps[name] = value = value if perturbations is None else value + perturbations[name]
        return value

    def is_array(value):
        return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)

    walk = Walk(record, is_array, inputs=INPUT_NAMES)
    paths = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}
    kinds = {type(module) for _, module in nnx.iter_modules(model)}
    with walk.functions(functions), patched_calls(walk, kinds, lambda module: paths.get(id(module))):
        yield taps


def trace_jax(
    build: Callable[[Any], nnx.Module],
    params: Any,
    objective: Callable[[nnx.Module], jax.Array],
    *,
    outputs: Callable[[nnx.Module], dict[str, jax.Array]] = lambda model: {},
    functions: Iterable[FunctionTap] = (),
    backward: bool = True,
) -> tuple[Arrays, Arrays, Any]:
    """Forward taps, cotangents and the gradient of the scalar `objective(build(params))`, from one jitted function.

    `outputs(model)` gives further arrays of the forward pass, computed without taps. Without `backward` the cotangents
    and the gradient are empty.
    """
    order: list[str] = []

    def run(params, perturbations):
        model = build(params)
        with jax_taps(model, perturbations, functions=functions) as taps:
            loss = objective(model)
        order[:] = taps  # a jitted function returns dicts sorted by key
        return loss, (dict(taps), outputs(model))

    if backward:
        shapes = jax.eval_shape(lambda params: run(params, None)[1][0], params)
        zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        tapped = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
        (loss, (taps, further)), (gradients, cotangents) = tapped(params, zeros)
    else:
        loss, (taps, further) = jax.jit(lambda params: run(params, None))(params)
        gradients, cotangents = {}, {}
    forward = {name: to_numpy(taps[name]) for name in order}
    forward |= {name: to_numpy(value) for name, value in further.items()} | {"loss": to_numpy(loss)}
    return forward, {name: to_numpy(cotangents[name]) for name in reversed(order) if name in cotangents}, gradients


def jax_model_taps(
    side: JaxModel,
    inputs_BT: np.ndarray,
    targets_BT: np.ndarray,
    dropout_seed: int | None = None,
    *,
    backward: bool = True,
) -> Taps:
    """Every tap of jax_impl's model under its training loss; logits are those without dropout."""
    with x64(side.precision), jax.default_matmul_precision(side.precision.matmul):
        key = None if dropout_seed is None else jax_random.key(dropout_seed)
        forward, cotangents, gradients = trace_jax(
            lambda params: jax_impl.weights.bind(side.graph, params),
            side.params,
            lambda model: model.loss(inputs_BT, targets_BT, dropout_key=key),
            outputs=lambda model: {"logits": model(inputs_BT)},
            functions=[JAX_ROPE],
            backward=backward,
        )
        by_name = jax_impl.weights.to_hf(gradients)
        names = [name for name in reversed(param_specs(side.model)) if name in by_name]
        return Taps(forward, cotangents, {name: by_name[name] for name in names})


def torch_model_taps(
    side: TorchModel,
    inputs_BT: np.ndarray,
    targets_BT: np.ndarray,
    dropout_seed: int | None = None,
    *,
    backward: bool = True,
) -> Taps:
    """The same of torch_ref's model."""
    key = None if dropout_seed is None else torch_random.key(dropout_seed)
    inputs, targets = torch.tensor(inputs_BT), torch.tensor(targets_BT).long()
    side.module.zero_grad()
    with (
        torch_taps(side.module, functions=[TORCH_ROPE], inputs=INPUT_NAMES) as (forward, cotangents),
        torch.set_grad_enabled(backward),
    ):
        loss = side.module.loss(inputs, targets, dropout_key=key)
        if backward:
            loss.backward()
    with torch.no_grad():
        forward |= {"logits": to_numpy(side.module(inputs)), "loss": to_numpy(loss)}
    return _ordered(forward, cotangents, side.module)


def transformers_taps(model, inputs_BT: np.ndarray, targets_BT: np.ndarray, *, backward: bool = True) -> Taps:
    """The same of a transformers Qwen3 or Llama, under its own loss function and in its own precision."""
    owner = sys.modules[type(model).__module__]
    rope = FunctionTap(owner, "apply_rotary_pos_emb", ROPE_NAMES, lambda x_BNTH: x_BNTH.transpose(0, 2, 1, 3))
    inputs, targets = torch.tensor(inputs_BT).long(), torch.tensor(targets_BT).long()
    model.zero_grad()
    with (
        torch_taps(model.model, functions=[rope], inputs=INPUT_NAMES) as (forward, cotangents),
        torch.set_grad_enabled(backward),
    ):
        # Tapped from the inner model on, so that what we call logits and loss is its own head's.
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = model.loss_function(logits, labels=None, vocab_size=logits.shape[-1], shift_labels=targets)
        if backward:
            loss.backward()
    # The inner model's own result is its last norm's, which has a tap.
    forward = {f"model.{name}": value for name, value in forward.items()}
    cotangents = {f"model.{name}": value for name, value in cotangents.items()}
    forward |= {"logits": to_numpy(logits), "loss": to_numpy(loss)}
    return _ordered(forward, cotangents, model)


def _ordered(forward: Arrays, cotangents: Arrays, module: torch.nn.Module) -> Taps:
    """Taps with cotangents and the module's gradients in the order of the backward pass."""
    gradients = {name: to_numpy(x.grad) for name, x in module.named_parameters() if x.grad is not None}
    ordered = {name: cotangents[name] for name in reversed(forward) if name in cotangents}
    return Taps(forward, ordered, dict(reversed(gradients.items())))


def training_taps(training: JaxTraining | TorchTraining, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Arrays:
    """Everything an optimizer step leaves, step by step: `step 1 loss`, `... grad_norm`, slots, updates, parameters."""
    record: Arrays = {}
    for step, batch in enumerate(batches, start=1):
        before = training.weights()
        metrics = training.step(*batch)
        after = training.weights()
        entry = {name: np.array(metrics[name]) for name in ("loss", "grad_norm")}
        entry |= {f"{slot} {name}": array for slot, slots in training.slots().items() for name, array in slots.items()}
        entry |= {f"update {name}": after[name] - before[name] for name in after}
        entry |= {f"parameter {name}": array for name, array in after.items()}
        record |= {f"step {step} {name}": array for name, array in entry.items()}
    return record


_PRODUCT = "x W^T"
_NORM = "x / sqrt(mean(x^2) + eps) * weight"
_LAYER_OPERATIONS = {
    "input_layernorm": (_NORM, ("<",)),
    "self_attn.q_proj": (_PRODUCT, ("input_layernorm",)),
    "self_attn.k_proj": (_PRODUCT, ("input_layernorm",)),
    "self_attn.v_proj": (_PRODUCT, ("input_layernorm",)),
    "self_attn.q_norm": (_NORM, ("self_attn.q_proj",)),
    "self_attn.k_norm": (_NORM, ("self_attn.k_proj",)),
    "self_attn.q_rope": ("rotation by position", ("self_attn.q_norm|self_attn.q_proj",)),
    "self_attn.k_rope": ("rotation by position", ("self_attn.k_norm|self_attn.k_proj",)),
    "self_attn.attention": (
        "softmax(q k^T / sqrt(H)) v",
        ("self_attn.q_rope", "self_attn.k_rope", "self_attn.v_proj"),
    ),
    "self_attn.o_proj": (_PRODUCT, ("self_attn.attention",)),
    "residual": ("x + attention branch", ("<", "self_attn.o_proj")),
    "post_attention_layernorm": (_NORM, ("residual",)),
    "mlp.gate_proj": (_PRODUCT, ("post_attention_layernorm",)),
    "mlp.up_proj": (_PRODUCT, ("post_attention_layernorm",)),
    "mlp.hidden": ("silu(gate) * up", ("mlp.gate_proj", "mlp.up_proj")),
    "mlp.down_proj": (_PRODUCT, ("mlp.hidden",)),
    "": ("x + MLP branch", ("residual", "mlp.down_proj")),
}
"""Tap of a block -> (operation, inputs); `<` is the block's input, `a|b` the first of the two that exists."""


def qwen3_operations(names: Iterable[str]) -> dict[str, Operation]:
    """The operation behind every named forward tap of a Qwen3 or Llama, in the names of Hugging Face."""
    names = list(names)
    found = {}
    for name in names:
        if not name.startswith("model.layers."):
            continue
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        block = f"model.layers.{layer}"
        before = f"model.layers.{int(layer) - 1}" if int(layer) else "model.embed_tokens"
        text, inputs = _LAYER_OPERATIONS.get(part, ("module of another layout", ()))
        candidates = [[before if one == "<" else f"{block}.{one}" for one in choice.split("|")] for choice in inputs]
        found[name] = Operation(text, tuple(next(one for one in choice if one in names) for choice in candidates))
    last = max((name for name in found if name.count(".") == 2), key=lambda name: int(name.split(".")[2]))
    found["model.embed_tokens"] = Operation("row of the table for each token", ())
    found["model.norm"] = Operation(_NORM, (last,))
    found["logits"] = Operation("x head^T", ("model.norm",))
    found["loss"] = Operation("mean of -log softmax(logits)[target]", ("model.norm",))
    return found


def operations(names: Iterable[str], forward: Mapping[str, Operation]) -> dict[str, Operation]:
    """The operation behind every tensor of a report (`forward NAME`, `backward NAME`, `gradient NAME`, `step K ...`).

    A cotangent reads the cotangents of its tap's readers, a gradient its operation's inputs and its cotangent. What the
    map does not know is said to follow the tensor before it.
    """
    names = list(names)
    known, found, previous = set(names), {}, ()
    for name in names:
        phase, _, tap = name.partition(" ")
        text, inputs = "", ()
        if phase == "forward" and tap in forward:
            text, inputs = forward[tap].text, [f"forward {one}" for one in forward[tap].inputs]
        elif phase == "backward" and forward:
            readers = [reader for reader, operation in forward.items() if tap in operation.inputs]
            text, inputs = "pulled back through its readers", [f"backward {reader}" for reader in readers]
            inputs = [one if one in known else "forward loss" for one in inputs]
        elif phase == "gradient" and tap.rpartition(".")[0] in forward:
            path = tap.rpartition(".")[0]
            text = "sum over tokens of cotangent times input"
            inputs = [f"backward {path}", *(f"forward {one}" for one in forward[path].inputs)]
        elif phase == "step":
            step, _, what = tap.partition(" ")
            kind, _, parameter = what.partition(" ")
            slots = [f"step {step} {slot} {parameter}" for slot in ("mu", "exp_avg", "exp_avg_sq")]
            if kind == "update":
                text, inputs = "rate times Newton-Schulz(momentum) or Adam(moments), decay", slots
            elif kind == "parameter":
                text, inputs = "parameter + update", [f"step {step} update {parameter}"]
            elif parameter:
                earlier = f"step {int(step) - 1} {what}"
                text = "moving average of the clipped mean gradient"
                inputs = [earlier, f"step {step} grad_norm", f"gradient {parameter}" if step == "1" else ""]
        inputs = tuple(dict.fromkeys(one for one in inputs if one in known))
        found[name] = Operation(text or "follows", inputs if text else previous)
        previous = (name,)
    return found
