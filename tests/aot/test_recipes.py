"""Every recipe of configs/pods.py, compiled by the TPU compiler at its full size.

    launch/test.sh -m slow tests/aot/test_recipes.py [-k "cadpo and 7b-v5e-256"]

Two to five minutes of one core each.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from configs import cadpo, pods, sft
from saber_jax import sharding
from saber_jax.aot import chips, hlo, memory, report
from saber_jax.train import stage as stages
from saber_jax.train.stage import Stage

pytestmark = pytest.mark.slow
STAGES = {"sft": sft, "cadpo": cadpo}


@dataclasses.dataclass(frozen=True)
class Compiled:
    recipe: pods.Recipe
    stage: Stage
    figures: dict
    module: hlo.Module
    log: str

    def sent(self, op: str, *, in_layers: bool) -> float:
        """GB that one device sends per step, without the gradients sent over DCN."""
        return sum(
            entry["wire"]
            for entry in self.figures["collectives"]
            if entry["op"] == op and entry["in_layers"] == in_layers and entry["axes"] != ["data"]
        )

    def gathered(self, pattern: str) -> float:
        """Bytes sent by one all-gather of the weights that match `pattern`, in bfloat16."""
        shards = sharding.shards(sharding.FSDP, self.stage.mesh)
        weights = self.stage.state.trainable | self.stage.state.frozen
        size = sum(2 * leaf.size for name, leaf in weights.items() if re.match(pattern, name))
        return size * (shards - 1) / shards

    def of_shared_rows(self, values: float) -> float:
        """Bytes that a device sends in a step where the devices of a row redistribute that many
        values a row, in bfloat16."""
        mesh, devices = self.stage.mesh, self.stage.mesh.shape[sharding.SEQUENCE]
        rows = self.stage.batch.text.tokens.shape[0] / sharding.shards(sharding.BATCH_AXES, mesh)
        return 2 * rows * values / devices * (devices - 1) / devices

    def exchanged(self) -> float:
        """Bytes of one pass through the text tower's layers: queries, keys, values, outputs."""
        text, slots = self.stage.cfg.text, self.stage.batch.text.tokens.shape[1]
        copied = max(text.kv_heads, self.stage.mesh.shape[sharding.SEQUENCE])
        heads = 2 * text.heads + 2 * copied
        return self.of_shared_rows(text.layers * slots * heads * text.head_dim)

    def media(self) -> float:
        """Bytes of gathering what the towers make of a row."""
        batch, devices = self.stage.batch, self.stage.mesh.shape[sharding.SEQUENCE]
        tokens = batch.vision.patches.shape[1] / 4 + 50 * batch.audio.mel.shape[1]
        return devices * self.of_shared_rows(tokens * self.stage.cfg.text.width)


@pytest.fixture(
    scope="module",
    params=[(variant, stage) for variant in pods.RECIPES for stage in STAGES],
    ids=lambda param: "-".join(param),
)
def compiled(request, four_chips, tmp_path_factory):
    """Runs the command; the output of the compiler is in `log`."""
    variant, name = request.param
    out = tmp_path_factory.mktemp("aot")
    command = [sys.executable, "-m", "saber_jax.aot", f"--config=configs/{name}.py:{variant}"]
    said = {"TPU_MIN_LOG_LEVEL": "0", "TPU_STDERR_LOG_LEVEL": "0"}
    done = subprocess.run(
        [*command, f"--json={out}/figures", f"--hlo={out}"],
        env=os.environ | said,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    config = STAGES[name].get_config(variant)
    devices = chips.parse_topology(config.topology).devices()
    stage = stages.build(config, sharding.make_mesh(**config.mesh, devices=devices))
    return Compiled(
        recipe=pods.RECIPES[variant],
        stage=stage,
        figures=json.loads((out / "figures").read_text()),
        module=hlo.parse((out / "train.hlo").read_text()),
        log=done.stderr,
    )


def test_a_tenth_of_the_memory_stays_free(compiled):
    assert compiled.figures["memory"]["headroom"] >= report.HEADROOM


def test_every_matrix_is_spread_over_all_devices_of_a_slice(compiled):
    state = compiled.stage.state
    shards = sharding.shards(sharding.FSDP, compiled.stage.mesh)
    for part in (state.trainable, state.frozen):
        # Adapters' halves without the width of the network are too thin to be worth a collective.
        matrices = {
            n: leaf
            for n, leaf in part.items()
            if re.search(r"/w_|embed|lm_head", n) and not n.startswith("lora/")
        }
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in matrices.values())
        assert memory.per_device(matrices) <= whole / shards * 1.02


def test_nothing_is_rematerialised_that_no_policy_names(compiled):
    """Rematerialisation is added neither by the compiler to save memory nor by the partitioner."""
    names = [name for part in compiled.module.computations.values() for name in part]
    assert not [name for name in names if ".remat" in name]
    assert "rematerialization" not in compiled.log.lower()


def test_layers_gather_each_weight_once_a_pass_and_nothing_else(compiled):
    """Forward, and backward where something below trains; frozen towers only forward."""
    once = {t: compiled.gathered(rf"(lora/)?{t}/blocks/") for t in ("text", "vision", "audio")}
    passes = compiled.stage.compute.microbatches * (sum(once.values()) + once["text"])
    assert compiled.sent("all-gather", in_layers=True) <= 1.02 * passes
    trained = "lora/text/blocks/" if compiled.recipe.lora_rank else "text/blocks/"
    gradients = compiled.gathered(trained)
    scattered = compiled.sent("reduce-scatter", in_layers=True)
    # Shares that do not fill a register tile travel padded: on rings of four 2, 7 and 28%.
    assert scattered <= 1.06 * compiled.stage.compute.microbatches * gradients + 1e6
    for op in ("all-reduce", "collective-permute"):
        assert compiled.sent(op, in_layers=True) <= 0.02 * passes
    # Forward, recomputed and backward.
    exchanges = 0.02 * passes + 3.03 * compiled.exchanged()
    assert compiled.sent("all-to-all", in_layers=True) <= exchanges


def test_around_the_layers_nothing_travels_whole_but_the_vocabulary(compiled):
    """lm_head, the projections of media into the text tower, and a share of the embedding."""
    rest = compiled.gathered(r"text/(lm_head|embed)|vision/(w_|merger)|audio/(w_|conv)")
    rest *= compiled.stage.compute.microbatches
    assert compiled.sent("all-gather", in_layers=False) <= 1.05 * (rest + compiled.media())
