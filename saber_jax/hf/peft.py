"""Exports the adapters of a LoRA run for `peft`: adapter_config.json, adapter_model.safetensors.

Modules are named as transformers 4 and the files of every version name them; with transformers 5
`peft` renames those of the text tower as it loads.
"""

import json
import re
from pathlib import Path

import numpy as np

from saber_jax.hf import digests, tensors
from saber_jax.hf.names import TensorEntry, entries
from saber_jax.models import lora
from saber_jax.models.config import SaberConfig
from saber_jax.train import checkpoint, saved, stream

CONFIG = "adapter_config.json"
WEIGHTS = tensors.ADAPTERS


def write(workdir: str | Path, out: Path, *, base: str | None = None) -> None:
    """Writes both files, and their digests, into `out`.

    `base` is the model that the adapters go onto, a directory or a name on the Hub; None is the
    directory that the run's base was loaded from. Raises ValueError if there is none, if the run at
    `workdir` has no adapters, or if it trained anything but adapters of the text tower: `peft`
    under transformers 5 finds no place for those of the others and goes on.
    """
    about = checkpoint.read_model_file(workdir)
    cfg = SaberConfig.from_dict(about["model"])
    if cfg.lora is None:
        raise ValueError(
            f"{workdir} has no adapters: it was trained without config.lora. Leave --peft out."
        )
    base = base or _base(workdir, about["base"])
    trained = stream.open_leaves(saved.newest(workdir))
    weights, modules, unfit = {}, [], [n for n in trained if not n.startswith(lora.ADAPTERS)]
    for entry in entries(cfg).values():
        name = "/".join((lora.ADAPTERS, *entry.path))
        if f"{name}/a" not in trained:
            continue
        if entry.path[0] != "text":
            unfit.append(entry.name)
            continue
        module = entry.name.removesuffix(".weight")
        modules.append(module)
        a, b = (trained[f"{name}/{side}"][_layer(entry)] for side in "ab")
        key = f"base_model.model.{module}"
        weights[f"{key}.lora_A.weight"] = a.reshape(-1, cfg.lora.rank).T
        weights[f"{key}.lora_B.weight"] = b.reshape(cfg.lora.rank, -1).T
    if unfit:
        raise ValueError(
            f"{workdir} trained more than adapters of the text tower: {unfit}. An adapter file "
            "cannot hold that safely; export the merged model instead, without --peft."
        )
    start = tensors.header({name: ("F32", array.shape) for name, array in weights.items()})
    sums = tensors.write(out / WEIGHTS, start, (np.ascontiguousarray(a) for a in weights.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": cfg.lora.rank,
        "lora_alpha": cfg.lora.alpha,
        "lora_dropout": cfg.lora.dropout,
        "bias": "none",
        "inference_mode": True,
        "target_modules": _pattern(modules),
    }
    (out / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    digests.write(out, {WEIGHTS: sums})


def _base(workdir: str | Path, described: dict[str, str]) -> str:
    """The HuggingFace directory that a run's frozen weights came from."""
    place = checkpoint.find_base(workdir, described)
    source = checkpoint.read_model_file(place).get("source")
    if source is None:
        raise ValueError(
            f"adapter_config.json has to name the model that the adapters go onto, and {place} was "
            "trained here. Export that model first, and say with --base where."
        )
    return source


def _layer(entry: TensorEntry):
    return ... if entry.layer is None else entry.layer


def _pattern(modules: list[str]) -> str:
    """Matches these modules of the text tower, in transformers 4 and 5 and inside the omni model.

    By their last parts alone, layers of other towers would be meant as well.
    """
    kinds = sorted({re.sub(r"\.\d+\.", ".0.", m.removeprefix("model.")) for m in modules})
    escaped = [re.escape(kind).replace(r"\.0\.", r"\.\d+\.") for kind in kinds]
    return rf"(thinker\.)?(model\.)?(language_model\.)?({'|'.join(escaped)})"
