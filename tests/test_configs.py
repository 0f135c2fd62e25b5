"""The configs: what a recipe for a pod may say, and what it may not."""

from pathlib import Path

import pytest

from configs import cadpo, pods, sft
from launch import chain
from saber_jax.runs.identity import identity
from saber_jax.train.objectives import Compute


def base_of(variant: str) -> str:
    """The variant that a recipe runs on its pod."""
    size, *rest = variant.split("-")
    return f"{size}-long" if "long" in rest else size


@pytest.mark.parametrize("stage", [sft, cadpo])
@pytest.mark.parametrize("variant", pods.RECIPES)
def test_a_recipe_says_where_and_how_and_never_what_is_computed(stage, variant):
    recipe, plain = stage.get_config(variant), stage.get_config(base_of(variant))
    assert recipe.topology and recipe.data.batch_examples == {sft: 128, cadpo: 64}[stage]
    if recipe.lora.rank:
        assert recipe.root != plain.root
        plain.lora.rank, plain.init.checkpoint = recipe.lora.rank, recipe.init.checkpoint
        plain.data.path = recipe.data.path
        if stage is cadpo:
            plain.data.pairs = recipe.data.pairs
    assert identity(recipe) == identity(plain)


@pytest.mark.parametrize(("stage", "chunk"), [(sft, 704), (cadpo, 512)])
def test_chunks_of_the_vocabulary_are_longer_on_a_v6e_and_divide_the_targets(stage, chunk):
    config = stage.get_config("7b-v6e-256")
    compute = Compute(
        dtype="bfloat16", remat="none", head_chunk=config.compute.head_chunk, frame_patches=1
    )
    assert compute.chunk_of(config.data.targets) == chunk
    assert stage.get_config("7b-v5e-256").compute.head_chunk == 256


@pytest.mark.parametrize("stage", [sft, cadpo])
@pytest.mark.parametrize("variant", pods.GPU_RECIPES)
def test_a_recipe_for_one_gpu_is_the_run_that_it_is_on_a_pod(stage, variant):
    on_pod = variant.removesuffix("gpu") + ("v5e-16" if "lora" in variant else "v5e-32")
    config, same = stage.get_config(variant), stage.get_config(on_pod)
    assert not config.topology and config.compute.kernel == "auto"
    assert config.data.batch_rows == config.compute.microbatches
    assert config.root == same.root and identity(config) == identity(same)


def test_how_a_host_loads_is_no_part_of_what_a_run_is():
    config = sft.get_config("tiny")
    before = identity(config)
    config.data.threads, config.data.workers = 7, 3
    assert identity(config) == before


def test_stage_2_of_a_recipe_starts_from_its_stage_1():
    config = cadpo.get_config("7b-lora-v5e-16")
    first, *links = chain.steps(config, "configs/cadpo.py:7b-lora-v5e-16", ())
    assert first.name == "sft" and "--config=configs/sft.py:7b-lora-v5e-16" in first.command
    assert config.init.checkpoint == "runs/7b-lora/sft"
    assert {link.name for link in links} >= {"pairs", "cadpo", "export"}


@pytest.mark.parametrize("stage", [sft, cadpo])
def test_a_variant_that_is_none_is_refused_with_those_that_are(stage):
    with pytest.raises(ValueError, match=r"no variant '7b-v4-8'; choose from .*7b-v5e-256"):
        stage.get_config("7b-v4-8")


def test_every_recipe_stands_in_the_table_of_what_the_compiler_says():
    table = Path("docs/aot_table.md").read_text(encoding="utf-8")
    assert not [variant for variant in pods.RECIPES if f"`{variant}`" not in table]


@pytest.mark.parametrize("stage", [sft, cadpo])
def test_answers_to_long_clips_have_no_larger_a_cache(stage):
    def slots(variant):
        config = stage.get_config(variant)
        row = config.data.length + 2 * config.data.response
        return config.generation.batch_size * (row + config.generation.max_new_tokens)

    assert slots("7b-long") <= slots("7b")
