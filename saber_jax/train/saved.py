"""Step folders of a checkpoint: which are whole, and whether they hold what was saved.

    checkpoints/40/           params, opt_state, meta: items that Orbax writes
    checkpoints/40/digests/   name of every array -> dtype, shape and digest (train/digests.py)
    checkpoints/60.damaged/   a step that turned out damaged and is not used any more

A folder is whole when Orbax finished it and no item is missing. Whether its bytes are still the
ones that were written, only its digests tell, once its arrays are read.
"""

import contextlib
import errno
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array

from saber_jax.runs import buckets, speaking
from saber_jax.train import digests

DIGESTS = "digests"
MARKS = {
    **dict.fromkeys(("params", "opt_state"), "_METADATA"),
    **dict.fromkeys(("meta", DIGESTS), "metadata"),
}
"""A file that every item of this name has."""
NAMED = 3
"""Damaged arrays that a message names; it counts the others."""

PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "Input/output error", "Stale file handle")
PAUSES = (1, 4, 16)
"""Seconds between attempts to read."""


class DamagedError(ValueError):
    """A stored step is not what was saved. The message names the folder and what is wrong in it."""


def steps(workdir: str | Path) -> list[Path]:
    """Step folders, oldest first, whole or not."""
    found = [p for p in (Path(workdir) / "checkpoints").glob("*") if p.name.isdigit()]
    return sorted((p.absolute() for p in found), key=lambda p: int(p.name))


def problem(step: Path, items: tuple[str, ...] = ("params", DIGESTS)) -> str | None:
    """Why `step` is not whole; None when it is."""
    missing = [item for item in items if not (step / item / MARKS[item]).is_file()]
    # In a bucket there is no rename that makes a step appear as a whole.
    if buckets.mounted(step):
        parts = [step / item for item in items]
        missing += [str((p / buckets.COMMITTED).relative_to(step)) for p in parts if _open(p)]
    return f"{' and '.join(missing)} missing" if missing else None


def _open(item: Path) -> bool:
    """Whether nobody finished an item that lies in a bucket."""
    return item.is_dir() and not (item / buckets.COMMITTED).is_file()


def newest(workdir: str | Path) -> Path:
    """The newest step, for whoever only reads.

    Raises FileNotFoundError if there is none, DamagedError if it is not whole.
    """
    found = steps(workdir)
    if not found:
        raise FileNotFoundError(f"{workdir} has no finished checkpoint yet; train it first.")
    if why := problem(found[-1]):
        raise DamagedError(f"{found[-1]} is damaged: {why}. {advice(found[-1])}")
    return found[-1]


def advice(step: Path) -> str:
    """What somebody who only reads may do about a damaged step."""
    others = [other.name for other in steps(step.parent.parent) if int(other.name) < int(step.name)]
    if not others:
        return "It is the only one: make it again, or copy it again from where it came from."
    return (
        f"Give the training command again, which sets it aside and goes on from step {others[-1]}, "
        f"or rename it to {step.name}.damaged to use step {others[-1]} as it is."
    )


def set_aside(step: Path) -> Path:
    """Renames a step so that nobody takes it for one, and keeps it. Returns its new place."""
    place, count = step.with_name(f"{step.name}.damaged"), 1
    while place.exists():
        count += 1
        place = step.with_name(f"{step.name}.damaged-{count}")
    return step.rename(place)


def described(arrays: Mapping[str, Array]) -> dict[str, list]:
    """What `digests/` holds of these arrays. Every process must call it."""
    found = digests.of_arrays(arrays)
    return {name: entry(leaf, found[name]) for name, leaf in arrays.items()}


def entry(leaf: Any, digest: int) -> list:
    """Of one array, which may be anything with a dtype and a shape."""
    return [str(leaf.dtype), list(leaf.shape), digest]


def checksum(meta: Any) -> int:
    """Of JSON values."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def read_json(step: Path, item: str) -> dict[str, Any]:
    """What Orbax stored as a JSON item. Raises DamagedError when it is none."""
    try:
        value = json.loads((step / item / "metadata").read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"{step} is damaged: {item} missing.") from None
    except ValueError as error:  # Neither JSON nor text.
        raise DamagedError(f"{step} is damaged: {item} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{step} is damaged: {item} is no JSON object.")
    return value


def read_meta(step: Path) -> dict[str, Any]:
    """What a run saved beside its arrays. Raises DamagedError when it is not that any more."""
    meta = read_json(step, "meta")
    if checksum(meta) != read_json(step, DIGESTS).get("meta"):
        raise DamagedError(f"{step} is damaged: meta is not what was saved.")
    return meta


def digests_of(step: Path, item: str) -> dict[str, list]:
    """name -> [dtype, shape, digest] of the arrays of one item, as they were saved."""
    return {name: e for name, e in _entries(step).items() if name.startswith(f"{item}/")}


def check_shapes(step: Path, arrays: Mapping[str, Any]) -> None:
    """Raises ValueError when `step` was saved by a network or an optimizer of other shapes."""
    wanted = {n: tuple(e[:2]) for n, e in _entries(step).items()}
    ours = {n: (str(leaf.dtype), list(leaf.shape)) for n, leaf in arrays.items()}
    differ = sorted(n for n in wanted.keys() | ours.keys() if wanted.get(n) != ours.get(n))
    if differ:
        raise ValueError(
            f"{step} holds another network or optimizer: {differ[0]} is {wanted.get(differ[0])} "
            f"there and {ours.get(differ[0])} here, and {len(differ) - 1} more differ. Give the "
            "new run another --config.workdir, or go back to the code and settings of the old one."
        )


def check(step: Path, arrays: Mapping[str, Array], *, partly: bool = False) -> None:
    """Raises DamagedError naming those of `arrays` that are not what was saved in `step`, and
    those that were saved and are not there, unless only a part was read."""
    wanted = _entries(step)
    found = described(arrays)
    differ = [n for n in found if found[n] != wanted.get(n)]
    report(step, differ + ([] if partly else sorted(wanted.keys() - found.keys())))


def check_one(step: Path, name: str, leaf: Any, digest: int) -> None:
    """Raises DamagedError when `digest` is not that of the array that was saved as `name`."""
    if _entries(step).get(name) != entry(leaf, digest):
        report(step, [name])


def report(step: Path, differ: list[str]) -> None:
    """Raises DamagedError if any array differs."""
    if differ:
        others = f" and {len(differ) - NAMED} others" if len(differ) > NAMED else ""
        raise DamagedError(
            f"{step} is damaged: {', '.join(differ[:NAMED])}{others} "
            f"{'is' if len(differ) == 1 else 'are'} not what was saved."
        )


@contextlib.contextmanager
def readable(step: Path) -> Iterator[None]:
    """Whatever Orbax and TensorStore raise inside becomes a DamagedError with advice."""
    speaking.keep_orbax_brief()
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"{error} {advice(step)}") from error
    except Exception as error:
        raise DamagedError(f"{damage(step, error)} {advice(step)}") from error


def reading(read: Callable[[], Any]) -> Any:
    """`read()`, tried again a few times while storage is out of reach. One process only: several
    would lose each other inside Orbax."""
    for pause in PAUSES if jax.process_count() == 1 else ():
        try:
            return read()
        except Exception as error:
            if not any(word in str(error) for word in PASSING):
                raise
            print(f"storage: {brief(error)}; trying again in {pause} s", file=sys.stderr)
            time.sleep(pause)
    return read()


def damage(step: Path, error: BaseException) -> str:
    """What `error` says about a step. Raises it again when it is not about what is stored.

    Of damaged files Orbax and TensorStore raise about everything, AttributeError included.
    """
    if isinstance(error, PermissionError | MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        raise error
    return f"{step} is damaged: {brief(error)}."


def brief(error: BaseException) -> str:
    """The first line of what a library said, cut where it goes on about source files."""
    text = re.split(r" \[(?:source|tensorstore)|\n", str(error).strip(), maxsplit=1)[0]
    return f"{type(error).__name__}: {text[:300]}".rstrip(".: ")


def cause(error: BaseException) -> str:
    """The operating system's reason where there is one among the causes, or the first line."""
    found: BaseException | None = error
    text = str(error)
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return f"{found.strerror} ({found.filename})" if found.filename else found.strerror
        text += str(found)
        found = found.__cause__ or found.__context__
    known = (os.strerror(code) for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS))
    return next((reason for reason in known if reason in text), brief(error))


def _entries(step: Path) -> dict[str, list]:
    entries = {n: e for n, e in read_json(step, DIGESTS).items() if n != "meta"}
    if broken := [n for n, e in entries.items() if not isinstance(e, list) or len(e) != 3]:
        raise DamagedError(f"{step} is damaged: {DIGESTS} says nothing of {broken[0]}.")
    return entries


def write_digests(step: Path, entries: Mapping[str, list]) -> None:
    """For a step that holds weights alone. Every process must call it."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(buckets.native(step / DIGESTS), args=ocp.args.JsonSave(dict(entries)))


def named(tree: Any, prefix: str) -> dict[str, Any]:
    """{"opt_state/1/0/mu/text/embed": ...}: the leaves of any pytree, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in leaves
    }
