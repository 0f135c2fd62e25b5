"""Dropout of adapters in the step: a function of seed, step and row, and of nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saber_jax import sharding
from saber_jax.batch import empty
from saber_jax.data.packing import Budget
from saber_jax.data.records import FIELDS
from saber_jax.models import saber
from saber_jax.models.config import LoraConfig
from saber_jax.train.objectives import Compute
from saber_jax.train.step import TrainState, partition, sft_step
from saber_jax.tree import flatten
from tests.models.batches import CONFIG, text_batch

ROWS, LENGTH = 4, 16
TARGETS = ("text/blocks/attn/w_o", "text/blocks/mlp/w_up")
CFG = dataclasses.replace(CONFIG, lora=LoraConfig(rank=3, alpha=6.0, targets=TARGETS, dropout=0.2))
COMPUTE = {"dtype": "float32", "head_chunk": LENGTH, "frame_patches": 36}
TX = optax.sgd(0.1)


@pytest.fixture(scope="module")
def params():
    noise = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: noise.normal(0, 0.15, leaf.shape).astype(np.float32), saber.abstract(CFG)
    )


def batch():
    """Every token of each row predicts the next."""
    rows = text_batch(ROWS, LENGTH)
    ones = np.ones((ROWS, LENGTH), np.int32)
    budget = Budget(length=LENGTH, patches=0, chunks=0, targets=LENGTH, segments=0)
    targets = dataclasses.replace(
        empty(ROWS, budget).targets,
        tokens=np.roll(rows.text.tokens, -1, axis=1),
        source=ones * np.arange(LENGTH, dtype=np.int32),
        weights=ones.astype(np.float32),
        section=ones * (np.arange(LENGTH) % len(FIELDS) + 1).astype(np.int32),
    )
    return dataclasses.replace(rows, targets=targets)


def step_of(*, mesh=None, remat="none", microbatches=1):
    compute = Compute(**COMPUTE, mesh=mesh, remat=remat, microbatches=microbatches)
    return jax.jit(functools.partial(sft_step, cfg=CFG, compute=compute, tx=TX))


def stepped(step_fn, params, rows, *, number):
    """Adapters and the loss after step `number`."""
    trainable, frozen = partition(params, ("lora/*",))
    state = TrainState(jnp.int32(number), trainable, frozen, TX.init(trainable))
    after, metrics = step_fn(state, rows)
    return jax.tree.map(np.asarray, after.trainable), float(metrics["loss"])


def test_a_step_drops_the_same_whatever_the_mesh_the_microbatches_and_what_is_computed_again(
    params,
):
    plain, rows = step_of(), batch()
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1)
    spread = jax.device_put(params, saber.shardings(CFG, mesh))
    over = jax.device_put(rows, sharding.batch_sharding(mesh))
    want, loss = stepped(plain, params, rows, number=3)
    got, same = stepped(step_of(mesh=mesh, remat="layer", microbatches=2), spread, over, number=3)
    assert same == pytest.approx(loss, rel=1e-5)
    for name, leaf in want.items():
        moved = np.abs(leaf - flatten(params)[name]).max()
        np.testing.assert_allclose(got[name], leaf, atol=1e-4 * moved, err_msg=name)
    assert stepped(plain, params, rows, number=3)[1] == loss
    assert abs(stepped(plain, params, rows, number=4)[1] - loss) > 1e-3
