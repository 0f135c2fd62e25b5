"""Answers from a trained model: prefill, decode with a static cache, greedy or sampled."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from saber_jax import sharding
from saber_jax.data import decode, isolation
from saber_jax.data import withhold as hiding
from saber_jax.data.examples import Example, encode_record
from saber_jax.data.records import ClipSize, Record, clip_size
from saber_jax.data.tokenizer import Tokenizer, load_tokenizer
from saber_jax.data.withhold import Modality
from saber_jax.generate import decoding
from saber_jax.generate.prompts import Packer, Room
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.runs.manifest import fingerprint
from saber_jax.train import checkpoint

STREAM_TOKENS = 8  # Tokens between two calls of `on_text`; without it the device is never asked.

T = TypeVar("T")


class Generator:
    """Answers records in batches of one static shape.

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
        dtype: jnp.dtype = jnp.float32,
    ):
        """`params` may be sharded over a mesh; rows are then spread over its data axes."""
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(
                "max_new_tokens and batch_size must be at least 1, got "
                f"{max_new_tokens} and {batch_size}."
            )
        self._cfg, self._tokenizer, self._dtype = cfg, tokenizer, dtype
        self._max_new_tokens, self._end = max_new_tokens, tokenizer.id("<|im_end|>")
        self._params = jax.tree.map(lambda leaf: jax.device_put(leaf).astype(dtype), params)
        placed = jax.tree.leaves(self._params)[0].sharding
        self._devices = placed.device_set
        self._rows = self._everywhere = self._cache = self._layers = None
        if [device.platform for device in self._devices] == ["cpu"]:
            self._layers = saber.text_layers(self._params, cfg, dtype)
        groups = 1
        if isinstance(placed, NamedSharding):
            mesh = placed.mesh
            assert isinstance(mesh, Mesh)  # No abstract one: these arrays exist.
            self._rows = sharding.batch_sharding(mesh)
            self._everywhere = sharding.replicated(mesh)
            self._cache = sharding.cache_sharding(cfg.text.kv_heads, mesh)
            groups = sharding.shards(sharding.BATCH_AXES, mesh)
        self._packer = Packer(tokenizer, groups=groups, prompts=-(-batch_size // groups))
        self._batch_size = self._packer.batch_size
        # What the programs are compiled for: a room, and answers to each prompt.
        self._answered: tuple[Room, int] | None = None

    def reserve(self, sizes: Iterable[ClipSize]) -> None:
        """Makes room for clips of these sizes, in batches in this order; see RecordSource.sizes."""
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
        """Answers of batch after batch. Two batches are in work, so that neither host nor device
        waits; with `on_text`, or with several devices, one.

        Batches hold at most `batch_size` records; their sizes should have been reserved.
        """
        numbered = zip(itertools.count(step=self._batch_size), batches, strict=False)
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
        # Programs with collectives, started from two threads, could wait for each other for ever.
        alone = on_text is not None or len(self._devices) > 1
        compiled = self._answered == (self._packer.room, samples)
        work = (
            functools.partial(self._answer, first, batch, samples, sampling, on_text)
            for first, batch in batches
        )
        return _in_flight(work, 1 if alone else 2, first_alone=not compiled)

    def _answer(
        self,
        first: int,
        records: Sequence[Record],
        samples: int,
        sampling: decoding.Sampling,
        on_text: Callable[[int, str], None] | None,
    ) -> list[list[str]]:
        """`samples` answers to each record of one batch, whose first record is number `first`."""
        texts: list[list[str]] = []
        if not records:
            return texts
        examples = [encode_record(r, self._tokenizer, responses=()) for r in records]
        streaming = on_text is not None
        for state in self._run(examples, first, samples, sampling, streaming=streaming):
            out, step = jax.device_get((state["out"], state["step"]))
            answers = out.reshape(self._batch_size, samples, -1)[: len(records), :, :step]
            texts = [[self._text(tokens) for tokens in of_record] for of_record in answers]
            if on_text is not None:
                for row, (text,) in enumerate(texts):
                    on_text(first + row, text)
        return texts

    def _run(
        self,
        examples: Sequence[Example],
        first: int,
        samples: int,
        sampling: decoding.Sampling,
        *,
        streaming: bool,
    ) -> Iterator[decoding.State]:
        """States of one batch: every few tokens when streaming, else only the last."""
        batch, room = self._packer.pack(examples)
        row = np.arange(self._batch_size * samples)
        program = decoding.Program(
            cfg=self._cfg,
            dtype=self._dtype,
            greedy=sampling.temperature == 0,
            prompt_slots=room.prompt,
            max_new_tokens=self._max_new_tokens,
            samples=samples,
            max_frame_patches=room.frame_patches or None,
            cache=self._cache,
        )
        pick = decoding.Pick(
            seed=self._put(np.uint32(sampling.seed)),
            rows=self._put_rows((first * samples + row).astype(np.uint32)),
            temperature=self._put(np.float32(sampling.temperature)),
            top_p=self._put(np.float32(sampling.top_p)),
            end=self._put(np.int32(self._end)),
            vocabulary=self._put(np.int32(self._tokenizer.vocab_size)),
        )
        state, cache = decoding.start(
            self._params,
            self._put_rows(batch),
            self._put_rows(row >= len(examples) * samples),
            pick,
            program=program,
        )
        stride = STREAM_TOKENS if streaming else self._max_new_tokens
        for limit in range(stride, self._max_new_tokens + stride, stride):
            limit = self._put(np.int32(min(limit, self._max_new_tokens)))
            state, cache = decoding.proceed(
                self._params, self._layers, state, cache, limit, pick, program=program
            )
            yield state
            if streaming and jax.device_get(state["finished"]).all():
                break
        self._answered = room, samples

    def _put(self, values: Any) -> Any:
        return jax.device_put(values, self._everywhere)

    def _put_rows(self, values: Any) -> Any:
        return jax.device_put(values, self._rows)

    def _text(self, tokens: Int[np.ndarray, " n"]) -> str:
        ended = np.flatnonzero(tokens == self._end)
        return self._tokenizer.decode(tokens[: ended[0]] if len(ended) else tokens)


def _in_flight(work: Iterable[Callable[[], T]], most: int, *, first_alone: bool) -> Iterator[T]:
    """Results in order, of which up to `most` are being made at any time.

    With `first_alone`, that one is finished first: what it compiles, the others use.
    """
    with ThreadPoolExecutor(max_workers=most) as pool:
        started: collections.deque[Future[T]] = collections.deque()
        for position, job in enumerate(work):
            started.append(pool.submit(job))
            if len(started) == most or (first_alone and position == 0):
                yield started.popleft().result()
        while started:
            yield started.popleft().result()


def load_generator(workdir: str | Path, *, max_new_tokens: int, batch_size: int) -> Generator:
    """The model of a run's work directory, on all devices, in bfloat16 (on CPUs in float32)."""
    cpu = jax.default_backend() == "cpu"
    cfg = SaberConfig.from_dict(checkpoint.read_model_file(workdir)["model"])
    shardings = None
    if jax.device_count() > 1:
        shardings = saber.shardings(cfg, sharding.generation_mesh(cfg.text.kv_heads))
    params = checkpoint.load_params(workdir, cfg, shardings)
    return Generator(
        params,
        cfg,
        load_tokenizer(workdir),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=jnp.float32 if cpu else jnp.bfloat16,
    )


def model_fingerprint(workdir: str | Path) -> str:
    """Changes with the weights, vocabulary or shape of a run's newest checkpoint."""
    steps = sorted(int(p.name) for p in Path(workdir).glob("checkpoints/*") if p.name.isdigit())
    newest = f"checkpoints/{steps[-1] if steps else 0}/params/**/*"
    checkpoint.read_model_file(workdir)  # Says what is wrong when this is no checkpoint at all.
    return fingerprint(workdir, checkpoint.MODEL_FILE, "tokenizer.*", newest)


def record_of_clip(path: str | Path, language: str, settings: dict[str, Any] | None) -> Record:
    """A video or picture file as a record without annotation, decoded as model.json says, in a
    process of its own.

    `settings` are the fields of decode.Sampling; None takes its defaults. Raises FileNotFoundError
    or decode.MediaError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Check --video.")
    sampling = decode.Sampling(**(settings or {}))
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
