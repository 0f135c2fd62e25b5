"""Compiled programs in files: a pod loads what `python -m saber_jax.aot --save` compiled elsewhere.

    FOLDER/KEY.executable

KEY is a hash of the program as jax hands it to the compiler (StableHLO, with the shardings), of
the compiler's options and of the versions of jax and of the compiler. So a file is only used for
the program that it was made of. Like any pickle, a file may run code when it is loaded: use only
files that you made.
"""

import hashlib
import importlib.metadata
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable

from saber_jax.runs.console import log, warn

SUFFIX = ".executable"
COMPILERS = ("jax", "jaxlib", "libtpu")


def key(lowered: jax.stages.Lowered, options: Mapping[str, str | bool]) -> str:
    """Thirty-two hex digits that change with anything that the executable depends on."""
    versions = {name: _version(name) for name in COMPILERS}
    digest = hashlib.sha256(repr((versions, sorted(options.items()))).encode())
    digest.update(lowered.as_text().encode())
    return digest.hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def save(
    lowered: jax.stages.Lowered,
    compiled: jax.stages.Compiled,
    folder: epath.Path,
    options: Mapping[str, str | bool],
) -> epath.Path:
    """Writes `compiled`, which was compiled from `lowered` with `options`; returns the file."""
    # The trees of arguments and results are left out: they cannot be pickled, and `load` has them.
    executable, _, _ = serialize_executable.serialize(compiled)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key(lowered, options)}{SUFFIX}"
    path.write_bytes(executable)
    return path


def load(
    lowered: jax.stages.Lowered,
    folder: epath.Path,
    options: Mapping[str, str | bool],
    devices: Sequence[Any],
) -> Callable[..., Any] | None:
    """The saved executable of `lowered` on `devices`, jax.Device in the order of their mesh.

    None if `folder` has none, or one that this machine cannot load; says which.
    """
    path = folder / f"{key(lowered, options)}{SUFFIX}"
    if not path.exists():
        others = len(list(folder.glob(f"*{SUFFIX}"))) if folder.exists() else 0
        if others:
            log(
                f"{folder} has {others} executables, but none of this program and these versions: "
                "it is compiled here."
            )
        return None
    try:
        executable = serialize_executable.deserialize_and_load(
            path.read_bytes(),
            jax.tree.structure(lowered.args_info),
            lowered.out_tree,
            execution_devices=list(devices),
        )
    # A truncated file, another compiler, or devices in another arrangement.
    except (jax.errors.JaxRuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        warn(f"{path} cannot be loaded: {error}. The program is compiled here instead.")
        return None
    log(f"loaded {path}: the step need not be compiled")
    return executable
