import pytest

from benchmarks import loader_memory
from saber_jax.data import loader


@pytest.mark.parametrize("variant", loader_memory.RECIPES)
@pytest.mark.parametrize("stage", loader_memory.STAGES)
def test_a_host_of_every_recipe_loads_within_a_few_batches_and_gigabytes(variant, stage):
    bound = loader_memory.bound(variant, stage)
    assert bound.bytes < 16e9
    # Whatever a batch holds, no more than four of it are in memory; the rest does not grow with it.
    alone = loader.most_rows(0, threads=4, workers=4)
    assert bound.rows - alone == 4 * bound.local


def test_a_pod_of_one_wide_host_makes_all_rows_there():
    assert loader_memory.bound("7b-lora-v6e-8").local == 96
    assert loader_memory.bound("7b-v5e-256").local == 4
