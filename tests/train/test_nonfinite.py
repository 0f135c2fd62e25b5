"""What a skipped step changes in the optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saber_jax.train.nonfinite import skipping
from saber_jax.train.optimizer import make_optimizer
from saber_jax.train.progress import StepSchedule
from saber_jax.train.step import TrainState
from tests.train.test_optimizer import CONFIG, ROLES

STEPS, SKIPPED = 8, (2, 3, 5)
NAME = "vision/w_patch"


def optimizer():
    config = dataclasses.replace(CONFIG, vocabulary_steps=0, clip_norm=1e9)
    schedule = StepSchedule(config, STEPS, adapters=False, passed=0, epochs=float)
    rates = [schedule.after(step, 1)["learning_rate"] for step in range(STEPS)]
    return make_optimizer(config, STEPS, ROLES), rates


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda tx: tx,
        lambda tx: optax.masked(tx, {NAME: True}),
        lambda tx: optax.partition({"all": tx}, {NAME: "all"}),
    ],
    ids=["alone", "masked", "partitioned"],
)
def test_the_learning_rate_after_a_skipped_step_is_that_of_the_step_number(wrapped):
    tx, rates = optimizer()
    tx = wrapped(tx)

    @jax.jit
    @skipping
    def step(state, loss):
        # Of equal gradients, Adam makes updates of 1 times the learning rate.
        updates, opt_state = tx.update({NAME: loss}, state.opt_state, state.trainable)
        after = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss, "grad_norm": loss}
        return TrainState(state.step + 1, after, {}, opt_state), metrics

    params = {NAME: jnp.zeros(())}
    state = TrainState(jnp.int32(0), params, {}, tx.init(params))
    used = []
    for i in range(STEPS):
        before = state.trainable[NAME]
        state, _ = step(state, jnp.float32(np.nan if i in SKIPPED else 1.0))
        used.append(float(before - state.trainable[NAME]))
    logged = [0.0 if i in SKIPPED else rate for i, rate in enumerate(rates)]
    np.testing.assert_allclose(used, logged, rtol=1e-4, atol=1e-8)
    found = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
    # Of Adam and of the schedule.
    assert [int(count) for _, count in found] == [STEPS - len(SKIPPED), STEPS]
