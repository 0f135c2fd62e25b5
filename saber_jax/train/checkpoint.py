"""Checkpoints: the contents of a work directory, saving, and loading.

WORKDIR/model.json            the network's config, the sampling of media, the stage
WORKDIR/tokenizer.model|json  the vocabulary
WORKDIR/checkpoints/STEP/     Orbax items: params, opt_state, meta and digests

The digest of every array is saved with it and compared when it is read (train/saved.py), so that
damaged weights are never used.

A LoRA run saves only what it trains. `base` in model.json names the checkpoint with the frozen
weights, its step and a hash, so that another checkpoint in its place is refused. Loading WORKDIR
returns base and adapters together.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from saber_jax.data.tokenizer import Tokenizer
from saber_jax.data.tokenizer import copy as copy_tokenizer
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.runs import buckets, checksums, console, distributed, files, manifest
from saber_jax.runs.files import read_json, write_json
from saber_jax.train import saved
from saber_jax.train.step import TrainState
from saber_jax.tree import flatten, merge

MODEL_FILE = "model.json"
STAGES = ("sft", "cadpo")  # Work directories in the root of a chain.
ITEMS = ("params", "opt_state", "meta", saved.DIGESTS)


class SaveError(Exception):
    """A checkpoint was not written; the message gives the reason and the last complete step."""


class Checkpoints:
    """Saves asynchronously, keeps the last two, and restores onto any mesh.

    Removes what killed saves left, so only the holder of the work directory's lock may make one.
    With `frozen` False the frozen weights, which are in the base, are neither saved nor restored.
    With `strict` a damaged step is an error; otherwise it is renamed and the one before is used.
    """

    def __init__(
        self, workdir: str | Path, *, every: int, frozen: bool = True, strict: bool = False
    ):
        self._workdir, self._every = Path(workdir), every
        self._frozen, self._strict = frozen, strict
        console.quiet_orbax()
        if jax.process_index() == 0:
            saved.remove_unfinished(self._workdir)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            enable_async_checkpointing=True,
            # Otherwise the threads that write arrays wait minutes for folders that a full disk
            # refused, and Python waits for these threads when it exits.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, barrier_sync_fn=distributed.meet_to_save
            ),
        )
        self._manager = ocp.CheckpointManager(
            buckets.native(Path(workdir) / "checkpoints"), options=options, item_names=ITEMS
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step % self._every == 0

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves the step unless it exists. `meta` is JSON that has to match when the run resumes.

        Raises SaveError if this save or the one before it failed.
        """
        step = int(meta["step"])
        if step == self.latest():
            return
        about = saved.described(self._arrays(state)) | {saved.META: checksums.of_json(meta)}
        with self._saving():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(self._saved(state)),
                    opt_state=ocp.args.StandardSave(state.opt_state),
                    meta=ocp.args.JsonSave(meta),
                    digests=ocp.args.JsonSave(checksums.sealed(about)),
                ),
                force=True,
            )

    def meta(self) -> dict[str, Any]:
        """The `meta` of the latest state."""
        return saved.read_meta(self._folder(self.latest()))

    def restore(self, abstract: TrainState, meta: dict[str, Any]) -> TrainState | None:
        """The newest undamaged state, with the shardings of `abstract`; None if there is none.

        Newer steps that are damaged are renamed to STEP.damaged, and process 0 prints a warning.
        Frozen weights that were not saved are returned as in `abstract`. Raises ValueError if
        `meta` differs in anything but the step. Raises DamagedError for a damaged step if `strict`,
        or if only this one of several processes sees the damage; the step is renamed in that case
        too. Raises UnreachableError, and renames nothing, if storage does not answer.
        """
        while (step := self.latest()) is not None:
            try:
                return self._restored(self._folder(step), abstract, meta)
            except saved.DamagedError as error:
                if self._strict:
                    raise saved.DamagedError(
                        f"{error} Set config.strict_restore to False to go on from the step before."
                    ) from error
                self._set_aside(step, error)
        return None

    def _restored(self, folder: Path, abstract: TrainState, meta: dict[str, Any]) -> TrainState:
        if why := saved.problem(folder, ITEMS):
            raise saved.DamagedError(f"{folder} is damaged: {why}.")
        stored = saved.read_meta(folder)
        step = stored["step"]
        ours = {key: value for key, value in meta.items() if key != "step"}
        manifest.check(
            {key: stored.get(key) for key in ours},
            ours,
            what=f"The checkpoint at step {step} belongs to another run",
            remedy="Give the new run a --workdir of its own, or go back to the settings and data "
            "of the old one.",
        )
        saved.check_shapes(folder, self._arrays(abstract))
        restored = self._read(folder, abstract)
        saved.check(
            folder,
            saved.named(restored["params"], "params")
            | saved.named(restored["opt_state"], "opt_state"),
        )
        params = flatten(restored["params"])
        return TrainState(
            step=jax.device_put(np.int32(step), abstract.step.sharding),
            trainable={name: params[name] for name in abstract.trainable},
            frozen={name: params.get(name, leaf) for name, leaf in abstract.frozen.items()},
            opt_state=restored["opt_state"],
        )

    def _read(self, folder: Path, abstract: TrainState) -> Any:
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(self._saved(abstract)),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
        )
        try:
            return saved.reading(lambda: self._manager.restore(int(folder.name), args=args))
        except Exception as error:
            damaged = saved.DamagedError(saved.damage(folder, error))
            if jax.process_count() > 1 and not self._strict:
                # The other processes wait inside Orbax for this one, so it has to exit.
                place = saved.set_aside(folder)
                raise SystemExit(f"{damaged} It is {place.name} now; start again.") from error
            raise damaged from error

    def _set_aside(self, step: int, error: saved.DamagedError) -> None:
        distributed.barrier("all have read the damaged step")
        if jax.process_index() == 0:
            place = saved.set_aside(self._folder(step))
            print(f"WARNING: {error} It is kept as {place.name}.", file=sys.stderr, flush=True)
        distributed.barrier("it is set aside")
        self._manager.reload()
        if jax.process_index() == 0:
            before = self.latest()
            text = "the run begins again at step 0" if before is None else f"step {before} is used"
            print(f"WARNING: {text} instead.", file=sys.stderr, flush=True)

    def _folder(self, step: int | None) -> Path:
        return (self._workdir / "checkpoints" / str(step)).absolute()

    def _saved(self, state: TrainState) -> dict:
        return state.params if self._frozen else merge(state.trainable)

    def _arrays(self, state: TrainState) -> dict[str, Any]:
        return saved.named(self._saved(state), "params") | saved.named(state.opt_state, "opt_state")

    def close(self) -> None:
        """Waits for the last save. Raises SaveError if it failed."""
        with self._saving():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Replaces Orbax's error output for a failed save by a SaveError with one sentence."""
        try:
            yield
        except Exception as error:
            whole = [s.name for s in saved.steps(self._workdir) if not saved.problem(s, ITEMS)]
            kept = f"step {whole[-1]} is whole" if whole else "there is no earlier one"
            raise SaveError(
                f"A checkpoint could not be written to {self._workdir}: {saved.cause(error)}; "
                f"{kept}. Make room or repair the disk; the same command goes on from there."
            ) from error


def write_model_files(
    workdir: str | Path, cfg: SaberConfig, tokenizer: Tokenizer, **about: Any
) -> None:
    """Writes model.json and the tokenizer. `about` is added to model.json."""
    workdir = Path(workdir)
    files.make_folder(workdir)
    target = workdir / f"tokenizer{tokenizer.path.suffix}"
    held = files.read_bytes(target) if files.exists(target) else None
    same = held == files.read_bytes(tokenizer.path)
    if not same or not files.exists(checksums.beside(target)):
        copy_tokenizer(tokenizer.path, workdir)
    write_model_file(workdir, cfg, **about)


def write_model_file(workdir: str | Path, cfg: SaberConfig, **about: Any) -> None:
    """WORKDIR/model.json, with a checksum of itself."""
    # Through JSON, which has no tuples, so that the checksum is that of the content when read.
    content = json.loads(json.dumps({"model": cfg.to_dict(), **about}))
    write_json(Path(workdir) / MODEL_FILE, checksums.sealed(content))


def read_model_file(workdir: str | Path) -> dict[str, Any]:
    """Reads WORKDIR/model.json.

    Raises FileNotFoundError if WORKDIR is not a checkpoint directory, DamagedError if the file was
    changed or damaged.
    """
    path = Path(workdir) / MODEL_FILE
    if not files.exists(path):
        raise FileNotFoundError(
            f"{workdir} is not a checkpoint: it has no {MODEL_FILE}. {_instead(path.parent)}"
        )
    content = read_json(path)
    if not isinstance(content, dict):
        raise saved.DamagedError(f"{path} is damaged: it holds no JSON object.")
    if content.pop(checksums.CHECKSUM, None) != checksums.of_json(content):
        raise saved.DamagedError(
            f"{path} is damaged: it is not what was written. Copy it again, or repeat the command "
            "that made it."
        )
    return content


def _instead(directory: Path) -> str:
    """What to give instead of a directory that is not a checkpoint."""
    if inside := [stage for stage in STAGES if files.exists(directory / stage / MODEL_FILE)]:
        return f"Give one that it contains: {', '.join(str(directory / name) for name in inside)}."
    config = directory / "config.json"
    if files.exists(config) and '"architectures"' in files.read_text(config):
        return (
            f"It is a HuggingFace directory, which `python -m saber_jax.hf.load --hf_dir "
            f"{directory} --out WORKDIR` converts."
        )
    return "Give the --workdir of a training run, or what `python -m saber_jax.hf.load` wrote."


def load_params(
    workdir: str | Path,
    cfg: SaberConfig,
    shardings: dict | None = None,
    dtypes: Mapping[str, DTypeLike] | None = None,
) -> dict:
    """Parameters of the latest checkpoint, as a nested dict, checked against `cfg` name by name.

    They are placed by `shardings`, or else on one device, and never with the saved shardings,
    because a checkpoint of a pod must also load on a laptop. `dtypes` maps flattened names to
    dtypes; other parameters keep the stored one.

    A LoRA checkpoint gives base and adapters. If `cfg` has no LoRA, as for a run that starts from
    another one's result, it gives the base with the adapters merged.
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
    step = saved.newest(workdir)
    item = buckets.native(step / "params")
    with ocp.StandardCheckpointer() as checkpointer:
        with saved.readable(step):
            stored = flatten(checkpointer.metadata(item).item_metadata.tree)
        held = {name: leaf for name, leaf in expected.items() if base is None or name in stored}
        saber.check_tree(merge(held), merge(stored), dtypes=False)
        layout = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, stored[name].dtype, sharding=places.get(name, here)
            )
            for name, leaf in held.items()
        }
        with saved.readable(step):
            params = flatten(checkpointer.restore(item, merge(layout)))
            saved.check(step, {f"params/{n}": leaf for n, leaf in params.items()}, partly=True)
    for name in params.keys() & dtypes.keys():
        params[name] = params[name].astype(dtypes[name])  # One at a time: both may not fit.
    if base is not None:
        bare = dataclasses.replace(cfg, lora=None)
        under = shardings and saber.without_lora(shardings)
        params = flatten(load_params(find_base(workdir, base), bare, under, dtypes)) | params
    saber.check_tree(merge(expected), merge(params), dtypes=False)
    return merge(params)


def digest(workdir: str | Path) -> str:
    """Sixteen hex digits that change with any parameter that `load_params` would return.

    They are computed from the stored digests, without reading weights. Raises FileNotFoundError or
    DamagedError if a file is missing, as `load_params` does.
    """
    about, step = read_model_file(workdir), saved.newest(workdir)
    parts = {"lora": about["model"].get("lora"), "params": saved.digests_of(step, "params")}
    if "base" in about:
        parts["base"] = digest(find_base(workdir, about["base"]))
    return manifest.digest(parts)


def save_params(
    workdir: str | Path, params: dict, cfg: SaberConfig, *, step: int = 0, **about: Any
) -> None:
    """Saves a checkpoint of weights only. model.json is written last and marks it as complete.

    Raises SaveError if the disk refuses it.
    """
    place = (Path(workdir) / "checkpoints" / str(step)).absolute()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(buckets.native(place / "params"), params)
        saved.write_digests(place, saved.described(saved.named(params, "params")))
        write_model_file(workdir, cfg, **about)
    except Exception as error:  # Orbax and TensorStore raise many types.
        raise SaveError(
            f"Weights could not be written to {workdir}: {saved.cause(error)}. Make room or repair "
            "the disk; the same command goes on."
        ) from error


def describe_base(workdir: str | Path, base: str | Path) -> dict[str, str]:
    """The entry `base` of model.json of `workdir`: the checkpoint with its frozen weights."""
    newest = saved.newest(base)
    return {
        "checkpoint": os.path.relpath(base, workdir),
        "step": newest.name,
        "saved": _identity(newest),
    }


def find_base(workdir: str | Path, described: dict[str, str]) -> Path:
    """The directory that `describe_base` described, at its old path or moved along with `workdir`.

    Raises ValueError if it contains other weights.
    """
    base = Path(os.path.normpath(Path(workdir) / described["checkpoint"]))
    newest = saved.newest(base)
    if (newest.name, _identity(newest)) != (described["step"], described["saved"]):
        raise ValueError(
            f"{workdir} holds adapters for step {described['step']} of {base}, which now holds "
            f"other weights (step {newest.name}). Bring the old ones back, or train again."
        )
    return base


def _identity(step: Path) -> str:
    """A hash that differs between any two saves but not between copies of a checkpoint."""
    # The manifest contains random names of data files.
    return hashlib.sha256(files.read_bytes(step / "params" / "manifest.ocdbt")).hexdigest()[:16]
