"""Stage 1, SED: supervised fine-tuning on visual evidence, acoustic evidence, then the reasoning.

    launch/tpu_run.sh configs/sft.py:tiny         the embedded corpus, on this machine
    launch/tpu_run.sh configs/sft.py:7b-v5e-256   Qwen2.5-Omni-7B's thinker, on 256 TPU v5e

`tiny` trains from random weights on two CPU cores, 1600 steps: first on transcripts and faces
alone, then on whole answers. docs/ablation.md says what it reaches, and why it is made as it is.

`3b` and `7b` are model sizes, `7b-long` has rows for clips of minutes (configs/long_clips.py), and
configs/pods.py has recipes for certain pods, such as `7b-v5e-256` and `7b-lora-v5e-16`. They start
from HuggingFace weights: set config.init.checkpoint to the output of
`python -m saber_jax.hf.load`, and config.data.path to that of `python -m data_prep.build`.
"""

from ml_collections import ConfigDict, config_dict

from configs import long_clips, pods
from saber_jax.data.records import FIELDS

VARIANTS = ("tiny", "3b", "7b", "7b-long", *pods.RECIPES, *pods.GPU_RECIPES)


def tasks(**weights: float) -> dict[str, float]:
    """Relative frequency of every task; those that are not named have none."""
    return dict.fromkeys(("sed", "visual", "acoustic", *FIELDS), 0.0) | weights


def get_config(variant: str = "7b") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/sft.py has no variant {variant!r}; choose from {VARIANTS}.")
    tiny = variant == "tiny"
    c = ConfigDict()
    c.stage = "sft"
    c.variant = variant
    c.model = variant.split("-")[0]
    c.topology = ""  # The TPUs that a recipe is made for.
    # The folder of all outputs of a chain; the other paths are below it.
    parts = variant.split("-")
    c.root = "runs/" + "-".join([c.model, *(part for part in ("long", "lora") if part in parts)])
    root = c.get_ref("root")
    c.workdir = root + "/sft"
    c.seed = 0
    # Of the run; None: as many as `epochs` take, which needs data.batch_examples.
    c.steps = config_dict.placeholder(int)
    if tiny:
        c.steps = 1600
    c.epochs = 0 if tiny else 2

    # Where the weights come from: a checkpoint directory, or "" for random ones.
    c.init = ConfigDict({"checkpoint": "" if tiny else root + "/init"})
    # Shell patterns over parameter names. The published recipe freezes both towers.
    c.trainable = ("*",) if tiny else ("text/*",)

    # LoRA if rank > 0. The published recipe is --config.lora.rank=8 with these settings. The base
    # is init.checkpoint, which is frozen and not saved again.
    c.lora = ConfigDict({"rank": 0, "alpha": 32.0, "dropout": 0.05})
    # Shell patterns over parameter names; only linear layers can have adapters.
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
    c.data.batch_rows = 12 if tiny else 96
    c.data.batch_examples = 0 if tiny else 128
    # The static shape of a row; examples are packed into it. `response` is for preference pairs.
    # Which budgets suit other data: python -m saber_jax.data.budgets.
    c.data.length = 360 if tiny else 4096
    c.data.response = 0
    c.data.patches = 144 if tiny else 7_680
    c.data.chunks = 3 if tiny else 10
    c.data.targets = 168 if tiny else 2_816
    c.data.segments = 4 if tiny else 16
    # Maximum patches of a frame pair, the reach of vision attention. Clips with larger frames are
    # left out; python -m data_prep.build --max_pixels limits them (196 pixels per patch).
    c.data.frame_patches = 36 if tiny else 640
    # Share of examples with one modality withheld. A network with random weights would otherwise
    # never have seen silence or a blank picture; a pretrained one has.
    c.data.withhold = 0.2 if tiny else 0.0
    # Relative frequency of each task: all six sections, what is seen, what is heard, or one section
    # alone; and the number of wordings (1 to 4) of each.
    c.data.tasks = ConfigDict(tasks(sed=1.0, speech_content=0.5 if tiny else 0.0))
    # The same for the first epochs: a network with random weights learns to see and to hear sooner
    # from single sections than from whole answers.
    c.data.first_tasks = ConfigDict(
        tasks(speech_content=2.0, facial_exp_desc=1.0) if tiny else tasks(sed=1.0)
    )
    c.data.first_epochs = 6 if tiny else 0
    c.data.wordings = 1
    # Whether a task that one modality answers comes without the other one.
    c.data.alone = tiny
    # Loader processes of a host, and threads of each. Python runs one thread of a process at a
    # time, so use threads for slow storage and processes for more CPU work.
    c.data.workers = 0 if tiny else 4
    c.data.threads = 1 if tiny else 4

    # Mesh axes; -1 takes the remaining devices. `sequence` devices share each row.
    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1})

    c.compute = ConfigDict()
    c.compute.dtype = "float32" if tiny else "bfloat16"
    c.compute.microbatches = 1  # Parts of a batch whose gradients are added up before an update.
    c.compute.remat = "none" if tiny else "layer"  # Policies: saber_jax/models/remat.py.
    # Attention: "xla" anywhere, "splash" or "splash_fused" on TPUs, "triton" on NVIDIA GPUs; "auto"
    # picks by device.
    c.compute.kernel = "xla" if tiny else "auto"
    c.compute.head_chunk = 256  # Most targets whose logits are in memory at a time.
    # Keep the derivative of every logit for the backward pass: faster, but needs memory.
    c.compute.head_keep = False

    c.optimizer = ConfigDict()
    c.optimizer.peak_lr = 1e-3 if tiny else 1e-5
    # Learning rate of adapters relative to whole weights, which gives the published 1e-4.
    c.optimizer.adapter_factor = 10.0
    # First steps in which only the vocabulary trains; for networks with random weights.
    c.optimizer.vocabulary_steps = 10 if tiny else 0
    c.optimizer.warmup_steps = 50
    c.optimizer.final_fraction = 0.05
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.98 if tiny else 0.95
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 1.0
    # Of Adam's first moment. "bfloat16" saves 2 of the 12 bytes that a trained parameter takes.
    c.optimizer.mu_dtype = "float32"

    # Approximate number of held-out examples, in whole clips; 0 for no validation. Validation runs
    # before the first step, every `every` steps, and after the last.
    c.validate = ConfigDict({"examples": 0 if tiny else 256, "every": 100})
    # A metric of validation by which the best weights are kept in WORKDIR/best, such as "nll" or
    # "length_balanced_accuracy"; "": none. The run ends after so many measurements in a row that
    # are no better; 0: never.
    c.validate.keep_best = ""
    c.validate.patience = 0

    c.checkpoint_every = 100
    # For a step with non-finite loss or gradients: "stop" ends the run, "skip" discards the step's
    # update, "rollback" returns to the last checkpoint and leaves out the records of that batch,
    # which count towards data.max_bad_fraction.
    c.on_nonfinite = "stop"
    c.nonfinite_limit = 10  # Steps that may be skipped or rolled back in the whole run.
    # A damaged checkpoint ends the run; by default the one before it is used.
    c.strict_restore = False
    c.metrics_every = 100  # Steps between metrics that are too costly for every step (stage 2).
    c.log_every = 25 if tiny else 10  # Steps between console lines, which are means over them.
    c.wandb = ""  # A Weights & Biases project to log to as well; it must be installed.
    # "10:15" traces those steps, see docs/performance.md.
    c.profile = ConfigDict({"steps": ""})
    # The run ends if a process sends no heartbeat for so long.
    c.heartbeat_seconds = 60
    # The run ends, with the stacks of all hosts, after so long without progress, and at least 20
    # times the median step. Compiling, restoring and saving may take an hour. 0: no limit.
    c.stall_seconds = 900

    # Whether the chain makes the embedded corpus, and how its clips are sampled.
    c.embedded = tiny
    c.sampling = ("--fps", "2", "--min_pixels", "7056", "--max_pixels", "7056") if tiny else ()
    # Prompts at a time; a host of four v5e chips has room for the 7B's, see docs/aot_table.md.
    c.generation = ConfigDict({"batch_size": 60, "max_new_tokens": 128 if tiny else 1024})
    long_clips.fit(c)
    pods.fit(c)
    return c
