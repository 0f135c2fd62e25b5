"""The train step as the TPU compiler makes it: what must not be in it."""

import dataclasses
import re

import jax
import pytest
from etils import epath
from jax.sharding import AbstractMesh

from configs import cadpo, sft
from saber_jax import sharding
from saber_jax.aot import chips, cost, hlo, programs, report
from saber_jax.aot.xla_flags import FLAGS
from saber_jax.runs import executables
from saber_jax.train import stage as stages


@pytest.fixture(scope="module")
def text_only():
    """A small supervised config without media, as it would run on TPUs."""
    config = sft.get_config("tiny")
    config.data.batch_rows = 4
    config.data.length = config.data.targets = 128
    config.data.patches = config.data.chunks = 0
    config.compute.update(dtype="bfloat16", kernel="splash", remat="layer", head_chunk=128)
    return config


@pytest.fixture(scope="module")
def step(four_chips, text_only):
    """(config, setup, compiled, module)"""
    mesh = sharding.make_mesh(**text_only.mesh, devices=four_chips)
    stage = stages.build(text_only, mesh)
    compiled = stage.train_step().lower(stage.state, stage.batch).compile(compiler_options=FLAGS)
    return text_only, stage, compiled, hlo.parse(compiled.as_text())


def test_no_weight_or_moment_is_replicated_that_the_rules_shard(step):
    _, stage, compiled, _ = step
    (state, _), _ = compiled.input_shardings
    for wanted, got in zip(jax.tree.leaves(stage.state), jax.tree.leaves(state), strict=True):
        assert got.is_equivalent_to(wanted.sharding, wanted.ndim)
    matrices = {n: leaf for n, leaf in stage.state.trainable.items() if "/w_" in n}
    assert all(not leaf.sharding.is_fully_replicated for leaf in matrices.values())


def test_layers_gather_weights_and_scatter_gradients_and_nothing_else(step):
    """Per layer and ring: each weight gathered in both passes, each gradient scattered once."""
    _, stage, _, module = step
    costs = cost.analyze(module, dict(stage.mesh.shape), {})
    in_layers = {k: t for k, t in costs.collectives.items() if k.in_layers}
    matrices = [n for n in stage.state.trainable if re.match(r"text/blocks/\w+/w_", n)]
    blocks, attention = (
        sum(2 * stage.state.trainable[name].size for name in matrices if part in name)
        for part in ("", "/attn/")
    )
    gathered = sum(t.wire for k, t in in_layers.items() if k.op == "all-gather")
    scattered = sum(t.wire for k, t in in_layers.items() if k.op == "reduce-scatter")
    # Over four devices, two rings of two: 1/4 + 1/2 of a weight arrives.
    assert gathered <= 2 * blocks * 3 / 4 * 1.01
    assert scattered <= blocks * 3 / 4 * 1.01
    assert {k.op for k in in_layers} <= {"all-gather", "reduce-scatter", "all-reduce"}
    # Heads of 32, a quarter of the lanes, are worth no reduce-scatter to the compiler.
    summed = sum(t.wire for k, t in in_layers.items() if k.op == "all-reduce")
    assert summed <= 2 * attention * 3 / 4 * 1.01


def test_a_run_s_own_lowering_finds_the_saved_executable(step, tmp_path):
    config, stage, compiled, _ = step
    executables.save(programs.lower("train", config, stage), compiled, epath.Path(tmp_path), FLAGS)
    (saved,) = tmp_path.iterdir()
    again = stages.build(config, stage.mesh)
    ours = again.train_step().lower(again.state, again.batch)  # As saber_jax.main has it.
    assert saved.name.startswith(executables.key(ours, FLAGS)) and saved.stat().st_size > 10_000


def test_the_compiler_had_to_rematerialise_nothing(step):
    *_, module = step
    names = [name for c in module.computations.values() for name in c]
    assert not [name for name in names if ".remat" in name]


def test_memory_by_kind_is_what_the_shardings_say(step):
    _, stage, compiled, _ = step
    figures = report.figures(compiled, "train", stage, chips.parse_topology("v5e:2x2"), 0.0)
    text = sum(leaf.size for leaf in stage.state.trainable.values())
    assert figures["memory"]["weights"] == pytest.approx(4 * text / 4, rel=0.1)
    assert figures["memory"]["optimizer"] == pytest.approx(8 * text / 4, rel=0.1)
    assert programs.full_row_cost(stage).targets == 4 * 128
    assert "bound by" in report.text(figures)


@pytest.mark.slow
def test_layers_inputs_wait_on_the_host(four_chips, text_only):
    with text_only.unlocked():
        config = text_only.copy_and_resolve_references()
    config.compute.remat = "layer_offload"
    stage = stages.build(config, sharding.make_mesh(**config.mesh, devices=four_chips))
    lowered = programs.lower("train", config, stage)
    compiled = lowered.compile(compiler_options=FLAGS)
    figures = report.figures(compiled, "train", stage, chips.parse_topology("v5e:2x2"), 0.0)
    text = stage.cfg.text
    assert figures["memory"]["host"] >= 2 * text.layers * config.data.length * text.width
    assert figures["memory"]["activations"] < figures["memory"]["host"]
    assert "on the host" in report.text(figures)


def test_a_topology_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"no topology 'v5e:3x3'.*\n.*v5e: 2x2 2x4 4x4"):
        chips.parse_topology("v5e:3x3")
    assert chips.parse_topology("2*v5e:16x16").count == 2


def test_what_does_not_fit_is_told_with_settings_that_would_help(step):
    config, stage, *_ = step
    message = "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.25G of 15.75G hbm."
    said = report.refusal(message, config, stage, chips.parse_topology("v5e:2x2"))
    assert said.startswith("does not fit: 4.5 GiB over the 15.75 GiB of a v5e device; try ")
    assert "--config.compute.remat=layer_offload" in said
    said = report.refusal(message, config, stage, chips.parse_topology("v5e:2x2"), "prefill")
    assert said.endswith(
        "try --config.generation.batch_size=15; or a topology of 8 devices or more"
    )
    said = report.refusal("INTERNAL: Mosaic", config, stage, chips.parse_topology("v5e:2x2"))
    assert said == "the compiler refused the program: INTERNAL: Mosaic"


def test_more_devices_are_no_remedy_once_no_weight_is_shared_by_more_of_them(step):
    config, stage, *_ = step
    assert "8 devices or more" in report.suggestions(config, stage)[-1]
    sizes = dict(stage.mesh.shape) | {"fsdp_z": stage.cfg.text.width}
    many = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    tried = report.suggestions(config, dataclasses.replace(stage, mesh=many))
    assert tried and not any("devices or more" in setting for setting in tried)


@pytest.mark.parametrize(
    ("config", "program"), [(sft, "train"), (cadpo, "train"), (cadpo, "reference")]
)
def test_what_a_pod_runs_lowers_with_long_blocks_of_attention(four_chips, config, program):
    config = config.get_config("7b")
    config.data.batch_rows = len(four_chips)
    mesh = sharding.make_mesh(**config.mesh, devices=four_chips)
    lowered = programs.lower(program, config, stages.build(config, mesh))
    kernels = set(re.findall(r"splash_(\d+)x(\d+)", lowered.as_text(debug_info=True)))
    # The text tower and the vision tower's full attention; windows and audio chunks are short.
    assert len([kernel for kernel in kernels if int(kernel[1]) >= 384]) == 2
