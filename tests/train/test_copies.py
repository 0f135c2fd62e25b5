"""The copy for generation: the same weights in half the bytes, and never those of another step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax.generate import generator
from saber_jax.models import saber
from saber_jax.models.config import saber_config
from saber_jax.train import checkpoint, copies
from saber_jax.tree import flatten

CFG = saber_config("tiny")


def weights(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), saber.abstract(CFG)
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    params = weights(0)
    checkpoint.save_params(folder, params, CFG, step=2)
    assert copies.find(folder) is None
    copies.write(folder, params, CFG)
    return folder


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_copy_is_rounded_as_generation_rounds_and_takes_half_the_bytes(workdir):
    found = copies.find(workdir)
    assert found == workdir / "bfloat16"
    masters = flatten(checkpoint.load_params(workdir, CFG))
    for name, leaf in flatten(checkpoint.load_params(found, CFG)).items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, masters[name].astype(jnp.bfloat16))
    assert size(found) < 0.6 * size(workdir / "checkpoints")


@pytest.mark.parametrize(("platform", "read"), [("tpu", "bfloat16"), ("cpu", "")])
def test_accelerators_read_the_copy_and_cpus_the_masters(workdir, platform, read, monkeypatch):
    loaded = []

    def load_params(folder, *_):
        loaded.append(folder)
        raise InterruptedError

    monkeypatch.setattr(generator.jax, "default_backend", lambda: platform)
    monkeypatch.setattr(generator.checkpoint, "load_params", load_params)
    with pytest.raises(InterruptedError):
        generator.load_generator(workdir, max_new_tokens=1, batch_size=1)
    assert loaded == [workdir / read]


def test_the_copy_of_an_earlier_step_is_not_used_and_replaced(workdir):
    later = weights(1)
    checkpoint.save_params(workdir, later, CFG, step=4)
    assert copies.find(workdir) is None
    copies.write(workdir, later, CFG)
    assert copies.find(workdir) == workdir / "bfloat16"
