"""The steps: sharing a prefix changes nothing, sharding changes nothing, frozen stays frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saber_jax import sharding
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.transforms import encode_record
from saber_jax.models import saber
from saber_jax.models.config import saber_config
from saber_jax.train import optimizer as optimizer_lib
from saber_jax.train.step import (
    Compute,
    TrainState,
    cadpo_objective,
    flatten,
    merge,
    pair_log_probs,
    partition,
    sft_objective,
    sft_step,
)
from tests import synthetic

COMPUTE = Compute(dtype="float32", remat="none", head_chunk=64, frame_patches=36)
PAIRS = Budget(length=512, response=96, patches=144, chunks=2, targets=256, segments=2)
SINGLE = Budget(length=320, patches=72, chunks=1, targets=128, segments=1)
HEAD = "[video_desc] calm person speaks"
RESPONSES = (
    (f"{HEAD} loudly in the red room", f"{HEAD} slowly"),
    ("[video_desc] red room", "[facial_exp_desc] quiet person in the room"),
)


@pytest.fixture(scope="module")
def cfg():
    whole = saber_config("tiny")
    return dataclasses.replace(
        whole,
        text=dataclasses.replace(whole.text, layers=2),
        vision=dataclasses.replace(whole.vision, depth=2, full_attention_layers=(1,)),
    )


@pytest.fixture(scope="module")
def params(cfg):
    return jax.jit(functools.partial(saber.init, cfg))(jax.random.key(0))


@pytest.fixture(scope="module")
def pair_batch(tokenizer):
    examples = [
        encode_record(synthetic.record(i), tokenizer, responses=texts, reference=(-20.0, -30.0))
        for i, texts in enumerate(RESPONSES)
    ]
    return pack_rows([examples], PAIRS)


def alone(tokenizer, index: int, text: str):
    example = encode_record(synthetic.record(index), tokenizer, responses=(text,))
    return pack_rows([[example]], SINGLE)


def test_packed_pairs_with_a_shared_prefix_equal_four_separate_rows(
    cfg, params, pair_batch, tokenizer
):
    chosen, rejected = jax.jit(functools.partial(pair_log_probs, cfg=cfg, compute=COMPUTE))(
        params, pair_batch
    )
    objective = jax.jit(functools.partial(sft_objective, cfg=cfg, compute=COMPUTE))
    for got, column in ((chosen, 0), (rejected, 1)):
        for index, texts in enumerate(RESPONSES):
            batch = alone(tokenizer, index, texts[column])
            loss, metrics = objective(params, batch)
            expected = -float(loss * metrics["target_tokens"])
            assert float(got[0, index]) == pytest.approx(expected, rel=1e-5)


def test_gradients_through_the_shared_prefix_equal_the_duplicated_form(
    cfg, params, pair_batch, tokenizer
):
    rows = [
        [encode_record(synthetic.record(i), tokenizer, responses=(text,))]
        for i, texts in enumerate(RESPONSES)
        for text in texts
    ]
    duplicated = pack_rows(rows, SINGLE)

    def duplicated_loss(params):
        # Rows are (chosen 0, rejected 0, chosen 1, rejected 1), each a "chosen" of its own.
        sums, _ = pair_log_probs(params, duplicated, cfg, COMPUTE)
        chosen, rejected = sums[0::2, 0], sums[1::2, 0]
        margin = 0.1 * ((chosen + 20.0) - (rejected + 30.0))
        return -jax.nn.log_sigmoid(margin).mean()

    def shared_loss(params):
        return cadpo_objective(params, pair_batch, cfg, COMPUTE, beta=0.1)[0]

    loss, grads = jax.jit(jax.value_and_grad(shared_loss))(params)
    expected_loss, expected = jax.jit(jax.value_and_grad(duplicated_loss))(params)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    for name, leaf in flatten(grads).items():
        other = flatten(expected)[name]
        scale = max(float(jnp.abs(other).max()), 1e-6)
        np.testing.assert_allclose(leaf / scale, other / scale, atol=2e-5, err_msg=name)


def state_of(params, tx, patterns=("*",)):
    trainable, frozen = partition(params, patterns)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, tx.init(trainable))


def test_frozen_towers_are_bit_identical_and_have_no_moments(cfg, params, tokenizer):
    batch = alone(tokenizer, 0, RESPONSES[0][0])
    tx = optax.adamw(1e-2, weight_decay=0.1)
    state = state_of(params, tx, ("text/*",))
    before = jax.tree.map(np.asarray, state.frozen)
    step = jax.jit(functools.partial(sft_step, cfg=cfg, compute=COMPUTE, tx=tx))
    after, _ = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, before, after.frozen)
    assert any((after.trainable[n] != state.trainable[n]).any() for n in state.trainable)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(state.trainable)


def test_a_pattern_that_matches_nothing_is_refused(params):
    with pytest.raises(
        ValueError, match=r"'txet/\*' matches no parameter.*'audio', 'text', 'vision'"
    ):
        partition(params, ("txet/*",))


def test_merge_undoes_flatten(params):
    jax.tree.map(np.testing.assert_array_equal, merge(flatten(params)), params)


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_sharded_step_equals_the_step_on_one_device(cfg, params, tokenizer, axis):
    rows = [
        [encode_record(synthetic.record(i), tokenizer, responses=(RESPONSES[i % 2][0],))]
        for i in range(4)
    ]
    batch = pack_rows(rows, SINGLE)
    tx = optax.adamw(1e-3)
    step = functools.partial(sft_step, cfg=cfg, compute=COMPUTE, tx=tx)
    _, expected_metrics = jax.jit(step)(state_of(params, tx), batch)

    mesh = sharding.make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, axis: 2})
    shardings = saber.shardings(cfg, mesh)
    state = state_of(jax.device_put(params, shardings), tx)
    opt = optimizer_lib.optimizer_shardings(tx, state.trainable, flatten(shardings), mesh)
    placed = TrainState(
        jax.device_put(state.step, sharding.replicated(mesh)),
        state.trainable,
        {},
        jax.device_put(state.opt_state, opt),
    )
    compute = dataclasses.replace(COMPUTE, mesh=mesh if axis == "fsdp" else None)
    step = functools.partial(sft_step, cfg=cfg, compute=compute, tx=tx)
    got, metrics = jax.jit(step)(placed, jax.device_put(batch, sharding.batch_sharding(mesh)))
    assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(
        float(expected_metrics["grad_norm"]), rel=1e-5
    )
    for name, place in flatten(shardings).items():
        assert axis == "tensor" or got.trainable[name].sharding.is_equivalent_to(
            place, got.trainable[name].ndim
        ), name
