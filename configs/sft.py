"""Stage 1, SED: supervised fine-tuning on visual evidence, acoustic evidence, then the reasoning.

    launch/tpu_run.sh configs/sft.py:tiny         the embedded corpus, on whatever is here
    launch/tpu_run.sh configs/sft.py:7b-v5e-256   Qwen2.5-Omni-7B's thinker, on 256 TPU v5e

`tiny` learns from nothing on two CPU cores: 500 steps in 5 minutes, to a loss of about 0.05 nats a
token (unigram entropy 4.8), 99% right conclusions on held-out clips whose modalities agree and 77%
where they don't (n = 120 each). Voices it reads from step 90 on, colours from 200, faces from 350.
Without optimizer.vocabulary_steps it never reads the faces.

`3b` and `7b` say what is computed, and configs/pods.py how on a given pod: `7b-v5e-256`,
`7b-lora-v5e-16`, ... They start from a HuggingFace directory: set config.init.checkpoint to what
`python -m saber_jax.hf.load` wrote, and config.data.path to what `python -m data_prep.build` wrote.
"""

from ml_collections import ConfigDict, config_dict

from configs import pods
from saber_jax.data.records import FIELDS

VARIANTS = ("tiny", "3b", "7b", *pods.RECIPES)


def get_config(variant: str = "7b") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/sft.py has no variant {variant!r}; choose from {VARIANTS}.")
    tiny = variant == "tiny"
    c = ConfigDict()
    c.stage = "sft"
    c.variant = variant
    c.model = variant.split("-")[0]
    c.topology = ""  # TPUs that it is made for, if it is for certain ones.
    # Everything a chain leaves lies under here; the other paths follow it.
    c.root = "runs/" + (f"{c.model}-lora" if "-lora-" in variant else c.model)
    root = c.get_ref("root")
    c.workdir = root + "/sft"
    c.seed = 0
    # Of the run; None: as many as `epochs` take, which needs data.batch_examples.
    c.steps = config_dict.placeholder(int)
    if tiny:
        c.steps = 500
    c.epochs = 0 if tiny else 2

    # Where the weights come from: a checkpoint directory, or "" for random ones.
    c.init = ConfigDict({"checkpoint": "" if tiny else root + "/init"})
    # Shell patterns over parameter names. The published recipe freezes both towers.
    c.trainable = ("*",) if tiny else ("text/*",)

    # LoRA where rank > 0. The published recipe is --config.lora.rank=8 with what stands here. The
    # base is what init.checkpoint holds, stays as it is, and is not saved again.
    c.lora = ConfigDict({"rank": 0, "alpha": 32.0, "dropout": 0.05})
    # Shell patterns over parameter names; linear layers take an adapter, others none.
    c.lora.targets = ("text/*",)
    # What trains, in place of `trainable` above; such as ("lora/*", "vision/merger/*").
    c.lora.trainable = ("lora/*",)

    c.data = ConfigDict()
    c.data.path = root + "/records"
    c.data.split = "train"
    # Several record sources instead, as "PATH:SPLIT:WEIGHT"; the first one's tokenizer is used.
    c.data.mixture = ()
    # Examples that cannot be used are named in WORKDIR/quarantine.jsonl; past this share of all of
    # them the run ends with an error.
    c.data.max_bad_fraction = 0.01
    # Of an optimizer step, over all hosts: the rows that it has room for, and how many examples it
    # takes (saber_jax/data/steps.py). 0: as many as the rows hold, a few more or less every step.
    c.data.batch_rows = 10 if tiny else 96
    c.data.batch_examples = 0 if tiny else 128
    # The static shape of a row; examples are packed into it. `response` is for preference pairs.
    # Which budgets suit other data: python -m saber_jax.data.budgets.
    c.data.length = 352 if tiny else 4096
    c.data.response = 0
    c.data.patches = 288 if tiny else 7_680
    c.data.chunks = 2 if tiny else 10
    c.data.targets = 256 if tiny else 2_816
    c.data.segments = 4 if tiny else 16
    # Most patches of one frame pair: attention looks no further. Clips with larger frames are left
    # out; python -m data_prep.build --max_pixels bounds them, to 196 pixels a patch.
    c.data.frame_patches = 36 if tiny else 640
    # Share of examples with one modality hidden. A network that starts from nothing has never met
    # silence or a blank picture; a pretrained one has, and a unimodal prompt finds it prepared.
    c.data.withhold = 0.2 if tiny else 0.0
    # How often each task is drawn, relative to the others: all six sections, what is seen, what is
    # heard, or one section alone; and in how many wordings (1 to 4) each is asked for.
    c.data.tasks = ConfigDict(
        {"sed": 1.0, "visual": 0.0, "acoustic": 0.0, **dict.fromkeys(FIELDS, 0.0)}
    )
    c.data.wordings = 1
    # Of a host: processes that load, and threads of each. Python runs one thread of a process at a
    # time, so threads are for waiting (for a bucket), processes for work.
    c.data.workers = 0 if tiny else 4
    c.data.threads = 1 if tiny else 4

    # Mesh axes; -1 takes the devices that the others leave.
    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})

    c.compute = ConfigDict()
    c.compute.dtype = "float32" if tiny else "bfloat16"
    c.compute.microbatches = 1  # Parts of a batch whose gradients are added up before an update.
    c.compute.remat = "none" if tiny else "layer"  # Policies: saber_jax/models/remat.py.
    # Attention: "xla" anywhere, "splash" on TPUs, "triton" on NVIDIA GPUs; "auto" picks by device.
    c.compute.kernel = "xla" if tiny else "auto"
    c.compute.head_chunk = 256  # Targets whose logits exist at one time.
    # Keep a number per target and vocabulary entry: faster, where there is memory for it.
    c.compute.head_keep = False

    c.optimizer = ConfigDict()
    c.optimizer.peak_lr = 2e-3 if tiny else 1e-5
    # Adapters learn at so many times the rate of whole weights: at the published 1e-4.
    c.optimizer.adapter_factor = 10.0
    # Steps in which only the vocabulary learns; for a network that starts from nothing.
    c.optimizer.vocabulary_steps = 50 if tiny else 0
    c.optimizer.warmup_steps = 50
    c.optimizer.final_fraction = 0.05
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.98 if tiny else 0.95
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 1.0

    # About so many examples, whole clips, are never trained on; 0 for no validation. They are
    # measured before the first step, every so many steps, and after the last.
    c.validate = ConfigDict({"examples": 0 if tiny else 256, "every": 100})
    # A metric of validation by which the best weights are kept in WORKDIR/best, such as "nll" or
    # "length_balanced_accuracy"; "": none. The run ends after so many measurements in a row that
    # are no better; 0: never.
    c.validate.keep_best = ""
    c.validate.patience = 0

    c.checkpoint_every = 100
    # A step whose loss or gradients are not finite: "stop" ends the run, "skip" changes nothing at
    # that step, "rollback" goes back to the last checkpoint without the records of that batch,
    # which count towards data.max_bad_fraction.
    c.on_nonfinite = "stop"
    c.nonfinite_limit = 10  # Steps that may be passed over in the whole run.
    # A damaged checkpoint ends the run instead of being set aside for the one before it.
    c.strict_restore = False
    c.metrics_every = 100  # Steps between measurements too costly for every step; stage 2 has some.
    c.log_every = 25 if tiny else 10  # Steps a console line is the mean of.
    c.wandb = ""  # A Weights & Biases project to log to as well; it must be installed.
    # "10:15" traces those steps, see docs/performance.md.
    c.profile = ConfigDict({"steps": ""})
    # A process that has not been heard of for so long is given up, and the run with it.
    c.heartbeat_seconds = 60
    # A run without progress for so long, and for 20 usual steps, is ended with the stacks of all
    # hosts. Compiling, restoring and saving have an hour. 0: it may hang for ever.
    c.stall_seconds = 900

    # The embedded corpus is made on the spot, and its clips are sampled like this.
    c.embedded = tiny
    c.sampling = ("--fps", "4", "--min_pixels", "7056", "--max_pixels", "7056") if tiny else ()
    # Prompts at a time; a host of four v5e chips holds 12 of the 7B's, see docs/aot_table.md.
    c.generation = ConfigDict(
        {"batch_size": 60 if tiny else 12, "max_new_tokens": 128 if tiny else 1024}
    )
    pods.fit(c)
    return c
