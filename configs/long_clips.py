"""Rows for clips of up to three minutes, which the variants `7b-long` and `7b-long-...` have.

Three minutes at two frames per second are 180 pairs of frames. With 512 patches a pair
(`python -m data_prep.build --min_pixels 50176 --max_pixels 100352`) they become 23,040 tokens. The
sound becomes 4,500, and with the request and an answer a clip has about 28,000. Shorter clips share
a row, and longer ones keep fewer frames, as in other rows.
"""

from ml_collections import ConfigDict

# By stage. Two or four devices can share a row, and a step has a row for each of its examples. The
# recipes in pods.py say how many do.
ROWS = {
    "sft": {"batch_rows": 128, "length": 30_720, "targets": 4_096, "segments": 64},
    "cadpo": {
        **{"batch_rows": 64, "length": 28_672, "response": 1_024},
        **{"targets": 3_072, "segments": 64},
    },
}
MEDIA = {"patches": 92_160, "chunks": 92}
# Prompts that are answered at a time: their cache is no larger than that of 60 short ones.
PLACES = 9


def fit(config: ConfigDict) -> None:
    """Sets the rows of config.variant for config.stage, and generation, if it is one for long
    clips."""
    if "long" in config.variant.split("-"):
        config.data.update(ROWS[config.stage] | MEDIA)
        config.generation.batch_size = PLACES
