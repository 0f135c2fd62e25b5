"""Checkpoint directories for tests, and changes to them."""

import dataclasses
import json

import jax
import pytest
from safetensors.numpy import load_file, save_file

from saber_jax.data.sed import heading
from saber_jax.hf import load
from saber_jax.models import saber
from saber_jax.models.config import saber_config
from tests.models import batches

# With the vocabulary below, and the ids that it gives to placeholders.
CONFIG = dataclasses.replace(
    batches.CONFIG,
    text=dataclasses.replace(batches.CONFIG.text, vocab=380),
    tokens=saber_config("tiny").tokens,
)

TEXTS = [
    "A woman smiles, but her voice trembles.\nShe looks away.",
    "  two  spaces, a tab\tand an emoji 😀 ",
    "他说他很开心，可是声音里有悲伤。",
    f"<|im_start|>user\n<|AUDIO|>hello<|im_end|>\n{heading('video_desc')} a man laughs",
]


def equal(got, want):
    saber.check_tree(want, got)
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), got, want)))


def rewrite(directory, change):
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(directory) -> str:
    with pytest.raises(ValueError) as error:
        load.load_params(directory)
    return str(error.value)
