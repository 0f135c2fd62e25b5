"""Checkpoints: a run's work directory, what is in it, and how to get a model out of it.

WORKDIR/model.json            the network's shape, how media was sampled, which stage made it
WORKDIR/tokenizer.model|json  the vocabulary
WORKDIR/checkpoints/STEP/     Orbax: params, opt_state and meta, each an item of its own

A run with LoRA saves only what it trains: model.json's `base` names the checkpoint that holds the
frozen weights, its step and a hash, so that another one that took its place is refused. Whoever
loads WORKDIR gets base and adapters together and need not know.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from saber_jax.data.tokenizer import Tokenizer
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.runs import manifest
from saber_jax.runs.files import write_json
from saber_jax.train.step import TrainState
from saber_jax.tree import flatten, merge

MODEL_FILE = "model.json"

# Items that a CheckpointManager wrote have no metadata file of their own, and need none.
logging.getLogger("absl").addFilter(
    lambda record: not record.getMessage().startswith("Metadata file does not exist")
)


class Checkpoints:
    """Saves asynchronously, keeps the last two, and restores onto any mesh.

    With `frozen` False the frozen weights are neither saved nor restored: they lie in the base.
    """

    def __init__(self, workdir: str | Path, *, every: int, frozen: bool = True):
        self._every, self._frozen = every, frozen
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(
            (Path(workdir) / "checkpoints").absolute(),
            options=options,
            item_names=("params", "opt_state", "meta"),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether the interval asks for a checkpoint after `step` steps."""
        return step % self._every == 0

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves, if that step is not saved yet. `meta` is JSON: what must match for a resume."""
        step = int(meta["step"])
        if step == self.latest():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(self._saved(state)),
                opt_state=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave(meta),
            ),
            force=True,
        )

    def meta(self) -> dict[str, Any]:
        """What was saved beside the latest state."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(self.latest(), args=args)["meta"]

    def restore(self, abstract: TrainState, meta: dict[str, Any]) -> TrainState:
        """The latest state, laid out as `abstract` says.

        Frozen weights that were not saved come back as `abstract` has them. Raises ValueError when
        its meta differs in anything but the step.
        """
        stored = self.meta()
        step = stored["step"]
        ours = {key: value for key, value in meta.items() if key != "step"}
        manifest.check(
            {key: stored.get(key) for key in ours},
            ours,
            what=f"The checkpoint at step {step} belongs to another run",
            remedy="Give the new run a --workdir of its own, or go back to the settings and data "
            "of the old one.",
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(self._saved(abstract)),
                opt_state=ocp.args.StandardRestore(abstract.opt_state),
            ),
        )
        params = flatten(restored["params"])
        return TrainState(
            step=jax.device_put(np.int32(step), abstract.step.sharding),
            trainable={name: params[name] for name in abstract.trainable},
            frozen={name: params.get(name, leaf) for name, leaf in abstract.frozen.items()},
            opt_state=restored["opt_state"],
        )

    def _saved(self, state: TrainState) -> dict:
        return state.params if self._frozen else merge(state.trainable)

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
    write_model_file(workdir, cfg, **about)


def write_model_file(workdir: str | Path, cfg: SaberConfig, **about: Any) -> None:
    """WORKDIR/model.json."""
    write_json(Path(workdir) / MODEL_FILE, {"model": cfg.to_dict(), **about})


def read_model_file(workdir: str | Path) -> dict[str, Any]:
    """WORKDIR/model.json. Raises FileNotFoundError that says what a checkpoint directory is."""
    path = Path(workdir) / MODEL_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} is not a checkpoint: it has no {MODEL_FILE}. Give the --workdir of a "
            "training run, or what `python -m saber_jax.hf.load` wrote."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def load_params(
    workdir: str | Path,
    cfg: SaberConfig,
    shardings: dict | None = None,
    dtypes: Mapping[str, DTypeLike] | None = None,
) -> dict:
    """Parameters of the latest checkpoint, as a nested dict, checked against `cfg` name by name.

    They go where `shardings` says, or else to one device: never where they were when they were
    saved, because a pod's checkpoint must also load on a laptop. `dtypes` maps flattened names to
    what they are wanted in; the others stay as they are stored.

    With LoRA they are those of base and adapters. Asked for under a `cfg` without LoRA, which is
    how a run starts from another's result, they are the base with its adapters merged into it.
    """
    dtypes = dtypes or {}
    stored = SaberConfig.from_dict(read_model_file(workdir)["model"])
    if stored.lora is None or cfg.lora is not None:
        return _restore(workdir, cfg, shardings, dtypes)
    layout = shardings
    if shardings is not None:
        mesh = jax.tree.leaves(shardings)[0].mesh
        layout = saber.shardings(stored, mesh)
    params = _restore(workdir, stored, layout, dtypes)

    def merged(base, adapters):
        return saber.merge_lora(base | adapters, stored)

    base = saber.without_lora(params)
    adapters = {name: params[name] for name in params.keys() - base.keys()}
    return jax.jit(merged, donate_argnums=0, out_shardings=shardings)(base, adapters)


def _restore(
    workdir: str | Path, cfg: SaberConfig, shardings: dict | None, dtypes: Mapping[str, DTypeLike]
) -> dict:
    base = read_model_file(workdir).get("base")
    expected = flatten(saber.abstract(cfg))
    places = flatten(shardings) if shardings is not None else {}
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    item = latest(workdir) / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        stored = flatten(checkpointer.metadata(item).item_metadata.tree)
        held = {name: leaf for name, leaf in expected.items() if base is None or name in stored}
        saber.check_tree(merge(held), merge(stored), dtypes=False)
        layout = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                dtypes.get(name, stored[name].dtype),
                sharding=places.get(name, here),
            )
            for name, leaf in held.items()
        }
        params = flatten(checkpointer.restore(item, merge(layout)))
    if base is not None:
        bare = dataclasses.replace(cfg, lora=None)
        under = shardings and saber.without_lora(shardings)
        params = flatten(load_params(find_base(workdir, base), bare, under, dtypes)) | params
    saber.check_tree(merge(expected), merge(params), dtypes=False)
    return merge(params)


def latest(workdir: str | Path) -> Path:
    """The newest step that WORKDIR holds. Raises FileNotFoundError if there is none."""
    directory = Path(workdir) / "checkpoints"
    steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())
    if not steps:
        raise FileNotFoundError(f"{workdir} has no finished checkpoint yet; train it first.")
    return (directory / str(steps[-1])).absolute()


def save_params(workdir: str | Path, params: dict, cfg: SaberConfig, **about: Any) -> None:
    """A checkpoint of weights alone, complete when its model.json is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((Path(workdir) / "checkpoints" / "0" / "params").absolute(), params)
    write_model_file(workdir, cfg, **about)


def describe_base(workdir: str | Path, base: str | Path) -> dict[str, str]:
    """What model.json of `workdir` says about the checkpoint that holds its frozen weights."""
    newest = latest(base)
    return {
        "checkpoint": os.path.relpath(base, workdir),
        "step": newest.name,
        "saved": _identity(newest),
    }


def find_base(workdir: str | Path, described: dict[str, str]) -> Path:
    """The directory that `describe_base` described, at the place it was or moved along with us.

    Raises ValueError if it holds other weights by now.
    """
    base = Path(os.path.normpath(Path(workdir) / described["checkpoint"]))
    newest = latest(base)
    if (newest.name, _identity(newest)) != (described["step"], described["saved"]):
        raise ValueError(
            f"{workdir} holds adapters for step {described['step']} of {base}, which now holds "
            f"other weights (step {newest.name}). Bring the old ones back, or train again."
        )
    return base


def _identity(step: Path) -> str:
    """Differs between any two saves, and stays when a checkpoint is copied."""
    # The manifest names data files by random numbers.
    return hashlib.sha256((step / "params" / "manifest.ocdbt").read_bytes()).hexdigest()[:16]
