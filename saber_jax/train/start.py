"""The weights a run starts from: random ones, a checkpoint's, or a base with fresh adapters."""

import dataclasses
import functools
from pathlib import Path

import jax
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from saber_jax.models import lora, saber
from saber_jax.models.config import SaberConfig
from saber_jax.train import checkpoint
from saber_jax.train.setup import Setup
from saber_jax.train.step import TrainState, flatten


def base_checkpoint(config: ConfigDict, stage: Setup, workdir: Path) -> Path | None:
    """Where the weights lie that adapters are for; None without LoRA.

    Random ones are drawn once and kept in WORKDIR/base.
    """
    if stage.cfg.lora is None:
        return None
    if config.init.checkpoint:
        return Path(config.init.checkpoint)
    base, bare = workdir / "base", _bare(stage.cfg)
    if not (base / checkpoint.MODEL_FILE).exists():
        shardings = saber.without_lora(stage.param_shardings)
        checkpoint.save_params(base, _random(bare, _key(config), shardings), bare)
    return base


def params(config: ConfigDict, stage: Setup, base: Path | None) -> dict:
    """From config.init.checkpoint, or random; given a base, its weights and fresh adapters."""
    shardings = stage.param_shardings
    if base is None and config.init.checkpoint:
        return checkpoint.load_params(config.init.checkpoint, stage.cfg, shardings)
    if base is None:
        return _random(stage.cfg, _key(config), shardings)
    init = functools.partial(saber.init_lora, stage.cfg)
    adapters = jax.jit(init, out_shardings=shardings[lora.ADAPTERS])(_key(config))
    return _base_params(stage, base) | {lora.ADAPTERS: adapters}


def layout(stage: Setup, base: Path | None) -> TrainState:
    """What to restore into: `stage.state`, where a base stands for the weights that it holds."""
    if base is None:
        return stage.state
    under = flatten(_base_params(stage, base))
    frozen = {name: under.get(name, leaf) for name, leaf in stage.state.frozen.items()}
    return dataclasses.replace(stage.state, frozen=frozen)


def _base_params(stage: Setup, base: Path) -> dict:
    shardings = saber.without_lora(stage.param_shardings)
    return checkpoint.load_params(base, _bare(stage.cfg), shardings)


def _key(config: ConfigDict) -> Key[Array, ""]:
    # rbg: the default generator takes half a minute to compile for the tiny model alone.
    return jax.random.key(config.seed, impl="rbg")


def _random(cfg: SaberConfig, key: Key[Array, ""], shardings: dict) -> dict:
    return jax.jit(functools.partial(saber.init, cfg), out_shardings=shardings)(key)


def _bare(cfg: SaberConfig) -> SaberConfig:
    return dataclasses.replace(cfg, lora=None)
