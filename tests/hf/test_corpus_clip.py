"""A clip of the embedded corpus gives the same logits here and in `transformers`."""

import functools

import jax
import numpy as np
import pytest

from data_prep.corpus import build as corpus
from data_prep.corpus.plan import Sizes
from data_prep.records import build
from saber_jax.data import media
from saber_jax.data.examples import encode_record, size_of
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.records import RecordSource
from saber_jax.data.tokenizer import load_tokenizer
from saber_jax.hf.export import export
from saber_jax.models import saber
from saber_jax.models.config import saber_config
from tests.models import weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SAMPLING = ["--fps", "4", "--min_pixels", "7056", "--max_pixels", "7056"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    corpus.build(root / "corpus", sizes=Sizes(train=2, preference=1, validation=1, test=1), seed=0)
    folders = ["--clips", root / "corpus/clips", "--annotations", root / "corpus/annotations"]
    labels = ["--labels", root / "corpus/labels.jsonl", "--out", root / "records"]
    assert build.main([*map(str, folders + labels), *SAMPLING]) == 0
    return root / "records"


def test_exported_model_has_our_logits_on_a_real_clip(records, tmp_path):
    cfg, tokenizer = saber_config("tiny"), load_tokenizer(records)
    record = RecordSource(records, "test")[0]
    example = encode_record(record, tokenizer)
    size = size_of(example)
    budget = Budget(
        length=size.text,
        patches=size.patches,
        chunks=size.chunks,
        targets=size.targets,
        segments=1,
    )
    batch = pack_rows([[example]], budget)
    params = weights.tree(cfg)
    hidden = jax.jit(functools.partial(saber.hidden, cfg=cfg))(params, batch)
    ours = np.asarray(saber.logits(params, hidden))[0]

    export(params, cfg, tmp_path / "hf", tokenizer)
    reference = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    theirs = reference_logits(reference, batch.text.tokens, record)
    assert np.abs(theirs - ours).max() <= 1e-4 * max(np.abs(ours).max(), 1.0)


def reference_logits(model, tokens, record):
    """`transformers` on the clip as its own processor would present it."""
    mean = np.repeat([0.48145466, 0.4578275, 0.40821073], 2 * 14 * 14)
    std = np.repeat([0.26862954, 0.26130258, 0.27577711], 2 * 14 * 14)
    pixels = (media.patchify(record.frames) / 255.0 - mean) / std
    frames, height, width = record.frames.shape[:3]
    mel = media.log_mel(record.audio).T[None]
    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=torch.tensor(pixels, dtype=torch.float32),
            video_grid_thw=torch.tensor([[frames // 2, height // 14, width // 14]]),
            video_second_per_grid=torch.tensor([record.seconds_per_grid]),
            input_features=torch.tensor(mel),
            feature_attention_mask=torch.ones((1, mel.shape[2]), dtype=torch.long),
        )
    return out.logits[0].numpy()
