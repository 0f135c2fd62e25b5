"""Reads a HuggingFace checkpoint of the Qwen2.5-Omni thinker.

    python -m saber_jax.hf.load --hf_dir DIR --out WORKDIR

DIR holds either the thinker alone or the whole omni model, whose talker is left out. WORKDIR is
then what every other command takes as `--checkpoint`.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from saber_jax.data.tokenizer import load_tokenizer
from saber_jax.hf import tensors
from saber_jax.hf.config import from_hf, thinker
from saber_jax.hf.names import Entry, entries, from_disk
from saber_jax.models.config import SaberConfig

PREFIX = "thinker."
OTHER_MODELS = ("talker.", "token2wav.")


def load_params(hf_dir: str | Path) -> tuple[dict[str, Any], SaberConfig]:
    """Float32 NumPy parameters and the config of a checkpoint directory.

    Raises FileNotFoundError if there is no config.json, and otherwise one ValueError that lists
    everything wrong at once: missing, unexpected, mis-shaped and wrong-dtype tensors, truncated
    files, an index that points outside the directory, pickles.
    """
    directory = Path(hf_dir)
    config = _read_config(directory)
    found, problems = tensors.find(directory)
    cfg = None
    try:
        cfg = from_hf(config)
    except ValueError as error:
        problems.append(str(error))
    if cfg is None:
        raise ValueError(_report(directory, problems))
    expected = entries(cfg)
    named = _strip(found)
    if "lm_head.weight" not in named and _tied(config):
        named["lm_head.weight"] = named.get("model.embed_tokens.weight")
    # With a file unread, every tensor in it would be listed as missing too.
    problems += _compare(expected, named, complete=not problems)
    if problems:
        raise ValueError(_report(directory, problems))
    progress = tqdm(total=len(expected), desc=f"reading {directory.name}", unit="tensor")

    def read(entry: Entry) -> np.ndarray:
        progress.update()
        return named[entry.name].read().astype(np.float32)

    with progress:
        return from_disk(read, cfg), cfg


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} is not a HuggingFace checkpoint: it has no config.json. Give the "
            "directory that `huggingface-cli download` or save_pretrained wrote."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Download it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}.")
    return config


def _strip(found: Mapping[str, tensors.Tensor]) -> dict[str, Any]:
    """Names as the thinker alone has them."""
    if not any(name.startswith(PREFIX) for name in found):
        return dict(found)
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in found.items()
        if not name.startswith(OTHER_MODELS)
    }


def _tied(config: Mapping[str, Any]) -> bool:
    part = thinker(config)
    text = part.get("text_config") or {}
    return bool(part.get("tie_word_embeddings") or text.get("tie_word_embeddings"))


def _compare(
    expected: Mapping[str, Entry], found: Mapping[str, tensors.Tensor], *, complete: bool
) -> list[str]:
    problems = []
    if complete:
        absent = sorted(expected.keys() - found.keys())
        problems += [f"missing {name} {expected[name].shape}" for name in absent]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        want, have = expected[name], found[name]
        if have is None:
            continue
        if have.shape != want.shape:
            problems.append(f"{name}: expected shape {want.shape}, got {have.shape}")
        if have.dtype not in tensors.DTYPES:
            known = ", ".join(tensors.DTYPES)
            problems.append(f"{name}: expected dtype {known}, got {have.dtype}")
    return problems


def _report(directory: Path, problems: list[str]) -> str:
    listing = "\n  ".join(problems)
    return f"{directory} cannot be loaded, {len(problems)} problems:\n  {listing}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hf_dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args(argv)
    # Imported here: training code depends on models only, and hf on training only as a command.
    from saber_jax.train import checkpoint

    if (args.out / checkpoint.MODEL_FILE).exists():
        print(f"{args.out} is already there; nothing to do.")
        return 0
    if args.out.exists():
        print(f"{args.out} exists and is no checkpoint. Give --out a new name.", file=sys.stderr)
        return 1
    try:
        tokenizer = load_tokenizer(args.hf_dir)
        params, cfg = load_params(args.hf_dir)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    partial = args.out.with_name(f".{args.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    print(f"writing {args.out}")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((partial / "checkpoints" / "0" / "params").absolute(), params)
    checkpoint.write_model_files(partial, cfg, tokenizer, source=str(args.hf_dir))
    os.replace(partial, args.out)
    print(f"{args.out} is ready: use it as --checkpoint.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
