"""The conversations on which the network is held against transformers."""

import numpy as np

from saber_jax.batch import Batch
from tests.models.batches import (
    Audio,
    AudioInVideo,
    Conversation,
    Image,
    Text,
    Video,
    conversation,
    pack,
)

LOGITS, GRADIENTS = 5e-6, 1e-5  # Relative to the largest number; float32 noise reaches 2e-6, 6e-6.

CASES = {
    "text": [conversation(1, Text(20))],
    # 6 x 10 units: windows that are ragged at the right and at the bottom.
    "image": [conversation(2, Text(4), Image((1, 12, 20)), Text(7))],
    "images": [conversation(3, Image((1, 8, 8)), Text(2), Image((1, 4, 6)), Text(6))],
    "video": [conversation(4, Text(2), Video((3, 8, 12), 0.5), Text(9))],
    "videos": [
        conversation(14, Video((5, 4, 8), 0.5), Text(3), Video((4, 8, 4), 2 / 3), Text(5)),
    ],
    "audio": [conversation(5, Text(3), Audio(337), Text(5))],
    "audio_edges": [conversation(6, Text(2), Audio(201), Text(1), Audio(3), Audio(200), Text(4))],
    "video_then_audio": [conversation(8, Text(3), Video((2, 6, 4)), Audio(250), Text(5))],
    "audio_in_video": [conversation(9, Text(3), AudioInVideo(Video((4, 4, 4)), Audio(300)))],
    "long_audio_in_video": [
        conversation(15, AudioInVideo(Video((3, 4, 4)), Audio(713)), Text(6)),
    ],
    "audio_in_long_video": [
        conversation(16, AudioInVideo(Video((9, 4, 4), 0.5), Audio(130)), Text(6)),
    ],
    "two_audio_in_video": [
        conversation(
            17,
            Image((1, 4, 4)),
            AudioInVideo(Video((2, 4, 6)), Audio(207)),
            Text(2),
            AudioInVideo(Video((3, 6, 4), 0.8), Audio(212)),
            Text(4),
        ),
    ],
    "padded": [
        conversation(10, Text(3), Image((1, 6, 8)), Audio(150), Text(5)),
        conversation(11, Text(2), Video((2, 8, 6)), Text(3)),
        conversation(12, Text(9)),
    ],
    "padded_audio_in_video": [
        conversation(18, Text(2), AudioInVideo(Video((2, 4, 6)), Audio(207)), Text(4)),
        conversation(19, Image((1, 4, 4)), AudioInVideo(Video((5, 6, 4)), Audio(412)), Text(2)),
    ],
}

BUDGET = {"length": 256, "patches": 304, "chunks": 4}

PROMPTS = [
    conversation(20, Text(3), Video((2, 6, 4), 0.5), Audio(150), Text(5)),
    conversation(21, Video((3, 4, 4)), Audio(90), Text(9)),
    conversation(22, Text(6), Video((2, 4, 4)), Text(2), Audio(210), Text(4)),
]
"""What generation answers, with NEW_TOKENS each."""

NEW_TOKENS = 64


def row(*talks: Conversation) -> Batch[np.ndarray]:
    """A batch of one row with these conversations, of the shape that all cases share."""
    return pack([list(talks)], **BUDGET)


def relative(got, want) -> float:
    """Largest difference over largest number."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())
