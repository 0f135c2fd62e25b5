"""Continuous batching: a prompt is prefilled as soon as there is a place for it.

The lengths of answers vary much. If a whole batch were answered before the next one, most rows
would wait for the longest answer. Here the next prompts take the places of finished ones:

    place 0     a a a a d d d d
    place 1     b b e e e e f f
    place 2     c c c c c c c g
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from saber_jax.batch import Prompts
from saber_jax.data.examples import Example, encode_record
from saber_jax.data.records import Record
from saber_jax.data.tokenizer import Tokenizer
from saber_jax.generate import decoding
from saber_jax.generate.prompts import PackedShape, Packer
from saber_jax.models import saber
from saber_jax.models.text import Block

Tokens = Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A record to answer, its index in the call (which seeds its samples), and its place."""

    number: int
    batch: int
    position: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Prompts that are prefilled together, and the shape that they are packed in."""

    requests: Sequence[GenerationRequest]
    prompts: Prompts[np.ndarray]
    shape: PackedShape
    share: int  # Prompts of each group of devices; the last ones may have fewer.


class RequestQueue:
    """Batches of records, which one thread reads group by group and another one answers."""

    def __init__(
        self,
        batches: Iterable[tuple[int, Sequence[Record]]],
        packer: Packer,
        tokenizer: Tokenizer,
    ):
        """Each batch comes with the number of its first record."""
        self._packer, self._tokenizer = packer, tokenizer
        self._sizes: list[int] = []  # Of the batches that have been read.
        self._answers: dict[int, dict[int, list[str]]] = collections.defaultdict(dict)
        self._given = 0
        self._examples = self._read(batches)
        self._ahead: list[tuple[GenerationRequest, Example]] = []  # Read, but in no group yet.

    def _read(
        self, batches: Iterable[tuple[int, Sequence[Record]]]
    ) -> Iterator[tuple[GenerationRequest, Example]]:
        for batch, (first, records) in enumerate(batches):
            self._sizes.append(len(records))
            for position, record in enumerate(records):
                example = encode_record(record, self._tokenizer, responses=())
                yield GenerationRequest(first + position, batch, position), example

    def next_group(self) -> Group | None:
        """The next group of prompts; None when all are read."""
        missing = self._packer.lookahead - len(self._ahead)
        self._ahead += itertools.islice(self._examples, missing)
        if not self._ahead:
            return None
        chosen = self._packer.choose([example for _, example in self._ahead])
        part = [self._ahead[i] for i in chosen]
        self._ahead = [ahead for i, ahead in enumerate(self._ahead) if i not in chosen]
        prompts, shape = self._packer.pack([example for _, example in part])
        requests = [request for request, _ in part]
        return Group(requests, prompts, shape, self._packer.share_of(len(part)))

    def answer(self, request: GenerationRequest, texts: list[str]) -> None:
        self._answers[request.batch][request.position] = texts

    def answered_batches(self) -> Iterator[list[list[str]]]:
        """The answers to each record of each batch that is answered as a whole, in order."""
        while self._given < len(self._sizes):
            size = self._sizes[self._given]
            if len(self._answers[self._given]) < size:
                return
            answers = self._answers.pop(self._given)
            self._given += 1
            yield [answers[position] for position in range(size)]


class Running:
    """The answers that are being generated on the device."""

    def __init__(
        self,
        params: saber.Params,
        layers: Sequence[Block] | None,
        choice: decoding.TokenChoice,
        program: decoding.Program,
        *,
        places: int,
        put: Callable[[Any], Any],
        put_rows: Callable[[Any], Any],
    ):
        """`places` prompts at a time, equally many in each of `program.groups`.

        `put` puts values on all devices, `put_rows` rows on the devices that hold them.
        """
        self._params, self._layers, self._choice, self._program = params, layers, choice, program
        self._put, self._put_rows = put, put_rows
        self._places: list[list[GenerationRequest | None]] = [
            [None] * (places // program.groups) for _ in range(program.groups)
        ]
        self._state, self._cache = decoding.blank(prompts=places, program=program)

    @property
    def live(self) -> bool:
        """Whether any answer is unfinished."""
        return any(request for group in self._places for request in group)

    def outgrown(self, shape: PackedShape) -> bool:
        """Whether prompts of this shape are too long for the cache."""
        return shape.prompt > self._program.prompt_slots

    def has_room(self, prompts: int) -> bool:
        """Whether every group has places for `prompts` new ones."""
        return all(group.count(None) >= prompts for group in self._places)

    def admit(self, group: Group) -> None:
        """Prefills these prompts; there must be room for them."""
        samples = self._program.samples
        source = np.full((len(self._places), len(self._places[0])), -1, np.int32)
        numbers = np.zeros((*group.prompts.ends.shape, samples), np.uint32)
        for number, request in enumerate(group.requests):
            at = number // group.share, number % group.share
            places = self._places[at[0]]
            place = places.index(None)
            places[place] = request
            source[at[0], place] = at[1]
            numbers[at] = request.number * samples + np.arange(samples, dtype=np.uint32)
        program = dataclasses.replace(
            self._program, max_frame_patches=group.shape.frame_patches or None
        )
        self._state, self._cache = decoding.admit(
            self._params,
            self._put_rows(group.prompts),
            self._put_rows(source),
            self._put_rows(numbers.reshape(-1)),
            self._state,
            self._cache,
            self._choice,
            program=program,
        )

    def proceed(self, tokens: int, *, until: int | None) -> None:
        """Adds up to `tokens` tokens to every answer, until in every group there are `until` free
        places; None: until all are answered."""
        wanted = len(self._places[0]) if until is None else until
        self._state, self._cache = decoding.proceed(
            self._params,
            self._layers,
            self._state,
            self._cache,
            self._put(np.int32(tokens)),
            self._put(np.int32(wanted)),
            self._choice,
            program=self._program,
        )

    def collect(self) -> Iterator[tuple[GenerationRequest, list[Tokens], bool]]:
        """Each request with its answers so far, and whether they are finished; its place is then
        free. Tokens after an answer's end token are meaningless."""
        state = jax.device_get({name: self._state[name] for name in READ})
        samples = self._program.samples
        ended = state["finished"].reshape(-1, samples).all(1)
        out = state["out"].reshape(len(ended), samples, -1)
        number = itertools.count()
        for group in self._places:
            for place, request in enumerate(group):
                at = next(number)
                if request is None:
                    continue
                slots = (state["begun"][at] + np.arange(state["counts"][at])) % out.shape[2]
                if ended[at]:
                    group[place] = None
                yield request, list(out[at][:, slots]), bool(ended[at])


READ = ("out", "begun", "counts", "finished")
