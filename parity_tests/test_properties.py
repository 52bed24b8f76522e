"""Beyond "equal to the other": is it true? Properties of a language model on each twin, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_impl.attention
import jax_impl.loss
import jax_impl.model
import torch_ref.attention
import torch_ref.loss
import torch_ref.model
from jax_impl import backend
from jax_impl import random as jax_random
from jax_impl.backend import machine
from jax_impl.weights import bind
from parity_tests.cases import AWKWARD, FLOAT32, FLOAT64, ROWS, random_tokens, random_weights
from parity_tests.compare.montecarlo import allowances, amplification
from parity_tests.compare.tolerance import check, check_all, relative_error
from parity_tests.sides import Arrays, JaxModel, TorchModel
from recipe.contract import UNIT_ROUNDOFF
from torch_ref import random as torch_random

MODEL = dataclasses.replace(AWKWARD, num_hidden_layers=2)


class JaxTwin:
    """jax_impl behind NumPy, jitted, in float64."""

    module, random, side = jax_impl.model, jax_random, JaxModel
    attention_module = jax_impl.attention

    def logits(self, model, weights):
        """tokens -> logits, compiled once."""
        side = JaxModel(model, FLOAT64, weights)
        call = jax.jit(lambda params, tokens: bind(side.graph, params)(tokens))

        def logits(tokens_BT: np.ndarray) -> np.ndarray:
            with jax.enable_x64(True):
                return np.asarray(call(side.params, tokens_BT))

        return logits

    def call(self, name: str, *arrays: np.ndarray, **options) -> np.ndarray:
        """A function of the model's module."""
        with jax.enable_x64(True):
            function = jax.jit(functools.partial(getattr(self.module, name), **options))
            return np.asarray(function(*map(jnp.asarray, arrays)))


class TorchTwin:
    """torch_ref behind NumPy, in float64."""

    module, random, side = torch_ref.model, torch_random, TorchModel
    attention_module = torch_ref.attention

    def logits(self, model, weights):
        return TorchModel(model, FLOAT64, weights).logits

    def call(self, name: str, *arrays: np.ndarray, **options) -> np.ndarray:
        return getattr(self.module, name)(*map(torch.tensor, arrays), **options).numpy()


@pytest.fixture(params=[JaxTwin, TorchTwin], ids=["jax", "torch"])
def twin(request):
    return request.param()


def allowance_of(compute) -> dict[str, float]:
    """What two float64 runs of this torch computation may differ by."""
    return allowances(amplification(compute)[1], "float64")


def logits_allowance(model, weights, tokens) -> float:
    return allowance_of(lambda: {"logits": TorchModel(model, FLOAT64, weights).logits(tokens)})["logits"]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_changing_the_future_leaves_the_past_bit_equal(twin):
    logits, tokens = twin.logits(MODEL, random_weights(MODEL)), random_tokens(MODEL, ROWS, 11)
    before = logits(tokens)
    for t in (1, 6, 10):
        changed = tokens.copy()
        changed[:, t:] = (changed[:, t:] + 7) % MODEL.vocab_size
        after = logits(changed)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(axis=-1).all(), "each position sees its own token"


def test_a_row_does_not_see_the_other_rows(twin):
    logits, tokens = twin.logits(MODEL, random_weights(MODEL)), random_tokens(MODEL, ROWS, 11)
    before, changed = logits(tokens), tokens.copy()
    changed[1] = (changed[1] + 7) % MODEL.vocab_size
    np.testing.assert_array_equal(logits(changed)[0], before[0])


def _scores(twin, angles_TR: np.ndarray) -> np.ndarray:
    """Scores (T, T) of one query vector and one key vector placed at every position."""
    T, R = angles_TR.shape
    q, k = (np.tile(normal(1, 1, 1, 2 * R, seed=seed), (1, T, 1, 1)) for seed in (1, 2))
    q, k = (twin.call("apply_rope", x, np.cos(angles_TR), np.sin(angles_TR))[0, :, 0] for x in (q, k))
    return q @ k.T


def test_scores_depend_on_the_distance_only(twin):
    cos, sin = twin.module.rope_table(dataclasses.replace(MODEL, head_dim=8), 200)
    frequencies_R = np.arctan2(sin[1], cos[1])
    scores = _scores(twin, np.arange(200)[:, None] * frequencies_R)
    # The angle of position p errs by p * frequency * u, of two tables; the rotation and the product add a few u.
    u, norms = 2.0**-53, np.linalg.norm(normal(8, seed=1)) * np.linalg.norm(normal(8, seed=2))
    allowed = norms * 2 * (2 * 200 * frequencies_R.max() + 8) * u
    assert np.abs(scores[1:, 1:] - scores[:-1, :-1]).max() <= allowed
    shifted = _scores(twin, (1000 + np.arange(200))[:, None] * frequencies_R)
    assert np.abs(shifted - scores).max() <= norms * 2 * (1400 * frequencies_R.max() + 8) * u
    # And they do depend on it: no two distances have the same score.
    assert np.unique(scores[:, 0]).size == 200


def test_order_of_earlier_tokens_matters(twin):
    # One layer: with more of them the causal mask alone tells positions apart.
    model = dataclasses.replace(AWKWARD, num_hidden_layers=1)
    weights, tokens = random_weights(model), random_tokens(model, ROWS, 11)
    logits = twin.logits(model, weights)
    before, shuffled = logits(tokens), tokens.copy()
    shuffled[:, :-1] = tokens[:, np.random.default_rng(3).permutation(10)]
    # Blind to positions, the last logits would be the same sums in another order: equal to rounding.
    after = logits(shuffled)
    assert relative_error(after[:, -1], before[:, -1]) > logits_allowance(model, weights, tokens)


def test_grouped_queries_equal_repeated_key_value_heads(twin):
    grouped = dataclasses.replace(MODEL, attention_bias=True)
    full = dataclasses.replace(grouped, num_key_value_heads=grouped.num_attention_heads)
    weights, groups = random_weights(grouped), grouped.num_attention_heads // grouped.num_key_value_heads

    def repeat(name: str, weight: np.ndarray) -> np.ndarray:
        if ".k_proj." not in name and ".v_proj." not in name:
            return weight
        heads = weight.reshape(grouped.num_key_value_heads, grouped.head_dim, *weight.shape[1:])
        return heads.repeat(groups, axis=0).reshape(-1, *weight.shape[1:])

    repeated, tokens = {name: repeat(name, weight) for name, weight in weights.items()}, random_tokens(MODEL, ROWS, 11)
    truth = twin.logits(full, repeated)(tokens)
    check("logits", twin.logits(grouped, weights)(tokens), truth, logits_allowance(grouped, weights, tokens))


def test_the_tied_gradient_is_the_sum_of_embedding_and_head(twin):
    untied = dataclasses.replace(MODEL, tie_word_embeddings=False)
    weights, table = random_weights(MODEL), "model.embed_tokens.weight"
    inputs, targets = random_tokens(MODEL, ROWS, 11), random_tokens(MODEL, ROWS, 11, seed=2)
    loss, tied = twin.side(MODEL, FLOAT64, weights).loss_and_grads(inputs, targets)
    split = twin.side(untied, FLOAT64, weights | {"lm_head.weight": weights[table]})
    split_loss, parts = split.loss_and_grads(inputs, targets)

    def compute() -> Arrays:
        value, grads = TorchModel(MODEL, FLOAT64, weights).loss_and_grads(inputs, targets)
        return {"loss": np.array(value), **grads}

    assert np.any(parts[table]) and np.any(parts["lm_head.weight"]), "both uses of the table contribute"
    parts[table] = parts[table] + parts.pop("lm_head.weight")
    parts["loss"], tied["loss"] = np.array(split_loss), np.array(loss)
    check_all(tied, parts, allowance_of(compute).get)


@pytest.mark.parametrize("block", [4, 128])
def test_a_window_reaches_exactly_so_far(twin, block, monkeypatch):
    monkeypatch.setattr(twin.attention_module, "QUERY_BLOCK", block)
    window = 3
    model = dataclasses.replace(MODEL, sliding_window=window)
    logits, tokens = twin.logits(model, random_weights(model)), random_tokens(model, ROWS, 11)
    before, changed = logits(tokens), tokens.copy()
    changed[:, 0] = (changed[:, 0] + 7) % model.vocab_size
    reach = model.num_hidden_layers * (window - 1)
    after = logits(changed)
    np.testing.assert_array_equal(after[:, reach + 1 :], before[:, reach + 1 :])
    assert (after[:, reach] != before[:, reach]).any(), "the last position within reach sees the change"


@pytest.mark.parametrize("window", [None, 5])
def test_query_blocks_change_nothing(twin, window, monkeypatch):
    q, k, v = normal(2, 14, 6, 4, seed=1), normal(2, 14, 2, 4, seed=2), normal(2, 14, 2, 4, seed=3)
    whole = twin.call("attention", q, k, v, window=window)

    def compute() -> Arrays:
        return {"attention": TorchTwin().call("attention", q, k, v, window=window)}

    allowance = allowance_of(compute)["attention"]
    for block in (5, 13):
        monkeypatch.setattr(twin.attention_module, "QUERY_BLOCK", block)
        check(f"blocks of {block}", twin.call("attention", q, k, v, window=window), whole, allowance)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_chunks_of_attention_change_nothing(chunks, monkeypatch):
    """2 rows of 2 key heads, whole, two and one at a time, in blocks of 5 with dropout, values and gradients."""
    arrays = normal(2, 14, 6, 4, seed=1), normal(2, 14, 2, 4, seed=2), normal(2, 14, 2, 4, seed=3)
    cotangent = normal(2, 14, 6, 4, seed=4)
    monkeypatch.setattr(torch_ref.attention, "QUERY_BLOCK", 5)
    monkeypatch.setattr(jax_impl.attention, "QUERY_BLOCK", 5)
    monkeypatch.setattr(jax_impl.attention, "chunk_count", lambda rows, scores: chunks)

    def compute() -> Arrays:
        leaves = [torch.tensor(array).requires_grad_() for array in arrays]
        out = torch_ref.attention.attention(*leaves, window=8, rate=0.3, key=torch_random.key(6))
        out.backward(torch.tensor(cotangent))
        named = {"out": out} | {name: leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}
        return {name: value.detach().numpy() for name, value in named.items()}

    with jax.enable_x64(True):
        attention = functools.partial(jax_impl.attention.attention, window=8, rate=0.3, key=jax_random.key(6))

        @jax.jit
        def value_and_grads(q, k, v):
            out, pull = jax.vjp(attention, q, k, v)
            return out, *pull(jnp.asarray(cotangent))

        values = dict(zip(("out", *"qkv"), map(np.asarray, value_and_grads(*map(jnp.asarray, arrays))), strict=True))
    truths, kappas = amplification(compute)
    check_all(values, truths, allowances(kappas, "float64").get)


def test_attention_takes_as_many_rows_at_once_as_the_caches_hold(monkeypatch):
    # All fit; half of six do; no two do; seven rows, of which four would fit, have no equal parts but single ones.
    chunks = {(4, 2**18): 1, (6, 2**18): 2, (4, 2**21): 4, (7, 2**18): 7}
    assert {case: jax_impl.attention.chunk_count(*case) for case in chunks} == chunks
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert jax_impl.attention.chunk_count(4, 2**21) == 1


@pytest.mark.parametrize(
    "dropout_seed", [pytest.param(None, id="plain"), pytest.param(4, id="dropout", marks=pytest.mark.slow)]
)
def test_computing_blocks_again_changes_nothing(twin, dropout_seed):
    """Nor does it in the backward pass, whose masks have to be those of the forward pass."""
    model = dataclasses.replace(MODEL, dropout=0.2)
    weights, again = random_weights(model), dataclasses.replace(FLOAT64, remat=True)
    inputs, targets = random_tokens(model, ROWS, 11), random_tokens(model, ROWS, 11, seed=2)
    kept_loss, kept = twin.side(model, FLOAT64, weights).loss_and_grads(inputs, targets, dropout_seed)
    loss, grads = twin.side(model, again, weights).loss_and_grads(inputs, targets, dropout_seed)

    def compute() -> Arrays:
        value, grads = TorchModel(model, FLOAT64, weights).loss_and_grads(inputs, targets, dropout_seed)
        return {"loss": np.array(value), **grads}

    check_all(grads | {"loss": np.array(loss)}, kept | {"loss": np.array(kept_loss)}, allowance_of(compute).get)


@pytest.mark.slow
def test_computing_blocks_again_keeps_less_in_memory():
    """What waits for the backward pass: of every block its input alone, not some fifteen arrays of that size."""
    model = dataclasses.replace(AWKWARD, num_hidden_layers=6)
    weights, tokens = random_weights(model), random_tokens(model, 4, 100)
    kept = {}
    for remat in (False, True):
        precision = dataclasses.replace(FLOAT32, remat=remat)
        side = JaxModel(model, precision, weights)
        _, pull = jax.vjp(lambda params, side=side: bind(side.graph, params).loss(tokens, tokens), side.params)
        kept["jax", remat] = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
        # Every tensor once, however often it is kept; parameters and tokens are there anyway.
        seen = {}

        def keep(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        module = TorchModel(model, precision, weights).module
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module.loss(torch.tensor(tokens).long(), torch.tensor(tokens).long())
        kept["torch", remat] = sum(seen.values())
    block = 4 * 100 * model.hidden_size * 4
    for side in ("jax", "torch"):
        assert kept[side, False] - kept[side, True] > 8 * model.num_hidden_layers * block, kept


def test_attention_is_the_softmax_average_of_visible_values(twin):
    q, k, v = normal(1, 9, 2, 4, seed=1), normal(1, 9, 1, 4, seed=2), normal(1, 9, 1, 4, seed=3)
    expected = np.zeros((1, 9, 2, 4))
    for t in range(9):
        for head in range(2):
            visible = slice(max(0, t - 3), t + 1)
            weights = np.exp(k[0, visible, 0] @ q[0, t, head] / 2.0)
            expected[0, t, head] = weights @ v[0, visible, 0] / weights.sum()
    allowance = allowance_of(lambda: {"attention": TorchTwin().call("attention", q, k, v, window=4)})["attention"]
    check("attention", twin.call("attention", q, k, v, window=4), expected, allowance)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(twin, rate):
    shape, key = (300, 401), twin.random.key(11)
    masks = [twin.call("dropout", np.ones(shape), rate=rate, key=twin.random.fold_in(key, i)) != 0.0 for i in range(2)]
    elements, sites = masks[0].size, (masks[0], masks[1])
    deviation = np.sqrt(elements * rate * (1.0 - rate))
    for mask in sites:
        assert abs((~mask).sum() - rate * elements) <= 5 * deviation
    # Two keys agree as often as two independent coins do.
    agree = rate**2 + (1.0 - rate) ** 2
    agreements = (masks[0] == masks[1]).sum()
    assert abs(agreements - agree * elements) <= 5 * np.sqrt(elements * agree * (1.0 - agree))
    dropped = twin.call("dropout", np.ones(shape), rate=rate, key=key)
    assert abs(dropped.mean() - 1.0) <= 5 * deviation / elements / (1.0 - rate)


def test_no_key_means_no_dropout(twin):
    x = normal(3, 4)
    np.testing.assert_array_equal(twin.call("dropout", x, rate=0.5, key=None), x)
    np.testing.assert_array_equal(twin.call("dropout", x, rate=0.0, key=twin.random.key(1)), x)


# 14 tokens of 53 logits: one chunk; chunks of 4 (the last one padded by 2), of 5 (by 1), of 1.
@pytest.mark.parametrize("tokens_at_once", [512, 4, 5, 1])
def test_chunks_of_the_loss_change_nothing(tokens_at_once, monkeypatch):
    x, head = normal(14, 30, seed=1), normal(53, 30, seed=2) / np.sqrt(30)
    targets = np.random.default_rng(3).integers(0, 53, 14)

    def compute() -> Arrays:
        leaves = [torch.tensor(array).requires_grad_() for array in (x, head)]
        loss = torch_ref.loss.cross_entropy(*leaves, torch.tensor(targets))
        (3.0 * loss).backward()
        losses, _ = torch_ref.loss.token_losses(*leaves, torch.tensor(targets))
        named = {"loss": loss, "x": leaves[0].grad, "head": leaves[1].grad, "losses": losses}
        return {name: value.detach().numpy() for name, value in named.items()}

    record = dataclasses.replace(machine(), tokens_at_once=tokens_at_once)
    monkeypatch.setattr(jax_impl.loss, "machine", lambda: record)
    with jax.enable_x64(True):
        arrays = jnp.asarray(x), jnp.asarray(head)

        def tripled(x, head):
            return 3.0 * jax_impl.loss.cross_entropy(x, head, targets)

        grad_x, grad_head = jax.jit(jax.grad(tripled, argnums=(0, 1)))(*arrays)
        losses, correct = jax.jit(jax_impl.loss.token_losses)(*arrays, targets)
        # Differentiated and not, the loss has two code paths.
        loss, _ = jax.jit(jax.value_and_grad(jax_impl.loss.cross_entropy))(*arrays, targets)
        named = {"loss": loss, "x": grad_x, "head": grad_head, "losses": losses}
        values = {name: np.asarray(value) for name, value in named.items()}
        plain = np.asarray(jax.jit(jax_impl.loss.cross_entropy)(*arrays, targets))
    truths, kappas = amplification(compute)
    allowed = allowances(kappas, "float64")
    check_all(values, truths, allowed.get)
    check("loss without gradients", plain, truths["loss"], allowed["loss"])
    np.testing.assert_array_equal(correct, (x @ head.T).argmax(-1) == targets)


def test_a_sequence_that_is_too_long_is_refused(twin):
    model = dataclasses.replace(MODEL, max_position_embeddings=8)
    logits = twin.logits(model, random_weights(model))
    assert logits(random_tokens(model, 1, 8)).shape == (1, 8, model.vocab_size)
    with pytest.raises(ValueError, match="a sequence of 9 tokens exceeds max_position_embeddings=8"):
        logits(random_tokens(model, 1, 9))


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
def test_weights_rounded_once_are_weights_rounded_each_time(tied):
    """Loss and every gradient bit for bit, and gradients of the parameters' dtype."""
    model = dataclasses.replace(MODEL, tie_word_embeddings=tied, dropout=0.0)
    precision = dataclasses.replace(FLOAT32, compute="bfloat16")
    side = JaxModel(model, precision, random_weights(model))
    inputs, targets = random_tokens(model, ROWS, 11), random_tokens(model, ROWS, 11, seed=2)
    rounded = {path: x.astype("bfloat16") for path, x in side.params.items() if x.ndim == 2}

    def loss(params, copies):
        return bind(side.graph, params, copies).loss(inputs, targets)

    wrong = {path: x * 2 for path, x in rounded.items()}
    each, once, twice = (jax.jit(jax.value_and_grad(loss))(side.params, copies) for copies in ({}, rounded, wrong))
    for one, other in zip(jax.tree.leaves(each), jax.tree.leaves(once), strict=True):
        assert other.dtype == np.float32
        np.testing.assert_array_equal(one, other)
    assert twice[0] != each[0], "the copies are what is multiplied by"


@pytest.mark.parametrize(
    "logits", [[0.0], [3.0, 3.0, -1e4], [1e4, -1e4, 9999.0], [-3e38, -3e38], list(range(200))], ids=str
)
def test_one_pass_over_the_logits_finds_what_two_find(logits, monkeypatch):
    values = np.array([logits, logits[::-1]], np.float64)
    truth = np.exp(values - values.max(-1, keepdims=True)).sum(-1, keepdims=True)
    with jax.enable_x64(True):
        for pairs in (False, True):
            record = dataclasses.replace(backend.CPU, reduces_pairs=pairs)
            monkeypatch.setitem(backend.MACHINES, "cpu", record)
            peak, total = jax.jit(lambda x: jax_impl.loss.peak_and_total(x))(jnp.asarray(values))
            np.testing.assert_array_equal(peak, values.max(-1, keepdims=True))
            # Each exponential rounded, each of the sums rounded and, in one pass, each scaled.
            roundings = 1 + 3 * len(logits)
            assert (np.abs(total - truth) <= roundings * UNIT_ROUNDOFF["float64"] * truth).all()


def test_the_loss_is_the_kernels_in_16_bits_up_to_a_size(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    limit = backend.GPU.loss_kernel_up_to
    for D, dtype, expected in ((limit, "bfloat16", True), (limit + 1, "bfloat16", False), (8, "float32", False)):
        assert jax_impl.loss.is_in_kernel(dtype, D) == expected
