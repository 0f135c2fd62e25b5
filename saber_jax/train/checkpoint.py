"""Checkpoints: a run's work directory, what is in it, and how to get a model out of it.

WORKDIR/model.json            the network's shape, how media was sampled, which stage made it
WORKDIR/tokenizer.model|json  the vocabulary
WORKDIR/checkpoints/STEP/     Orbax: params, opt_state and meta, each an item of its own
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from saber_jax.data.tokenizer import Tokenizer, load_tokenizer
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.train.step import TrainState, flatten

MODEL_FILE = "model.json"


class Checkpoints:
    """Saves asynchronously, keeps the last two, and restores onto any mesh."""

    def __init__(self, workdir: str | Path, *, every: int):
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=every, max_to_keep=2, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(
            (Path(workdir) / "checkpoints").absolute(),
            options=options,
            item_names=("params", "opt_state", "meta"),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether the interval asks for a checkpoint after `step` steps."""
        return self._manager.should_save(step)

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves, if that step is not saved yet. `meta` is JSON: what must match for a resume."""
        step = int(meta["step"])
        if step == self.latest():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave(meta),
            ),
            force=True,
        )

    def restore(self, abstract: TrainState, meta: dict[str, Any]) -> TrainState:
        """The latest state, laid out as `abstract` says.

        Raises ValueError when its meta differs in anything but the step.
        """
        step = self.latest()
        stored = self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        ).meta
        changed = [key for key in meta if key != "step" and stored.get(key) != meta[key]]
        if changed:
            detail = "; ".join(f"{k} was {stored.get(k)}, is {meta[k]}" for k in changed)
            raise ValueError(
                f"The checkpoint at step {step} belongs to another run: {detail}. Give the new run "
                "a --workdir of its own, or go back to the settings and data of the old one."
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                opt_state=ocp.args.StandardRestore(abstract.opt_state),
            ),
        )
        params = flatten(restored.params)
        return TrainState(
            step=jax.device_put(np.int32(step), abstract.step.sharding),
            trainable={name: params[name] for name in abstract.trainable},
            frozen={name: params[name] for name in abstract.frozen},
            opt_state=restored.opt_state,
        )

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def write_model_files(
    workdir: str | Path, cfg: SaberConfig, tokenizer: Tokenizer, **about: Any
) -> None:
    """What makes WORKDIR readable on its own. `about` lands in model.json beside the shape."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    target = workdir / f"tokenizer{tokenizer.path.suffix}"
    if not target.exists() or target.read_bytes() != tokenizer.path.read_bytes():
        shutil.copyfile(tokenizer.path, target)
    temporary = workdir / f"{MODEL_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps({"model": cfg.to_dict(), **about}, indent=1), encoding="utf-8")
    os.replace(temporary, workdir / MODEL_FILE)


def read_model_file(workdir: str | Path) -> dict[str, Any]:
    """WORKDIR/model.json. Raises FileNotFoundError that says what a checkpoint directory is."""
    path = Path(workdir) / MODEL_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} is not a checkpoint: it has no {MODEL_FILE}. Give the --workdir of a "
            "training run, or what `python -m saber_jax.hf.load` wrote."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def load_params(workdir: str | Path, cfg: SaberConfig, shardings: dict | None = None) -> dict:
    """Parameters of the latest checkpoint, as a nested dict, checked against `cfg` name by name."""
    directory = Path(workdir) / "checkpoints"
    steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())
    if not steps:
        raise FileNotFoundError(f"{workdir} has no finished checkpoint yet; train it first.")
    abstract = saber.abstract(cfg)
    if shardings is not None:
        abstract = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            abstract,
            shardings,
        )
    item = (directory / str(steps[-1]) / "params").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(item).item_metadata.tree
        saber.check_tree(abstract, stored)
        return checkpointer.restore(item, abstract)


def load_model(workdir: str | Path) -> tuple[dict, SaberConfig, Tokenizer]:
    """Everything that generation, evaluation and export need from a finished run."""
    cfg = SaberConfig.from_dict(read_model_file(workdir)["model"])
    return load_params(workdir, cfg), cfg, load_tokenizer(workdir)
