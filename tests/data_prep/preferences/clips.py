"""Records and answers without a model behind them."""

import numpy as np

from saber_jax.data import sed
from saber_jax.data.records import FIELDS, Record

SARCASM = {"emotion": "contempt", "face": "happy", "voice": "angry", "conflict_type": "sarcasm"}


class Records(list):
    """Records as RecordSource gives them."""

    sizes = property(lambda self: [None] * len(self))

    def outline(self, index):
        return self[index]


def record(clip_id="clip", labels=SARCASM, ending="contempt", samples=160, frames=2):
    return Record(
        clip_id=clip_id,
        language="en",
        frames=np.zeros((frames, 28, 28, 3), np.uint8),
        seconds_per_grid=0.5,
        audio=np.ones(samples, np.int16),
        annotation=dict.fromkeys(FIELDS, "text") | {"sentiment_analysis": f"So {ending}."},
        labels=labels,
        provenance={},
    )


def answer(emotion):
    texts = dict.fromkeys(FIELDS, "said") | {"sentiment_analysis": f"So {emotion}."}
    return sed.target_text(texts)


class Model:
    """A model that concludes what the remaining modality suggests; it counts its calls."""

    def __init__(self, stop_after=None):
        self.asked, self._stop_after = [], stop_after

    def __call__(self, parts):
        for part in parts:
            if self._stop_after is not None and len(self.asked) == self._stop_after:
                raise KeyboardInterrupt
            self.asked.append([record.clip_id for record in part])
            heard = [record.audio.any() for record in part]
            yield [
                answer(record.labels["voice" if sound else "face"])
                for record, sound in zip(part, heard, strict=True)
            ]


RECORDS = Records([record(f"clip{i}") for i in range(3)])
RECORDS += [
    record("same", labels={"emotion": "sad", "face": "sad", "voice": "sad"}),
    record("odd", labels=SARCASM | {"kappa": "0.7"}),
]
