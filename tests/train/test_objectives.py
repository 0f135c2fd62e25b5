"""The objectives: what a batch becomes before it is scored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax.data.examples import encode_record
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.withhold import MODALITIES, withhold
from saber_jax.train.losses import means
from saber_jax.train.objectives import (
    EVIDENCE,
    Compute,
    pair_scores,
    reward_metrics,
    section_margins,
    withheld,
)
from saber_jax.train.preference import Preference
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


def margins(batch, alpha):
    """(rewards/margins, the sum of those of the kinds of evidence) of made-up log-probs."""
    batch = jax.tree.map(jnp.asarray, batch)
    options = Preference(length_alpha=alpha)
    noise = np.random.default_rng(0).normal(size=batch.targets.weights.shape)
    log_probs = jnp.asarray(noise, jnp.float32)
    policy, reference = (
        pair_scores(batch, values, length_alpha=alpha)
        for values in (log_probs, batch.targets.reference[:, 0])
    )
    whole = means(reward_metrics(policy, reference, batch, options.beta))["rewards/margins"]
    parts = means(section_margins(log_probs, batch, options))
    return float(whole), sum(float(parts[f"margins/{name}"]) for name in EVIDENCE)


@pytest.mark.parametrize("alpha", [1.0, 0.25, 0.0])
def test_margins_of_the_evidence_add_up_where_every_answer_has_headings(tokenizer, alpha):
    def packed(texts):
        example = encode_record(synthetic.record(0), tokenizer, responses=texts)
        return pack_rows([[synthetic.with_references(example, 0)]], BUDGET)

    headings = "[video_desc] calm person [acoustic_feat] quietly [sentiment_analysis] sad."
    longer = f"{headings} So sad, so slowly, so very quietly."
    whole, total = margins(packed((longer, headings)), alpha)
    assert total == pytest.approx(whole, rel=1e-4)
    whole, total = margins(packed((longer, "slowly")), alpha)
    assert total != pytest.approx(whole, rel=1e-2)


@pytest.mark.parametrize(
    ("targets", "most", "chunk"), [(2816, 256, 256), (168, 256, 168), (1000, 256, 250), (7, 4, 1)]
)
def test_chunks_of_targets_are_equal_and_no_larger_than_asked(targets, most, chunk):
    compute = Compute(dtype="float32", remat="none", head_chunk=most, frame_patches=36)
    assert compute.chunk_of(targets) == chunk
