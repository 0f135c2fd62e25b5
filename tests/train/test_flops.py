"""Model FLOPs: what the masks let through, and what XLA counts for the same step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax.data.examples import encode_record
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.models import masks, saber
from saber_jax.models.config import AudioConfig, TextConfig, VisionConfig, saber_config
from saber_jax.train import flops
from saber_jax.train.objectives import Compute, sft_objective
from saber_jax.train.step import partition
from saber_jax.tree import flatten, merge
from tests import synthetic

PAIRS = Budget(length=512, response=96, patches=144, chunks=3, targets=256, segments=2)


def test_mfu_is_a_share_of_all_devices_peak_and_unknown_where_the_peak_is():
    assert flops.mfu(8 * 197e12, 2.0, 8, "TPU v5 lite") == pytest.approx(0.5)
    assert flops.mfu(1e12, 2.0, 8, "cpu") is None


@pytest.fixture(scope="module")
def pair_batch(tokenizer):
    texts = ("[video_desc] calm person", "[video_desc] red room in the quiet")
    examples = [
        encode_record(synthetic.record(i, seconds=seconds), tokenizer, responses=texts)
        for i, seconds in enumerate((1.3, 2.4))
    ]
    return pack_rows([examples, examples[:1]], PAIRS)


def test_pairs_are_those_that_the_masks_let_through(pair_batch):
    got = jax.jit(flops.counts)(pair_batch)
    text = masks.packed_text(pair_batch.text.segments, pair_batch.text.branch)
    assert got["text_pairs"] == text.dense().sum()
    for name in ("window", "frame"):
        visible = masks.same_segment(getattr(pair_batch.vision, name))
        assert got[f"{name}_pairs"] == visible.dense().sum()
    steps = jnp.asarray((pair_batch.audio.lengths.reshape(-1) + 1) // 2)
    assert got["audio_pairs"] == masks.audio_chunk(steps, 100).dense().sum()


def test_padding_does_not_count(pair_batch):
    got = jax.jit(flops.counts)(pair_batch)
    wider = dataclasses.replace(PAIRS, length=600, patches=288, chunks=5, targets=300)
    padded = jax.tree.map(
        lambda array, wide: np.pad(
            array, [(0, to - size) for size, to in zip(array.shape, wide.shape, strict=True)]
        ),
        pair_batch,
        pack_rows([[], []], wider),
    )
    assert jax.jit(flops.counts)(padded) == got


# Wide enough for the matrix products, which is what is counted, to outweigh everything else; one
# layer each, because XLA counts the body of a loop once.
WIDE = dataclasses.replace(
    saber_config("tiny"),
    text=TextConfig(
        layers=1,
        width=512,
        heads=4,
        kv_heads=2,
        head_dim=128,
        mlp_dim=2048,
        vocab=4096,
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        norm_eps=1e-6,
        max_positions=4096,
    ),
    vision=VisionConfig(
        depth=1, width=512, heads=4, mlp_dim=2048, out_width=512, full_attention_layers=()
    ),
    audio=AudioConfig(layers=1, width=512, heads=4, mlp_dim=2048, out_width=512),
)


def full_batch(rows=2, length=256, patches=64, chunks=2, targets=128):
    """A batch without padding whose masks hide nothing except by causality."""
    batch = pack_rows(
        [[] for _ in range(rows)],
        Budget(length=length, patches=patches, chunks=chunks, targets=targets, segments=1),
    )
    vision, valid = batch.vision, batch.pairs.valid
    for filled in (batch.text.segments, vision.window, vision.frame, valid, batch.targets.weights):
        filled[:] = 1
    batch.audio.lengths[:] = 200
    return batch


def xla_flops(patterns, batch, *, optimized):
    """What XLA counts for the gradient of the loss; `optimized` after it simplified the program."""
    trainable, frozen = partition(saber.abstract(WIDE), patterns)
    compute = Compute(dtype="float32", remat="none", head_chunk=128, frame_patches=64)

    def loss(trainable, frozen, batch):
        return sft_objective(merge(trainable, frozen), batch, WIDE, compute)[0]

    lowered = jax.jit(jax.grad(loss)).lower(trainable, frozen, batch)
    return (lowered.compile() if optimized else lowered).cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("patterns", "optimized"),
    [
        (("*",), False),
        (("text/*",), True),
        (("text/lm_head", "text/norm"), False),
        (("vision/merger/*", "text/*"), False),
    ],
)
def test_flops_are_within_two_percent_of_what_xla_counts(patterns, optimized):
    batch = full_batch()
    counted = {name: float(value) for name, value in jax.jit(flops.counts)(batch).items()}
    # XLA multiplies the masked half too.
    counted["text_pairs"] = 2 * 256.0**2
    sizes = flops.parameter_sizes(flatten(saber.abstract(WIDE)))
    trainable, _ = partition(saber.abstract(WIDE), patterns)
    ours = sum(flops.train_flops(WIDE, sizes, trainable, counted).values())
    assert xla_flops(patterns, batch, optimized=optimized) == pytest.approx(ours, rel=0.02)
