"""How tokens are chosen, and what decoding compiles to: the cache is changed where it is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax import sharding
from saber_jax.generate import decoding


def test_new_prompts_are_written_into_the_cache_in_place_and_are_not_sent():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1)
    rows = sharding.batch_sharding(mesh)

    def shaped(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    # Two groups of 16 places with two rows each, two of which are given to new prompts.
    compiled = (
        jax.jit(decoding._put, donate_argnums=0, out_shardings=rows)
        .lower(shaped(64, 2, 8, 256), shaped(8, 2, 8, 256), shaped(2, 16, dtype=jnp.int32))
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    cache = 4 * 32 * 2 * 8 * 256  # Bytes on one device.
    assert memory.alias_size_in_bytes == cache
    assert memory.temp_size_in_bytes < cache / 4
    assert not re.search(r" (all|reduce|collective)-[a-z-]+\(", compiled.as_text() or "")


def test_top_p_draws_only_from_the_smallest_sufficient_set():
    # The two likeliest hold 0.75 of the probability, so 0.7 needs both and nothing else.
    logits = jnp.log(jnp.array([0.1, 0.45, 0.15, 0.3]))
    keys = jax.random.split(jax.random.key(0), 200)
    drawn = decoding.sample(jnp.tile(logits, (200, 1)), keys, jnp.array(1.0), jnp.array(0.7))
    assert set(drawn.tolist()) == {1, 3}


def test_impossible_sampling_is_refused():
    with pytest.raises(ValueError, match=r"top_p in \(0, 1\]"):
        decoding.Sampling(temperature=1.0, top_p=0.0)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed must be .* got {seed}"):
            decoding.Sampling(temperature=1.0, seed=seed)
    assert np.uint32(decoding.Sampling(seed=2**32 - 1).seed) == 2**32 - 1
