"""Which examples share a row, and how the row is laid out."""

import dataclasses

import numpy as np
import pytest

from saber_jax.batch import row_of
from saber_jax.data.examples import common_prefix, encode_record, size_of
from saber_jax.data.packing import Budget, pack_rows
from tests import synthetic

BUDGET = Budget(length=400, patches=288, chunks=2, targets=256, segments=4)


@pytest.fixture(scope="module")
def pair(tokenizer):
    """Two responses with the same first one and a half sections."""
    chosen = "[video_desc] a calm room\n[facial_exp_desc] the person smiles slowly"
    rejected = "[video_desc] a calm room\n[facial_exp_desc] the red room"
    return encode_record(synthetic.record(1), tokenizer, responses=(chosen, rejected))


def test_row_of_two_examples_is_laid_out_as_drawn(tokenizer):
    examples = [encode_record(synthetic.record(i, words=3), tokenizer) for i in (1, 2)]
    budget = dataclasses.replace(BUDGET, length=600)
    batch = pack_rows([examples], budget)
    first, second = (size_of(example) for example in examples)
    segments = batch.text.segments[0]
    assert (segments[: first.text] == 1).all()
    assert (segments[first.text : first.text + second.text] == 2).all()
    assert (segments[first.text + second.text :] == 0).all()
    # The second example's positions start again: nothing leaks from its neighbour.
    np.testing.assert_array_equal(batch.text.positions[0, :, first.text], [0, 0, 0])


def test_each_target_is_the_token_after_its_source(tokenizer):
    examples = [encode_record(synthetic.record(i, words=3), tokenizer) for i in (1, 2)]
    batch = pack_rows([examples], dataclasses.replace(BUDGET, length=600))
    row = row_of(batch, 0)
    used = row.targets.weights > 0
    np.testing.assert_array_equal(
        row.text.tokens[row.targets.source[used] + 1], row.targets.tokens[used]
    )
    assert used.sum() == sum(len(e.responses[0].tokens) for e in examples)


def test_media_slots_point_at_their_own_media(tokenizer):
    examples = [encode_record(synthetic.record(i, words=2), tokenizer) for i in (1, 2)]
    batch = pack_rows([examples], dataclasses.replace(BUDGET, length=600))
    index, segments = batch.text.media_index[0], batch.text.segments[0]
    units = BUDGET.patches // 4
    vision = [index[(segments == s) & (index >= 0) & (index < units)] for s in (1, 2)]
    audio = [index[(segments == s) & (index >= units)] - units for s in (1, 2)]
    assert sorted(vision[0]) == list(range(18)) and sorted(vision[1]) == list(range(18, 36))
    assert audio[0].max() < 50 <= audio[1].min() < 100
    assert set(audio[1] - 50) == set(audio[0])


def test_pair_row_is_laid_out_as_drawn(pair):
    budget = Budget(length=200, response=40, patches=72, chunks=1, targets=128, segments=2)
    row = row_of(pack_rows([[pair]], budget), 0)
    prompt = len(pair.prompt.tokens)
    chosen, rejected = (response.tokens for response in pair.responses)
    shared = common_prefix(chosen, rejected)
    assert shared > 5
    assert (row.text.branch[:200] == 0).all()
    np.testing.assert_array_equal(row.text.tokens[prompt : prompt + shared], chosen[:shared])
    np.testing.assert_array_equal(
        row.text.tokens[200 : 200 + len(chosen) - shared], chosen[shared:]
    )
    np.testing.assert_array_equal(
        row.text.tokens[240 : 240 + len(rejected) - shared], rejected[shared:]
    )
    # Both branches go on from the same position and from the same slot.
    np.testing.assert_array_equal(row.text.positions[:, 200], row.text.positions[:, 240])
    np.testing.assert_array_equal(
        row.text.positions[:, 200], row.text.positions[:, prompt + shared - 1] + 1
    )
    first = {b: row.targets.source[row.targets.branch == b][0] for b in (1, 2)}
    assert first == {1: prompt + shared - 1, 2: prompt + shared - 1}


def test_reference_log_probs_stand_beside_their_targets_and_missing_ones_are_nan(pair):
    views, count = 4, size_of(pair).targets
    reference = -np.arange(views * count, dtype=np.float32).reshape(views, count)
    with_them = dataclasses.replace(pair, reference=reference, ignored=1)
    budget = Budget(length=300, response=60, patches=144, chunks=2, targets=128, segments=3)
    row = row_of(pack_rows([[pair, with_them]], budget), 0)
    np.testing.assert_array_equal(row.targets.reference[:, count : 2 * count], reference)
    assert np.isnan(row.targets.reference[:, :count]).all()
    np.testing.assert_array_equal(row.pairs.ignored, [0, 1, 0])
    # Each target knows its place in its own response.
    chosen, rejected = (len(response.tokens) for response in pair.responses)
    for branch, length in ((1, chosen), (2, rejected)):
        places = row.targets.index[:count][np.isin(row.targets.branch[:count], (0, branch))]
        np.testing.assert_array_equal(places, np.arange(length))
