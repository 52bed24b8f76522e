"""Seeded bugs of updates on a mesh: what is summed, gathered, masked, and counted. Run by `parity_tests.mutants`."""

from parity_tests.mutant import Mutant

UPDATES = "parity_tests/test_sharding.py::test_updates_are_those_of_one_device"
BYTES = "parity_tests/test_sharding.py::test_what_is_sent_is_what_the_formula_says"
TRAVEL = "parity_tests/test_sharding.py::test_weights_travel_narrow_and_by_layer_again_in_the_backward_pass"
TABLES = "parity_tests/test_sharding.py::test_the_tables_by_hand"
UNEVEN = "parity_tests/test_sharding.py::test_what_does_not_divide_is_whole_and_said"


def on_a_mesh(name: str, module: str, old: str, new: str, caught_by: str) -> Mutant:
    """A slip in what several devices compute together."""
    return Mutant(name, f"jax_impl.{module}", old, new, caught_by, "on a mesh")


MUTANTS = (
    on_a_mesh(
        "heads' norms are not summed over tensor",
        "sharding",
        'return (*names, "tensor") if of_heads else names',
        "return names",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "the mean over devices is a sum",
        "exchange",
        "return loss / count, {path: done[path] / count for path in grads}",
        "return loss / count, done",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "gradients of inputs are not summed over tensor",
        "exchange",
        "return (total(cotangent.astype(accumulator(cotangent.dtype)), axis).astype(cotangent.dtype),)",
        "return (cotangent,)",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "the gradient of a sum is summed again",
        "exchange",
        "def _total_backward(axis, _, cotangent):\n    return (cotangent,)",
        "def _total_backward(axis, _, cotangent):\n    return (total(cotangent, axis),)",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "every device has the masks of the first rows",
        "exchange",
        "return index(ROWS) * rows_here",
        "return 0",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "every device has the masks of the first heads",
        "exchange",
        'return first_row(B) * heads + first("heads", N), heads - N',
        "return first_row(B) * heads, heads - N",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "the feed-forward layer's masks begin anew on each device",
        "random",
        'exchange.first("ffn", columns) if path[-1:] == (FFN_HIDDEN,) else 0',
        "0",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "tokens of another device's vocabulary take a row here",
        "exchange",
        "return jnp.where(inside[..., None], rows, jnp.zeros_like(rows))",
        "return rows",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "a token before a device's vocabulary counts from its end",
        "exchange",
        "places = jnp.where(tokens < 0, table_VD.shape[0], tokens)",
        "places = tokens",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "exponentials are summed over the vocabulary beside unlike peaks",
        "loss",
        "parts = jnp.stack([total * jnp.exp(peak - highest), jnp.where(inside, hit, 0.0)])",
        "parts = jnp.stack([total, jnp.where(inside, hit, 0.0)])",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "a part's largest logit counts as the vocabulary's",
        "loss",
        "jnp.where(has_peak, column_M, jnp.iinfo(jnp.int32).max)",
        "column_M",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "the norm counts what is whole on each device",
        "exchange",
        "jnp.sum(x * x) / layout.ways(layout.replicas(path))",
        "jnp.sum(x * x)",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "evaluations of rows that do not divide count them often",
        "exchange",
        "names = here().names(ROWS) if divided else ()",
        "names = here().names(ROWS)",
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "gradients are summed once per micro-batch",
        "train",
        "return jax.value_and_grad(loss)(variables, exchange.in_turn(rounded, index), batch, key)",
        "return exchange.reduced(*jax.value_and_grad(loss)(variables, rounded, batch, key))",
        f"{BYTES}[all]",
    ),
    on_a_mesh(
        "Muon leaves the exchange to XLA",
        "hybrid",
        "batched=machine().batched_matrices,\n                shardings=shardings,",
        "batched=machine().batched_matrices,",
        f"{BYTES}[all]",
    ),
    on_a_mesh(
        "what the weights weigh in the compute dtype is not sent in it",
        "exchange",
        "copies[path], axis = x.astype(dtype), layout.gathered_axis(path)",
        "copies[path], axis = x, layout.gathered_axis(path)",
        f"{TRAVEL}[half-uint16]",
    ),
    on_a_mesh(
        "weights gathered by layer are kept for the backward pass",
        "exchange",
        "primitive not in GATHERING",
        "True",
        f"{TRAVEL}[by-layer-uint64]",
    ),
    on_a_mesh(
        "fsdp divides the width of what is added up",
        "sharding",
        '"o_proj.kernel": ("heads", "hidden"),',
        '"o_proj.kernel": ("hidden", "heads"),',
        f"{UPDATES}[all]",
    ),
    on_a_mesh(
        "key heads may be divided unevenly",
        "sharding",
        '"heads": (model.num_attention_heads, model.num_key_value_heads),',
        '"heads": (model.num_attention_heads,),',
        UNEVEN,
    ),
    on_a_mesh(
        "two devices share a byte of dropout's decisions",
        "sharding",
        'unit = DECISIONS if axis == "ffn" and model.dropout else 1',
        "unit = 1",
        UNEVEN,
    ),
    on_a_mesh(
        "an axis of one device has a name",
        "sharding",
        "elif ways > 1:",
        "else:",
        TABLES,
    ),
)
