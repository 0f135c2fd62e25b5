import pytest

from saber_jax.aot import chips


@pytest.fixture(scope="session")
def four_chips():
    """Four TPU v5e as a target to compile for. Without the compiler its tests are skipped."""
    try:
        return chips.parse_topology("v5e:2x2").devices()
    except RuntimeError as error:
        pytest.skip(str(error))
