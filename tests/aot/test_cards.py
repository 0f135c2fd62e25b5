"""GPU programs as XLA compiles them for cards that are not here: the kernels, and whole steps."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from saber_jax.aot import cards, hlo, kernels, targets
from saber_jax.models import triton

LENGTH = 512


@pytest.fixture(scope="module")
def gpus():
    """name -> a card's device. Without the compiler its tests are skipped."""
    try:
        return {name: card.devices()[0] for name, card in cards.CARDS.items()}
    except RuntimeError as error:
        pytest.skip(str(error))


def compiled(device, head_dim, dtype):
    """The kernels of the forward and the backward pass, four query heads on two kv heads."""
    mesh = jax.sharding.Mesh([device], ("cards",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def of(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def loss(q, k, v, segments):
        return triton.packed(q, k, v, segments, response=128).astype(jnp.float32).sum()

    q, kv = of(1, LENGTH, 4, head_dim), of(1, LENGTH, 2, head_dim)
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return gradients.lower(q, kv, kv, of(1, LENGTH, dtype="int32")).compile()


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("card", sorted(cards.CARDS))
def test_the_kernels_fit_the_shared_memory_of_every_card(gpus, card, head_dim, dtype):
    program = compiled(gpus[card], head_dim, dtype)
    module = hlo.parse(program.as_text())
    found = [kernels.flops(run) for run in hlo.executions(module, {})]
    # Of 512 slots: 256 shared ones, causal, and two responses that see those and themselves.
    own, visit = {"bfloat16": (128, 64), "float32": (32, 32)}[dtype]
    visits = sum(
        len(range(0, first + own, visit)) - (2 if first >= 384 else 0) * (64 // visit)
        for first in range(0, LENGTH, own)
    )
    width = 128 if head_dim > 64 else 64
    assert sum(found) == 2 * (2 + 3 + 4) * 4 * visits * own * visit * width


def test_a_topology_may_be_a_card():
    assert targets.parse("h100") is cards.CARDS["h100"]
    assert targets.parse("v5e:2x2").family == "v5e"
    with pytest.raises(
        ValueError, match=r"no topology 'h100:2'(.|\n)*or one GPU: a100, h100, h200"
    ):
        targets.parse("h100:2")


def run(config, *flags):
    command = [sys.executable, "-m", "saber_jax.aot", f"--config=configs/{config}", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_run_takes_as_much_of_a_card_as_is_counted_on():
    script = (Path(__file__).parents[2] / "launch/tpu_run.sh").read_text()
    assert f"XLA_CLIENT_MEM_FRACTION:-{cards.USABLE}}}" in script


def test_a_step_for_a_card_is_not_saved():
    done = run("cadpo.py:tiny", "--topology=h100", "--save=nowhere", "--config.steps=1")
    assert done.returncode == 1 and "--save is for TPUs" in done.stderr


RECIPES = [
    *(("7b-lora-gpu", card, stage) for card in ("a100", "h100") for stage in ("sft", "cadpo")),
    *(("3b-gpu", "h200", stage) for stage in ("sft", "cadpo")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "card", "stage"), RECIPES)
def test_every_recipe_for_a_gpu_leaves_a_tenth_of_its_card_free(
    gpus, recipe, card, stage, tmp_path
):
    del gpus
    for program in ("train", *(("reference", "prefill", "decode") if stage == "cadpo" else ())):
        out = tmp_path / program
        flags = (f"--topology={card}", f"--program={program}", f"--json={out}")
        done = run(f"{stage}.py:{recipe}", *flags)
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(out.read_text())["memory"]["headroom"] >= 0.1, program
