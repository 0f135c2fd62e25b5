"""Random access to encoded examples: one per record, or one per preference pair."""

import contextlib
import functools
import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from saber_jax.data.examples import Example, Size, encode_record, measure_record, thinned
from saber_jax.data.pairs import Pair
from saber_jax.data.quarantine import LeftOut
from saber_jax.data.records import BadRecordError
from saber_jax.data.sources import Sources
from saber_jax.data.tasks import Request
from saber_jax.data.tokenizer import Tokenizer
from saber_jax.data.withhold import Modality, withhold
from saber_jax.runs.files import read_bytes


class References(Protocol):
    """Reference log-probs: element i is float32 [views, targets] of pair i; NaN if not computed."""

    def __getitem__(self, index: int) -> Float[np.ndarray, "V n"]: ...


class Examples:
    """Random access to encoded examples: one per record, or one per preference pair.

    A record gives one example for each request: with N records, example i + N * k is record i with
    request k. A pair always has the six-section request.
    """

    def __init__(
        self,
        source: Sources,
        tokenizer: Tokenizer,
        pairs: list[Pair] | None = None,
        requests: tuple[Request, ...] = (Request(),),
    ):
        self.source, self._tokenizer, self._pairs = source, tokenizer, pairs
        self._indices = [source.index(pair.clip_id) for pair in pairs] if pairs else None
        self._frame_pairs: Int[np.ndarray, " N"] | None = None
        self._skipped: frozenset[int] = frozenset()
        self.requests = requests if pairs is None else (Request(),)
        self._references: References | None = None

    @property
    def pairs(self) -> list[Pair]:
        """The pairs. Raises ValueError if the examples are records."""
        if self._pairs is None:
            raise ValueError("These examples are records, not preference pairs.")
        return self._pairs

    def with_references(self, references: "References") -> "Examples":
        """The same pairs, each with the reference's log-prob of every target."""
        return self._with(_references=references)

    def __len__(self) -> int:
        return len(self._pairs if self._pairs is not None else self.source)

    def __getitem__(self, index: int) -> Example:
        return self.encode(index, None)

    def encode(self, index: int, hidden: Modality | None) -> Example:
        """Encodes an example, with the modality `hidden` withheld if given; its size is the same.
        The only modality that a request shows is not withheld.

        Raises BadRecordError if the record cannot be used, OSError if storage fails, and
        RuntimeError if the code fails for another reason; all name the record.
        """
        asked, index = divmod(int(index), len(self))
        position = self.record_of(index)
        try:
            if index in self._skipped:
                raise BadRecordError("it was left out before")
            record = self.source[position]
            if self._frame_pairs is not None and len(record.frames) > 2 * self._frame_pairs[index]:
                record = thinned(record, int(self._frame_pairs[index]))
            if hidden is not None and self.requests[asked].only is None:
                record = withhold(record, hidden)
            if self._pairs is None:
                return encode_record(record, self._tokenizer, request=self.requests[asked])
            pair = self._pairs[index]
            return encode_record(
                record,
                self._tokenizer,
                responses=(pair.chosen, pair.rejected),
                kappa=pair.kappa,
                ignored=pair.withheld,
                reference=None if self._references is None else self._references[index],
            )
        except OSError:
            raise
        except Exception as error:
            raise self._named(position, error) from error

    def measure(self, index: int) -> tuple[list[Size], int, Int[np.ndarray, " n"]]:
        """Sizes under every request, frame pairs, all target tokens. Raises as `encode` does."""
        position = self.record_of(index)
        responses = None
        if self._pairs is not None:
            responses = (self._pairs[index].chosen, self._pairs[index].rejected)
        try:
            outline = self.source.outline(position)
            measured = [
                measure_record(outline, self._tokenizer, request=request, responses=responses)
                for request in self.requests
            ]
        except OSError:
            raise
        except Exception as error:
            raise self._named(position, error) from error
        sizes, tokens = zip(*measured, strict=True)
        return list(sizes), len(outline.frames) // 2, np.concatenate(tokens)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes if the inputs of examples change: records, vocabulary, requests or pairs."""
        digest = hashlib.sha256(repr((self.source.fingerprint, self.requests)).encode())
        digest.update(read_bytes(self._tokenizer.path))
        for pair in self._pairs or ():
            digest.update(pair.key)
        return digest.hexdigest()[:16]

    def key(self, index: int) -> bytes:
        """Sixteen bytes that identify a pair and the number of frames that its clip keeps."""
        kept = -1 if self._frame_pairs is None else int(self._frame_pairs[index])
        parts = self.pairs[index].key + kept.to_bytes(4, "big", signed=True)
        return hashlib.blake2b(parts, digest_size=16).digest()

    def probes(self) -> list[Example]:
        """The first and the last readable record as prompts without answers. They do not depend on
        the pairs and show how pictures, sound and prompts are encoded."""
        found = []
        for order in (range(len(self.source)), reversed(range(len(self.source)))):
            for position in order:
                try:
                    record = self.source[position]
                except BadRecordError:
                    continue
                found.append(encode_record(record, self._tokenizer, responses=()))
                break
        return found

    def readable(self, indices: Iterable[int], most: int) -> list[Example]:
        """The first `most` of `indices` that can be used, encoded."""
        found = []
        for index in indices:
            if len(found) == most:
                break
            with contextlib.suppress(BadRecordError):
                found.append(self[index])
        return found

    def provenance(self, indices: Iterable[int]) -> dict[str, Any]:
        """Of the record of the first of `indices` that can be read."""
        for index in indices:
            with contextlib.suppress(BadRecordError):
                return dict(self.source.outline(self.record_of(index)).provenance)
        return {}

    def entry(self, index: int, reason: str, detail: str) -> LeftOut:
        """An example's entry for quarantine.jsonl; a damaged record has no known clip id."""
        index = int(index) % len(self)
        position = self.record_of(index)
        try:
            clip_id = self.source.outline(position).clip_id
        except BadRecordError:
            clip_id = ""
        file = self.source.where(position)
        return LeftOut(index=index, clip_id=clip_id, file=file, reason=reason, detail=detail)

    def source_of(self) -> Int[np.ndarray, " N"]:
        """Which of the record sources each example comes from."""
        return self.source.source_of(np.array(self._indices or range(len(self)), np.int64))

    def with_frame_pairs(self, frame_pairs: Int[np.ndarray, " N"]) -> "Examples":
        """The same examples, with clips reduced to these numbers of frame pairs."""
        return self._with(_frame_pairs=frame_pairs)

    def without(self, indices: Iterable[int]) -> "Examples":
        """The same examples, with those of `indices` treated as bad records."""
        return self._with(_skipped=frozenset(indices))

    def record_of(self, index: int) -> int:
        """Which record an example is about."""
        return int(index) if self._indices is None else self._indices[index]

    def _with(self, **changes) -> "Examples":
        other = Examples.__new__(Examples)
        other.__dict__ = self.__dict__ | changes
        return other

    def _named(self, position: int, error: Exception) -> Exception:
        """The exception to raise instead of `error`, with the name of record `position`."""
        where = self.source.where(position)
        if isinstance(error, BadRecordError | ValueError):  # The stored record is invalid.
            return BadRecordError(f"{where}: {error}")
        # This includes StopIteration, which would look like the end of the data.
        return RuntimeError(
            f"Encoding {where} failed with {type(error).__name__}: {error}. This is a fault of the "
            "program, not of the record."
        )
