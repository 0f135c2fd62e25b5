"""Writes a checkpoint that `transformers` opens without any of our code.

    python -m saber_jax.hf.export --checkpoint WORKDIR --out DIR [--dtype bfloat16]

DIR is complete or absent: it is written under another name and renamed at the end.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from saber_jax.data.tokenizer import Tokenizer
from saber_jax.hf import tensors
from saber_jax.hf.config import to_hf
from saber_jax.hf.names import entries, to_disk
from saber_jax.hf.tokenizer import FILES as TOKENIZER_FILES
from saber_jax.hf.tokenizer import write_tokenizer
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.models.vision import PIXEL_MEAN, PIXEL_STD

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
SHARD_BYTES = 5 * 10**9
JSON_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")


def export(
    params: dict[str, Any],
    cfg: SaberConfig,
    out: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights, configs and the tokenizer; float32 weights survive bit for bit.

    Adapters are merged into the weights.

    An earlier export at `out` is replaced. Raises ValueError for parameters that do not fit `cfg`
    or an unknown dtype, FileExistsError if `out` holds anything else than an export.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    saber.check_tree(saber.abstract(cfg), params)
    params = saber.merge_lora(params, cfg)
    _refuse_foreign(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_weights(params, cfg, partial, dtype, shard_bytes)
    _write_json(partial / "config.json", to_hf(cfg, dtype=dtype))
    _write_json(partial / "generation_config.json", _generation(cfg))
    _write_json(partial / "preprocessor_config.json", _preprocessor(cfg))
    if tokenizer is not None:
        write_tokenizer(tokenizer, partial)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)


def _refuse_foreign(out: Path) -> None:
    """A mistyped --out must not cost anybody a directory."""
    if not out.exists():
        return
    ours = {*JSON_FILES, *TOKENIZER_FILES, tensors.INDEX}
    names = [p.name for p in out.iterdir()] if out.is_dir() else [out.name]
    foreign = [n for n in names if n not in ours and not n.endswith(".safetensors")]
    if foreign:
        raise FileExistsError(
            f"{out} holds files that no export wrote: {sorted(foreign)[:5]}. Give --out a new name."
        )


def _write_weights(
    params: dict[str, Any], cfg: SaberConfig, out: Path, dtype: str, shard_bytes: int
) -> None:
    """One file, or as many as it takes; only one is in memory at a time."""
    sizes = {
        name: int(np.prod(entry.shape)) * np.dtype(DTYPES[dtype]).itemsize
        for name, entry in entries(cfg).items()
    }
    shards = _shards(sizes, shard_bytes)
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = files if count > 1 else [tensors.SINGLE]
    stream = _converted(params, cfg, dtype, total=len(sizes))
    for file, names in zip(files, shards, strict=True):
        shard = dict(next(stream) for _ in names)
        # Without this tag transformers refuses to guess the framework.
        save_file(shard, out / file, metadata={"format": "pt"})
    if count > 1:
        places = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        total = {"total_size": sum(sizes.values())}
        _write_json(out / tensors.INDEX, {"metadata": total, "weight_map": places})


def _converted(
    params: dict[str, Any], cfg: SaberConfig, dtype: str, *, total: int
) -> Iterator[tuple[str, np.ndarray]]:
    for entry, array in tqdm(to_disk(params, cfg), desc="exporting", total=total, unit="tensor"):
        yield entry.name, np.ascontiguousarray(array.astype(DTYPES[dtype]))


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would pass the limit."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _generation(cfg: SaberConfig) -> dict[str, Any]:
    ids = cfg.tokens
    return {
        "bos_token_id": ids.im_start,
        "eos_token_id": [ids.eos, ids.pad],
        "pad_token_id": ids.pad,
        "do_sample": False,
    }


def _preprocessor(cfg: SaberConfig) -> dict[str, Any]:
    """What saber_jax.data.media does, in the words of transformers' processors."""
    vision = cfg.vision
    return {
        "processor_class": "Qwen2_5OmniProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": cfg.audio.mel_bins,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 300,
        "n_samples": 4_800_000,
        "nb_max_frames": 30_000,
        "dither": 0.0,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "min_pixels": 3136,
        "max_pixels": 12_845_056,
        "patch_size": vision.patch,
        "temporal_patch_size": vision.temporal_patch,
        "merge_size": vision.merge,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run's work directory")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    args = parser.parse_args(argv)
    # Imported here: training code depends on models only, and hf on training only as a command.
    from saber_jax.train.checkpoint import load_model

    try:
        params, cfg, tokenizer = load_model(args.checkpoint)
        print(f"exporting {args.checkpoint} to {args.out} in {args.dtype}")
        export(params, cfg, args.out, tokenizer, dtype=args.dtype)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.out} is ready for transformers' from_pretrained.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
