"""Seeded bugs aimed at what comparing two halves cannot see: slips that both share, dead flags, data, reports, cost,
precision, durability, input, the judge. Run with the others by `python -m parity_tests.mutants`."""

from parity_tests.mutant import Edit, Mutant

UPDATE = "parity_tests/test_one_update.py"
ONE = f"{UPDATE}::test_whole_updates_equal_the_third_opinion[torch-no-default]"
SWITCHED = f"{UPDATE}::test_whole_updates_equal_the_third_opinion[torch-switches]"
FINITE = f"{UPDATE}::test_an_infinite_gradient_of_a_finite_loss_changes_nothing_but_the_count"
SKIPPED = f"{UPDATE}::test_after_a_skipped_update_masks_go_on_and_schedule_and_moments_stay[torch]"
BLOCKS = f"{UPDATE}::test_masks_of_two_blocks_of_queries"
EVALUATED = f"{UPDATE}::test_an_evaluation_is_the_mean_over_tokens"
HYBRID, NS = "parity_tests/test_hybrid.py", "parity_tests/test_newton_schulz.py"
GENERATION = "parity_tests/test_generation.py"
FIELDS = "parity_tests/test_fields.py"
PRESETS, CAUSES, LOG = "tests/test_presets.py", "tests/test_data_causes.py", "tests/test_log_pinned.py"
COST, PROMISES, JUDGE = "parity_tests/test_cost.py", "parity_tests/test_promises.py", "parity_tests/test_judge.py"
MOMENTS, LOOP, STATE = "tests/test_every_moment.py", "tests/test_loop.py", "parity_tests/test_state.py"
CONFIG = "tests/test_config.py"
MODELS = "parity_tests/test_model.py"


def both(name: str, room: str, old: str, new: str, caught_by: str, torch: tuple[str, ...] | None = None) -> Mutant:
    """A slip made twice, with the same words unless torch's are given, and in the same room unless a third word is."""
    words = torch or (old, new)
    also = Edit(f"torch_ref.{(*words, room)[2]}", *words[:2])
    return Mutant(name, f"jax_impl.{room}", old, new, caught_by, "both halves", (also,))


def slip(kind: str, name: str, module: str, old: str, new: str, caught_by: str) -> Mutant:
    """A slip of a kind in one module."""
    return Mutant(name, module, old, new, caught_by, kind)


BOTH = (
    both(
        "all micro-batches share one dropout mask",
        "train",
        "random.fold_in(step_key, index)",
        "random.fold_in(step_key, 0)",
        ONE,
    ),
    both("dropout's key forgets the seed", "train", "random.key(config.seed)", "random.key(0)", ONE),
    both("a skipped batch's masks come again", "train", "state.step + state.skipped)", "state.step)", SKIPPED),
    both(
        "AdamW's rate has no schedule",
        "hybrid",
        "lambda count: adamw_config.learning_rate * schedule(count)",
        "lambda count: adamw_config.learning_rate",
        ONE,
        (
            'group["lr"] = learning_rate * factor',
            'group["lr"] = learning_rate * (factor if optimizer is self.muon else 1.0)',
        ),
    ),
    both(
        "the finite check looks at the loss",
        "train",
        "jnp.isfinite(grad_norm)",
        "jnp.isfinite(mean_loss)",
        FINITE,
        ("math.isfinite(grad_norm)", "math.isfinite(float(total_loss))"),
    ),
    both(
        "micro-batches' gradients are summed",
        "train",
        "jax.tree.map(lambda x: x / A, total)",
        "(total[0] / A, total[1])",
        ONE,
        ("grad.div_(A)", "grad.div_(1)"),
    ),
    both(
        "the clip divides by the norm alone",
        "hybrid",
        "jnp.minimum(1.0, max_norm / (norm + 1e-6))",
        "jnp.minimum(1.0, max_norm / norm)",
        ONE,
        ("torch.clamp(max_norm / (norm + 1e-6)", "torch.clamp(max_norm / norm"),
    ),
    both(
        "the norm is logged after the clip",
        "hybrid",
        "jax.tree.map(lambda grad: grad * factor, grads), norm",
        "jax.tree.map(lambda grad: grad * factor, grads), norm * factor",
        ONE,
        ("        grad.mul_(factor)\n    return norm", "        grad.mul_(factor)\n    return norm * factor"),
    ),
    both(
        "the clip's limit is one whatever is asked",
        "train",
        "clip_by_global_norm(grads, config.clip_norm)",
        "clip_by_global_norm(grads, 1.0)",
        ONE,
    ),
    both(
        "nesterov cannot be switched off",
        "muon.transforms",
        "if nesterov else mu",
        "if True else mu",
        ONE,
        ("if not nesterov:", "if False:"),
    ),
    both(
        "Muon's eps is a constant",
        "muon.transforms",
        "            eps=eps,\n            dtype=ns_dtype",
        "            eps=1e-7,\n            dtype=ns_dtype",
        ONE,
        ("eps=eps, dtype=ns_dtype", "eps=1e-7, dtype=ns_dtype", "muon.alias"),
    ),
    both(
        "Muon's steps are a constant",
        "hybrid",
        "KELLER_JORDAN[:1] * muon_config.ns_steps",
        "KELLER_JORDAN",
        ONE,
    ),
    both(
        "the fan ratio without its root",
        "muon.transforms",
        "max(1.0, ratio) ** 0.5",
        "max(1.0, ratio) ** 1.0",
        ONE,
    ),
    both(
        "the fan ratio upside down",
        "muon.transforms",
        "ratio = fan_out / max(fan_in, 1)",
        "ratio = fan_in / max(fan_out, 1)",
        ONE,
    ),
    both(
        "Muon's decay forgotten",
        "hybrid",
        "weight_decay=muon_config.weight_decay,",
        "weight_decay=0.0,",
        ONE,
    ),
    both(
        "AdamW's beta2 is its beta1",
        "hybrid",
        "scale_by_adam(adamw_config.beta1, adamw_config.beta2,",
        "scale_by_adam(adamw_config.beta1, adamw_config.beta1,",
        ONE,
        ("betas=(adamw_config.beta1, adamw_config.beta2)", "betas=(adamw_config.beta1, adamw_config.beta1)"),
    ),
    both(
        "AdamW's eps is a constant",
        "hybrid",
        "adamw_config.beta2, adamw_config.eps)",
        "adamw_config.beta2, 1e-8)",
        ONE,
        ("eps=adamw_config.eps,", "eps=1e-8,"),
    ),
    both(
        "the schedule runs one update ahead",
        "train",
        "jnp.minimum(count, config.steps - 1)",
        "jnp.minimum(count + 1, config.steps - 1)",
        ONE,
        ("min(count, config.steps - 1)", "min(count + 1, config.steps - 1)"),
    ),
    both("the logged rate is AdamW's", "train", "config.muon.learning_rate *", "config.adamw.learning_rate *", ONE),
    both(
        "no dropout at the embedding",
        "model",
        "dropout(self.embed_tokens(tokens_BT, self.dtype), rate, dropout_key, outside, random.EMBEDDING)",
        "dropout(self.embed_tokens(tokens_BT, self.dtype), 0.0, dropout_key, outside, random.EMBEDDING)",
        ONE,
    ),
    both("the head's mask is the embedding's", "model", "outside, random.HEAD)", "outside, random.EMBEDDING)", ONE),
    both(
        "both residual branches share a mask",
        "model",
        "self.layer, random.FFN_RESIDUAL",
        "self.layer, random.ATTENTION_RESIDUAL",
        ONE,
    ),
    both("all layers share the hidden mask", "model", "self.layer, random.FFN_HIDDEN", "0, random.FFN_HIDDEN", ONE),
    both(
        "all layers share attention's mask",
        "model",
        "random.fold_in(dropout_key, self.layer, random",
        "random.fold_in(dropout_key, 0, random",
        ONE,
    ),
    both(
        "all blocks of queries share a mask",
        "attention",
        "range(start, stop), ",
        "range(stop - start), ",
        BLOCKS,
    ),
    both(
        "the window sees one key more",
        "attention",
        "(s <= t) & (s > t - window)",
        "(s <= t) & (s >= t - window)",
        ONE,
    ),
    both(
        "RoPE's frequencies end one pair early",
        "model",
        "dtype=np.float64) / config.head_dim)",
        "dtype=np.float64) / (config.head_dim - 2))",
        ONE,
    ),
    both(
        "all samples of a prompt are the same",
        "generate",
        "random.key(options.seed, sample)",
        "random.key(options.seed)",
        f"{FIELDS}::test_the_tokens_chosen_depend_on[samples-torch]",
    ),
    both(
        "the seed of sampling is ignored",
        "generate",
        "random.key(options.seed, sample)",
        "random.key(0, sample)",
        f"{FIELDS}::test_the_tokens_chosen_depend_on[seed-torch]",
    ),
    both(
        "new tokens are not seen by the penalty",
        "generate",
        "seen_BV = state.seen_BV.at[np.arange(len(token_B)), legal_B].set(True)",
        "seen_BV = state.seen_BV",
        GENERATION,
        ("seen_BV = state.seen_BV.scatter(1, legal_B[:, None], True)", "seen_BV = state.seen_BV"),
    ),
    both(
        "top-k keeps one more",
        "generate",
        "min(top_k, logits_V.shape[-1])",
        "min(top_k + 1, logits_V.shape[-1])",
        GENERATION,
    ),
    both(
        "min-p before top-p's renormalisation",
        "generate",
        "probs < min_p * jnp.max(probs)",
        "probs < min_p",
        GENERATION,
        ("probs < min_p * torch.max(probs)", "probs < min_p"),
    ),
)

SHARED = (
    slip(
        "shared facts",
        "the cosine ends one update late",
        "recipe.schedule",
        "steps - 1 - warmup",
        "steps - warmup",
        ONE,
    ),
    slip(
        "shared facts",
        "the warm-up is cut instead of rounded",
        "recipe.schedule",
        "round(config.warmup_fraction * steps)",
        "int(config.warmup_fraction * steps)",
        ONE,
    ),
    slip(
        "shared facts",
        "the cosine's floor is a constant",
        "recipe.schedule",
        "cosine = config.final_factor +",
        "cosine = 0.1 +",
        ONE,
    ),
    slip(
        "shared facts",
        "the head does not decay",
        "recipe.params",
        'role in ("embedding", "head")',
        'role in ("embedding",)',
        HYBRID,
    ),
    slip(
        "shared facts",
        "biases decay",
        "recipe.params",
        'role in ("embedding", "head")',
        'role in ("embedding", "head", "bias")',
        SWITCHED,
    ),
    slip(
        "shared facts",
        "the initial deviation is a constant",
        "recipe.params",
        "np.float32(config.initializer_range)",
        "np.float32(0.02)",
        f"{FIELDS}::test_the_initial_weights_read_their_deviation_and_the_seed",
    ),
    slip(
        "shared facts",
        "the initial weights ignore the seed",
        "recipe.params",
        "key=[seed, zlib",
        "key=[0, zlib",
        f"{FIELDS}::test_the_initial_weights_read_their_deviation_and_the_seed",
    ),
    slip(
        "defaults",
        "rms_norm_eps 1e-5 by default",
        "recipe.config",
        "rms_norm_eps: float = 1e-6",
        "rms_norm_eps: float = 1e-5",
        PRESETS,
    ),
    slip(
        "defaults", "Muon's default momentum 0.9", "recipe.config", "beta: float = 0.95", "beta: float = 0.9", PRESETS
    ),
    slip(
        "defaults",
        "qwen3's positions are Qwen2's",
        "recipe.presets",
        "max_position_embeddings=40_960",
        "max_position_embeddings=32_768",
        PRESETS,
    ),
    slip(
        "defaults",
        "qwen3's theta is the default",
        "recipe.presets",
        "rope_theta=1_000_000.0",
        "rope_theta=10_000.0",
        PRESETS,
    ),
    slip("defaults", "one preset's FFN mistyped", "recipe.presets", "ffn=9728", "ffn=9782", PRESETS),
    slip(
        "defaults",
        "qwen3-8b tied",
        "recipe.presets",
        "hidden=4096, ffn=12288, layers=36, heads=32, tied=False",
        "hidden=4096, ffn=12288, layers=36, heads=32, tied=True",
        PRESETS,
    ),
)

DATA_SLIPS = (
    slip(
        "data",
        "all seeds share one order of windows",
        "recipe.data",
        "return _generator(self.seed, epoch).permutation(windows)",
        "return _generator(0, epoch).permutation(windows)",
        CAUSES,
    ),
    slip(
        "data",
        "all epochs share one order of windows",
        "recipe.data",
        "return _generator(self.seed, epoch).permutation(windows)",
        "return _generator(self.seed, 0).permutation(windows)",
        CAUSES,
    ),
    slip(
        "data",
        "the fingerprint of the first 4,096 tokens",
        "recipe.data",
        "np.ascontiguousarray(self.train_tokens).data",
        "np.ascontiguousarray(self.train_tokens[:4096]).data",
        CAUSES,
    ),
    slip(
        "data",
        "the last window is left out",
        "recipe.data",
        "return np.arange(windows, dtype=np.int64) * sequence_length",
        "return np.arange(max(1, windows - 1), dtype=np.int64) * sequence_length",
        CAUSES,
    ),
    slip(
        "data",
        "the evaluation's budget is ignored",
        "recipe.data",
        "count = max(1, min(tokens // (rows * sequence_length), len(starts) // rows))",
        "count = max(1, len(starts) // rows)",
        CAUSES,
    ),
    slip(
        "data",
        "every evaluation sees one batch fewer",
        "recipe.data",
        "range(0, count * rows, rows)",
        "range(0, max(1, count - 1) * rows, rows)",
        CAUSES,
    ),
)

REPORTING = (
    slip(
        "reporting",
        "bits per byte without the logarithm of two",
        "harness.loop",
        "loss / math.log(2) / dataset.bytes_per_token",
        "loss / dataset.bytes_per_token",
        LOG,
    ),
    slip(
        "reporting",
        "perplexity of base two",
        "harness.loop",
        "math.exp(loss) if loss < 700",
        "2.0**loss if loss < 700",
        LOG,
    ),
    slip(
        "reporting",
        "tokens per second of one micro-batch",
        "harness.loop",
        "tokens=config.tokens_per_step",
        "tokens=config.batch_size * config.sequence_length",
        LOG,
    ),
    slip(
        "reporting",
        "the epochs of one micro-batch",
        "harness.loop",
        "config.steps * config.tokens_per_step / tokens",
        "config.steps * config.batch_size * config.sequence_length / tokens",
        LOG,
    ),
    slip(
        "reporting", "the best loss is the last one", "harness.loop", "if loss < best and step > 0", "if step > 0", LOG
    ),
    slip(
        "reporting",
        "a skipped update is not counted in the log",
        "harness.runlog",
        '"skipped": int(skipped)}',
        '"skipped": 0}',
        LOG,
    ),
    slip(
        "reporting",
        "evaluation averages batches, not tokens",
        "jax_impl.train",
        "tokens + targets_BT.size\n        return loss / tokens",
        "tokens + 1\n        return loss / tokens",
        EVALUATED,
    ),
)

COST_SLIPS = (
    slip(
        "cost",
        "all logits held at once",
        "jax_impl.loss",
        "math.ceil(M / machine().tokens_at_once)",
        "1",
        COST,
    ),
    slip(
        "cost",
        "evaluation compiles at every call",
        "jax_impl.train",
        "self.eval_step(self.state.params, inputs_BT, targets_BT)",
        "make_evaluate(self.config)(self.state.params, inputs_BT, targets_BT)",
        COST,
    ),
    slip("cost", "the train step donates nothing", "jax_impl.train", "donate_argnums=0, ", "", COST),
    slip(
        "cost",
        "metrics are read at every update",
        "harness.loop",
        "due = time.perf_counter() - since > SECONDS_BETWEEN_RECORDS",
        "due = True",
        LOG,
    ),
    slip(
        "cost",
        "finished rows are computed to the end",
        "jax_impl.generate",
        "return (index < count) & ~jnp.all(state.done_B)",
        "return index < count",
        COST,
    ),
    slip(
        "cost",
        "finished rows are computed to the end in torch",
        "torch_ref.generate",
        "while len(new) < count and not state.done_B.all():",
        "while len(new) < count:",
        COST,
    ),
    slip(
        "cost",
        "every chunk of decoding compiles",
        "jax_impl.generate",
        'static_argnames=("graph", "choice"), donate',
        'static_argnames=("graph", "choice", "count"), donate',
        COST,
    ),
    slip("cost", "decoding copies its cache", "jax_impl.generate", ', donate_argnames="state")', ")", COST),
    slip(
        "cost",
        "remat is a dead flag",
        "jax_impl.model",
        "remat = self.remat and cache is None",
        "remat = False",
        COST,
    ),
    slip(
        "cost",
        "remat is a dead flag in torch",
        "torch_ref.model",
        "remat = self.remat and cache is None",
        "remat = False",
        COST,
    ),
    slip(
        "cost",
        "a window skips no keys",
        "jax_impl.attention",
        "[0 if window is None else max(0, start - window + 1) for start in starts]",
        "[0 for start in starts]",
        COST,
    ),
    slip(
        "cost",
        "an epoch's order is drawn for every batch",
        "recipe.data",
        "functools.lru_cache(maxsize=2)(self._permute)",
        "self._permute",
        CAUSES,
    ),
)

PRECISION = (
    slip(
        "precision",
        "the norm's product rounded three times",
        "jax_impl.model",
        "return (normed * weight.astype(wide.dtype)).astype(x.dtype)",
        "return normed.astype(x.dtype) * weight.astype(x.dtype)",
        PROMISES,
    ),
    slip(
        "precision",
        "the norm's product rounded three times in torch",
        "torch_ref.model",
        "return (normed * weight.to(wide.dtype)).to(x.dtype)",
        "return normed.to(x.dtype) * weight.to(x.dtype)",
        PROMISES,
    ),
    slip(
        "precision",
        "the norm's mean in bfloat16",
        "jax_impl.model",
        "wide = x.astype(accumulator(x.dtype))\n",
        "wide = x\n",
        PROMISES,
    ),
    slip(
        "precision",
        "rotary tables in the compute dtype",
        "jax_impl.model",
        "(jnp.asarray(table, accumulator(self.dtype)) for table in tables)",
        "(jnp.asarray(table, self.dtype) for table in tables)",
        PROMISES,
    ),
    slip(
        "precision",
        "rotary tables in the compute dtype in torch",
        "torch_ref.model",
        "to = dict(dtype=accumulator(self.dtype), device",
        "to = dict(dtype=self.dtype, device",
        PROMISES,
    ),
    slip(
        "precision",
        "softmax in the compute dtype",
        "jax_impl.attention",
        "jax.nn.softmax(scores_XGTS, axis=-1).astype(dtype)",
        "jax.nn.softmax(scores_XGTS.astype(dtype), axis=-1)",
        PROMISES,
    ),
    slip(
        "precision",
        "scores rounded before the softmax",
        "jax_impl.attention",
        'product("xqh,xsh->xqs", q_XQH, k_XSH, accumulator(dtype))',
        'product("xqh,xsh->xqs", q_XQH, k_XSH, dtype)',
        PROMISES,
    ),
    slip(
        "precision",
        "silu in the compute dtype",
        "jax_impl.model",
        "jax.nn.silu(gate.astype(accumulator(gate.dtype))).astype(gate.dtype) * up",
        "jax.nn.silu(gate) * up",
        PROMISES,
    ),
    slip(
        "precision",
        "logits rounded to the compute dtype",
        "jax_impl.model",
        'product("btd,vd->btv", x_BTD, self.head_VD, accumulator(x_BTD.dtype))',
        'product("btd,vd->btv", x_BTD, self.head_VD, x_BTD.dtype)',
        PROMISES,
    ),
    slip(
        "precision",
        "gradients summed in bfloat16",
        "jax_impl.train",
        "jax.tree.map(jnp.zeros_like, state.params))",
        "jax.tree.map(lambda x: jnp.zeros(x.shape, config.precision.compute), state.params))",
        PROMISES,
    ),
    slip(
        "precision",
        "Adam's moments in bfloat16",
        "jax_impl.hybrid",
        "return (m / correction1) / (jnp.sqrt(v / correction2) + eps)",
        "m, v = (x.astype(jnp.bfloat16).astype(x.dtype) for x in (m, v))\n"
        "            return (m / correction1) / (jnp.sqrt(v / correction2) + eps)",
        PROMISES,
    ),
    slip(
        "precision",
        "Newton-Schulz's last sum rounded twice",
        "jax_impl.muon.newton_schulz",
        "return (a * x.astype(wide) + product).astype(dtype)",
        "return ((a * x.astype(wide)).astype(dtype) + product).astype(dtype)",
        PROMISES,
    ),
    slip(
        "precision",
        "the cache's scores rounded",
        "jax_impl.cache",
        'product("bksh,bkgh->bkgs", k_BKSH, q_BKGH, accumulator(dtype))',
        'product("bksh,bkgh->bkgs", k_BKSH, q_BKGH, dtype)',
        PROMISES,
    ),
)

DURABILITY = (
    slip(
        "durability",
        "tensors are not forced to disk",
        "harness.tensors",
        "        os.fsync(stream.fileno())\n",
        "",
        MOMENTS,
    ),
    slip(
        "durability",
        "best is not put back after a kill",
        "harness.state",
        'for folder in (Path(run) / "best", Path(run) / "last"):',
        'for folder in (Path(run) / "last",):',
        MOMENTS,
    ),
    slip(
        "durability",
        "saved before evaluated",
        "harness.loop",
        "            if evaluating:\n                evaluate(step)\n"
        "            if saving or failing:\n                save()  # After",
        "            if saving or failing:\n                save()\n"
        "            if evaluating:\n                evaluate(step)  # After",
        MOMENTS,
    ),
    slip(
        "durability",
        "a failed save leaves its scratch",
        "harness.folders",
        "        shutil.rmtree(scratch)\n        raise",
        "        raise",
        "tests/test_checkpoint.py tests/test_loop.py",
    ),
    slip(
        "durability",
        "the predecessor is removed before the renaming",
        "harness.folders",
        "        folder.rename(set_aside(folder))\n        scratch.rename(folder)\n"
        "        shutil.rmtree(set_aside(folder))",
        "        shutil.rmtree(folder)\n        scratch.rename(folder)",
        MOMENTS,
    ),
    slip(
        "durability",
        "records are not flushed",
        "harness.runlog",
        "        self._metrics.flush()\n",
        "",
        "tests/test_runlog.py",
    ),
    slip("durability", "undone records are lost", "harness.runlog", "    if undone:\n", "    if not kept:\n", LOG),
    slip(
        "durability",
        "the position forgets skipped batches",
        "harness.state",
        "return self.updates + self.skipped",
        "return self.updates",
        LOOP,
    ),
    slip(
        "durability",
        "the best loss is forgotten by a resumed run",
        "harness.loop",
        "position, best = state.position, state.best",
        "position = state.position",
        MOMENTS,
    ),
    slip(
        "durability",
        "AdamW's count begins anew in torch",
        "torch_ref.weights",
        "torch.tensor(float(updates), dtype",
        "torch.tensor(0.0, dtype",
        STATE,
    ),
)

INPUT = (
    slip("input", "an odd head_dim is let through", "recipe.config", "self.head_dim % 2 == 0,", "True,", CONFIG),
    slip(
        "input",
        "a rate of one passes as a fraction",
        "recipe.config",
        "require(0 <= value < 1, f",
        "require(0 <= value <= 1, f",
        CONFIG,
    ),
    slip(
        "input",
        "negative sample_tokens pass",
        "recipe.config",
        'self, "sample_tokens", "profile_steps")',
        'self, "profile_steps")',
        CONFIG,
    ),
    slip(
        "input",
        "bfloat16 parameters are trained",
        "recipe.config",
        'self.params != "float64" or self.compute == "float64"',
        "True",
        CONFIG,
    ),
    slip(
        "input",
        "a sequence beyond the positions passes",
        "recipe.config",
        "self.sequence_length <= limit,",
        "True,",
        CONFIG,
    ),
    slip(
        "input",
        "an empty stop string passes",
        "recipe.sampling",
        'require("" not in self.stop',
        'require(True or "" not in self.stop',
        "tests/test_generation.py",
    ),
)

JUDGES = (
    slip(
        "the judge",
        "a value that is not a number passes",
        "parity_tests.compare.tolerance",
        "if not error <= allowance:",
        "if error > allowance:",
        JUDGE,
    ),
    slip(
        "the judge",
        "another shape passes",
        "parity_tests.compare.tolerance",
        "if value.shape != truth.shape:\n        raise",
        "if value.size != truth.size:\n        raise",
        JUDGE,
    ),
    slip(
        "the judge",
        "missing names pass",
        "parity_tests.compare.tolerance",
        "if values.keys() != truths.keys():",
        "if values.keys() - truths.keys():",
        JUDGE,
    ),
    slip(
        "the judge",
        "errors are relative to the larger of the two",
        "parity_tests.compare.tolerance",
        "norm = np.linalg.norm(truth[np.isfinite(truth)])",
        "norm = max(np.linalg.norm(truth[np.isfinite(truth)]), np.linalg.norm(value))",
        JUDGE,
    ),
    slip(
        "the judge",
        "a report looks at its first row alone",
        "parity_tests.compare.report",
        "for row in self.rows:\n            if row.beyond:",
        "for row in self.rows[:1]:\n            if row.beyond:",
        JUDGE,
    ),
    slip(
        "the judge",
        "a row is beyond only if every side is",
        "parity_tests.compare.report",
        "for side, error in self.errors.items() if not error <= self.allowances[side]]",
        "for side, error in self.errors.items() if error > self.allowances[side]]",
        JUDGE,
    ),
    slip("the judge", "a safety of ten", "parity_tests.compare.tolerance", "SAFETY = 2.0", "SAFETY = 10.0", JUDGE),
    slip(
        "the judge",
        "an infinite error counts as none",
        "parity_tests.compare.tolerance",
        "(error if math.isfinite(error) else math.inf)",
        "(error if math.isfinite(error) else 0.0)",
        JUDGE,
    ),
)

TORCH = (
    slip(
        "torch alone",
        "torch: q_norm and k_norm swapped",
        "torch_ref.model",
        "self.q_norm(q_BTNH), self.k_norm(k_BSKH)",
        "self.k_norm(q_BTNH), self.q_norm(k_BSKH)",
        MODELS,
    ),
    slip(
        "torch alone",
        "torch: RMSNorm's eps outside the root",
        "torch_ref.model",
        "torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + eps)",
        "(1.0 / (torch.sqrt(torch.mean(wide * wide, dim=-1, keepdim=True)) + eps))",
        MODELS,
    ),
    slip(
        "torch alone",
        "torch: rotation the other way",
        "torch_ref.model",
        "[first * cos - second * sin, second * cos + first * sin]",
        "[first * cos + second * sin, second * cos - first * sin]",
        MODELS,
    ),
    slip(
        "torch alone",
        "torch: gate and up swapped",
        "torch_ref.model",
        "self.gate_proj(x_BTD), self.up_proj(x_BTD)",
        "self.up_proj(x_BTD), self.gate_proj(x_BTD)",
        MODELS,
    ),
    slip(
        "torch alone",
        "torch: the head is never the table",
        "torch_ref.model",
        "(self.model.embed_tokens if self.lm_head is None",
        "(self.model.embed_tokens if self.lm_head is not None",
        MODELS,
    ),
    slip("torch alone", "torch: coefficient 2.0135", "torch_ref.muon.newton_schulz", "2.0315),)", "2.0135),)", NS),
    slip(
        "torch alone",
        "torch: eps under the root",
        "torch_ref.muon.newton_schulz",
        "keepdim=True)) + eps / scale",
        "keepdim=True) + eps / scale)",
        NS,
    ),
    slip(
        "torch alone",
        "torch: one iteration fewer",
        "torch_ref.muon.newton_schulz",
        "for a, b, c in coefficients:",
        "for a, b, c in coefficients[1:]:",
        NS,
    ),
    slip(
        "torch alone",
        "torch: tall matrices iterated tall",
        "torch_ref.muon.newton_schulz",
        "tall = x_OI.shape[-2] > x_OI.shape[-1]",
        "tall = False",
        COST,
    ),
    slip(
        "torch alone",
        "torch: momentum overwrites the gradient",
        "torch_ref.muon.transforms",
        "return grad.lerp(held, beta) if",
        "return grad.lerp_(held, beta) if",
        "parity_tests/test_muon.py",
    ),
    slip(
        "torch alone",
        "torch: the sampled position is one late",
        "torch_ref.generate",
        "zip(key_B, position_B.tolist(), strict=True)",
        "zip(key_B, (position_B + 1).tolist(), strict=True)",
        GENERATION,
    ),
    slip(
        "torch alone",
        "torch: the new key goes to the slot before",
        "torch_ref.cache",
        "k_BKSH[b, :, s], v_BKSH[b, :, s] = k",
        "k_BKSH[b, :, s - 1], v_BKSH[b, :, s] = k",
        GENERATION,
    ),
    slip(
        "torch alone",
        "torch: cached scores without the root",
        "torch_ref.cache",
        ".to(accumulator(dtype)) / math.sqrt(H)",
        ".to(accumulator(dtype)) / H",
        GENERATION,
    ),
    slip(
        "torch alone",
        "torch: the held weights are not rounded",
        "torch_ref.generate",
        'if role in ("matrix", "embedding", "head"):',
        'if role in ("matrix",):',
        PROMISES,
    ),
    slip(
        "torch alone",
        "torch: top-p a twentieth too low",
        "torch_ref.generate",
        "dim=-1), dim=-1) > 1.0 - top_p",
        "dim=-1), dim=-1) > 1.0 - top_p + 0.05",
        GENERATION,
    ),
    slip(
        "torch alone",
        "torch: the smallest logit counts as the answer",
        "torch_ref.loss",
        "logits_MV.argmax(-1) == targets_M",
        "logits_MV.argmin(-1) == targets_M",
        MODELS,
    ),
    slip(
        "torch alone",
        "torch: an array shares the parameter's memory",
        "torch_ref.weights",
        "return tensor.numpy().copy()",
        "return tensor.numpy()",
        "parity_tests/test_weights.py",
    ),
    slip(
        "torch alone",
        "torch: the mean gradient of all but one",
        "torch_ref.train",
        "total_loss / A",
        "total_loss / max(1, A - 1)",
        ONE,
    ),
)

PORTS = "parity_tests/test_compare.py"


def port(name: str, module: str, old: str, new: str, caught_by: str = PORTS) -> Mutant:
    """A slip in the comparison of foreign models."""
    return slip("ports", name, f"parity_tests.compare.{module}", old, new, caught_by)


COMPARISON = (
    port(
        "a torch parameter without a partner is passed over",
        "report",
        "return not (self.only_jax or self.only_torch or self.problems)",
        "return not (self.only_jax or self.problems)",
    ),
    port(
        "heads fused part by part",
        "rules",
        "for group in range(groups) for part in range(len(values))",
        "for part in range(len(values)) for group in range(groups)",
    ),
    port("a kernel is not transposed", "rules", "before=(I, O), axes=(1, 0))", "before=(O, I))"),
    port(
        "an unknown target of the rules is passed over",
        "rules",
        "if filled and not any(",
        "if not filled and not any(",
    ),
    port("float32 stays float32", "program", "_WIDE.get(np.dtype(value), value) if is_dtype", "value if is_dtype"),
    port(
        "a float32 literal is taken as rounded",
        "program",
        "np.asarray(float(str(array[()])), np.float64)",
        "array.astype(np.float64)",
    ),
    port("a scan runs forwards", "program", 'reverse=params["reverse"]', "reverse=False"),
    port("cotangents of a scan's taps are lost", "program", "if unique in mine}", "if unique in mine and False}"),
    port(
        "a constant explains everything",
        "modules",
        "        if casts:\n            ratio",
        "        if names:\n            ratio",
    ),
    port(
        "a parameter without a gradient is not compared",
        "modules",
        "gradients={name: run.gradients.get(name, zero) for name, zero in zeros.items()}",
        "gradients={name: run.gradients[name] for name in zeros if name in run.gradients}",
    ),
    port(
        "the whole table's gradient passes with its padding row",
        "modules",
        "gradients[first][row] = expected[row]",
        "gradients[first][:] = expected",
    ),
    port(
        "an output of another shape is passed over",
        "modules",
        "if is_input(name) and np.shape",
        "if np.shape",
    ),
    port(
        "the command ends in 0 whatever was found",
        "__main__",
        "return report.exit_code",
        "return 0",
    ),
)

LOSS_KERNEL = "parity_tests/test_loss_kernel.py"
ATTENTION_KERNEL = "parity_tests/test_attention_kernel.py"


def kernel(name: str, module: str, old: str, new: str, caught_by: str) -> Mutant:
    """A slip in what a GPU alone runs."""
    return slip("a GPU's", name, f"jax_impl.{module}", old, new, caught_by)


ON_A_GPU = (
    slip(
        "shared",
        "dropout's rate rounded down",
        "recipe.dropout",
        "round(rate * RESOLUTION)",
        "int(rate * RESOLUTION)",
        ONE,
    ),
    slip(
        "shared",
        "what stays is divided by too much",
        "recipe.dropout",
        "1.0 - threshold(rate) / RESOLUTION",
        "1.0 - (threshold(rate) - 1) / RESOLUTION",
        ONE,
    ),
    kernel("columns beyond the vocabulary count", "loss_kernel", "if V % TILE_V:", "if False:", LOSS_KERNEL),
    kernel(
        "segments' sums are not rescaled",
        "loss_kernel",
        "jnp.sum(totals * jnp.exp(peaks - peak_M), axis=0)",
        "jnp.sum(totals, axis=0)",
        LOSS_KERNEL,
    ),
    kernel(
        "an equal logit before the target is no rival",
        "loss_kernel",
        "(hit_M == peak_M) & (before_M < hit_M)",
        "hit_M == peak_M",
        LOSS_KERNEL,
    ),
    kernel(
        "the target is not taken from the gradient",
        "loss_kernel",
        "return grad_MV - jnp.where(is_target, weight_M[:, None], 0.0)",
        "return grad_MV",
        LOSS_KERNEL,
    ),
    kernel(
        "the last columns of D are left out",
        "loss_kernel",
        "SEGMENT, pl.cdiv(D, TILE_D)",
        "SEGMENT, D // TILE_D",
        LOSS_KERNEL,
    ),
    kernel(
        "stores go beyond the array",
        "loss_kernel",
        "triton.store(tile, value, mask=_inside(starts, value.shape, ref.shape))",
        "triton.store(tile, value)",
        LOSS_KERNEL,
    ),
    kernel(
        "one pass over the logits forgets to rescale",
        "loss",
        "one[1] * jnp.exp(one[0] - peak) +",
        "one[1] +",
        "parity_tests/test_properties.py",
    ),
    kernel(
        "weights rounded once are not used",
        "products",
        "return self.copy if dtype == self.copy.dtype else self.parameter.astype(dtype)",
        "return self.parameter.astype(dtype)",
        "parity_tests/test_properties.py",
    ),
    kernel(
        "the kernel's window is one key wider",
        "attention_kernel",
        "(s_QS > t_QS - window)",
        "(s_QS >= t_QS - window)",
        ATTENTION_KERNEL,
    ),
    kernel(
        "the kernel's keys in their own order",
        "attention_kernel",
        "c % quarter * 4 + c // quarter",
        "c",
        ATTENTION_KERNEL,
    ),
    kernel(
        "heads share a mask in the kernel",
        "attention_kernel",
        "jnp.uint32(0), number.astype(jnp.uint32))",
        "jnp.uint32(0), jnp.uint32(0))",
        ATTENTION_KERNEL,
    ),
    kernel(
        "a threshold of eight bits",
        "attention_kernel",
        "tile.keys // 4, threshold(settings.rate), jnp",
        "tile.keys // 4, threshold(settings.rate) >> 8 << 8, jnp",
        ATTENTION_KERNEL,
    ),
    kernel(
        "the kernel's gradient is not centred",
        "attention_kernel",
        "_dot(grads_QS.astype(k_SH.dtype), k_SH, 1, 0)",
        "_dot((probs_QS * grads_QS).astype(k_SH.dtype), k_SH, 1, 0)",
        ATTENTION_KERNEL,
    ),
)

MUTANTS = (
    *BOTH,
    *SHARED,
    *DATA_SLIPS,
    *REPORTING,
    *COST_SLIPS,
    *PRECISION,
    *DURABILITY,
    *INPUT,
    *JUDGES,
    *COMPARISON,
    *ON_A_GPU,
    *TORCH,
)
