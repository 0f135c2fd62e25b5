"""Every recipe of configs/pods.py, compiled by the TPU compiler at its full size.

    launch/test.sh -m slow tests/aot/test_recipes.py

Two minutes of one core each, so these are not among the tests that always run.
"""

import os
import re
import subprocess
import sys

import jax
import pytest

from configs import cadpo, pods, sft
from saber_jax import sharding
from saber_jax.aot import chips, cost, hlo, programs, report
from saber_jax.train import setup
from saber_jax.xla_flags import FLAGS

pytestmark = pytest.mark.slow
STAGES = {"sft": sft, "cadpo": cadpo}


@pytest.fixture(
    scope="module",
    params=[(stage, variant) for variant in pods.RECIPES for stage in STAGES],
    ids=lambda param: ":".join(param),
)
def step(request):
    """(setup, compiled, figures, module)"""
    stage_name, variant = request.param
    config = STAGES[stage_name].get_config(variant)
    slices = chips.parse_topology(config.topology)
    try:
        devices = slices.devices()
    except RuntimeError as error:
        pytest.skip(str(error))
    stage = setup.build(config, sharding.make_mesh(**config.mesh, devices=devices))
    compiled = programs.lower("train", config, stage).compile(compiler_options=FLAGS)
    return stage, compiled, report.figures(compiled, "train", stage, slices, 0.0)


def test_a_tenth_of_the_memory_stays_free(step):
    _, _, figures = step
    assert figures["memory"]["headroom"] >= report.HEADROOM
