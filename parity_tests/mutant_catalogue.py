"""Seeded bugs: each one a realistic slip, and the test that must catch it. Run by `python -m parity_tests.mutants`."""

from parity_tests.mutant import Equivalent, Mutant

MODEL, NS, TRAIN = "jax_impl.model", "jax_impl.muon.newton_schulz", "jax_impl.train"
MUON, BATCHES, HYBRID_ROOM = "jax_impl.muon.transforms", "jax_impl.muon.batches", "jax_impl.hybrid"
MATRICES, ALIAS = "jax_impl.muon.matrices", "jax_impl.muon.alias"
PRODUCTS, ATTENTION, CACHE, JAX_LOSS = "jax_impl.products", "jax_impl.attention", "jax_impl.cache", "jax_impl.loss"
JAX_RANDOM = "jax_impl.random"
LOGITS = "parity_tests/test_model.py::test_logits[plain-float64]"
WINDOW = "parity_tests/test_model.py::test_logits[window-float64]"
LONG_WINDOW = "parity_tests/test_model.py::test_logits[long-window-float64]"
BIAS = "parity_tests/test_model.py::test_logits[bias-float64]"
GRADS = "parity_tests/test_model.py::test_loss_and_every_gradient[plain-float64]"
DROPOUT = "parity_tests/test_model.py::test_loss_and_every_gradient[everything-float64]"
EVALUATION = "parity_tests/test_model.py::test_evaluation_numbers[float64]"
LOSS = "parity_tests/test_parts.py::test_part[cross_entropy-float64]"
CHUNKS = "parity_tests/test_properties.py::test_chunks_of_the_loss_change_nothing"
ATTENTION_CHUNKS = "parity_tests/test_properties.py::test_chunks_of_attention_change_nothing"
HF = "parity_tests/test_transformers.py::test_logits_loss_and_gradients_equal_those_of_transformers"
RANDOM = "parity_tests/test_random.py"
UPDATES = "parity_tests/test_training.py::test_ten_updates_agree_in_float64"
DRIFT = "parity_tests/test_training.py::test_low_precision_drifts_as_rounding_must[f32]"
SKIPPING = "parity_tests/test_training.py::test_a_gradient_that_is_not_finite_changes_nothing_but_the_count[jax]"
ORTHO = "parity_tests/test_newton_schulz.py"
MUON_TESTS = "parity_tests/test_muon.py"
PARTS, MESHES = "parity_tests/test_muon_parts.py", "parity_tests/test_muon_sharded.py"
HYBRID = "parity_tests/test_hybrid.py"
STATE = "parity_tests/test_state.py::test_a_run_goes_on_in_the"
SAME_JAX = STATE + "_same_framework_bit_for_bit[jax-float64-6]"
SAME_TORCH = STATE + "_same_framework_bit_for_bit[torch-float64-6]"
TO_TORCH = STATE + "_other_framework[jax-torch-float64-6]"
KILLED = "tests/test_loop.py::test_a_killed_run_resumed_equals_an_uninterrupted_one"
GENERATE, GENERATION = "jax_impl.generate", "parity_tests/test_generation.py"
CACHED = GENERATION + "::test_cached_logits_equal_uncached_ones[plain-jax]"
CACHED_WINDOW = GENERATION + "::test_cached_logits_equal_uncached_ones[window-jax]"
GREEDY = GENERATION + "::test_greedy_takes_the_largest_logit_of_the_whole_sequence"
BATCHED = GENERATION + "::test_a_batch_gives_each_row_what_it_gets_alone[jax]"
SAME_SEED = GENERATION + "::test_the_same_seed_gives_the_same_tokens_in_both_frameworks"

MUTANTS = (
    # The model, forward.
    Mutant(
        "q_norm and k_norm swapped",
        MODEL,
        "q_BTNH, k_BSKH = self.q_norm(q_BTNH), self.k_norm(k_BSKH)",
        "q_BTNH, k_BSKH = self.k_norm(q_BTNH), self.q_norm(k_BSKH)",
        LOGITS,
    ),
    Mutant(
        "QK-norm after RoPE",
        MODEL,
        """        if self.q_norm is not None:
            q_BTNH, k_BSKH = self.q_norm(q_BTNH), self.k_norm(k_BSKH)
        q_BTNH, k_BSKH = apply_rope(q_BTNH, cos_TR, sin_TR), apply_rope(k_BSKH, cos_TR, sin_TR)
""",
        """        q_BTNH, k_BSKH = apply_rope(q_BTNH, cos_TR, sin_TR), apply_rope(k_BSKH, cos_TR, sin_TR)
        if self.q_norm is not None:
            q_BTNH, k_BSKH = self.q_norm(q_BTNH), self.k_norm(k_BSKH)
""",
        LOGITS,
    ),
    Mutant("theta five times too large", MODEL, "= config.rope_theta **", "= (5.0 * config.rope_theta) **", LOGITS),
    Mutant(
        "half of the rotary frequencies",
        MODEL,
        "return np.cos(angles_TR), np.sin(angles_TR)",
        "angles_TR[:, angles_TR.shape[1] // 2 :] = 0.0\n    return np.cos(angles_TR), np.sin(angles_TR)",
        LOGITS,
    ),
    Mutant(
        "rotation the other way on keys only",
        MODEL,
        "apply_rope(q_BTNH, cos_TR, sin_TR), apply_rope(k_BSKH, cos_TR, sin_TR)",
        "apply_rope(q_BTNH, cos_TR, sin_TR), apply_rope(k_BSKH, cos_TR, -sin_TR)",
        LOGITS,
    ),
    Mutant(
        "keys rotated one position late",
        MODEL,
        "apply_rope(q_BTNH, cos_TR, sin_TR), apply_rope(k_BSKH, cos_TR, sin_TR)",
        "apply_rope(q_BTNH, cos_TR, sin_TR), apply_rope(k_BSKH, jnp.roll(cos_TR, 1, 0), jnp.roll(sin_TR, 1, 0))",
        LOGITS,
    ),
    Mutant(
        "rotation over heads instead of positions",
        MODEL,
        "cos, sin = cos_TR[..., None, :].astype(wide), sin_TR[..., None, :].astype(wide)",
        "N = x_BTNH.shape[2]\n    cos, sin = cos_TR[:N].astype(wide), sin_TR[:N].astype(wide)",
        LOGITS,
    ),
    Mutant(
        "neighbouring dimensions paired by RoPE",
        MODEL,
        "first, second = jnp.split(x_BTNH.astype(wide), 2, axis=-1)",
        "first, second = x_BTNH.astype(wide)[..., ::2], x_BTNH.astype(wide)[..., 1::2]",
        LOGITS,
    ),
    Mutant(
        "gate and up swapped",
        MODEL,
        "gate_BTF, up_BTF = self.gate_proj(x_BTD), self.up_proj(x_BTD)",
        "gate_BTF, up_BTF = self.up_proj(x_BTD), self.gate_proj(x_BTD)",
        LOGITS,
    ),
    Mutant("GELU for SiLU", MODEL, "jax.nn.silu(", "jax.nn.gelu(", LOGITS),
    Mutant("RMSNorm eps 1e-5", MODEL, "keepdims=True) + eps)", "keepdims=True) + 10 * eps)", LOGITS),
    Mutant(
        "RMSNorm eps outside the root",
        MODEL,
        "jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)",
        "(1.0 / (jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True)) + eps))",
        LOGITS,
    ),
    Mutant("LayerNorm's variance for RMSNorm's", MODEL, "jnp.mean(wide * wide, axis", "jnp.var(wide, axis", LOGITS),
    Mutant("queries see one key of the future", ATTENTION, "return (s <= t) if", "return (s <= t + 1) if", LOGITS),
    Mutant(
        "window one key too wide",
        ATTENTION,
        "return (s <= t) if window is None else (s <= t) & (s > t - window)",
        "return (s <= t) if window is None else (s <= t) & (s >= t - window)",
        WINDOW,
    ),
    Mutant(
        "window's first block cut one key short",
        ATTENTION,
        "max(0, start - window + 1)",
        "max(0, start - window + 2)",
        LONG_WINDOW,
    ),
    Mutant(
        "scores over sqrt(hidden) instead of sqrt(head_dim)",
        ATTENTION,
        "q_XQH, k_XSH, accumulator(dtype)) / math.sqrt(H)",
        "q_XQH, k_XSH, accumulator(dtype)) / math.sqrt(N * H)",
        LOGITS,
    ),
    Mutant(
        "query heads grouped the other way round",
        ATTENTION,
        "q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)",
        "q_BTNH.reshape(B, T, G, K, H).transpose(0, 3, 2, 1, 4)",
        LOGITS,
    ),
    Mutant(
        "chunks of attention put back in another order",
        ATTENTION,
        "operands))\n    return out_XGTH.reshape",
        "operands))[::-1]\n    return out_XGTH.reshape",
        ATTENTION_CHUNKS,
    ),
    Mutant(
        "heads put back in another order", ATTENTION, ".transpose(0, 3, 1, 2, 4)", ".transpose(0, 3, 2, 1, 4)", LOGITS
    ),
    Mutant("final norm left out", MODEL, "dropout(self.norm(x_BTD), rate,", "dropout(x_BTD, rate,", LOGITS),
    Mutant(
        "residual taken after the norm",
        MODEL,
        "        branch_BTD = self.self_attn(self.input_layernorm(x_BTD), places, dropout_key, cache)",
        "        x_BTD = self.input_layernorm(x_BTD)\n"
        "        branch_BTD = self.self_attn(x_BTD, places, dropout_key, cache)",
        LOGITS,
    ),
    Mutant("bias not added", MODEL, "return y if self.bias is None else", "return y if True else", BIAS),
    Mutant(
        "window from the wrong layer on",
        "recipe.config",
        "if layer >= self.max_window_layers",
        "if layer > self.max_window_layers",
        HF + "[window-jax]",
    ),
    Mutant(
        "rope_theta lost on the way to config.json",
        "harness.hf_config",
        '"rope_theta": config.rope_theta},',
        '"rope_theta": 10_000.0 * 1.5},',
        "tests/test_checkpoint.py::test_a_saved_folder_comes_back_bit_for_bit",
    ),
    # The model, backward and loss.
    Mutant(
        "tied head as a copy: no gradient through it",
        MODEL,
        "return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight[...]",
        "return jax.lax.stop_gradient((self.lm_head or self.model.embed_tokens).weight[...])",
        GRADS,
    ),
    Mutant("loss over M - 1 tokens", JAX_LOSS, "jnp.full((M,), 1.0 / M,", "jnp.full((M,), 1.0 / (M - 1),", GRADS),
    Mutant(
        "padding tokens of the last chunk counted",
        JAX_LOSS,
        "jnp.pad(means_M, (0, padding))",
        "jnp.pad(means_M, (0, padding), constant_values=1.0 / M)",
        CHUNKS,
    ),
    Mutant(
        "head's gradient from the last chunk only",
        JAX_LOSS,
        "return (loss, grad_head_DV + product(",
        "return (loss, 0.0 * grad_head_DV + product(",
        CHUNKS,
    ),
    Mutant(
        "labels shifted by one",
        MODEL,
        "return cross_entropy(x_BTD.reshape(-1, x_BTD.shape[-1]), self.head_VD, targets_BT.reshape(-1), weights_M)",
        "return cross_entropy(\n"
        "            x_BTD.reshape(-1, x_BTD.shape[-1]), self.head_VD,\n"
        "            jnp.roll(targets_BT, 1, 1).reshape(-1), weights_M\n        )",
        GRADS,
    ),
    Mutant(
        "upstream gradient of the loss ignored",
        JAX_LOSS,
        "return grad_x_MD, grad_head_VD, None",
        "return residuals[0], grad_head_VD, None",
        LOSS,
    ),
    Mutant(
        "accuracy of the smallest logit",
        JAX_LOSS,
        "jnp.argmax(logits_MV, axis=-1) == targets",
        "jnp.argmin(logits_MV, axis=-1) == targets",
        EVALUATION,
    ),
    # Dropout and random numbers.
    Mutant("dropout without 1/(1-rate)", JAX_RANDOM, "/ kept_share(rate)).astype", "/ 1.0).astype", DROPOUT),
    Mutant(
        "one mask for both residual branches",
        MODEL,
        "self.layer, random.FFN_RESIDUAL)",
        "self.layer, random.ATTENTION_RESIDUAL)",
        DROPOUT,
    ),
    Mutant(
        "attention's masks laid out for other heads",
        ATTENTION,
        "decided.append(jax.vmap(of_head)(head_keys)",
        "decided.append(jax.vmap(of_head)(head_keys[::-1])",
        DROPOUT,
    ),
    Mutant(
        "one mask for all blocks of queries",
        ATTENTION,
        "rows=range(start, stop), columns",
        "rows=range(stop - start), columns",
        ATTENTION_CHUNKS,
    ),
    Mutant("dropped and kept exchanged", "jax_impl.random", "half >= jnp", "half < jnp", RANDOM),
    Mutant(
        "the halves of a word exchanged",
        "jax_impl.random",
        "(word & jnp.uint32(0xFFFF), word >> 16)",
        "(word >> 16, word & jnp.uint32(0xFFFF))",
        RANDOM,
    ),
    Mutant(
        "a mask cut at the wrong column", "jax_impl.random", "first = columns.start % DECISIONS", "first = 0", RANDOM
    ),
    Mutant("a Threefry rotation mistyped", "torch_ref.random", "(13, 15, 26, 6)", "(13, 15, 26, 7)", RANDOM),
    Mutant(
        "the same mask in every micro-batch",
        TRAIN,
        "random.fold_in(step_key, index) if",
        "random.fold_in(step_key, 0) if",
        UPDATES,
    ),
    Mutant(
        "the same masks at every step",
        TRAIN,
        "random.fold_in(random.key(config.seed), state.step + state.skipped)",
        "random.fold_in(random.key(config.seed), 0)",
        UPDATES,
    ),
    # Newton-Schulz.
    Mutant("coefficient 3.4455", NS, "((3.4445,", "((3.4455,", ORTHO),
    Mutant("coefficient 2.0351", NS, "2.0315),)", "2.0351),)", ORTHO),
    Mutant("coefficient -4.7550", NS, "-4.7750", "-4.7550", ORTHO),
    Mutant(
        "eps as a clamp",
        NS,
        "(jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + eps / scale)",
        "jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)), eps / scale)",
        ORTHO,
    ),
    Mutant(
        "eps under the root",
        NS,
        "keepdims=True)) + eps / scale",
        "keepdims=True) + (eps / scale) ** 2)",
        ORTHO,
    ),
    Mutant("eps 1e-8", NS, "eps: float | jax.Array = 1e-7", "eps: float | jax.Array = 1e-8", ORTHO),
    Mutant(
        "one iteration too many", NS, "fori_loop(0, len(coefficients),", "fori_loop(0, len(coefficients) + 1,", ORTHO
    ),
    Mutant(
        "norm of the whole stack",
        NS,
        "jnp.sum(x * x, axis=(-2, -1), keepdims=True)",
        "jnp.sum(x * x, keepdims=True)",
        ORTHO,
    ),
    Mutant(
        "polynomial summed in bfloat16 with rounded coefficients",
        NS,
        "return (a * x.astype(wide) + product).astype(dtype)",
        "return a * x + product.astype(dtype)",
        ORTHO,
    ),
    Mutant("no transpose of tall matrices", NS, "tall = x_OI.shape[-2] > x_OI.shape[-1]", "tall = False", ORTHO),
    # Muon and the hybrid.
    Mutant(
        "fan ratio upside down",
        MUON,
        "ratio = fan_out / max(fan_in, 1)",
        "ratio = fan_in / max(fan_out, 1)",
        MUON_TESTS,
    ),
    Mutant("fan ratio without its root", MUON, "max(1.0, ratio) ** 0.5", "max(1.0, ratio)", MUON_TESTS),
    Mutant(
        "Nesterov with the old momentum",
        MUON,
        "jax.tree.map(mix, updates, mu) if nesterov",
        "jax.tree.map(mix, updates, state.mu) if nesterov",
        MUON_TESTS,
    ),
    Mutant("no Nesterov", MUON, "if nesterov else mu", "if not nesterov else mu", MUON_TESTS),
    Mutant(
        "momentum as a sum (same direction, other state)",
        MUON,
        'weight = 1 - beta if momentum == "average" else 1.0',
        "weight = 1.0",
        MUON_TESTS,
    ),
    Mutant(
        "beta 0.949",
        HYBRID_ROOM,
        "                muon_config.beta,",
        "                muon_config.beta - 0.001,",
        UPDATES,
    ),
    Mutant(
        "square kernels iterated on the wrong side",
        MATRICES,
        "return (*counting, *matrix.fan_out, *matrix.fan_in)",
        "return (*counting, *matrix.fan_in, *matrix.fan_out)",
        MUON_TESTS,
    ),
    Mutant(
        "clip without torch's 1e-6",
        HYBRID_ROOM,
        "jnp.minimum(1.0, max_norm / (norm + 1e-6))",
        "jnp.minimum(1.0, max_norm / norm)",
        UPDATES,
    ),
    Mutant(
        "embedding under Muon",
        HYBRID_ROOM,
        '.role == "matrix" else',
        '.role in ("matrix", "embedding") else',
        HYBRID,
    ),
    Mutant(
        "decay on norm scales",
        "recipe.params",
        "or config.decay_norms",
        "or True",
        HYBRID,
    ),
    Mutant(
        "AdamW's beta2 0.99",
        HYBRID_ROOM,
        "adamw_config.beta2, adamw_config.eps)",
        "adamw_config.beta2 - 0.009, adamw_config.eps)",
        HYBRID,
    ),
    Mutant(
        "AdamW's bias correction by subtraction in float32",
        HYBRID_ROOM,
        "(-jnp.expm1(count.astype(v.dtype) * log) for log in logs)",
        "(1.0 - jnp.exp(count.astype(v.dtype) * log) for log in logs)",
        DRIFT,
    ),
    Mutant(
        "learning rate 0.1 % too high",
        HYBRID_ROOM,
        "muon_config.learning_rate *",
        "1.001 * muon_config.learning_rate *",
        UPDATES,
    ),
    Mutant(
        "torch momentum by lerp with beta",
        "torch_ref.muon.transforms",
        "held.lerp_(grad, 1.0 - beta)",
        "held.lerp_(grad, beta)",
        MUON_TESTS,
    ),
    # Muon's other parts.
    Mutant(
        "Gram: a row taken twice after a restart",
        NS,
        "            a, b, c = next(rows)\n",
        "            a, b, c = next(rows) if done or length == 1 else coefficients[0]\n",
        PARTS,
    ),
    Mutant(
        "Gram: one factor for both sides", NS, "gram = add(a, half, multiply(half, polynomial))", "gram = half", PARTS
    ),
    Mutant("Gram: no restarts", NS, "GRAM_RESTARTS = (2, 3)", "GRAM_RESTARTS: tuple = ()", PARTS),
    Mutant("a table read in one row", NS, "if len(set(coefficients)) == 1:", "if len(coefficients) == 5:", PARTS),
    Mutant("a mistyped row of Polar Express", NS, "3.3184196573706015", "3.3148196573706015", PARTS),
    Mutant("Polar Express without its margin", NS, "(a / 1.01, b / 1.01**3, c / 1.01**5)", "(a, b, c)", PARTS),
    Mutant(
        "the norm of squares that overflow", NS, "    x = x / scale\n    return", "    scale = 1.0\n    return", PARTS
    ),
    Mutant(
        "RMS by the shorter side", MUON, "rms * max(fan_in, fan_out) ** 0.5", "rms * min(fan_in, fan_out) ** 0.5", PARTS
    ),
    Mutant(
        "no maximum in either fan ratio", MUON, "if clamped else ratio**0.5", "if not clamped else ratio**0.5", PARTS
    ),
    Mutant(
        "NorMuon's neurons are inputs",
        MUON,
        "axis=matrix.fan_in, keepdims=True)\n            return (beta",
        "axis=matrix.fan_out, keepdims=True)\n            return (beta",
        PARTS,
    ),
    Mutant(
        "NorMuon with the old average",
        MUON,
        "map_matrices(scale, matrices, updates, nu)",
        "map_matrices(scale, matrices, updates, state.nu)",
        PARTS,
    ),
    Mutant("NorMuon forgets the norm", MUON, "even * (norm(wide) / (norm(even) + eps))", "even", PARTS),
    Mutant(
        "cautious decay where it works against", MUON, ".astype(update.dtype) >= 0", ".astype(update.dtype) <= 0", PARTS
    ),
    Mutant("QK-clip raises small logits too", MUON, "jnp.where(factor < 1, clipped, update)", "clipped * 1.01", PARTS),
    Mutant(
        "QK-clip of the weights before the update",
        MUON,
        "(weight + update) * factor - weight",
        "weight * factor - weight + update",
        PARTS,
    ),
    Mutant(
        "replicas orthogonalise the same matrices",
        "jax_impl.muon.sharded",
        "share[jax.lax.axis_index(self.replicas) if self.replicas else 0]",
        "share[0]",
        MESHES,
    ),
    Mutant(
        "parts put together in the wrong order",
        "jax_impl.muon.sharded",
        "[order.index(axis) for axis in range(len(order))]",
        "order",
        MESHES,
    ),
    Mutant(
        "matrices on a mesh left to XLA",
        BATCHES,
        "if any(sharding is not None for sharding in lie):",
        "if False:",
        MESHES,
    ),
    Mutant("batches cut at the wrong place", BATCHES, "batch[taken : taken + count]", "batch[:count]", MUON_TESTS),
    Mutant(
        "attention's way out read as its way in",
        MATRICES,
        "    if axes == 3 and parent in _FROM_HEADS:\n        return FROM_HEADS",
        "    if axes == 3 and parent in _FROM_HEADS:\n        return TO_HEADS",
        "tests/test_muon_library.py",
    ),
    Mutant(
        "the hybrid's rule does not reach its Muon",
        ALIAS,
        "told = optax.GradientTransformationExtraArgs(init_fn, update_fn)",
        "told = inner",
        "tests/test_muon_behaviour.py",
    ),
    Mutant(
        "Newton-Schulz at every micro-step",
        ALIAS,
        "return jax.lax.cond(is_applied, run, wait)",
        "return jax.tree.map(lambda new, old: jnp.where(is_applied, new, old), run(), wait())",
        "tests/test_muon_behaviour.py",
    ),
    Mutant(
        "the decay is never cautious",
        ALIAS,
        "if cautious else optax.add_decayed_weights",
        "if False else optax.add_decayed_weights",
        PARTS,
    ),
    # The train step.
    Mutant("gradients summed instead of averaged", TRAIN, "lambda x: x / A, total", "lambda x: x, total", UPDATES),
    Mutant(
        "clip of each micro-batch instead of their mean",
        TRAIN,
        "            return jax.value_and_grad(loss)(variables, exchange.in_turn(rounded, index), batch, key)\n",
        "            value, grads = jax.value_and_grad(loss)(variables, rounded, batch, key)\n"
        "            return value, clip_by_global_norm(grads, config.clip_norm)[0]\n",
        UPDATES,
    ),
    Mutant("first micro-batch alone", TRAIN, "        if A == 1:\n", "        if A >= 1:\n", UPDATES),
    Mutant(
        "norm of the rows' norms added up",
        "torch_ref.hybrid",
        "torch.linalg.vector_norm(row, dtype=torch.float64) for row",
        "torch.linalg.vector_norm(row, 1, dtype=torch.float64) for row",
        UPDATES,
    ),
    Mutant(
        "schedule one update ahead",
        TRAIN,
        "jnp.asarray(factors)[jnp.minimum(count, config.steps - 1)]",
        "jnp.asarray(factors)[jnp.minimum(count + 1, config.steps - 1)]",
        UPDATES,
    ),
    Mutant(
        "a non-finite gradient still moves the state",
        TRAIN,
        "finite = jnp.isfinite(grad_norm)",
        "finite = True",
        SKIPPING,
    ),
    # Recipe and generation.
    Mutant(
        "warm-up starts at zero",
        "recipe.schedule",
        "(step + 1.0) / max(1, warmup)",
        "step / max(1, warmup)",
        "tests/test_config.py",
    ),
    Mutant(
        "top-p drops the token that reaches p",
        GENERATE,
        "jnp.cumsum(jax.nn.softmax(ascending)) >",
        "jnp.cumsum(jax.nn.softmax(ascending)) - jax.nn.softmax(ascending) >",
        GENERATION,
    ),
    Mutant(
        "temperature multiplies",
        GENERATE,
        "/ max(temperature, COLDEST)",
        "* max(temperature, COLDEST)",
        GENERATION,
    ),
    Mutant(
        "the last prompt token is not seen",
        "recipe.sampling",
        "len(prompt) - 1 for",
        "len(prompt) - 2 for",
        GREEDY,
    ),
    # The cache.
    Mutant(
        "new tokens one position late",
        GENERATE,
        "cache = KVCache(layers, position_B)",
        "cache = KVCache(layers, position_B + 1)",
        CACHED,
    ),
    Mutant(
        "new tokens see the padding behind their row",
        CACHE,
        "jnp.where(visible(t, s, window)[:, None, None]",
        "jnp.where(visible(t + S, s, window)[:, None, None]",
        CACHED,
    ),
    Mutant(
        "keys and values written one slot late",
        CACHE,
        "s = self.position_B[:, None, None]",
        "s = self.position_B[:, None, None] + 1",
        CACHED,
    ),
    Mutant(
        "every row written into the first row's slot",
        CACHE,
        "s = self.position_B[:, None, None]",
        "s = self.position_B[:1, None, None]",
        CACHED,
    ),
    Mutant(
        "values cached as keys",
        CACHE,
        "v_BKSH.at[b, k, s].set(v_BKTH)",
        "v_BKSH.at[b, k, s].set(k_BKTH)",
        CACHED,
    ),
    Mutant(
        "new tokens rotated as if at position 0",
        MODEL,
        "cos_TR[cache.position_B[:, None]], sin_TR[cache.position_B[:, None]]",
        "cos_TR[0 * cache.position_B[:, None]], sin_TR[0 * cache.position_B[:, None]]",
        CACHED,
    ),
    Mutant(
        "new tokens look beyond their window",
        MODEL,
        "cache.attend(self.layer, q_BTNH, window=self.window)",
        "cache.attend(self.layer, q_BTNH, window=None)",
        CACHED_WINDOW,
    ),
    Mutant(
        "window of a new token one key too wide",
        CACHE,
        "jnp.where(visible(t, s, window)[:, None, None]",
        "jnp.where(visible(t, s, window and window + 1)[:, None, None]",
        CACHED_WINDOW,
    ),
    Mutant(
        "rows of samples in another order than their prompts",
        GENERATE,
        "jnp.repeat(x_BKSH, samples, axis=0)",
        "jnp.concatenate([x_BKSH] * samples)",
        BATCHED,
    ),
    Mutant(
        "one noise for all samples",
        GENERATE,
        "random.key(options.seed, sample) for",
        "random.key(options.seed) for",
        GENERATION + "::test_samples_differ_and_the_first_one_is_the_single_text[jax]",
    ),
    Mutant(
        "noise of the token before",
        GENERATE,
        "(key_B, position_B)).astype",
        "(key_B, state.position_B)).astype",
        SAME_SEED,
    ),
    Mutant(
        "repetition rewarded",
        GENERATE,
        "jnp.where(logits_V < 0, logits_V * penalty",
        "jnp.where(logits_V > 0, logits_V * penalty",
        GENERATION + "::test_filters_equal_those_of_transformers[repetition_penalty-jax]",
    ),
    Mutant(
        "new tokens are not counted as seen",
        GENERATE,
        "state.seen_BV.at[np.arange(len(token_B)), legal_B].set(True)",
        "state.seen_BV",
        GENERATION + "::test_greedy_tokens_equal_those_of_transformers[plain-jax]",
    ),
    Mutant(
        "min-p of probability one",
        GENERATE,
        "probs < min_p * jnp.max(probs)",
        "probs < min_p",
        GENERATION + "::test_filters_equal_those_of_transformers[min_p-jax]",
    ),
    Mutant(
        "text of a stop string's beginning is shown",
        "harness.text",
        "certain = len(self.held) - (0 if self.stopped else waiting)",
        "certain = len(self.held)",
        "tests/test_generation.py::test_a_stop_string_over_several_tokens_never_shows",
    ),
    # The training state.
    Mutant(
        "momentum transposed on load",
        "jax_impl.weights",
        "from_array(slots[slot][hf_name(path)], path, leaf.dtype, where)",
        "jnp.asarray(slots[slot][hf_name(path)].reshape(leaf.shape), leaf.dtype)",
        SAME_JAX,
    ),
    Mutant(
        "exp_avg and exp_avg_sq swapped on load",
        "jax_impl.weights",
        'mu=filled(adam_state.mu, "exp_avg"), nu=filled(adam_state.nu, "exp_avg_sq")',
        'mu=filled(adam_state.mu, "exp_avg_sq"), nu=filled(adam_state.nu, "exp_avg")',
        SAME_JAX,
    ),
    Mutant(
        "exp_avg and exp_avg_sq swapped on save",
        "jax_impl.weights",
        '"exp_avg": adam_state.mu, "exp_avg_sq": adam_state.nu}',
        '"exp_avg": adam_state.nu, "exp_avg_sq": adam_state.mu}',
        TO_TORCH,
    ),
    Mutant(
        "optimizer's count of updates not restored",
        "jax_impl.weights",
        "jnp.full_like(leaf, updates)",
        "jnp.zeros_like(leaf)",
        SAME_JAX,
    ),
    Mutant(
        "torch's Adam starts its bias correction again",
        "torch_ref.weights",
        "torch.tensor(float(updates), dtype",
        "torch.tensor(0.0, dtype",
        SAME_TORCH,
    ),
    Mutant(
        "learning-rate schedule starts again",
        "torch_ref.train",
        "return TrainState(state.model, state.optimizer, updates, skipped)",
        "return TrainState(state.model, state.optimizer, 0, skipped)",
        SAME_TORCH,
    ),
    Mutant(
        "skipped count lost",
        TRAIN,
        "jnp.full_like(state.skipped, skipped)",
        "jnp.zeros_like(state.skipped)",
        SAME_JAX,
    ),
    Mutant(
        "state rounded to float32",
        "harness.state",
        "dtype = state.config.precision.params",
        'dtype = "float32"',
        SAME_TORCH,
    ),
    Mutant(
        "data position restarted",
        "harness.loop",
        "= self.state.position, self.state.best,",
        "= 0, self.state.best,",
        KILLED + "[5]",
    ),
    Mutant(
        "skipped batches used again",
        "harness.state",
        "return self.updates + self.skipped",
        "return self.updates",
        KILLED + "[8]",
    ),
    Mutant(
        "best loss forgotten, so worse weights become best/",
        "harness.state",
        '"best": math.inf if best is None else best,',
        '"best": math.inf,',
        KILLED + "[11]",
    ),
    Mutant(
        "state saved in place",
        "harness.folders",
        "    scratch.mkdir()\n",
        "    shutil.rmtree(folder, ignore_errors=True)\n    scratch.mkdir()\n",
        "tests/test_loop.py::test_a_run_killed_while_saving_goes_on_from_the_state_before",
    ),
    Mutant(
        "records of undone updates kept in the log",
        "harness.records",
        '(line.record["step"] > step) == later',
        '(line.record["step"] > step + 99) == later',
        "tests/test_loop.py::test_what_a_resumed_run_makes_again_is_kept_aside",
    ),
)

EQUIVALENT = (
    Equivalent(
        "all positions shifted by a constant",
        "rope_table over arange(length) + 1",
        "RoPE depends on differences of positions; parity_tests/test_properties.py shows it",
    ),
    Equivalent(
        "momentum as a sum, seen through the update alone",
        "g + beta m for beta m + (1 - beta) g, with the matching Nesterov form",
        "the two differ by the factor 1 - beta, which Newton-Schulz divides out but for eps; the state shows it, "
        "and the tests compare the state",
    ),
    Equivalent(
        "no transpose of tall matrices, seen through values",
        "tall = False",
        "Newton-Schulz commutes with transposition up to rounding; it costs FLOPs, and a test counts them",
    ),
)
