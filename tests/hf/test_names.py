"""The tables against the tensor lists of the released checkpoints, kept beside this file."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from saber_jax.hf import names
from saber_jax.models import saber
from saber_jax.models.config import saber_config
from tests.models.batches import CONFIG


def released(size: str) -> dict[str, tuple[int, ...]]:
    """Lines `name 2x3`; `{0..27}` in a name stands for that many tensors."""
    tensors = {}
    for line in (Path(__file__).parent / f"checkpoint_{size}.txt").read_text().splitlines():
        name, shape = line.split()
        span = re.search(r"\{0\.\.(\d+)\}", name)
        for layer in range(int(span[1]) + 1) if span else [0]:
            full = name.replace(span[0], str(layer)) if span else name
            tensors[full] = tuple(map(int, shape.split("x")))
    return tensors


@pytest.mark.parametrize(
    ("size", "tensors", "parameters"), [("3b", 1442, 4_703_464_448), ("7b", 1346, 8_931_813_888)]
)
def test_our_tree_is_the_released_checkpoint_name_by_name(size, tensors, parameters):
    got = {name: entry.shape for name, entry in names.entries(saber_config(size)).items()}
    assert got == released(size)
    assert len(got) == tensors
    leaves = jax.tree.leaves(saber.abstract(saber_config(size)))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == parameters


def test_every_parameter_has_exactly_one_row():
    rows = [(entry.path, entry.layer) for entry in names.entries(CONFIG).values()]
    assert len(rows) == len(set(rows))
    paths = {tuple(key.key for key in path) for path, _ in _leaves(saber.abstract(CONFIG))}
    assert {path for path, _ in rows} == paths


def test_to_disk_undoes_from_disk():
    rng = np.random.default_rng(0)
    disk = {
        name: rng.normal(size=entry.shape).astype(np.float32)
        for name, entry in names.entries(CONFIG).items()
    }
    params = names.from_disk(lambda entry: disk[entry.name], CONFIG)
    for entry, array in names.to_disk(params, CONFIG):
        np.testing.assert_array_equal(array, disk[entry.name], err_msg=entry.name)


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)
