"""Exports a checkpoint as a directory that `transformers` loads without our code.

    python -m saber_jax.hf.export --checkpoint WORKDIR --out DIR [--dtype bfloat16]

writes the thinker alone; with `--layout omni`, the thinker inside the layout of the omni model,
without speech, which vLLM and ms-swift load.

    python -m saber_jax.hf.export --checkpoint WORKDIR --out DIR --source HF_DIR

writes a copy of HF_DIR (the thinker alone or the whole omni model) with our weights in place of its
thinker's: the same files with the same tensors in the same dtypes, including talker and vocoder.

    python -m saber_jax.hf.export --checkpoint WORKDIR --out DIR --peft

writes the adapters of a LoRA run for `peft`; the other two forms merge them into the weights.

DIR is written under another name and renamed at the end, so it is never incomplete. An existing
export is only replaced with `--overwrite`. Matrices are converted one at a time.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from saber_jax.data.tokenizer import Tokenizer, load_tokenizer
from saber_jax.flags import Parser
from saber_jax.hf import chat_template, digests, peft, processor, tensors
from saber_jax.hf.config import LAYOUTS, portable, to_hf
from saber_jax.hf.load import PREFIX, HfCheckpoint, open_checkpoint
from saber_jax.hf.names import TensorEntry, entries, on_disk
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.runs import manifest
from saber_jax.runs.files import exists, listed, replacing_folder, write_json
from saber_jax.train import saved, stream

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES = 5 * 10**9
CONFIG = "config.json"


def export(
    params: dict[str, Any],
    cfg: SaberConfig,
    out: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "auto",
    layout: str = "thinker",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights, configs and the tokenizer; adapters are merged into the weights.

    `params` holds arrays, or what stream.open_model gives. "auto" is the narrowest dtype among
    them, in which the ones that are stored in it survive bit for bit. "omni" is the layout of the
    whole model, its thinker alone filled. Raises ValueError for parameters that do not fit `cfg`,
    an unknown dtype or layout; FileExistsError if `out` holds an export and `overwrite` is not set,
    or anything else than an export.
    """
    saber.check_tree(saber.abstract(cfg), params, dtypes=False)
    params, cfg = saber.merge_lora(params, cfg), dataclasses.replace(cfg, lora=None)
    dtype = _narrowest(params) if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}.")
    ours = {CONFIG, *processor.FILES, tensors.INDEX, digests.FILE}
    config = to_hf(cfg, dtype=dtype, layout=layout)
    omni = layout == "omni"
    with _replacing(Path(out), ours, overwrite) as partial:
        prefix = PREFIX if omni else ""
        sums = _write_weights(params, cfg, partial, DTYPES[dtype], shard_bytes, prefix)
        write_json(partial / CONFIG, config)
        processor.write_processor(partial, cfg, tokenizer)
        if omni:
            processor.write_no_voices(partial)
        digests.write(partial, sums)


def export_like(
    params: dict[str, Any],
    cfg: SaberConfig,
    out: str | Path,
    source: HfCheckpoint,
    *,
    overwrite: bool = False,
) -> list[str]:
    """Writes `source.directory` again with these weights; returns what was left out.

    Left out are weights that no index names, such as pickles beside safetensors, and folders.
    Every tensor keeps its place and dtype, so weights that came from `source` unchanged give files
    that are equal byte for byte. Raises ValueError for parameters or a source that do not fit
    `cfg`, FileExistsError if `out` is there and `overwrite` is not set, or holds anything that is
    not in `source`.
    """
    saber.check_tree(saber.abstract(cfg), params, dtypes=False)
    params, cfg = saber.merge_lora(params, cfg), dataclasses.replace(cfg, lora=None)
    _check_source(params, cfg, source)
    shards: dict[Path, list[tuple[str, tensors.Tensor]]] = {}
    for name, tensor in source.everything.items():
        shards.setdefault(tensor.path, []).append((name, tensor))
    kept, left_out = _other_files(source.directory, {path.name for path in shards})
    bar = tqdm(desc="exporting", total=len(source.everything), unit="tensor")
    with _replacing(Path(out), {digests.FILE, *(p.name for p in kept)}, overwrite) as partial, bar:
        for path in kept:
            shutil.copyfile(path, partial / path.name)
            if path.name == CONFIG:
                _make_portable(partial / path.name, tied=_is_tied(source))
        for held in shards.values():
            held.sort(key=lambda pair: pair[1].offset)
        known = entries(cfg)
        jobs = [
            (tensor.nbytes, _job_like(params, known.get(name.removeprefix(PREFIX)), source, tensor))
            for path in sorted(shards)
            for name, tensor in shards[path]
        ]
        arrays, sums = _counted(stream.in_order(jobs), bar), {}
        for path in sorted(shards):
            ours = itertools.islice(arrays, len(shards[path]))
            sums[path.name] = tensors.write(partial / path.name, tensors.read_header(path), ours)
        digests.write(partial, sums)
    return left_out


def _make_portable(path: Path, *, tied: bool) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    if (changed := portable(config, tied=tied)) != config:
        write_json(path, changed)


def _job_like(
    params, entry: TensorEntry | None, source: HfCheckpoint, tensor: tensors.Tensor
) -> Callable[[], np.ndarray]:
    """Our bytes for a tensor of the thinker, the source's own for any other."""
    if entry is None or source.tensors.get(entry.name) is not tensor:
        return tensor.read_bytes
    return functools.partial(_convert, params, entry, tensor.dtype)


def _check_source(params, cfg: SaberConfig, source: HfCheckpoint) -> None:
    ours, theirs = cfg.to_dict(), source.cfg.to_dict()
    ours["tokens"] = theirs["tokens"]
    manifest.check(
        theirs,
        ours,
        what=f"{source.directory} is another model than the checkpoint",
        remedy="Give the directory that the checkpoint was loaded from, or leave --source out.",
    )
    if _is_tied(source):
        head, embed = params["text"]["lm_head"][...], params["text"]["embed"][...]
        if not np.array_equal(np.asarray(head).T, np.asarray(embed)):
            raise ValueError(
                f"{source.directory} has one matrix for embedding and lm_head, but in the "
                "checkpoint they differ. Leave --source out."
            )


def _is_tied(source: HfCheckpoint) -> bool:
    return source.tensors["lm_head.weight"] is source.tensors["model.embed_tokens.weight"]


def _other_files(directory: Path, shards: set[str]) -> tuple[list[Path], list[str]]:
    """The files of a directory to copy, and the names of those that are not copied."""
    weights = (".safetensors", ".bin", ".pth", ".h5", ".msgpack")
    kept, left_out = [], []
    for path in sorted(directory.iterdir()):
        if path.name in {*shards, digests.FILE} or path.name.startswith("."):
            continue
        stale = path.is_dir() or path.name.endswith(weights)
        (left_out if stale else kept).append(path)
    return kept, [path.name for path in left_out]


def _narrowest(params: dict[str, Any]) -> str:
    names = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(params)}
    return next((name for name in ("bfloat16", "float16") if name in names), "float32")


@contextlib.contextmanager
def _replacing(out: Path, expected: set[str], overwrite: bool) -> Iterator[Path]:
    """A directory to write into, which takes the place of `out` when all is written.

    A mistyped --out must not cost anybody a directory: `out` may be replaced if `overwrite` says
    so, and if it holds `expected` and safetensors alone.
    """
    if exists(out):
        names = [out.name] if out.is_file() else [path.name for path in listed(out)]
        foreign = [n for n in names if n not in expected and not n.endswith(".safetensors")]
        if foreign:
            raise FileExistsError(
                f"{out} holds files that no export wrote: {sorted(foreign)[:5]}. Give --out a new "
                "name."
            )
        if names and not overwrite:
            raise FileExistsError(
                f"{out} is there already. Give --out a new name, or --overwrite to replace it."
            )
    with replacing_folder(out) as partial:
        yield partial


def _write_weights(
    params: dict[str, Any], cfg: SaberConfig, out: Path, dtype: str, shard_bytes: int, prefix: str
) -> dict[str, list[int]]:
    """One file, or as many as it takes, of tensors whose names begin with `prefix`. Returns their
    digests."""
    known = {prefix + name: entry for name, entry in entries(cfg).items()}
    itemsize = np.dtype(tensors.DTYPES[dtype]).itemsize
    sizes = {name: int(np.prod(entry.shape)) * itemsize for name, entry in known.items()}
    shards = _shards(sizes, shard_bytes)
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = files if count > 1 else [tensors.SINGLE]
    jobs = [(sizes[n], functools.partial(_convert, params, known[n], dtype)) for n in sizes]
    with tqdm(desc="exporting", total=len(jobs), unit="tensor") as bar:
        arrays, sums = _counted(stream.in_order(jobs), bar), {}
        for file, names in zip(files, shards, strict=True):
            start = tensors.header({name: (dtype, known[name].shape) for name in names})
            sums[file] = tensors.write(out / file, start, itertools.islice(arrays, len(names)))
    if count > 1:
        places = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        total = {"total_size": sum(sizes.values())}
        write_json(out / tensors.INDEX, {"metadata": total, "weight_map": places})
    return sums


def _convert(params: dict[str, Any], entry: TensorEntry, dtype: str) -> np.ndarray:
    array = on_disk(params, entry).astype(tensors.DTYPES[dtype], copy=False)
    return stream.contiguous(array)


def _counted(arrays: Iterator[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    for array in arrays:
        bar.update()  # Before `yield`, because the generator is not resumed after the last one.
        yield array


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names in order, divided into files of at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run's work directory")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPES], help="auto: the narrowest that the checkpoint holds"
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="thinker (default): the thinker alone; omni: inside the whole model, for servers",
    )
    parser.add_argument(
        "--source",
        type=Path,
        help="HuggingFace directory whose config, other files and other tensors are copied",
    )
    parser.add_argument("--peft", action="store_true", help="adapters alone")
    parser.add_argument(
        "--base",
        help="with --peft: directory or name of the model that they go onto; by default the one "
        "that the run's base was loaded from",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an export at --out")
    args = parser.parse_args(argv)
    own = args.dtype is not None or args.layout is not None
    if sum([own, args.source is not None, args.peft]) > 1:
        parser.error("give --dtype and --layout, or --source, or --peft")
    if args.base is not None and not args.peft:
        parser.error("--base belongs to --peft")
    print(f"exporting {args.checkpoint} to {args.out}")
    try:
        if args.peft:
            ours = {peft.CONFIG, peft.WEIGHTS, digests.FILE}
            with _replacing(args.out, ours, args.overwrite) as partial:
                peft.write(args.checkpoint, partial, base=args.base)
            print(f"{args.out} is ready for peft's PeftModel.from_pretrained.")
            return 0
        params, cfg = stream.open_model(args.checkpoint)
        if args.source is not None:
            source = open_checkpoint(args.source)
            left_out = export_like(params, cfg, args.out, source, overwrite=args.overwrite)
            if other := chat_template.difference(args.source):
                print(f"note: the copied chat template is not that of training: {other}")
            if left_out:
                names = ", ".join(left_out)
                print(f"not copied, because they are folders or other weights: {names}")
        else:
            export(
                params,
                cfg,
                args.out,
                load_tokenizer(args.checkpoint),
                dtype=args.dtype or "auto",
                layout=args.layout or "thinker",
                overwrite=args.overwrite,
            )
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{args.out} could not be written: {saved.cause(error)}.", file=sys.stderr)
        return 1
    print(f"{args.out} is ready for transformers' from_pretrained.")
    return 0


if __name__ == "__main__":
    # Conversion needs no accelerator, which another program may be using.
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)
    sys.exit(main())
