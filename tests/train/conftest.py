"""A network of the real architecture that compiles in seconds."""

import dataclasses
import functools

import jax
import pytest

from saber_jax.models import saber
from saber_jax.models.config import saber_config


@pytest.fixture(scope="module")
def cfg():
    whole = saber_config("tiny")
    return dataclasses.replace(
        whole,
        text=dataclasses.replace(whole.text, layers=2),
        vision=dataclasses.replace(whole.vision, depth=2, full_attention_layers=(1,)),
    )


@pytest.fixture(scope="module")
def params(cfg):
    return jax.jit(functools.partial(saber.init, cfg))(jax.random.key(0))
