import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saber_jax.train.optimizer import OptimizerConfig, make_optimizer, schedules

CONFIG = OptimizerConfig(
    peak_lr=1e-2,
    adapter_factor=10.0,
    vocabulary_steps=3,
    warmup_steps=2,
    final_fraction=0.1,
    b1=0.9,
    b2=0.95,
    weight_decay=0.0,
    clip_norm=1.0,
)
PARAMS = {
    "text/embed": jnp.ones((4, 2)),
    "text/lm_head": jnp.ones((2, 4)),
    "text/norm": jnp.ones(2),
    "text/blocks/attn/w_q": jnp.ones((2, 2)),
    "vision/w_patch": jnp.ones((2, 2)),
}


def trained(config: OptimizerConfig, steps: int) -> dict[str, jax.Array]:
    tx = make_optimizer(config, 10)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def changed(params: dict[str, jax.Array]) -> set[str]:
    return {name for name, leaf in params.items() if not np.array_equal(leaf, PARAMS[name])}


def test_at_first_only_the_vocabulary_learns():
    assert changed(trained(CONFIG, 3)) == {"text/embed", "text/lm_head", "text/norm"}


def test_then_everything_learns():
    # The first step after them is the first of a warm-up from 0, so it takes two.
    assert changed(trained(CONFIG, 5)) == set(PARAMS)


def test_the_schedule_begins_after_the_vocabulary_steps():
    rates = schedules(CONFIG, 10)
    np.testing.assert_allclose([rates["rest"](s) for s in range(6)], [0, 0, 0, 0, 5e-3, 1e-2])
    np.testing.assert_allclose([rates["vocabulary"](s) for s in range(4)], [1e-2] * 4)
    for name in ("rest", "vocabulary"):
        assert rates[name](10) == pytest.approx(1e-3)


def test_adapters_learn_faster_than_the_weights_beside_them():
    rates = schedules(CONFIG, 10)
    np.testing.assert_allclose([rates["adapters"](s) for s in (2, 5, 10)], [0, 1e-1, 1e-2])
    params = {"lora/text/blocks/attn/w_q/a": jnp.ones((2, 2)), "vision/w_patch": jnp.ones((2, 2))}
    tx = make_optimizer(dataclasses.replace(CONFIG, vocabulary_steps=0), 10)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    adapter, weight = (updates[name][0, 0] for name in params)
    assert weight < 0 and adapter == pytest.approx(10 * weight)


def test_without_vocabulary_steps_there_is_one_schedule():
    rates = schedules(dataclasses.replace(CONFIG, vocabulary_steps=0), 10)
    assert rates["rest"](1) == rates["vocabulary"](1) == pytest.approx(5e-3)
