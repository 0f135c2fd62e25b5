"""Answers from a trained model, greedy or sampled, with continuous batching of prompts."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from saber_jax import sharding
from saber_jax.data import decode, isolation
from saber_jax.data import withhold as hiding
from saber_jax.data.records import ClipSize, Record, clip_size
from saber_jax.data.tokenizer import Tokenizer, load_tokenizer
from saber_jax.data.withhold import Modality
from saber_jax.generate import decoding
from saber_jax.generate.prompts import PREFILL, PackedShape, Packer, most_prompts
from saber_jax.generate.running import RequestQueue, Running
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.models.kernels import Kernel
from saber_jax.runs.manifest import fingerprint
from saber_jax.train import checkpoint, copies, saved
from saber_jax.tree import flatten

STREAM_TOKENS = 8  # Tokens between two calls of `on_text`; without it the device is never asked.


class Generator:
    """Answers records, up to `batch_size` of them at a time (generate/running.py).

    Shapes grow to the largest clip seen. Call `reserve` with the sizes of everything that will come
    and the first call compiles once for all.
    """

    def __init__(
        self,
        params: saber.Params,
        cfg: SaberConfig,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        batch_size: int,
        prefill: int = PREFILL,
        dtype: jnp.dtype = jnp.float32,
    ):
        """Reads up to `prefill` prompts at a time, as soon as so many of the `batch_size` have
        answers. It reads at most half of `batch_size`, so that half of the places never wait empty.

        `params` may be sharded over a mesh; rows are then spread over its data axes.
        """
        if min(max_new_tokens, batch_size, prefill) < 1:
            raise ValueError(
                "max_new_tokens, batch_size and prefill must be at least 1, got "
                f"{max_new_tokens}, {batch_size} and {prefill}."
            )
        self._cfg, self._tokenizer, self._dtype = cfg, tokenizer, dtype
        self._max_new_tokens, self._end = max_new_tokens, tokenizer.id("<|im_end|>")
        self._params = jax.tree.map(lambda leaf: jax.device_put(leaf).astype(dtype), params)
        placed = jax.tree.leaves(self._params)[0].sharding
        self._devices = placed.device_set
        self._rows = self._everywhere = self._cache = None
        self._layers = decoding.separate_layers(self._params, cfg, dtype, self._devices)
        self._kernel: Kernel = decoding.prefill_kernel(self._devices)
        groups = 1
        if isinstance(placed, NamedSharding):
            mesh = placed.mesh
            assert isinstance(mesh, Mesh)  # No abstract one: these arrays exist.
            self._rows = sharding.batch_sharding(mesh)
            self._everywhere = sharding.replicated(mesh)
            self._cache = sharding.cache_sharding(cfg.text.kv_heads, mesh)
            groups = sharding.shards(sharding.BATCH_AXES, mesh)
        self._groups, self._batch_size = groups, -(-batch_size // groups) * groups
        prompts = most_prompts(self._batch_size, groups, prefill)
        self._packer = Packer(tokenizer, groups=groups, prompts=prompts)

    def reserve(self, sizes: Iterable[ClipSize]) -> None:
        """Makes room for clips of these sizes, answered in this order; see RecordSource.sizes."""
        self._packer.reserve(sizes)

    def respond(
        self,
        records: Sequence[Record],
        *,
        withhold: Modality | None = None,
        sampling: decoding.Sampling = decoding.GREEDY,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """One answer per record, without the end token.

        `on_text(i, text)` receives the whole text of record i so far, every few tokens.
        """
        if withhold:
            records = [hiding.withhold(record, withhold) for record in records]
        self.reserve(map(clip_size, records))
        size = self._batch_size
        parts = (records[first : first + size] for first in range(0, len(records), size))
        answers = self.respond_batches(parts, sampling=sampling, on_text=on_text)
        return [answer for batch in answers for answer in batch]

    def respond_batches(
        self,
        batches: Iterable[Sequence[Record]],
        *,
        sampling: decoding.Sampling = decoding.GREEDY,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[list[str]]:
        """Answers of batch after batch, in order.

        What is answered at a time does not depend on the batches: those that follow are read, and
        begun, while the last answers of one are still growing. Sizes should have been reserved.
        """
        numbered = _numbered(batches)
        answers = self._batches(numbered, 1, sampling, on_text)
        return ([text for (text,) in batch] for batch in answers)

    def sample_batches(
        self,
        batches: Iterable[tuple[int, Sequence[Record]]],
        samples: int,
        *,
        sampling: decoding.Sampling,
    ) -> Iterator[list[list[str]]]:
        """`samples` answers to each record of batch after batch, as `respond_batches` answers them.

        A record's prompt is read once, and its answers grow together from the one cache of it.
        Each batch comes with the number of its first record: with the same numbers and seed,
        batches answered in several calls get what one call would give them.
        """
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}.")
        return self._batches(batches, samples, sampling, None)

    def _batches(
        self,
        batches: Iterable[tuple[int, Sequence[Record]]],
        samples: int,
        sampling: decoding.Sampling,
        on_text: Callable[[int, str], None] | None,
    ) -> Iterator[list[list[str]]]:
        requests = RequestQueue(batches, self._packer, self._tokenizer)
        tokens = STREAM_TOKENS if on_text else self._max_new_tokens
        running = None
        # The host reads the next prompts while devices compute. Only this thread starts programs:
        # those with collectives, started from two, could wait for each other for ever.
        with ThreadPoolExecutor(max_workers=1) as reader:
            following = reader.submit(requests.next_group)
            while True:
                added = False
                while group := following.result():
                    if running is None or (not running.live and running.outgrown(group.shape)):
                        running = None  # Frees its kv cache before the larger one is allocated.
                        running = self._running(group.shape, samples, sampling)
                    if running.outgrown(group.shape) or not running.has_room(group.share):
                        break
                    running.admit(group)
                    added = True
                    following = reader.submit(requests.next_group)
                if running is None or not running.live:
                    break
                # The first token of an answer comes with its prompt.
                next_fits = group is not None and not running.outgrown(group.shape)
                until = group.share if group and next_fits else None
                running.proceed(max(tokens - added, 1), until=until)
                for request, answers, ended in running.collect():
                    if on_text is not None:
                        on_text(request.number, self._text(answers[0]))
                    if ended:
                        requests.answer(request, [self._text(answer) for answer in answers])
                yield from requests.answered_batches()
        yield from requests.answered_batches()  # Batches without any record.

    def _running(self, shape: PackedShape, samples: int, sampling: decoding.Sampling) -> Running:
        program = decoding.Program(
            cfg=self._cfg,
            dtype=self._dtype,
            greedy=sampling.temperature == 0,
            prompt_slots=shape.prompt,
            max_new_tokens=self._max_new_tokens,
            samples=samples,
            groups=self._groups,
            rows=self._rows,
            kernel=self._kernel,
            cache=self._cache,
        )
        choice = decoding.TokenChoice(
            seed=self._put(np.uint32(sampling.seed)),
            temperature=self._put(np.float32(sampling.temperature)),
            top_p=self._put(np.float32(sampling.top_p)),
            end=self._put(np.int32(self._end)),
            vocabulary=self._put(np.int32(self._tokenizer.vocab_size)),
        )
        return Running(
            self._params,
            self._layers,
            choice,
            program,
            places=self._batch_size,
            put=self._put,
            put_rows=self._put_rows,
        )

    def _put(self, values: Any) -> Any:
        return jax.device_put(values, self._everywhere)

    def _put_rows(self, values: Any) -> Any:
        return jax.device_put(values, self._rows)

    def _text(self, tokens: Int[np.ndarray, " n"]) -> str:
        ended = np.flatnonzero(tokens == self._end)
        return self._tokenizer.decode(tokens[: ended[0]] if len(ended) else tokens)


def _numbered(batches: Iterable[Sequence[Record]]) -> Iterator[tuple[int, Sequence[Record]]]:
    first = 0
    for batch in batches:
        yield first, batch
        first += len(batch)


def load_generator(workdir: str | Path, *, max_new_tokens: int, batch_size: int) -> Generator:
    """A Generator for a run's work directory, on all devices, in bfloat16 (on CPUs in float32).

    In bfloat16 it reads the copy that a finished run leaves, if there is one (train/copies.py).
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    source = (copies.find(workdir) if dtype == jnp.bfloat16 else None) or workdir
    cfg = SaberConfig.from_dict(checkpoint.read_model_file(workdir)["model"])
    shardings = None
    if jax.device_count() > 1:
        shardings = saber.shardings(cfg, sharding.generation_mesh(cfg.text.kv_heads))
    dtypes = {name: dtype for name in flatten(saber.abstract(cfg))}
    params = checkpoint.load_params(source, cfg, shardings, dtypes)
    return Generator(
        params,
        cfg,
        load_tokenizer(workdir),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=dtype,
    )


def model_fingerprint(workdir: str | Path) -> str:
    """A hash of the weights, vocabulary and config of a run's newest checkpoint."""
    steps = saved.finished_steps(workdir)
    newest = f"checkpoints/{steps[-1].name if steps else 0}/params/**/*"
    checkpoint.read_model_file(workdir)  # Raises a clear error if this is not a checkpoint.
    return fingerprint(workdir, checkpoint.MODEL_FILE, "tokenizer.*", newest)


def record_of_clip(path: str | Path, language: str, settings: dict[str, Any] | None) -> Record:
    """A video or picture file as a record without annotation, decoded as model.json says, in a
    process of its own.

    `settings` are the fields of decode.FrameSampling; None takes its defaults. Raises
    FileNotFoundError or decode.MediaError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Check --video.")
    sampling = decode.FrameSampling(**(settings or {}))
    about = {"clip_id": path.stem, "language": language, "annotation": {}, "labels": {}}
    provenance = {"file": path.name, "sampling": dataclasses.asdict(sampling)}
    if path.suffix.lower() in decode.PICTURES:
        frames = isolation.call(decode.decode_image, path, sampling.mode)
        silence = np.zeros(0, np.int16)
        return Record(
            **about, frames=frames, audio=silence, seconds_per_grid=0.0, provenance=provenance
        )
    clip = isolation.call(decode.decode_clip, path, sampling)
    return Record(
        **about,
        frames=clip.frames,
        seconds_per_grid=clip.seconds_per_grid,
        audio=clip.audio,
        provenance=provenance | {"source": clip.info},
        audio_in_video=sampling.audio_in_video,
    )
