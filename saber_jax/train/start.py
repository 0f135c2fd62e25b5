"""The start of a run: checks of the machine, starting weights, and files of the work directory.

Starting weights are random, from a checkpoint, or a base with new adapters.
"""

import dataclasses
import functools
from pathlib import Path

import jax
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from saber_jax import sharding
from saber_jax.inputs import RunInputs
from saber_jax.models import lora, saber
from saber_jax.models.config import SaberConfig
from saber_jax.runs import distributed, files, manifest
from saber_jax.runs.console import log, warn
from saber_jax.train import best, checkpoint, nonfinite, profile, saved
from saber_jax.train.stage import Stage
from saber_jax.train.step import TrainState
from saber_jax.tree import flatten, merge


def refuse_large_model_on_cpu(config: ConfigDict) -> None:
    """Raises ValueError for 3B and larger models on a CPU, which would swap for hours."""
    if config.model != "tiny" and jax.default_backend() == "cpu":
        raise ValueError(
            f"{config.model} needs TPUs or GPUs and this machine has only a CPU. Run it where they "
            "are (README, `On a pod`), or train the embedded example here: "
            f"launch/tpu_run.sh configs/{config.stage}.py:tiny"
        )


def check(config: ConfigDict, stage: Stage) -> None:
    """Raises ValueError for settings of the loop that it would refuse later, and FileNotFoundError
    or ValueError unless config.init.checkpoint is complete or ""."""
    best.check(config, stage.validated)
    nonfinite.check(config.on_nonfinite)
    if config.profile.steps and config.steps is not None:
        profile.parse(config.profile.steps, config.steps)
    if config.init.checkpoint:
        checkpoint.read_model_file(config.init.checkpoint)
        saved.newest(config.init.checkpoint)


def describe(config: ConfigDict, stage: Stage, base: Path | None, inputs: RunInputs) -> None:
    """Prints what the run reads, and writes the model files of its work directory."""
    workdir = Path(config.workdir)
    about = {"stage": config.stage, "provenance": inputs.provenance}
    if base is not None:
        about["base"] = checkpoint.describe_base(workdir, base)
    if jax.process_index() == 0:
        checkpoint.write_model_files(workdir, stage.cfg, inputs.tokenizer, **about)
        for said in sharding.shared_by_fewer(stage.state.params, stage.cfg.widths, stage.mesh):
            warn(said)
    log(f"{config.stage}: {inputs.describe()}")


def base_checkpoint(config: ConfigDict, stage: Stage, workdir: Path) -> Path | None:
    """The checkpoint with the frozen weights of a LoRA run; None without LoRA.

    Random weights are drawn once and kept in WORKDIR/base.
    """
    if stage.cfg.lora is None:
        return None
    if config.init.checkpoint:
        return Path(config.init.checkpoint)
    base, bare = workdir / "base", _bare(stage.cfg)
    if not files.exists(base / checkpoint.MODEL_FILE):
        if jax.process_index() == 0:
            # Orbax refuses to overwrite what a killed attempt left.
            files.remove_folder(base, ignore_errors=True)
        distributed.barrier("the base has room")
        shardings = saber.without_lora(stage.param_shardings)
        init = jax.jit(functools.partial(saber.init, bare), out_shardings=shardings)
        checkpoint.save_params(base, init(_key(config)), bare)
    return base


def params(config: ConfigDict, stage: Stage, base: Path | None) -> dict:
    """Parameters from config.init.checkpoint, or random; with a base, its weights and new
    adapters."""
    shardings = stage.param_shardings
    if base is None and config.init.checkpoint:
        return checkpoint.load_params(
            config.init.checkpoint, stage.cfg, shardings, stage.param_dtypes
        )
    if base is None:
        return jax.jit(functools.partial(_random, stage), out_shardings=shardings)(_key(config))
    init = functools.partial(saber.init_lora, stage.cfg)
    adapters = jax.jit(init, out_shardings=shardings[lora.ADAPTERS])(_key(config))
    return _base_params(stage, base) | {lora.ADAPTERS: adapters}


class Weights:
    """The starting weights, `params`, loaded at the first call and kept until `forget`."""

    def __init__(self, config: ConfigDict, stage: Stage, base: Path | None):
        self._make = functools.partial(params, config, stage, base)
        self._held: dict | None = None

    def __call__(self) -> dict:
        if self._held is None:
            self._held = self._make()
        return self._held

    def forget(self) -> None:
        """Frees their memory for the weights of a checkpoint."""
        self._held = None


def weights_digest(config: ConfigDict, stage: Stage, base: Path | None) -> str:
    """Sixteen hex digits that change with any of the starting weights, except new adapters. They
    are computed from the stored digests of the checkpoint, without reading weights."""
    source = base or config.init.checkpoint
    if source:
        return checkpoint.digest(source)
    drawn = {"seed": config.seed, "network": stage.cfg.to_dict(), "jax": jax.__version__}
    return manifest.digest(drawn)


def layout(stage: Stage, base: Path | None) -> TrainState:
    """The state to restore into: `stage.state`, with frozen weights from the base if there is
    one."""
    if base is None:
        return stage.state
    under = flatten(_base_params(stage, base))
    frozen = {name: under.get(name, leaf) for name, leaf in stage.state.frozen.items()}
    return dataclasses.replace(stage.state, frozen=frozen)


def _base_params(stage: Stage, base: Path) -> dict:
    shardings = saber.without_lora(stage.param_shardings)
    return checkpoint.load_params(base, _bare(stage.cfg), shardings, stage.param_dtypes)


def _key(config: ConfigDict) -> Key[Array, ""]:
    # rbg: the default generator takes half a minute to compile for the tiny model alone.
    return jax.random.key(config.seed, impl="rbg")


def _random(stage: Stage, key: Key[Array, ""]) -> dict:
    drawn = flatten(saber.init(stage.cfg, key))
    return merge({name: leaf.astype(stage.param_dtypes[name]) for name, leaf in drawn.items()})


def _bare(cfg: SaberConfig) -> SaberConfig:
    return dataclasses.replace(cfg, lora=None)
