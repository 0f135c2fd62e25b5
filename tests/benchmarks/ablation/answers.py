"""Made-up answers of arms, in the folders that an ablation leaves."""

from pathlib import Path
from typing import Any

from saber_jax.runs.files import write_jsonl

CLIPS = 40


def row(number: int, *, right: bool) -> dict[str, Any]:
    """Clips of even numbers agree; in the others the face is happy, the voice sad."""
    agrees = number % 2 == 0
    emotion = "happy" if agrees else "sorrow"
    concluded = emotion if right else "sad" if agrees else "happy"
    words = f"[speech_content] good {'day' if right else 'night'}"
    return {
        "clip_id": f"test_{number}",
        "language": "en",
        "response": f"{words}\n[sentiment_analysis] {concluded}",
        "conclusion": concluded,
        "labels": {
            "emotion": emotion,
            "face": "happy",
            "voice": "happy" if agrees else "sad",
            "conflict_type": "none" if agrees else "masking",
        },
        "annotation": {"speech_content": "good day"},
    }


def answered(folder: Path, right: int, *, probes: bool = True) -> None:
    """The scores of an arm that is right about the first `right` clips, and about none without its
    sound."""
    for probe in ("", "probes/audio_muted", "probes/audio_swapped") if probes else ("",):
        (folder / probe).mkdir(parents=True, exist_ok=True)
        rows = [row(n, right=n < right and not probe) for n in range(CLIPS)]
        write_jsonl(folder / probe / "predictions.jsonl", rows)
