"""Stage 2, CA-DPO: prefer answers that weigh all modalities, where the modalities conflict.

    launch/tpu_run.sh configs/cadpo.py:tiny   everything, from an empty machine to an exported model
    launch/tpu_run.sh configs/cadpo.py:7b     on a TPU pod, from what configs/sft.py:7b leaves

`tiny` takes 80 steps in a minute and a half: reward accuracy reaches 1.0, unimodal dominance on
held-out conflicting clips falls from 93% to 69%, accuracy there rises from 2% to 8% (n = 120). A
learning rate of 3e-4, after a shorter stage 1 on fewer conflicts, went from 0% to 28% but broke the
six sections on 105 of 240 clips.

The starting point is what configs/sft.py of the same variant leaves, and the pairs are mined with
it: launch/tpu_run.sh makes whatever of that is missing.
"""

from ml_collections import ConfigDict

from configs import sft


def get_config(variant: str = "7b") -> ConfigDict:
    if variant not in sft.VARIANTS:
        raise ValueError(
            f"configs/cadpo.py has no variant {variant!r}; choose from {sft.VARIANTS}."
        )
    tiny = variant == "tiny"
    c = sft.get_config(variant)
    c.stage = "cadpo"
    root = c.get_ref("root")
    c.workdir = root + "/cadpo"
    c.steps = 80 if tiny else 1_000
    c.init.checkpoint = root + "/sft"

    c.data.split = "preference"
    c.data.pairs = root + "/pairs"
    c.data.withhold = 0.0
    del c.data.tasks, c.data.wordings  # A pair answers the six-section request.
    # A row: [shared prefixes | chosen | rejected], `length` + 2 * `response` slots.
    c.data.batch_rows = 12 if tiny else 256
    c.data.length = 176 if tiny else 3072
    c.data.response = 112 if tiny else 512
    c.data.patches = 144 if tiny else 12_288
    c.data.chunks = 1 if tiny else 16
    c.data.targets = 224 if tiny else 1024
    c.data.segments = 1 if tiny else 8

    c.loss = ConfigDict({"beta": 0.1})

    c.compute.head_chunk = 224 if tiny else 256
    c.optimizer.peak_lr = 5e-5 if tiny else 5e-7
    c.optimizer.warmup_steps = 10
    c.checkpoint_every = 50
    return c
