"""Answers that grow together: what they hold on the device."""

import dataclasses
import weakref

import jax
import numpy as np

from saber_jax.generate import generator as generating
from saber_jax.models import saber
from saber_jax.models.config import saber_config
from tests import synthetic


def test_a_cache_is_freed_before_longer_prompts_get_a_larger_one(tokenizer, monkeypatch):
    def running(*args, **options):
        kept.append(sum(of() is not None for of in made))
        found = original(*args, **options)
        made.append(weakref.ref(found))
        return found

    original, made, kept = generating.Running, [], []
    monkeypatch.setattr(generating, "Running", running)
    cfg = saber_config("tiny")
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), saber.abstract(cfg))
    generator = generating.Generator(params, cfg, tokenizer, max_new_tokens=1, batch_size=1)
    short = synthetic.record(0, seconds=0.5, frames=2)
    long = dataclasses.replace(short, question="Is this sarcasm? " * 40)
    # Two prompts are read ahead, so the first cache is made without knowing of the third.
    answers = generator.respond_batches([[short], [short], [long]])
    assert [len(batch) for batch in answers] == [1, 1, 1]
    assert kept == [0, 0]
