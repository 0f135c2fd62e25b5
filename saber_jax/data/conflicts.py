"""What a conflict between modalities is called, in records, batches, metrics and reports.

A clip is in conflict when its face, its voice and its words do not suggest the same emotion. A
record says which kind it is in labels["conflict_type"] and how strong in labels["kappa"], from 0
(they agree) to 1. A batch holds the kind as its index in CONFLICT_TYPES.
"""

from saber_jax.data.withhold import MODALITIES

NO_CONFLICT = "none"
OTHER_CONFLICT = "other"
CONFLICT_TYPES = (NO_CONFLICT, "sarcasm", "masking", "suppression", "leakage", OTHER_CONFLICT)
"""sarcasm: the voice denies the words; masking: a smile over a sad voice; suppression: a neutral
face over a feeling voice; leakage: a feeling face over a neutral voice."""

IGNORED = ("", *MODALITIES)
"""The modality that a pair's rejected answer was given without, "" where nobody knows. A batch
holds its index."""


def conflict_index(name: str) -> int:
    """Index in CONFLICT_TYPES; a name that a corpus has and we do not counts as "other"."""
    return CONFLICT_TYPES.index(name if name in CONFLICT_TYPES else OTHER_CONFLICT)
