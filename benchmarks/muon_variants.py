"""The optimizers that `benchmarks.muon_training` compares, and one run of any of them on this project's own model.

A variant is one compiled program: rates come in as numbers, so that all trials and seeds share it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jax_impl.backend import machine
from jax_impl.hybrid import clip_by_global_norm, qwen_matrices, scale_by_adam
from jax_impl.muon import POLAR_EXPRESS, muon, muon_or
from jax_impl.train import make_evaluate
from jax_impl.weights import Params, bind, from_hf, hf_name, model_structure
from recipe.config import AdamWConfig, RunConfig
from recipe.data import Dataset
from recipe.params import Role, init_params, param_specs
from recipe.schedule import learning_rate_factors

DECAY = 0.1
"""Decoupled weight decay of the matrices where a variant has any: Moonlight's, and AdamW's in the presets."""


class Variant(NamedTuple):
    """One optimizer: the matrices by AdamW or by `muon` with these arguments; all else by AdamW."""

    says: str
    """What the table says it is."""
    adamw: Mapping[str, Any] | None = None
    """Fields of the preset's `AdamWConfig` to change, where AdamW has the matrices too."""
    muon: Mapping[str, Any] | None = None
    """Arguments of `jax_impl.muon.muon`, where Muon has them."""
    apart: bool = False
    """Whether all but the matrices keeps the preset's rate under AdamW too, as it does under Muon."""
    times: float = 1.0
    """Its grid is that of its kind (--muon_rates or --adamw_rates) times this."""


VARIANTS = {
    "adamw": Variant("AdamW on everything", adamw={}),
    "adamw_fast": Variant("AdamW on everything, beta2 0.95", adamw={"beta2": 0.95}),
    # An eighth: grids of times 1 and times 0.5 were tried first, and tiny's best rate was the lowest of each.
    "adamw_apart": Variant("AdamW, matrices at a rate apart", adamw={}, apart=True, times=0.125),
    "muon": Variant("Muon as the library has it", muon={}),
    "gram": Variant("Muon, Gram form", muon={"gram": True}),
    "polar_express": Variant("Muon, Polar Express", muon={"coefficients": POLAR_EXPRESS}),
    "normuon": Variant("NorMuon, beta 0.95", muon={"neuron_beta": 0.95}),
    "decay": Variant(f"Muon, decay {DECAY}", muon={"weight_decay": DECAY}),
    "cautious": Variant(f"Muon, cautious decay {DECAY}", muon={"weight_decay": DECAY, "cautious": True}),
    # 0.2 sqrt(192) = 2.8 and 0.2 sqrt(512) = 4.5 stand where Jordan's scale has 1 and 1.6: rates times 1 / 2.8
    # ask for the same updates of all of tiny's matrices but the down projections, which have 1.
    "moonlight": Variant(
        f"Moonlight's scale, decay {DECAY}", muon={"scale": "consistent_rms", "weight_decay": DECAY}, times=0.36
    ),
}


def is_muon(name: str) -> bool:
    """Whether the matrices of this variant are Muon's."""
    return VARIANTS[name].muon is not None


def make_optimizer(
    config: RunConfig, name: str, rate: jax.Array, other_rate: jax.Array
) -> optax.GradientTransformation:
    """The variant at these rates, which may be traced: of the matrices, and of all else where Muon has the matrices."""
    variant, specs = VARIANTS[name], param_specs(config.model)

    def adamw(settings: AdamWConfig, rate: jax.Array, decayed: set[Role]) -> optax.GradientTransformation:
        def mask(params):
            return jax.tree_util.tree_map_with_path(lambda path, _: specs[hf_name(path[0].key)].role in decayed, params)

        return optax.chain(
            scale_by_adam(settings.beta1, settings.beta2, settings.eps),
            optax.add_decayed_weights(settings.weight_decay, mask=mask),
            optax.scale_by_learning_rate(rate),
        )

    matrices = functools.partial(qwen_matrices, model=config.model)
    if variant.muon is None:
        changed = AdamWConfig(**(vars(config.adamw) | dict(variant.adamw or {})))
        if not variant.apart:
            return adamw(changed, rate, {"matrix", "embedding", "head"})
        own = adamw(changed, rate, {"matrix"})
    else:
        options = dict(ns_dtype=config.precision.newton_schulz, batched=machine().batched_matrices, **variant.muon)
        own = muon(rate, matrices=matrices, **options)
    return muon_or(matrices, own, adamw(config.adamw, other_rate, {"embedding", "head"}))


class State(NamedTuple):
    """What an update changes."""

    params: Params
    opt_state: optax.OptState


class Trial:
    """A variant's compiled update, and runs of it.

    The update is `jax_impl.train.make_train_step`'s, loss, clip and all, with another optimizer.
    """

    def __init__(self, config: RunConfig, name: str) -> None:
        self.config, self.name = config, name
        graph = model_structure(config.model, config.precision)

        @functools.partial(jax.jit, donate_argnums=0, compiler_options=dict(machine().compiler_options))
        def update(state: State, inputs_BT, targets_BT, rate, other_rate):
            def loss(params):
                return bind(graph, params).loss(inputs_BT, targets_BT)

            value, grads = jax.value_and_grad(loss)(state.params)
            grads, _ = clip_by_global_norm(grads, config.clip_norm)
            optimizer = make_optimizer(config, name, rate, other_rate)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return State(optax.apply_updates(state.params, updates), opt_state), value

        self._update = update

    def init(self, seed: int) -> State:
        """The state before the first update, on the weights of this seed."""
        params = from_hf(init_params(self.config.model, seed), self.config.model, self.config.precision)
        zero = jnp.zeros((), jnp.float32)
        return State(params, make_optimizer(self.config, self.name, zero, zero).init(params))

    def update(
        self, state: State, batch: tuple[np.ndarray, np.ndarray], rate: float, factor: float
    ) -> tuple[State, jax.Array]:
        """One update with the schedule at `factor`: the new state, the loss before."""
        inputs_ABT, targets_ABT = batch
        rates = np.float32(rate * factor), np.float32(self.config.adamw.learning_rate * factor)
        with jax.default_matmul_precision(self.config.precision.matmul):
            return self._update(state, inputs_ABT[0], targets_ABT[0], *rates)

    def run(self, dataset: Dataset, *, rate: float, seed: int, steps: int) -> tuple[Params, list[float]]:
        """The parameters after a run, with warm-up and cosine over its own updates; the loss before each update."""
        config, state, losses = self.config, self.init(seed), []
        ordered = in_order_of(dataset, seed)
        sizes = dict(accumulation=1, batch_size=config.batch_size, sequence_length=config.sequence_length)
        factors = learning_rate_factors(config.schedule, steps)
        for step, factor in enumerate(tqdm(factors, desc=self.name, unit="update", leave=False, disable=None)):
            state, loss = self.update(state, ordered.batch(step, **sizes), rate, float(factor))
            losses.append(float(loss))
        return state.params, losses


def in_order_of(dataset: Dataset, seed: int) -> Dataset:
    """The same tokens, training and held out, drawn in another seed's order."""
    return Dataset(
        dataset.tokenizer,
        dataset.train_tokens,
        dataset.validation_tokens,
        bytes_per_token=dataset.bytes_per_token,
        leaking_fraction=dataset.leaking_fraction,
        seed=seed,
    )


def make_held_out_loss(
    config: RunConfig, batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Callable[[Params], float]:
    """Nats per token on these batches as a function of the parameters."""
    evaluate, kept = make_evaluate(config), list(batches)
    tokens = sum(targets_BT.size for _, targets_BT in kept)

    def held_out_loss(params: Params) -> float:
        return sum(float(evaluate(params, *batch)[0]) for batch in kept) / tokens

    return held_out_loss
