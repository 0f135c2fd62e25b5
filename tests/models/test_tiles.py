"""The copy of the text tower that a CPU decodes from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from saber_jax.models import saber, tiles
from saber_jax.models.config import saber_config
from saber_jax.models.parameters import IN_AXES
from saber_jax.models.tiles import Tiled

TINY = saber_config("tiny")
TOWERS = ("vision", "audio")


@pytest.mark.parametrize(("width", "tiled"), [(96, True), (128, True), (96, False)])
def test_separate_layers_decode_the_same(monkeypatch, width, tiled):
    # 128 columns are two tiles; 96 are no whole number of them, and those weights stay as they are.
    monkeypatch.setattr(tiles, "COLUMNS", 64)
    monkeypatch.setattr(tiles, "LEAST", 1)
    size = dataclasses.replace(TINY.text, width=width, mlp_dim=128)
    towers = {name: dataclasses.replace(getattr(TINY, name), out_width=width) for name in TOWERS}
    cfg = dataclasses.replace(TINY, text=size, **towers)
    params = saber.init(cfg, jax.random.key(0))
    layers = saber.text_layers(params, cfg, tiled=tiled)
    assert isinstance(layers[0].mlp.w_up, Tiled) == tiled
    assert isinstance(layers[0].mlp.w_down, Tiled) == (tiled and width == 128)

    rows = jnp.arange(3, dtype=jnp.int32)
    random = jax.random.normal(jax.random.key(1), (3, size.kv_heads, size.head_dim, 8))
    keys = {"k": random, "prompt_k": random[:1]}
    values = {"v": random.swapaxes(2, 3), "prompt_v": random[:1].swapaxes(2, 3)}
    cache = [keys | values] * size.layers
    slot, counts = jnp.int32(5), jnp.array([6])
    step = jax.jit(
        lambda **k: saber.decode(params, rows + 5, rows, cache, rows[:1], slot, counts, cfg, **k)
    )
    want, got = jax.tree.leaves(step()), jax.tree.leaves(step(layers=layers))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "count"), [((512, 2048), 8), ((2048, 512), 4), ((896, 4864), 19)]
)
def test_a_tile_has_enough_work_for_a_core(shape, count):
    tile = Tiled(nnx.Param(jnp.zeros(shape), **{IN_AXES: 1})).tiles
    assert tile.shape == (count, shape[0], shape[1] // count)
    assert tile[0].size >= tiles.LEAST
