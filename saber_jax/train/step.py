"""The train steps of both stages, `sft_step` and `cadpo_step`.

They are pure functions of a state and a batch; the caller jits them and donates the state.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from saber_jax.batch import Batch
from saber_jax.models import lora
from saber_jax.models.config import SaberConfig
from saber_jax.train.losses import WeightedSums, means
from saber_jax.train.microbatches import split
from saber_jax.train.objectives import Compute, cadpo_objective, sft_objective
from saber_jax.train.preference import Preference
from saber_jax.tree import flatten, merge

Metrics = dict[str, Array]
Objective = Callable[[dict, Batch], tuple[Array, Array, WeightedSums]]
"""(parameters, batch) -> loss sum, the weight to divide it by, metrics."""

ArrayT = TypeVar("ArrayT", Array, jax.ShapeDtypeStruct)
"""A leaf of a state: an array, or its jax.ShapeDtypeStruct in an abstract state."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState(Generic[ArrayT]):
    """Parameters are split by `partition`: only `trainable` has gradients and optimizer state."""

    step: ArrayT  # int32 []
    trainable: dict[str, ArrayT]  # "text/blocks/attn/w_q" -> float32 master
    frozen: dict[str, ArrayT]
    opt_state: optax.OptState

    @property
    def params(self) -> dict:
        return merge(self.trainable, self.frozen)


def partition(params: dict, patterns: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits by shell patterns over the flattened names: ("text/*", "vision/merger/*").

    Raises ValueError naming a pattern that matches nothing: a typo would freeze a tower silently.
    """
    flat = flatten(params)
    for pattern in patterns:
        if not fnmatch.filter(flat, pattern):
            towers = sorted({name.split("/")[0] for name in flat})
            raise ValueError(
                f"config.trainable pattern {pattern!r} matches no parameter. Names look like "
                f"{next(iter(flat))!r}; the towers are {towers}."
            )
    chosen = {name for pattern in patterns for name in fnmatch.filter(flat, pattern)}
    trainable = {name: leaf for name, leaf in flat.items() if name in chosen}
    return trainable, {name: leaf for name, leaf in flat.items() if name not in chosen}


def sft_step(
    state: TrainState[Array],
    batch: Batch,
    *,
    cfg: SaberConfig,
    compute: Compute,
    tx: optax.GradientTransformation,
    seed: int = 0,
) -> tuple[TrainState[Array], Metrics]:
    """One optimizer step of stage 1; `seed` is for the dropout of adapters."""
    batch = lora.keyed(batch, cfg.lora, seed, state.step)
    objective = functools.partial(sft_objective, cfg=cfg, compute=compute)
    state, metrics = _update(state, batch, objective, tx, compute.microbatches)
    return state, metrics | {"target_tokens": batch.targets.weights.sum()}


def cadpo_step(
    state: TrainState[Array],
    batch: Batch,
    *,
    cfg: SaberConfig,
    compute: Compute,
    tx: optax.GradientTransformation,
    options: Preference,
    seed: int = 0,
) -> tuple[TrainState[Array], Metrics]:
    """One optimizer step of stage 2; `seed` as in `sft_step`. The reference has no dropout."""
    batch = lora.keyed(batch, cfg.lora, seed, state.step)
    objective = functools.partial(cadpo_objective, cfg=cfg, compute=compute, options=options)
    state, metrics = _update(state, batch, objective, tx, compute.microbatches)
    return state, metrics | {"pairs": batch.pairs.valid.sum()}


def _update(
    state: TrainState[Array],
    batch: Batch,
    objective: Objective,
    tx: optax.GradientTransformation,
    microbatches: int,
) -> tuple[TrainState[Array], Metrics]:
    (loss, weight, sums), grads = gradients(state, batch, objective, microbatches)
    grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1), grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = cast("dict[str, Array]", optax.apply_updates(state.trainable, updates))
    metrics = means(sums | {"loss": (loss, jnp.maximum(weight, 1))})
    metrics |= {"grad_norm": optax.global_norm(grads), "update_norm": optax.global_norm(updates)}
    metrics |= {f"grad_norm/{tower}": optax.global_norm(g) for tower, g in _towers(grads).items()}
    return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics


def gradients(
    state: TrainState[Array], batch: Batch, objective: Objective, microbatches: int
) -> tuple[tuple[Array, Array, WeightedSums], dict[str, Array]]:
    """The objective's sums over the whole batch, and the gradient of its loss sum.

    Microbatches are processed one after another. Sums are added up and divided once at the end, so
    each microbatch counts in proportion to its number of targets.
    """

    def loss_fn(trainable, part):
        loss, weight, sums = objective(merge(trainable, state.frozen), part)
        return loss, (weight, sums)

    def part_sums(part):
        (loss, (weight, sums)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.trainable, part
        )
        return (loss, weight, sums), grads

    if microbatches == 1:
        return part_sums(batch)
    parts = split(batch, microbatches)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part_sums, first))

    def add(total, part):
        return jax.tree.map(jnp.add, total, part_sums(part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def _towers(grads: dict[str, Array]) -> dict[str, dict[str, Array]]:
    towers: dict[str, dict[str, Array]] = {}
    for name, leaf in grads.items():
        towers.setdefault(name.removeprefix("lora/").split("/")[0], {})[name] = leaf
    return towers
