"""The objectives: what a batch becomes before it is scored."""

import numpy as np
import pytest

from saber_jax.data.examples import encode_record
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.withhold import MODALITIES, withhold
from saber_jax.train.objectives import Compute, withheld
from tests import synthetic

BUDGET = Budget(length=640, response=96, patches=144, chunks=4, targets=256, segments=2)


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_batch_with_a_modality_withheld_is_that_of_its_records(tokenizer, modality):
    def packed(hide):
        examples = []
        for i, texts in enumerate((("calm person", "slowly"), ("red room", "quiet person"))):
            record = synthetic.record(i, seconds=1.3 + i)
            record = withhold(record, modality) if hide else record
            examples.append(encode_record(record, tokenizer, responses=texts))
        return pack_rows([examples], BUDGET)

    got, want = withheld(packed(False), modality), packed(True)
    heard = np.arange(200)[None, None, :] < want.audio.lengths[:, :, None]
    np.testing.assert_allclose(got.audio.mel[heard], want.audio.mel[heard], atol=1e-6)
    seen = want.vision.frame > 0
    np.testing.assert_array_equal(got.vision.patches[seen], want.vision.patches[seen])


@pytest.mark.parametrize(
    ("targets", "most", "chunk"), [(2816, 256, 256), (168, 256, 168), (1000, 256, 250), (7, 4, 1)]
)
def test_chunks_of_targets_are_equal_and_no_larger_than_asked(targets, most, chunk):
    compute = Compute(dtype="float32", remat="none", head_chunk=most, frame_patches=36)
    assert compute.chunk_of(targets) == chunk
