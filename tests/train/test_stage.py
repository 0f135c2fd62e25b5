"""The stages: which kernel a config and a mesh come to."""

import types
from typing import cast

import numpy as np
import pytest
from jax.sharding import Mesh

from saber_jax.train import stage as stages


def mesh_of(platform):
    device = types.SimpleNamespace(platform=platform)
    described = types.SimpleNamespace(devices=np.array([device]), shape={"tensor": 2})
    return cast("Mesh", described)


@pytest.mark.parametrize(
    ("platform", "kernel"), [("tpu", "splash"), ("gpu", "triton"), ("cpu", "xla")]
)
def test_auto_picks_the_kernel_of_the_devices(platform, kernel):
    assert stages._kernel("auto", mesh_of(platform), by_hand=True) == kernel
    assert stages._kernel("auto", mesh_of(platform), by_hand=False) == "xla"


@pytest.mark.parametrize(
    ("named", "platform", "by_hand", "message"),
    [
        ("cudnn", "gpu", True, r"must be one of 'auto', 'xla', .*; got 'cudnn'"),
        ("splash", "gpu", True, r"'splash' does not run on .* 'gpu'. Set it to 'auto'.* 'triton'"),
        ("triton", "cpu", True, r"'triton' does not run on .* 'cpu'"),
        ("triton", "gpu", False, r"needs config.mesh.tensor=1, got 2"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(named, platform, by_hand, message):
    with pytest.raises(ValueError, match=message):
        stages._kernel(named, mesh_of(platform), by_hand=by_hand)
