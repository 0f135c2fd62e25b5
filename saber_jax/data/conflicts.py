"""Names of the types of conflict between modalities, in records, batches, metrics and reports.

A clip is in conflict when its face, its voice and its words do not suggest the same emotion. A
record stores the type in labels["conflict_type"] and the strength in labels["kappa"], from 0 (they
agree) to 1. A batch stores the type as its index in CONFLICT_TYPES.
"""

from saber_jax.data.withhold import MODALITIES

NO_CONFLICT = "none"
OTHER_CONFLICT = "other"
CONFLICT_TYPES = (NO_CONFLICT, "sarcasm", "masking", "suppression", "leakage", OTHER_CONFLICT)
"""sarcasm: the words contradict face and voice; masking: the face hides what voice and words tell,
such as a smile over a sad voice; suppression: a neutral face with an emotional voice; leakage: one
cue betrays what the others hide, such as a trembling voice under a calm face."""

IGNORED = ("", *MODALITIES)
"""The modality that was withheld when a pair's rejected answer was generated, "" if unknown. A
batch stores its index."""


def conflict_index(name: str) -> int:
    """Index in CONFLICT_TYPES; a name that is not among them counts as "other"."""
    return CONFLICT_TYPES.index(name if name in CONFLICT_TYPES else OTHER_CONFLICT)
