"""The network against numbers that transformers gave (tests/golden/make_network.py), without torch.

tests/hf/test_parity.py compares with transformers itself, and checks that these numbers are still
what it says.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from saber_jax.hf import names
from tests.models import weights
from tests.models.batches import CONFIG
from tests.models.cases import CASES, GRADIENTS, LOGITS, PROMPTS, relative, row
from tests.models.generation import greedy
from tests.models.gradients import summed_loss_and_gradients

GOLDEN = Path(__file__).parents[1] / "golden/network.npz"
DIRECTIONS = 4


def projected(gradient: np.ndarray) -> np.ndarray:
    """Sums of a gradient's entries under random signs, divided by the root of their number.

    Such a sum is about as large as the entries, and all of them take part in it.
    """
    signs = np.random.default_rng(gradient.size).choice([-1.0, 1.0], (DIRECTIONS, gradient.size))
    return signs @ gradient.reshape(-1).astype(np.float64) / np.sqrt(gradient.size)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def params():
    return weights.tree(CONFIG)


@pytest.mark.parametrize("case", CASES)
def test_positions_logits_loss_and_gradients_are_those_of_transformers(golden, params, case):
    total, count, summed = 0.0, 0, None
    for number, talk in enumerate(CASES[case]):
        np.testing.assert_array_equal(talk.positions, golden[f"{case}.{number}.positions"])
        loss, terms, logits, gradients = summed_loss_and_gradients(params, row(talk))
        want = golden[f"{case}.{number}.logits"]
        assert relative(logits[0, : len(talk.tokens)], want) < LOGITS
        total, count = total + float(loss), count + int(terms)
        summed = gradients if summed is None else jax.tree.map(np.add, summed, gradients)
    assert abs(total / count - golden[f"{case}.loss"]) < 2e-6
    disk = {entry.name: array / count for entry, array in names.to_disk(summed, CONFIG)}
    rows = zip(sorted(disk), golden[f"{case}.gradients"], golden[f"{case}.largest"], strict=True)
    for name, want, largest in rows:
        difference = np.abs(projected(disk[name]) - want).max()
        assert difference <= GRADIENTS * largest, name


def test_greedy_answers_are_those_of_transformers_token_for_token(golden, params):
    np.testing.assert_array_equal(greedy(params, PROMPTS), golden["answers"])
