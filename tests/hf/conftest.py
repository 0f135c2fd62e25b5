"""A small network as a checkpoint directory."""

import shutil

import jax
import numpy as np
import pytest

from saber_jax.data.sed import heading
from saber_jax.data.tokenizer import train_sentencepiece
from saber_jax.hf import digests, export
from saber_jax.models import saber
from tests.hf.directories import CONFIG, TEXTS


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), saber.abstract(CONFIG)
    )


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    out = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    headings = [heading("video_desc")]
    return train_sentencepiece(TEXTS * 20, out, vocab_size=380, symbols=headings)


@pytest.fixture(scope="module")
def exported(params, vocabulary, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "hf"
    export.export(params, CONFIG, out, vocabulary)
    return out


@pytest.fixture
def copy(exported, tmp_path):
    """An export that a test may damage, as if it came from elsewhere: without digests."""
    out = shutil.copytree(exported, tmp_path / "hf")
    (out / digests.FILE).unlink()
    return out
