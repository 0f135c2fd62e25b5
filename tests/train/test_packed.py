"""Loss and gradients of a packed row are the sums of its examples', each in a row of its own."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from saber_jax.data.examples import encode_record
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.train.objectives import Compute, cadpo_objective, sft_objective
from saber_jax.train.preference import Preference
from saber_jax.tree import flatten
from tests import synthetic

COMPUTE = Compute(dtype="float32", remat="none", head_chunk=64, frame_patches=36)
ROW = Budget(length=896, patches=240, chunks=6, targets=384, segments=5)
PAIRS = dataclasses.replace(ROW, response=128)
TERMS = Preference(sft=0.1)


def clip(seed: int, frames: int, height: int, width: int, seconds: float, words: int):
    """A made-up record with media of these sizes, 0 for none."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (frames, height, width, 3), np.uint8)
    record = synthetic.record(seed, frames=2, seconds=seconds, words=words)
    return dataclasses.replace(record, frames=pixels, audio_in_video=seed == 1)


RECORDS = {
    "video and sound": clip(0, 4, 84, 84, 1.3, 5),
    "sound of three chunks woven into the video": clip(1, 6, 56, 112, 4.1, 9),
    "text alone": clip(2, 0, 28, 28, 0.0, 2),
    "a picture": clip(3, 1, 84, 56, 0.0, 4),
    "sound alone": clip(4, 0, 28, 28, 0.7, 3),
}
ANSWERS = (
    ("[video_desc] calm person speaks loudly", "[video_desc] calm person slowly"),
    ("[video_desc] red", f"[video_desc] {'quiet red room ' * 6}"),
    ("[video_desc] calm", "[facial_exp_desc] quiet person"),
    ("[video_desc] room in the red", "[video_desc] room in the quiet"),
    (f"[acoustic_feat] {'loudly ' * 9}", "[acoustic_feat] slowly"),
)


def pair(tokenizer, record, answers, seed: int):
    example = encode_record(record, tokenizer, responses=answers, kappa=0.2 * seed)
    return synthetic.with_references(example, seed)


def assert_the_row_is_the_sum_of_its_examples(objective, params, examples, budget):
    """`objective` gives a sum and a count. All batches have one shape, so it compiles once."""

    def total(params, batch):
        loss, count, _ = objective(params, batch)
        return loss, count

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (loss, count), grads = run(params, pack_rows([examples], budget))
    alone = [run(params, pack_rows([[example]], budget)) for example in examples]
    assert float(count) == sum(float(count) for (_, count), _ in alone)
    assert float(loss) == pytest.approx(sum(float(loss) for (loss, _), _ in alone), rel=1e-5)
    summed = flatten(jax.tree.map(lambda *leaves: sum(leaves), *(grads for _, grads in alone)))
    for name, leaf in flatten(grads).items():
        scale = max(float(np.abs(summed[name]).max()), 1e-6)
        np.testing.assert_allclose(leaf / scale, summed[name] / scale, atol=2e-5, err_msg=name)
    for tower in ("text", "vision", "audio"):
        assert any(leaf.any() for name, leaf in flatten(grads).items() if name.startswith(tower))


def test_a_packed_row_of_stage_1_is_the_sum_of_its_examples(cfg, params, tokenizer):
    examples = [encode_record(record, tokenizer) for record in RECORDS.values()]
    objective = functools.partial(sft_objective, cfg=cfg, compute=COMPUTE)
    assert_the_row_is_the_sum_of_its_examples(objective, params, examples, ROW)


def test_a_packed_row_of_pairs_is_the_sum_of_its_pairs(cfg, params, tokenizer):
    records = zip(RECORDS.values(), ANSWERS, strict=True)
    examples = [pair(tokenizer, record, texts, i) for i, (record, texts) in enumerate(records)]
    compute = dataclasses.replace(COMPUTE, response=PAIRS.response)
    objective = functools.partial(cadpo_objective, cfg=cfg, compute=compute, options=TERMS)
    assert_the_row_is_the_sum_of_its_examples(objective, params, examples, PAIRS)
