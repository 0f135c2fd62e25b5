"""What decoding compiles to: the cache is changed where it is."""

import re

import jax
import jax.numpy as jnp

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
