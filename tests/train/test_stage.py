"""The stages: what a config and a mesh come to, and what they refuse."""

import types
from typing import cast

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import cadpo, sft
from saber_jax import sharding
from saber_jax.runs.files import write_jsonl
from saber_jax.train import stage as stages
from saber_jax.train.preference import Preference


def mesh_of(platform, kind=""):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    described = types.SimpleNamespace(devices=np.array([device]), shape={"tensor": 2})
    return cast("Mesh", described)


@pytest.mark.parametrize(
    ("platform", "kind", "kernel"),
    [
        *[("tpu", "TPU v5 lite", "splash"), ("tpu", "TPU v6 lite", "splash_fused")],
        *[("gpu", "NVIDIA H100", "triton"), ("cpu", "cpu", "xla")],
    ],
)
def test_auto_picks_the_kernel_of_the_devices(platform, kind, kernel):
    assert stages._kernel("auto", mesh_of(platform, kind), by_hand=True) == kernel
    assert stages._kernel("auto", mesh_of(platform, kind), by_hand=False) == "xla"
    if platform == "tpu":
        assert stages._kernel("splash", mesh_of(platform, kind), by_hand=True) == "splash"


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


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [("dtype", "float16", "float32, bfloat16"), ("remat", "layers", "layer_offload, layer,")],
)
def test_a_way_to_compute_that_is_none_is_refused_before_anything_is_built(name, value, known):
    config = cadpo.get_config("tiny")
    config.compute[name] = value
    with pytest.raises(ValueError, match=f"config.compute.{name} must be one of {known}.*{value}"):
        stages.build(config, mesh_of("cpu"))


@pytest.mark.parametrize(
    ("option", "why"),
    [("conditional_audio", "no pair ignored audio"), ("conflict_power", "kappa is 1 everywhere")],
)
def test_a_loss_option_that_these_pairs_leave_idle_is_refused(tmp_path, option, why):
    config = cadpo.get_config("tiny")
    config.data.pairs = str(tmp_path / "pairs.jsonl")
    pair = {"clip_id": "clip0", "chosen": "calm", "rejected": "quiet"}
    write_jsonl(tmp_path / "pairs.jsonl", [pair | {"withheld": "video", "kappa": 1.0}])
    config.loss[option] = 0.5
    config.loss.conditional_ignored_only = option == "conditional_audio"
    with pytest.raises(ValueError, match=rf"config\.loss\.{option} would have no effect.*{why}"):
        stages.checked_pairs(config, Preference(**config.loss))
    write_jsonl(tmp_path / "pairs.jsonl", [pair | {"withheld": "audio", "kappa": 0.5}])
    assert len(stages.checked_pairs(config, Preference(**config.loss))) == 1


def test_a_modality_is_not_hidden_from_whole_pairs():
    config = cadpo.get_config("tiny")
    config.data.withhold = 0.2
    with pytest.raises(ValueError, match=r"data\.withhold=0\.2 belongs to stage 1"):
        stages.checked_pairs(config, Preference(**config.loss))


@pytest.mark.parametrize(
    ("mesh", "settings", "expected"),
    [
        ({"data": 2, "fsdp": 1}, {}, True),
        ({"data": 1, "fsdp": 2}, {}, False),
        ({"data": 1, "fsdp": 1}, {}, False),
        ({"data": 2, "fsdp": 1}, {"trainable": ("text/*",)}, False),  # No gradients for the rest.
        ({"data": 2, "fsdp": 1}, {"lora.rank": 2, "optimizer.vocabulary_steps": 0}, False),
    ],
)
def test_cpus_with_all_weights_sum_all_gradients_as_one_vector(mesh, settings, expected):
    config = sft.get_config("tiny")
    config.update_from_flattened_dict(settings)
    devices = jax.devices()[: mesh["data"] * mesh["fsdp"]]
    stage = stages.build(config, sharding.make_mesh(**mesh, tensor=1, devices=devices))
    assert stage.compute.one_vector is expected


def test_a_microbatch_that_leaves_devices_without_rows_is_refused():
    config = sft.get_config("tiny")
    config.data.batch_rows, config.compute.microbatches = 6, 2
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1)
    with pytest.raises(ValueError, match=r"batch_rows=6 .*microbatches=2 times the 2 devices"):
        stages.build(config, mesh)
