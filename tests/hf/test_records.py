"""Records of every kind, through the whole data path into one packed row, against transformers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from saber_jax.data import media
from saber_jax.data.examples import encode_record
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.models import saber
from saber_jax.models.config import saber_config
from saber_jax.models.vision import normalize
from tests import synthetic
from tests.hf import reference
from tests.models import weights
from tests.models.cases import LOGITS, relative

CFG = saber_config("tiny")
KINDS = {
    "video and sound": synthetic.record(1, frames=4, seconds=1.3),
    "sound in video": dataclasses.replace(
        synthetic.record(2, frames=6, seconds=3.1), seconds_per_grid=1.25, audio_in_video=True
    ),
    # The video's last frame lies later than the text behind it.
    "short sound in video": dataclasses.replace(
        synthetic.record(6, frames=4, seconds=0.2), seconds_per_grid=1.9, audio_in_video=True
    ),
    "picture": dataclasses.replace(synthetic.record(3, frames=1), audio=np.zeros(0, np.int16)),
    "picture and sound": synthetic.record(4, frames=1, seconds=0.7),
    "sound": synthetic.record(5, frames=0, seconds=2.2),
}


@pytest.fixture(scope="module")
def examples(tokenizer):
    return {name: encode_record(record, tokenizer) for name, record in KINDS.items()}


@pytest.fixture(scope="module")
def packed(examples):
    """Logits of all kinds side by side in one row, and where each begins and ends."""
    budget = Budget(length=896, patches=432, chunks=8, targets=512, segments=len(examples))
    batch = pack_rows([list(examples.values())], budget)
    hidden = jax.jit(functools.partial(saber.hidden, cfg=CFG))(weights.tree(CFG), batch)
    logits = np.asarray(saber.logits(weights.tree(CFG), hidden))[0]
    return {
        name: (batch.text.tokens[0, here], logits[here])
        for number, name in enumerate(examples, start=1)
        for here in [batch.text.segments[0] == number]
    }


@pytest.fixture(scope="module")
def model():
    return reference.thinker(CFG)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_record_has_the_logits_of_transformers(packed, model, kind):
    record, (tokens, logits) = KINDS[kind], packed[kind]
    ids = torch.tensor(tokens[None].astype(np.int64))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    count, height, width = record.frames.shape[:3]
    if count:
        grid = torch.tensor([[(count + 1) // 2, height // 14, width // 14]])
        pixels = torch.tensor(np.array(normalize(media.patchify(record.frames)[None]))[0])
        names = ("pixel_values", "image_grid_thw")
        if count > 1:
            names = ("pixel_values_videos", "video_grid_thw")
            given["video_second_per_grid"] = torch.tensor([record.seconds_per_grid])
        given |= dict(zip(names, (pixels, grid), strict=True))
    if len(record.audio):
        mel = torch.tensor(media.log_mel(record.audio).T[None])
        given |= {
            "input_features": mel,
            "feature_attention_mask": torch.ones_like(mel[:, 0]).long(),
        }
    with torch.no_grad():
        want = model(**given, use_audio_in_video=record.audio_in_video, use_cache=False).logits[0]
    assert relative(logits, want.numpy()) < LOGITS
