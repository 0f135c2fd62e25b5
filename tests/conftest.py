import os

# Set before jax is imported: two devices, so that sharding is tested and not assumed.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite compiles far more than it computes, so XLA is told not to polish.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2 "
    "--xla_backend_optimization_level=0"
)
# A collective on a CPU holds a thread until all devices have come to it, and a device may be at one
# of every loop that it is in. With a thread a device, XLA's default here, two devices can hold all
# threads at different ones: it aborts after 40 seconds.
os.environ.setdefault("PJRT_NPROC", "8")

import pytest
from jaxtyping import install_import_hook

import tests.annotations  # noqa: F401 - The hook finds it by its name alone.

# Modules that are imported from here on check the annotated shapes and dtypes of every call.
install_import_hook(
    ["saber_jax.models", "saber_jax.train", "saber_jax.data"], "tests.annotations.check_arrays"
)

from saber_jax.data.tokenizer import Tokenizer  # noqa: E402
from tests import synthetic  # noqa: E402

# The files that take longest, longest first. A file stays on one worker, so one of these that began
# last would leave the other workers idle until it ends.
LONGEST = (
    "tests/test_main.py",
    "tests/train/test_step.py",
    "tests/test_validation.py",
    "tests/launch/test_pod.py",
    "tests/test_left_out.py",
    "tests/models/test_attention.py",
    "tests/models/test_saber.py",
    "tests/train/test_packed.py",
    "tests/models/test_lora.py",
    "tests/data_prep/raw/test_run.py",
    "tests/launch/test_remote.py",
    "tests/hf/test_settings.py",
    "tests/generate/test_generator.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the slowest files first; all other tests keep their order."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The vocabulary of tests/synthetic.py."""
    return synthetic.tokenizer(tmp_path_factory.mktemp("vocabulary"))
