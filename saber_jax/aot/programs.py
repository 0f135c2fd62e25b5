"""Every program that a config runs on a pod, lowered from abstract inputs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from saber_jax import sharding
from saber_jax.batch import Prompts
from saber_jax.generate import decoding
from saber_jax.generate.prompts import most_prompts, rows_of
from saber_jax.train import flops
from saber_jax.train.stage import Stage
from saber_jax.tree import flatten

GENERATION = ("prefill", "decode")
NAMES = ("train", "reference", *GENERATION)


def lower(name: str, config: ConfigDict, stage: Stage) -> jax.stages.Lowered:
    """Raises ValueError for a program that the config does not run."""
    if name == "train":
        step = stage.train_step(skip=config.on_nonfinite == "skip")
        return step.lower(stage.state, stage.batch)
    if name == "reference":
        return stage.reference_step("whole").lower(stage.state.params, stage.batch)
    if name in GENERATION:
        # Pallas asks the mesh which GPU it lowers for; a train step has it inside of shard_map.
        with jax.sharding.use_abstract_mesh(stage.mesh.abstract_mesh):
            return _generation(name, config, stage)
    raise ValueError(f"There is no program {name!r}; there are {', '.join(NAMES)}.")


def _generation(name: str, config: ConfigDict, stage: Stage) -> jax.stages.Lowered:
    """Prompts as long as the config's rows, one a row, answered config.generation.batch_size at a
    time: `prefill` reads as many in each group as generate/prompts.py does."""
    mesh, compute = stage.mesh, stage.compute
    places = sharding.batch_rows(config.generation.batch_size, mesh)
    groups = sharding.shards(sharding.BATCH_AXES, mesh)
    new = groups * min(rows_of(stage.batch.text.tokens.shape[1]), most_prompts(places, groups))
    place, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def of(shape, dtype, where=everywhere) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    dtype = jnp.dtype(compute.dtype)
    params = jax.tree.map(lambda p: of(p.shape, dtype, p.sharding), stage.state.params)
    given, cached = stage.batch, sharding.cache_sharding(stage.cfg.text.kv_heads, mesh)
    program = decoding.Program(
        cfg=stage.cfg,
        dtype=dtype,
        greedy=True,
        prompt_slots=given.text.tokens.shape[1],
        max_new_tokens=config.generation.max_new_tokens,
        samples=1,
        groups=groups,
        kernel=compute.kernel,
        rows=place,
        cache=cached,
    )
    choice = decoding.TokenChoice(
        seed=of((), jnp.uint32),
        temperature=of((), jnp.float32),
        top_p=of((), jnp.float32),
        end=of((), jnp.int32),
        vocabulary=of((), jnp.int32),
    )
    state, cache = jax.eval_shape(lambda: decoding.blank(prompts=places, program=program))
    state = {k: of(v.shape, v.dtype, place if v.ndim else everywhere) for k, v in state.items()}
    cache = jax.tree.map(lambda leaf: of(leaf.shape, leaf.dtype, cached), cache)
    if name == "decode":
        count = of((), jnp.int32)
        layers = jax.eval_shape(
            lambda p: decoding.separate_layers(p, stage.cfg, dtype, mesh.devices.flat), params
        )
        layers = jax.tree.map(lambda leaf: of(leaf.shape, leaf.dtype), layers)
        return decoding.proceed.lower(
            params, layers, state, cache, count, count, choice, program=program
        )
    text, vision, audio = jax.tree.map(
        lambda leaf: of((new, *leaf.shape[1:]), leaf.dtype, place),
        (given.text, given.vision, given.audio),
    )
    slots = of((groups, new // groups), jnp.int32, place)
    batch = Prompts(text=text, vision=vision, audio=audio, ends=slots, lengths=slots)
    source = of((groups, places // groups), jnp.int32, place)
    answers = of((new,), jnp.uint32, place)
    program = dataclasses.replace(program, max_frame_patches=compute.frame_patches)
    return decoding.admit.lower(
        params, batch, source, answers, state, cache, choice, program=program
    )


def branch_shares(stage: Stage) -> dict[str, float]:
    """How often the vision tower takes either branch, by their scopes."""
    vision = stage.cfg.vision
    full = len(vision.full_attention_layers) / vision.depth
    return {"frame_attention": full, "window_attention": 1.0 - full}


@dataclasses.dataclass(frozen=True)
class FullRowCost:
    """What full rows ask for, over all devices: model FLOPs by tower, and tokens."""

    flops: dict[str, float]
    tokens: float
    targets: float


def full_row_cost(stage: Stage) -> FullRowCost:
    """Of one train step whose every slot, patch, chunk and target is real: one clip a row, frames
    and windows as large as they may be. The numerator of MFU is this times the rows' fill."""
    rows, length = stage.batch.text.tokens.shape
    response, patches = stage.compute.response, stage.batch.vision.patches.shape[1]
    shared, chunks = length - 2 * response, stage.batch.audio.mel.shape[1]
    steps = 100 * chunks
    counted = {
        "examples": rows,
        "tokens": rows * length,
        "text_pairs": rows * (_causal(shared) + 2 * (_causal(response) + response * shared)),
        "targets": rows * stage.batch.targets.tokens.shape[1],
        "patches": rows * patches,
        "units": rows * patches / 4,
        "window_pairs": rows * patches * stage.cfg.vision.window_patches,
        "frame_pairs": rows * patches * stage.compute.frame_patches,
        "chunks": rows * chunks,
        "mel_frames": rows * 2 * steps,
        "audio_steps": rows * steps,
        "audio_pairs": rows * steps * 100,
        "audio_tokens": rows * steps / 2,
    }
    sizes = flops.parameter_sizes(flatten(stage.state.params))
    by_tower = flops.train_flops(stage.cfg, sizes, stage.state.trainable, counted)
    return FullRowCost(by_tower, counted["tokens"], counted["targets"])


def _causal(length: int) -> float:
    return length * (length + 1) / 2
