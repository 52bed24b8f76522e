"""One whole update in plain NumPy float64: the third opinion, which shares no code with the other two.

Forward pass, gradient, accumulation, clip, Muon, AdamW, schedule and dropout masks, written from the papers and the
notebook. Gradients come by the complex step, Im f(w + ih) / h with h = 1e-30 (Squire and Trapp, SIAM Review 40, 1998):
exact to rounding, and without a backward pass to get wrong; one forward pass per parameter, so for tiny models alone.
Nothing of ours is imported: of a `RunConfig` only values are read. Letters of dimensions as in `torch_ref/model.py`.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]
STEP = 1e-30
EMBEDDING, PROBABILITIES, ATTENTION_BRANCH, FFN_HIDDEN, FFN_BRANCH, HEAD = range(6)
"""Sites of dropout within a layer; the first and the last count as layer `num_hidden_layers`."""


class State(NamedTuple):
    """Weights by Hugging Face name, slots by (slot, name), updates applied, updates skipped."""

    weights: Arrays
    slots: dict[tuple[str, str], np.ndarray]
    updates: int = 0
    skipped: int = 0


def threefry(key: tuple[int, int], x0: np.ndarray, x1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 of twenty rounds (Salmon et al., SC 2011) on 32-bit words kept in uint64."""
    word = np.uint64(2**32 - 1)
    keys = [np.uint64(k) for k in (*key, key[0] ^ key[1] ^ 0x1BD11BDA)]
    x0, x1 = (np.asarray(x0, np.uint64) + keys[0]) & word, (np.asarray(x1, np.uint64) + keys[1]) & word
    for round_ in range(20):
        left = np.uint64((13, 15, 26, 6, 17, 29, 16, 24)[round_ % 8])
        x0 = (x0 + x1) & word
        x1 = (((x1 << left) | (x1 >> (np.uint64(32) - left))) & word) ^ x0
        if round_ % 4 == 3:
            injection = round_ // 4 + 1
            x0 = (x0 + keys[injection % 3]) & word
            x1 = (x1 + keys[(injection + 1) % 3] + np.uint64(injection)) & word
    return x0, x1


@functools.lru_cache(maxsize=256)
def folded(key: tuple[int, int], *words: int) -> tuple[int, int]:
    """The key that each word in turn makes of the one before."""
    for word in words:
        high, low = threefry(key, np.array([0]), np.array([word]))
        key = int(high[0]), int(low[0])
    return key


@functools.lru_cache(maxsize=256)  # every forward pass of a gradient asks for the same masks
def kept(shape: tuple[int, ...], rate: float, key: tuple[int, int]) -> np.ndarray:
    """Which elements stay: those whose 16 random bits are at least the rate's, four of a row from one block."""
    row, column = np.indices((math.prod(shape[:-1]), shape[-1]))
    first, second = threefry(key, row, column // 4)
    chosen = np.where(column % 4 < 2, first, second) >> np.where(column % 2, 16, 0).astype(np.uint64)
    return (chosen % 65536 >= round(rate * 65536)).reshape(shape)


def dropped(x: np.ndarray, rate: float, key: tuple[int, int] | None, *path: int) -> np.ndarray:
    """x / (1 - rate) where it is kept, else zero (inverted dropout, Srivastava et al., 2014), for a rate of 16 bits."""
    if key is None or rate == 0.0:
        return x
    return np.where(kept(x.shape, rate, folded(key, *path)), x / (1.0 - round(rate * 65536) / 65536), 0.0)


def normed(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm over the last axis (Zhang and Sennrich, 2019)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def turned(x_BTNH: np.ndarray, theta: float) -> np.ndarray:
    """RoPE (Su et al., 2021) in Hugging Face's layout: dimensions r and r + H/2 are the two parts of one number."""
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    angles = np.arange(T)[:, None, None] / theta ** (2 * np.arange(H // 2) / H)
    a, b = x_BTNH[..., : H // 2], x_BTNH[..., H // 2 :]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)


def attended(q_BTNH, k_BTKH, v_BTKH, documents_BT, window: int | None, rate: float, key, layer: int) -> np.ndarray:
    """Causal grouped-query attention, the window counting the query itself; each row and head has a key of its
    own for the mask over its queries and keys. Documents of a row do not see each other."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    window, q_BTKGH = T if window is None else window, q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = np.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BTKH) / math.sqrt(H)
    t, s = np.arange(T)[:, None], np.arange(T)[None, :]
    together_BTS = np.ones((1, T, T), bool)
    if documents_BT is not None:
        together_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
    seen_BKGTS = ((s <= t) & (s > t - window) & together_BTS)[:, None, None]
    shifted = scores_BKGTS - np.where(seen_BKGTS, scores_BKGTS.real, -np.inf).max(axis=-1, keepdims=True)
    powers = np.where(seen_BKGTS, np.exp(np.where(seen_BKGTS, shifted, 0.0)), 0.0)
    probs_BKGTS = powers / powers.sum(axis=-1, keepdims=True)
    for number, head in enumerate(np.ndindex(B, K, N // K)):
        probs_BKGTS[head] = dropped(probs_BKGTS[head], rate, key, layer, PROBABILITIES, number)
    return np.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BTKH).reshape(B, T, N * H)


def loss(model: Any, weights: Mapping[str, np.ndarray], inputs_BT, targets_BT, key=None, documents_BT=None, count=None):
    """Sum of -log softmax(logits)[target] in nats, of targets that are not -100, by their count or the one given;
    without a key nothing is dropped."""
    (B, T), H, outside, rate = inputs_BT.shape, model.head_dim, model.num_hidden_layers, model.dropout

    def linear(x, name):
        y = x @ weights[name + ".weight"].T
        return y + weights[name + ".bias"] if name + ".bias" in weights else y

    def norm(x, name):
        return normed(x, weights[name + ".weight"], model.rms_norm_eps)

    x_BTD = dropped(weights["model.embed_tokens.weight"][inputs_BT], rate, key, outside, EMBEDDING)
    for layer in range(outside):
        block = f"model.layers.{layer}."
        attention, mlp = block + "self_attn.", block + "mlp."
        y_BTD = norm(x_BTD, block + "input_layernorm")
        q, k, v = (linear(y_BTD, f"{attention}{letter}_proj").reshape(B, T, -1, H) for letter in "qkv")
        if model.qk_norm:
            q, k = norm(q, attention + "q_norm"), norm(k, attention + "k_norm")
        window = model.sliding_window if layer >= model.max_window_layers else None
        q, k = turned(q, model.rope_theta), turned(k, model.rope_theta)
        y_BTD = linear(attended(q, k, v, documents_BT, window, rate, key, layer), attention + "o_proj")
        x_BTD = x_BTD + dropped(y_BTD, rate, key, layer, ATTENTION_BRANCH)
        y_BTD = norm(x_BTD, block + "post_attention_layernorm")
        gate = linear(y_BTD, mlp + "gate_proj")
        hidden = gate / (1.0 + np.exp(-gate)) * linear(y_BTD, mlp + "up_proj")
        hidden = dropped(hidden, rate, key, layer, FFN_HIDDEN)
        x_BTD = x_BTD + dropped(linear(hidden, mlp + "down_proj"), rate, key, layer, FFN_BRANCH)
    x_BTD = dropped(norm(x_BTD, "model.norm"), rate, key, outside, HEAD)
    head = "model.embed_tokens" if model.tie_word_embeddings else "lm_head"
    logits_BTV = x_BTD @ weights[head + ".weight"].T
    logits_BTV = logits_BTV - logits_BTV.real.max(axis=-1, keepdims=True)
    hits = np.take_along_axis(logits_BTV, np.maximum(targets_BT, 0)[..., None], axis=-1)[..., 0]
    losses_BT = np.where(targets_BT != -100, np.log(np.exp(logits_BTV).sum(axis=-1)) - hits, 0.0)
    return complex(losses_BT.sum() / (count or (targets_BT != -100).sum()))


def gradient(model: Any, weights: Arrays, *batch) -> Arrays:
    """d loss / d weight of every weight, one number after another."""

    def derivatives(name: str) -> Iterator[float]:
        for index in np.ndindex(weights[name].shape):
            moved = weights[name].astype(np.complex128)
            moved[index] += STEP * 1j
            yield loss(model, weights | {name: moved}, *batch).imag / STEP

    return {name: np.reshape(list(derivatives(name)), weight.shape) for name, weight in weights.items()}


def factor(run: Any, update: int) -> float:
    """Of both learning rates at this update, from 0: (i + 1)/W through the W warm-up updates, then a cosine."""
    warmup = round(run.schedule.warmup_fraction * run.steps)
    if update < warmup:
        return (update + 1) / warmup
    end, span = run.schedule.final_factor, max(1, run.steps - 1 - warmup)
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (update - warmup) / span)))


def orthogonal(x_OI: np.ndarray, steps: int, eps: float) -> np.ndarray:
    """Keller Jordan's quintic on x / (||x|| + eps), which takes singular values towards one."""
    x = x_OI / (np.sqrt((x_OI**2).sum()) + eps)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def one_update(run: Any, state: State, inputs_ABT, targets_ABT, documents_ABT=None) -> tuple[State, dict]:
    """The state after one update, and its metrics: loss, grad_norm before the clip, Muon's rate, skipped updates.

    The loss is the mean over the trained tokens of all micro-batches, so each is divided by an equal share of them."""
    A, key = len(inputs_ABT), folded((0, run.seed), state.updates + state.skipped)
    share = max(1, (targets_ABT != -100).sum()) / A
    losses, grads = [], {name: np.zeros_like(weight) for name, weight in state.weights.items()}
    for a in range(A):
        documents_BT = None if documents_ABT is None else documents_ABT[a]
        batch = inputs_ABT[a], targets_ABT[a], folded(key, a), documents_BT, share
        losses.append(loss(run.model, state.weights, *batch).real)
        for name, grad in gradient(run.model, state.weights, *batch).items():
            grads[name] += grad / A
    norm, scale = math.sqrt(sum((grad**2).sum() for grad in grads.values())), factor(run, state.updates)
    metrics = {"loss": sum(losses) / A, "grad_norm": norm, "lr": run.muon.learning_rate * scale}
    if not math.isfinite(norm):
        state = state._replace(skipped=state.skipped + 1)
        return state, metrics | {"skipped": state.skipped}
    weights, slots, t = dict(state.weights), dict(state.slots), state.updates + 1
    for name, weight in weights.items():
        g = grads[name] * min(1.0, run.clip_norm / (norm + 1e-6))
        if name.endswith("_proj.weight"):
            muon, beta = run.muon, run.muon.beta
            mu = slots["mu", name] = beta * slots["mu", name] + (1.0 - beta) * g
            direction = orthogonal(beta * mu + (1.0 - beta) * g if muon.nesterov else mu, muon.ns_steps, muon.eps)
            direction = direction * math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
            weights[name] = weight - muon.learning_rate * scale * (direction + muon.weight_decay * weight)
        else:
            adamw = run.adamw
            m = slots["exp_avg", name] = adamw.beta1 * slots["exp_avg", name] + (1.0 - adamw.beta1) * g
            v = slots["exp_avg_sq", name] = adamw.beta2 * slots["exp_avg_sq", name] + (1.0 - adamw.beta2) * g * g
            direction = m / (1.0 - adamw.beta1**t) / (np.sqrt(v / (1.0 - adamw.beta2**t)) + adamw.eps)
            decays = adamw.decay_norms or name in ("model.embed_tokens.weight", "lm_head.weight")
            decay = adamw.weight_decay * weight if decays else 0.0
            weights[name] = weight - adamw.learning_rate * scale * (direction + decay)
    return State(weights, slots, t, state.skipped), metrics | {"skipped": state.skipped}
