"""Parsing of SABER JSON, the six-section annotation of a clip (docs/formats.md)."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from saber_jax.data import texts
from saber_jax.data.records import AUDIO_FIELDS, AUDIO_GROUP, FIELDS

# Inside a section, a heading would end it.
_HEADING = re.compile(rf"\[(?:{'|'.join(FIELDS)})\]")

ANNOTATION_SHAPE = """{
  "video_desc": "...", "facial_exp_desc": "...", "body_lang_desc": "...",
  "audio_desc": {"acoustic_feat": "...", "speech_content": "..."},
  "sentiment_analysis": "..."
}"""
"""The form that `parse_annotation` takes. The keys of audio_desc may also be at the top level."""


class AnnotationError(ValueError):
    """An annotation that does not follow the SABER JSON layout."""


def parse_annotation(obj: Any) -> dict[str, str]:
    """SABER JSON to {field: text} in FIELDS order; sections may be empty but not missing.

    Takes the published form, ANNOTATION_SHAPE, or all six keys at the top level. Raises
    AnnotationError, which lists the wrong and missing keys and suggests similar valid ones.
    """
    values = _flattened(obj)
    missing = [name for name in FIELDS if name not in values]
    unknown = [str(name) for name in values if name not in FIELDS]
    faults = [_unknown(name, missing) for name in unknown]
    near = [name for name in missing if not any(f'"{name}"' in fault for fault in faults)]
    if near:
        faults.append(f'it lacks {", ".join(map(json.dumps, near))}; add "" where nothing fits')
    if faults:
        text = "; ".join(faults)
        raise AnnotationError(text if text.endswith("?") else f"{text}.")
    for field in FIELDS:
        if not isinstance(values[field], str):
            kind = type(values[field]).__name__
            raise AnnotationError(f'"{field}" must be text, got {kind}; write it as one string.')
        if fault := texts.fault(values[field]):
            raise AnnotationError(f'"{field}" {fault}.')
        if heading := _HEADING.search(values[field]):
            raise AnnotationError(
                f'"{field}" holds {heading[0]}, the heading of a section; write it another way.'
            )
    return {field: values[field].strip() for field in FIELDS}


def _flattened(obj: Any) -> dict[str, Any]:
    """The object with the keys of audio_desc at the top level; other keys are kept."""
    if not isinstance(obj, Mapping):
        raise AnnotationError(f"it must be a JSON object, got {type(obj).__name__}.")
    values = dict(obj)
    if AUDIO_GROUP not in values:
        return values
    inner = values.pop(AUDIO_GROUP)
    if not isinstance(inner, Mapping):
        kind = type(inner).__name__
        raise AnnotationError(
            f'"{AUDIO_GROUP}" must be an object with {", ".join(AUDIO_FIELDS)}, got {kind}.'
        )
    if twice := [name for name in AUDIO_FIELDS if name in values]:
        raise AnnotationError(
            f'"{twice[0]}" is unknown beside "{AUDIO_GROUP}", which is where it belongs then.'
        )
    misplaced = {f"{AUDIO_GROUP}.{name}": inner[name] for name in inner if name not in AUDIO_FIELDS}
    known = {name: inner[name] for name in inner if name in AUDIO_FIELDS}
    return {**values, **known, **misplaced}


def _unknown(name: str, missing: Sequence[str]) -> str:
    if not missing:
        return f'unknown key "{name}"; leave it out'
    near = difflib.get_close_matches(name, missing, n=1, cutoff=0.0)
    return f'unknown key "{name}"; did you mean "{near[0]}"?'
