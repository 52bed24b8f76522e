"""`jax_impl.loss_kernel`, interpreted on the CPU: the loss, its gradients and its flags against the float64 truth.

What Triton makes of the kernels needs a GPU; that they are lowered for one is seen here without.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import torch_ref.loss
from jax_impl import backend, loss, loss_kernel
from jax_impl.products import accumulator
from parity_tests import test_model
from parity_tests.cases import BFLOAT16
from parity_tests.compare.montecarlo import Arrays, allowances, amplification, noise_of, rounded
from parity_tests.compare.tolerance import SAFETY, check, check_all
from parity_tests.sides import JaxModel

KERNEL = dataclasses.replace(backend.CPU, loss_kernel_up_to=backend.GPU.loss_kernel_up_to)
"""A CPU that interprets the kernel."""
SLOW = pytest.mark.slow
DTYPES = ("float64", "float32", "bfloat16")
MOST = [pytest.param(dtype, marks=[SLOW] * (dtype == "float32")) for dtype in DTYPES]
"""What lies between the other two every night."""
# Tiles of 128 tokens, 256 logits, 64 features, eight to a segment: one token, logit and feature more than a tile or
# a segment has; all of them multiples; less than one tile; hidden sizes of the presets.
REAL = {"one-more": (129, 2049, 65), "multiples": (128, 2304, 384), "small": (14, 53, 30), "257": (130, 257, 40)}
# Tiles of 16, 32 and 16, two to a segment: many programs, ragged in every axis; multiples of tiles in every
# axis and of no segment.
SMALL = {"ragged": (35, 150, 42), "even": (48, 96, 32), "last-tile-of-one": (17, 129, 8)}


@pytest.fixture(autouse=True)
def device(request):
    """The CPU, even where JAX has a GPU; but for the test that is about one."""
    if "gpu" in request.keywords:
        if jax.default_backend() != "gpu":
            pytest.skip(f"needs a GPU, JAX has {jax.default_backend()}")
        yield
    else:
        with jax.default_device(jax.devices("cpu")[0]):
            yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles at small sizes. JAX keeps a traced kernel by its shapes, so no test of real tiles has the same."""
    for name, size in {"TILE_M": 16, "TILE_V": 32, "TILE_D": 16, "SEGMENT": 2}.items():
        monkeypatch.setattr(loss_kernel, name, size)


@pytest.fixture
def in_kernel(monkeypatch):
    """16-bit losses are the kernel's."""
    monkeypatch.setitem(backend.MACHINES, "cpu", KERNEL)


def exact(array: np.ndarray) -> np.ndarray:
    """float64 rounded to what bfloat16 holds, so that only the computation rounds."""
    return torch.tensor(array).bfloat16().double().numpy()


def operands(M: int, V: int, D: int, size: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, head and targets; logits of about `size`, and targets at the edges of tiles and segments among them."""
    random = np.random.default_rng(M + V + D)
    x, head = random.standard_normal((M, D)), size * random.standard_normal((V, D)) / np.sqrt(D)
    targets = random.integers(0, V, M)
    edges = [edge for tile in (32, 64, 256, 2048) for edge in (tile - 1, tile) if edge < V]
    targets[: len(edges) + 2] = [0, V - 1, *edges][:M]
    return exact(x), exact(head), targets.astype(np.int32)


def truths_and_limits(x, head, targets, dtype: str) -> tuple[Arrays, dict[str, float]]:
    """The float64 truth by torch's autograd, and what an evaluation in this dtype may be off.

    In bfloat16 two things are rounded to it, the gradients of logits and x; all else is in float32.
    """

    def compute() -> Arrays:
        leaves = [torch.tensor(array).requires_grad_() for array in (x, head)]
        goals = torch.tensor(targets).long()
        noise = "float32" if dtype == "float64" else dtype

        def narrow(grad: torch.Tensor) -> torch.Tensor:
            with noise_of(noise, noise):
                return torch.tensor(rounded(grad.numpy()))

        with noise_of("float32", noise):
            logits = torch_ref.loss.logits(*leaves)
            if dtype == "bfloat16":
                logits.register_hook(narrow)
            value = F.cross_entropy(logits, goals)
            value.backward()
            losses = torch_ref.loss.token_losses(*leaves, goals)[0]
        grad_x = narrow(leaves[0].grad) if dtype == "bfloat16" else leaves[0].grad
        named = {"loss": value, "losses": losses, "x": grad_x, "head": leaves[1].grad}
        return {name: tensor.detach().numpy() for name, tensor in named.items()}

    truths, kappas = amplification(compute, "float32" if dtype == "float64" else dtype)
    return truths, allowances(kappas, dtype)


def evaluate(form, x, head, targets, dtype: str) -> tuple[Arrays, np.ndarray]:
    """What a form of the loss gives, jitted, and its flags. Its head is a parameter: in float32 for bfloat16."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        gradients = {
            loss_kernel: loss_kernel.loss_and_gradients,
            loss: jax.value_and_grad(loss.cross_entropy, argnums=(0, 1)),
        }[form]
        arrays = jnp.asarray(x, dtype), jnp.asarray(head, accumulator(jnp.dtype(dtype)))
        # Functions of their own, or jit would take what it made of them for another machine.
        value, (grad_x, grad_head) = jax.jit(lambda *args: gradients(*args))(*arrays, targets)
        losses, correct = jax.jit(lambda *args: form.token_losses(*args))(*arrays, targets)
        assert grad_x.dtype == dtype and {a.dtype for a in (value, losses, grad_head)} == {arrays[1].dtype}
        named = {"loss": value, "losses": losses, "x": grad_x, "head": grad_head}
        return {name: np.asarray(array, np.float64) for name, array in named.items()}, np.asarray(correct)


def judge(sizes, dtype: str, size: float = 1.0) -> None:
    """The kernel's form within its allowance, and in lower precision no worse than the chunks' own error."""
    x, head, targets = operands(*sizes, size)
    truths, limits = truths_and_limits(x, head, targets, dtype)
    (kernel, correct), (chunks, _) = (evaluate(form, x, head, targets, dtype) for form in (loss_kernel, loss))
    errors = check_all(kernel, truths, limits.get)
    if dtype == "float64":
        check_all(kernel, chunks, limits.get)
    else:
        others = check_all(chunks, truths, limits.get)
        assert np.linalg.norm(list(errors.values())) <= SAFETY * np.linalg.norm(list(others.values()))
    assert (kernel["losses"] >= 0.0).all()
    np.testing.assert_array_equal(correct, (x @ head.T).argmax(-1) == targets)


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("name", ["one-more", "small", *(pytest.param(n, marks=SLOW) for n in ("multiples", "257"))])
def test_the_loss_and_its_gradients(name, dtype):
    judge(REAL[name], dtype)


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("name", ["ragged", "last-tile-of-one", pytest.param("even", marks=SLOW)])
def test_many_tiles_and_segments(name, dtype, small_tiles):
    judge(SMALL[name], dtype)


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=[SLOW] * (d != "bfloat16")) for d in DTYPES])
def test_logits_of_ten_thousand(dtype, small_tiles):
    judge((36, 151, 42), dtype, size=1e4)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_of_equal_logits_the_first_is_the_largest(dtype, small_tiles):
    """Whole numbers, so that equal rows of the head give equal logits: the flags are argmax's to the last one."""
    random = np.random.default_rng(0)
    x, kinds = random.integers(-2, 3, (300, 4)).astype(np.float64), random.integers(-2, 3, (5, 4)).astype(np.float64)
    head = kinds[random.integers(0, 5, 150)]  # every logit some thirty times, in every tile and segment
    head[[0, 31, 32, 63, 64, 149]] = kinds[0]
    logits = x @ head.T
    targets = random.integers(0, 150, 300).astype(np.int32)
    # The first of the largest, the next one, or any.
    largest = [np.flatnonzero(row == row.max()) for row in logits]
    targets[:200] = [which[index % 2] for index, which in enumerate(largest[:200])]
    x[-1] = 0.0  # all logits alike
    targets[-1] = 0
    expected = logits.argmax(-1) == targets
    expected[-1] = True
    _, correct = evaluate(loss_kernel, x, head, targets, dtype)
    np.testing.assert_array_equal(correct, expected)
    assert 90 < correct.sum() < 210


def test_one_target_for_all_at_a_tiles_edge(small_tiles):
    """All logits alike and most tiles without a target; the first token alone has the largest logit."""
    x, head = np.ones((16, 8)), np.ones((150, 8))
    for target in (0, 1, 31, 32, 64, 149):
        targets = np.full(16, target, np.int32)
        values, correct = evaluate(loss_kernel, x, head, targets, "float32")
        truths, limits = truths_and_limits(x, head, targets, "float32")
        check_all(values, truths, limits.get)
        assert correct.all() if target == 0 else not correct.any()


def test_what_is_not_a_number_stays_none(small_tiles):
    """A training step is skipped when its loss or gradient is not finite."""
    x, head, targets = operands(*SMALL["ragged"])
    x[3, 5] = np.nan
    values, _ = evaluate(loss_kernel, x, head, targets, "float32")
    assert np.isnan(values["loss"]) and np.isnan(values["head"]).any()
    np.testing.assert_array_equal(np.isnan(values["losses"]), np.arange(35) == 3)
    np.testing.assert_array_equal(np.isnan(values["x"]).all(axis=1), np.arange(35) == 3)


@pytest.mark.parametrize("tokens_at_once", [7, 16, 35])
def test_chunks_change_nothing(tokens_at_once, small_tiles, monkeypatch):
    x, head, targets = operands(*SMALL["ragged"])
    monkeypatch.setitem(backend.MACHINES, "cpu", dataclasses.replace(KERNEL, tokens_at_once=tokens_at_once))
    truths, limits = truths_and_limits(x, head, targets, "float64")
    check_all(evaluate(loss_kernel, x, head, targets, "float64")[0], truths, limits.get)


def equations(jaxpr, outside_of: str = ""):
    """Every equation, those inside calls and loops too, but not inside the named primitive."""
    for equation in jaxpr.eqns:
        yield equation
        for value in () if equation.primitive.name == outside_of else equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, outside_of)


def shapes(function, *args):
    """(shape, dtype) of all that is computed outside of kernels."""
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr, outside_of="pallas_call"):
        yield from ((variable.aval.shape, str(variable.aval.dtype)) for variable in equation.outvars)


def test_logits_are_held_nowhere(monkeypatch):
    """Of all arrays that have an axis of V but none of D there is the gradient of a chunk, in bfloat16."""
    M, V, D, rows = 1000, 5000, 40, 250
    monkeypatch.setitem(backend.MACHINES, "cpu", dataclasses.replace(backend.GPU, tokens_at_once=rows // 2))
    x, head, targets = (
        jax.ShapeDtypeStruct(s, t) for s, t in (((M, D), "bfloat16"), ((V, D), "float32"), ((M,), "int32"))
    )
    gradients = jax.value_and_grad(loss.cross_entropy, argnums=(0, 1))
    seen = {found for found in shapes(gradients, x, head, targets) if V in found[0] and D not in found[0]}
    assert seen == {((rows, V), "bfloat16")}
    losses = list(shapes(lambda *args: loss.token_losses(*args), x, head, targets))
    assert losses and not [shape for shape, _ in losses if V in shape and D not in shape]


@pytest.mark.parametrize("sizes", [(35, 150, 42), (48, 96, 32), (35, 96, 32), (48, 150, 32)], ids=str)
def test_nothing_is_touched_outside_of_an_array(sizes, small_tiles):
    """Interpreted, a store beyond the end is lost, and on a GPU it is not: all that can leave its array has a mask."""
    x, head, targets = operands(*sizes)
    traced = jax.make_jaxpr(lambda *args: loss_kernel.loss_and_gradients(*args))(x, head, targets)
    masked = []
    for equation in equations(traced.jaxpr):
        if equation.primitive.name in ("masked_load", "masked_swap"):
            ref, _, *rest = jax.tree.unflatten(equation.params["args_tree"], equation.invars)
            mask = rest[0 if equation.primitive.name == "masked_load" else 1]
            tile = equation.outvars[0].aval.shape
            leaves = any(whole % part for whole, part in zip(ref.aval.shape, tile, strict=True))
            assert (mask is not None) == leaves, f"{equation}"
            masked.append(leaves)
    # x, head and targets twice, three more numbers of a token; four results and the gradient.
    assert len(masked) == 2 * 3 + 3 + 4 + 1 and any(masked) == (sizes != (48, 96, 32))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_sixteen_bit_losses_are_the_kernels_where_the_machine_has_it(dtype, monkeypatch):
    with jax.enable_x64(dtype == "float64"):
        for record, D in ((backend.CPU, 8), (KERNEL, 8), (KERNEL, 1208)):
            x, head, targets = jnp.zeros((3, D), dtype), jnp.zeros((5, D)), jnp.zeros(3, jnp.int32)
            monkeypatch.setitem(backend.MACHINES, "cpu", record)
            for function in (loss.cross_entropy, jax.grad(loss.cross_entropy), loss.token_losses):
                in_kernel = "pallas_call" in str(jax.make_jaxpr(lambda *args, f=function: f(*args))(x, head, targets))
                assert in_kernel == (record is KERNEL and D == 8 and dtype == "bfloat16")


def test_another_generation_of_gpu_has_the_chunks(monkeypatch):
    class Device:
        platform, compute_capability = "gpu", "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with jax.default_device(None):
        assert backend.machine() == backend.GPU
        for capability in ("8.0", "8.9", "10.0", "12.0", "gfx942"):
            monkeypatch.setattr(Device, "compute_capability", capability)
            assert backend.machine() == dataclasses.replace(backend.GPU, loss_kernel_up_to=0, attention_kernel=False)


def test_it_can_be_mapped_and_computed_again(in_kernel, small_tiles):
    """vmap over two batches that share a head, and checkpoint, against one batch after the other."""
    x, head, targets = operands(*SMALL["even"])
    xs, goals = jnp.asarray(np.stack([x, -x]), jnp.bfloat16), jnp.asarray(np.stack([targets, targets[::-1]]))

    def gradients(form, x, targets):
        return jax.grad(lambda x, head: form(x, head, targets), argnums=(0, 1))(x, jnp.asarray(head, jnp.float32))

    apart = [jax.jit(gradients, static_argnums=0)(loss.cross_entropy, *pair) for pair in zip(xs, goals, strict=True)]
    mapped = jax.jit(jax.vmap(lambda *pair: gradients(loss.cross_entropy, *pair)))(xs, goals)
    again = jax.jit(gradients, static_argnums=0)(jax.checkpoint(loss.cross_entropy), xs[0], goals[0])
    for index in range(2):
        _, limits = truths_and_limits(*(np.asarray(a, np.float64) for a in (xs[index], head)), goals[index], "bfloat16")
        for which, name in enumerate(("x", "head")):
            check(f"mapped {name}", mapped[which][index], apart[index][which], 2 * limits[name])
            if index == 0:
                check(f"again {name}", again[which], apart[0][which], 2 * limits[name])


@pytest.mark.parametrize("name", ["plain", pytest.param("untied", marks=SLOW)])
def test_the_model_trains_and_evaluates_with_it(name, in_kernel):
    """Tied and untied, in bfloat16: at the allowances of the whole model."""
    case = test_model.CASES[name]
    truths, kappas = test_model.truths_and_kappas(case, "bfloat16")
    limits = allowances(kappas, "bfloat16")
    side = JaxModel(case.model, BFLOAT16, case.weights)
    values = test_model.measure(side, case)
    check_all(values, {key: truths[key] for key in values}, limits.get)
    total, correct = side.evaluate(case.inputs, case.targets)
    check("evaluation", np.array(total / case.targets.size), truths["loss"], limits["loss"])
    assert 0 <= correct <= case.targets.size


# jax 0.11 and 0.12 say that Pallas's Triton backend will go; until it does nothing else compiles these kernels.
DEPRECATED = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


@DEPRECATED
@pytest.mark.parametrize("sizes", [(12288, 49152, 384), (8192, 151936, 1024), (300, 257, 40)], ids=str)
def test_it_is_lowered_for_a_gpu_without_one(sizes, monkeypatch):
    """Two calls of Triton and two products, both of bfloat16; no array of logits."""
    M, V, D = sizes
    monkeypatch.setitem(backend.MACHINES, "cpu", dataclasses.replace(backend.GPU, loss_kernel_up_to=D))
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((M, D), jnp.bfloat16), ((V, D), jnp.float32), ((M,), jnp.int32))
    ]
    hopper = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=hopper)):
        gradients = jax.jit(jax.value_and_grad(loss.cross_entropy, argnums=(0, 1)))
        text = gradients.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        losses = jax.jit(loss.token_losses).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2 and losses.count("__gpu$xla.gpu.triton") == 1
    assert text.count("stablehlo.dot_general") == 2 and losses.count("stablehlo.dot_general") == 0
    # In float32 only the gradient of the head has an axis of V.
    assert set(re.findall(rf"(\d+)x{V}xf32>", text)) == {str(D)} and f"x{V}xf32>" not in losses


@pytest.mark.gpu
@DEPRECATED
@pytest.mark.parametrize("sizes", [(300, 257, 40), (200, 49152, 384), (130, 20001, 960)], ids=str)
def test_compiled_on_a_gpu(sizes, monkeypatch):
    """As on the CPU, and against the chunks there."""
    monkeypatch.setitem(backend.MACHINES, "gpu", dataclasses.replace(backend.GPU, loss_kernel_up_to=0))
    judge(sizes, "bfloat16")
