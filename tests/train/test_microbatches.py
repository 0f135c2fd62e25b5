"""What has no gradient goes through the devices part by part, and comes out as if all at once."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from saber_jax.data.examples import encode_record
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.train import microbatches, validate
from saber_jax.train.objectives import Compute, cadpo_probe
from tests import synthetic

PAIRS = Budget(length=320, response=64, patches=144, chunks=2, targets=128, segments=1)


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Four rows with a pair each, but for the last one, which is empty."""
    rows = []
    for i in range(3):
        texts = (f"[video_desc] {'red ' * (i + 1)}", "[video_desc] quiet")
        example = encode_record(synthetic.record(i), tokenizer, responses=texts, ignored="audio")
        rows.append([synthetic.with_references(example, i)])
    return pack_rows([*rows, []], PAIRS)


def test_rows_keep_their_order(batch):
    def score(part):
        return part.text.tokens.sum(1), part.targets.weights

    for got, want in zip(microbatches.scored(score, batch, 2), score(batch), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("program", ["pairs", "probe"])
def test_a_batch_in_two_parts_is_measured_as_a_whole_one(cfg, params, batch, program):
    run = {"pairs": validate.measure_pairs, "probe": cadpo_probe}[program]
    compute = Compute(dtype="float32", remat="none", head_chunk=64, frame_patches=36, response=64)
    whole, parts = (
        jax.jit(functools.partial(run, cfg=cfg, compute=made))(params, batch)
        for made in (compute, dataclasses.replace(compute, microbatches=2))
    )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole)) > 1
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
