"""The cache of log pi_ref of every target of every preference pair, on disk.

The reference network is never in memory together with the policy; its log-probs are part of the
batch. A cache is a folder with one subfolder per view (the modality withheld from the reference):

    reference/whole/manifest.json                the inputs of the numbers
    reference/whole/00000.array_record ...       records of a pair's key and float32 log-probs

The key of a pair is a hash of its clip and texts. So the cache does not depend on the order or
packing of pairs, an interrupted computation continues with the missing ones, and new pairs are
added to existing ones. Inputs that are not in the key have to match, or the cache is refused.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from saber_jax.batch import Batch
from saber_jax.data import reading
from saber_jax.data.examples import Example
from saber_jax.data.loader import GlobalBatches
from saber_jax.data.quarantine import LeftOut
from saber_jax.data.steps import Rows
from saber_jax.data.withhold import VIEWS, View
from saber_jax.inputs import RunInputs
from saber_jax.models import saber
from saber_jax.runs import buckets, distributed, manifest
from saber_jax.runs.console import warn
from saber_jax.runs.files import listed, move, replacing
from saber_jax.runs.manifest import fingerprint
from saber_jax.runs.phases import PhaseClock
from saber_jax.train.stage import Stage

KEY_BYTES = 16
FLUSH_SECONDS = 30  # Interrupting the computation loses at most this much work.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceInputs:
    """Everything except the pair itself that reference log-probs depend on.

    `weights` from `start.weights_digest`, `processor` from `processor_digest`; `tokens` is a digest
    of the vocabulary, `media` of the records.
    """

    weights: str
    processor: str
    tokens: str
    media: str
    dtype: str


def processor_digest(examples: Sequence[Example]) -> str:
    """Sixteen hex digits: a hash of a few encoded clips (prompts, positions, pixels and sound).

    It changes if sampling, resizing, mel filters, the chat template or TMRoPE change.
    """
    digest = hashlib.sha256()
    for example in examples:
        prompt = example.prompt
        for array in (prompt.tokens, prompt.positions, example.patches, example.mel):
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


class ReferenceCache:
    """The log-probs of one view, by pair key. Only the first process reads and writes files, so
    that hosts with separate disks agree; `complete` sends the contents to the others."""

    def __init__(self, folder: Path, view: View, source: ReferenceInputs):
        """Opens or creates FOLDER/VIEW. Raises ValueError, naming the difference, if it was
        computed from other inputs, and OSError if storage fails."""
        self.folder, self.view = folder / view, view
        self.values: dict[bytes, Float[np.ndarray, " n"]] = {}
        if jax.process_index() > 0:
            return
        manifest.claim(
            self.folder / "manifest.json",
            dataclasses.asdict(source),
            what=f"{self.folder} holds reference log-probs of another run",
            remedy="Delete the folder to compute them again, or choose another with "
            "--config.reference=DIR.",
        )
        for path in listed(self.folder, "*.array_record"):
            try:
                self.values |= reading.tried_again(
                    functools.partial(_stored, path), forget=tuple, what=str(path)
                )
            except (RuntimeError, ValueError) as error:  # Of ArrayRecord's checksums, and of NumPy.
                aside = move(path, path.with_name(f"{path.name}.damaged"))
                reason = str(error).splitlines()[0][:200] if str(error) else "unreadable"
                warn(f"{path} is damaged: {reason}. It is kept as {aside.name} and computed again.")

    def add(self, values: dict[bytes, Float[np.ndarray, " n"]]) -> None:
        """Adds log-probs and writes them to a new file.

        Raises FloatingPointError, and writes nothing, if any is not finite.
        """
        if bad := [key for key, value in values.items() if not np.isfinite(value).all()]:
            raise FloatingPointError(
                f"The reference's log-probs of {len(bad)} pairs are not finite; its checkpoint is "
                "broken, or compute.dtype is too narrow for it."
            )
        self.values |= values
        if not values or jax.process_index() > 0:
            return
        # Above all numbers, those of damaged files included: nothing is overwritten.
        names = [path.name.split(".")[0] for path in listed(self.folder, "*.array_record*")]
        number = max((int(name) for name in names if name.isdigit()), default=-1) + 1
        path = self.folder / f"{number:05d}.array_record"
        with replacing(path) as partial:
            writer = ArrayRecordWriter(str(partial), "group_size:64")
            for key, value in values.items():
                writer.write(key + value.astype("<f4").tobytes())
            writer.close()


def _stored(path: Path) -> dict[bytes, Float[np.ndarray, " n"]]:
    """The log-probs of one file. A damaged file may raise exceptions of several types."""
    reader = ArrayRecordReader(str(buckets.native(path)))
    try:
        records = reader.read_all()
    finally:
        reader.close()
    return {record[:KEY_BYTES]: np.frombuffer(record[KEY_BYTES:], "<f4") for record in records}


class References:
    """Element i is float32 [views, targets] of pair i; NaN in views that were not requested."""

    def __init__(self, caches: Sequence[ReferenceCache], keys: Sequence[bytes]):
        self._values, self._keys = {cache.view: cache.values for cache in caches}, keys

    def __getitem__(self, index: int) -> Float[np.ndarray, "V n"]:
        key = self._keys[index]
        nothing = np.full_like(self._values["whole"][key], np.nan)
        return np.stack(
            [self._values[view][key] if view in self._values else nothing for view in VIEWS]
        )


def complete(
    cache: ReferenceCache,
    keys: Sequence[bytes],
    counts: Int[np.ndarray, "N"],
    plan: Callable[[list[int]], Rows],
    batches: Callable[[Rows], Iterator[tuple[Batch, Container[int]]]],
    log_probs: Callable[[Batch], Float[Array, "B T"]],
    *,
    batch_rows: int,
) -> int:
    """Computes the pairs of `keys` that are missing in `cache`; returns their number.

    `counts[i]` is the number of targets of pair i. `plan` assigns the missing pairs to rows,
    `batches` makes batches of `batch_rows` rows, which may end with empty rows, and `log_probs`
    scores the targets of a batch. With a batch come its pairs that could not be read; they are not
    in it and stay missing.

    Raises Preempted, with what was computed in the cache, if one of several processes received
    SIGTERM.
    """
    _share(cache, keys, counts)
    missing = [i for i, key in enumerate(keys) if key not in cache.values]
    rows = plan(missing) if missing else []
    found: dict[bytes, Float[np.ndarray, " n"]] = {}
    first, saved = 0, time.monotonic()
    with tqdm(
        total=len(missing),
        desc=f"reference log-probs ({cache.view})",
        unit="pair",
        disable=jax.process_index() != 0 or not missing,
    ) as bar:
        for batch, lost in batches(rows):
            values = multihost_utils.process_allgather(log_probs(batch), tiled=True)
            mine = rows[first : first + batch_rows]
            for row, indices in zip(np.asarray(values), mine, strict=False):
                held = [i for i in indices if i not in lost]
                parts = np.split(row, np.cumsum(counts[held]))
                found |= {keys[i]: part for i, part in zip(held, parts, strict=False)}
                bar.update(len(indices))
            first += batch_rows
            if distributed.told_to_stop():
                cache.add(found)
                raise distributed.Preempted("stopped among the reference log-probs, which are kept")
            if time.monotonic() - saved > FLUSH_SECONDS:
                cache.add(found)
                found, saved = {}, time.monotonic()
    cache.add(found)
    return len(missing)


def _share(cache: ReferenceCache, keys: Sequence[bytes], counts: Int[np.ndarray, " N"]) -> None:
    """Sends the contents that the first process has read to all processes."""
    if jax.process_count() == 1:
        return
    held = np.array([key in cache.values for key in keys])
    held = np.asarray(multihost_utils.broadcast_one_to_all(held))
    blank = [np.zeros(count, np.float32) for count in counts]
    flat = np.concatenate([cache.values.get(k, b) for k, b in zip(keys, blank, strict=True)])
    flat = np.asarray(multihost_utils.broadcast_one_to_all(flat))
    parts = np.split(flat, np.cumsum(counts)[:-1])
    cache.values |= {key: part for key, part, real in zip(keys, parts, held, strict=True) if real}


def reference_inputs(inputs: RunInputs, weights: str, dtype: str) -> ReferenceInputs:
    """What log-probs of `inputs` depend on besides the pairs. It does not change if pairs are added
    or removed, but with the mixture of records. `weights` is the digest of the reference."""
    examples = inputs.examples
    return ReferenceInputs(
        weights=weights,
        processor=processor_digest(examples.probes()),
        tokens=fingerprint(inputs.tokenizer.path.parent, inputs.tokenizer.path.name),
        media=examples.source.fingerprint,
        dtype=dtype,
    )


def with_references(
    config: ConfigDict,
    weights: str,
    params: Callable[[], dict],
    inputs: RunInputs,
    stage: Stage,
    clock: PhaseClock,
) -> RunInputs:
    """`inputs` with the reference log-probs of its pairs, in the views that the stage needs, and
    without the pairs whose records cannot be read.

    Log-probs that config.reference lacks are computed with the starting weights, whose digest is
    `weights`. `params` loads them, and is called only if some are missing.
    """
    source = reference_inputs(inputs, weights, stage.compute.dtype)
    keys = [inputs.examples.key(i) for i in range(len(inputs.examples))]

    def log_probs(view: View) -> Callable[[Batch], Float[Array, "B T"]]:
        step = stage.reference_step(view)

        def of_batch(batch: Batch) -> Float[Array, "B T"]:
            clock.enter("start")  # Tells the watchdog that there is progress.
            # New adapters do not change the output, so the base alone is the reference.
            return step(saber.without_lora(params()), batch)

        return of_batch

    def completed(view: View) -> ReferenceCache:
        cache, usable = ReferenceCache(Path(config.reference), view, source), inputs.usable
        # The cache numbers only the usable pairs.
        number = {int(i): n for n, i in enumerate(usable)}

        def batches(rows: Rows) -> Iterator[tuple[Batch, set[int]]]:
            made = inputs.batches(
                config, stage.mesh, [[int(usable[n]) for n in row] for row in rows]
            )
            for batch in made:
                yield batch, {number[entry.index] for entry in _left_out(made, batch)}

        complete(
            cache,
            [keys[i] for i in usable],
            inputs.usable_sizes[:, -1],
            lambda missing: [
                [number[i] for i in row] for row in inputs.plan.rows_of(usable[missing])
            ],
            batches,
            log_probs(view),
            batch_rows=config.data.batch_rows,
        )
        return cache

    # One after another: a pair that one view could not read is not usable in the next.
    references = References([completed(view) for view in stage.reference_views], keys)
    examples = inputs.examples.with_references(references)
    return dataclasses.replace(inputs, examples=examples.without(inputs.quarantine.indices))


def _left_out(batches: GlobalBatches, last: Batch) -> list[LeftOut]:
    """The examples of the `last` of `batches` that could not be read, in any process."""
    counts = multihost_utils.process_allgather(last.left_out, tiled=True)
    return batches.agree() if np.sum(counts) else []
