"""Scores of an answer: two numbers from 0 to 1 that need no label.

- Logical consistency: does the conclusion follow from the evidence that the answer itself states,
  and are its claims about face, voice and words consistent?
- Evidence alignment: is the evidence that it states in the clip?

An answer that describes a trembling voice and concludes happiness is not consistent; one that
describes a smile where there is none is not aligned. The mean of both decides which of several
answers is preferred.

A scorer is a function of a record and an answer. There are two: `offline.score` uses rules, and
`judge.JudgeScorer` asks a language model.
"""

import dataclasses
from collections.abc import Callable

from saber_jax.data import sed
from saber_jax.data.records import FIELDS, Record

EVIDENCE = FIELDS[:-1]
"""The sections that state what is in the clip; the last one reasons about them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Both from 0 to 1; None if there was nothing to score, or the judge gave no usable number."""

    consistency: float | None
    alignment: float | None

    @property
    def total(self) -> float | None:
        """The mean of both, rounded so that floating-point errors do not rank answers."""
        if self.consistency is None or self.alignment is None:
            return None
        return round((self.consistency + self.alignment) / 2, 6)


Scorer = Callable[[Record, str], Scores]


def well_formed(answer: str) -> bool:
    """Whether all six headings are there; a section may be empty, as for a clip without speech."""
    return all(sed.heading(field) in answer for field in FIELDS)
