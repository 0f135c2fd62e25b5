import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saber_jax.models import saber
from saber_jax.models.config import LoraConfig, saber_config
from saber_jax.train.optimizer import OptimizerConfig, make_optimizer, schedules
from saber_jax.tree import flatten

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
CFG = dataclasses.replace(
    saber_config("3b"),
    lora=LoraConfig(rank=4, alpha=4, targets=("text/blocks/attn/w_q", "audio/blocks/w_up")),
)
ROLES = flatten(saber.roles(CFG))
PARAMS = {
    "text/embed": jnp.ones((4, 2)),
    "text/lm_head": jnp.ones((2, 4)),
    "text/norm": jnp.ones(2),
    "text/blocks/attn/w_q": jnp.ones((2, 2)),
    "vision/w_patch": jnp.ones((2, 2)),
}


def trained(config: OptimizerConfig, steps: int) -> dict[str, jax.Array]:
    tx = make_optimizer(config, 10, ROLES)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_a_first_moment_in_bfloat16_is_rounded_after_the_update_and_the_second_stays_float32():
    grads = {"vision/w_patch": jax.random.normal(jax.random.key(0), (16, 16))}
    params, now = jax.tree.map(jnp.zeros_like, grads), {}
    config = dataclasses.replace(CONFIG, vocabulary_steps=0, warmup_steps=0)
    for dtype in ("float32", "bfloat16"):
        tx = make_optimizer(dataclasses.replace(config, mu_dtype=dtype), 10, ROLES)
        first, state = tx.update(grads, tx.init(params), params)
        now[dtype] = first, tx.update(grads, state, params)[0]
        mu, nu = (optax.tree_utils.tree_get(state, name)["vision/w_patch"] for name in ("mu", "nu"))
        assert (mu.dtype, nu.dtype) == (dtype, "float32")
    (first, second), (rounded_first, rounded_second) = now.values()
    jax.tree.map(np.testing.assert_array_equal, first, rounded_first)
    [exact], [rounded] = jax.tree.leaves(second), jax.tree.leaves(rounded_second)
    np.testing.assert_allclose(rounded, exact, rtol=2**-8)
    assert not np.array_equal(rounded, exact)


def test_another_dtype_of_the_first_moment_is_refused():
    with pytest.raises(ValueError, match=r"mu_dtype.* one of float32, bfloat16; got 'int8'"):
        dataclasses.replace(CONFIG, mu_dtype="int8")


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
    tx = make_optimizer(dataclasses.replace(CONFIG, vocabulary_steps=0), 10, ROLES)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    adapter, weight = (updates[name][0, 0] for name in params)
    assert weight < 0 and adapter == pytest.approx(10 * weight)


def test_without_vocabulary_steps_there_is_one_schedule():
    rates = schedules(dataclasses.replace(CONFIG, vocabulary_steps=0), 10)
    assert rates["rest"](1) == rates["vocabulary"](1) == pytest.approx(5e-3)


def decayed() -> set[str]:
    """Names of the 3b parameters that a step without any gradient pulls towards zero."""
    config = dataclasses.replace(CONFIG, vocabulary_steps=0, warmup_steps=0, weight_decay=0.1)
    # One number a parameter, of as many axes as the parameter has: decay must not go by shape.
    params = {
        name: jnp.ones((1,) * leaf.ndim) for name, leaf in flatten(saber.abstract(CFG)).items()
    }
    tx = make_optimizer(config, 10, ROLES)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    return {name for name, update in updates.items() if float(update.sum()) != 0}


def test_weight_decay_touches_these_parameters_of_the_3b_model_and_no_others():
    assert decayed() == {
        "audio/blocks/attn/w_k",
        "audio/blocks/attn/w_o",
        "audio/blocks/attn/w_q",
        "audio/blocks/attn/w_v",
        "audio/blocks/w_down",
        "audio/blocks/w_up",
        "audio/conv1/w",
        "audio/conv2/w",
        "audio/w_out",
        "lora/audio/blocks/w_up/a",
        "lora/audio/blocks/w_up/b",
        "lora/text/blocks/attn/w_q/a",
        "lora/text/blocks/attn/w_q/b",
        "text/blocks/attn/w_k",
        "text/blocks/attn/w_o",
        "text/blocks/attn/w_q",
        "text/blocks/attn/w_v",
        "text/blocks/mlp/w_down",
        "text/blocks/mlp/w_gate",
        "text/blocks/mlp/w_up",
        "text/embed",
        "text/lm_head",
        "vision/blocks/attn/w_k",
        "vision/blocks/attn/w_o",
        "vision/blocks/attn/w_q",
        "vision/blocks/attn/w_v",
        "vision/blocks/mlp/w_down",
        "vision/blocks/mlp/w_gate",
        "vision/blocks/mlp/w_up",
        "vision/merger/w_in",
        "vision/merger/w_out",
        "vision/w_patch",
    }


def test_no_norm_bias_or_unread_parameter_decays():
    kept = ROLES.keys() - decayed()
    assert {"audio/bos_eos", "audio/blocks/attn_norm/scale", "audio/blocks/mlp_norm/bias"} <= kept
    axes = flatten(jax.tree.map(",".join, saber.axes(CFG), is_leaf=lambda x: isinstance(x, tuple)))
    assert {name for name in axes if "norm" in axes[name]} <= kept


def test_every_parameter_that_is_read_says_where_in_its_tower_it_stands():
    nowhere = [name for name, role in ROLES.items() if role.part is None]
    assert nowhere == ["audio/bos_eos"]
