"""Reads a HuggingFace checkpoint of the Qwen2.5-Omni thinker.

    python -m saber_jax.hf.load --hf_dir DIR --out WORKDIR

DIR contains either the thinker alone or the whole omni model, whose talker is left out. All other
commands take WORKDIR as `--checkpoint`. Weights keep their dtype and are converted one matrix at a
time. On a pod, start it on every host: each reads and writes its share.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from saber_jax.data.tokenizer import Tokenizer, load_tokenizer
from saber_jax.flags import Parser
from saber_jax.hf import chat_template, tensors
from saber_jax.hf.config import from_hf, tied_by
from saber_jax.hf.names import TensorEntry, entries, from_disk
from saber_jax.hf.processor import differences
from saber_jax.hf.tokenizer import check_tokenizer
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.runs import distributed
from saber_jax.runs.files import parse_json, replacing_folder
from saber_jax.train import checkpoint, saved, stream

PREFIX = "thinker."
OTHER_MODELS = ("talker.", "token2wav.")
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"

# Tables that older versions of transformers saved, and that follow from the config.
DERIVED = (".inv_freq", "positional_embedding.positional_embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfCheckpoint:
    """A HuggingFace directory that passed all checks.

    `everything` has all tensors by their names there. `tensors` has the thinker's by their names in
    a thinker alone; a tied head is the embedding.
    """

    directory: Path
    cfg: SaberConfig
    everything: Mapping[str, tensors.Tensor]
    tensors: Mapping[str, tensors.Tensor]


def open_checkpoint(hf_dir: str | Path) -> HfCheckpoint:
    """Reads configs and headers; tensors only where the head could be one of two.

    Raises FileNotFoundError if there is no config.json, saying what is there instead, and otherwise
    one ValueError that lists everything wrong at once: missing, unexpected, mis-shaped and
    wrong-dtype tensors, truncated files, pointers of Git LFS, an index that points outside the
    directory, pickles, settings that this network does not have.
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
    named, strangers = _strip(found)
    problems += strangers
    if HEAD not in named and EMBED in named and any(tied_by(config)):
        named[HEAD] = named[EMBED]
    # With a file unread, every tensor in it would be listed as missing too.
    problems += _compare(expected, named, complete=not problems)
    if not problems and all(tied_by(config)):
        problems += _two_heads(named)
    problems += differences(directory, cfg)
    if problems:
        raise ValueError(_report(directory, problems))
    return HfCheckpoint(directory=directory, cfg=cfg, everything=found, tensors=named)


def load_params(hf_dir: str | Path) -> tuple[dict[str, Any], SaberConfig]:
    """Float32 NumPy parameters and the config of a checkpoint directory, all of it in memory.

    Raises what `open_checkpoint` raises.
    """
    source = open_checkpoint(hf_dir)

    def read(entry: TensorEntry) -> np.ndarray:
        return source.tensors[entry.name].read().astype(np.float32)

    return from_disk(read, source.cfg), source.cfg


def leaves(source: HfCheckpoint) -> dict[str, Any]:
    """The parameters for `stream.save`, in the dtype that they have on disk, not yet read."""
    parts: dict[tuple[str, ...], list[TensorEntry]] = {}
    for entry in entries(source.cfg).values():
        parts.setdefault(entry.path, []).append(entry)

    def leaf(
        path, abstract: jax.ShapeDtypeStruct, axes: tuple[str, ...]
    ) -> stream.StreamedParameter:
        made_of = parts[tuple(key.key for key in path)]
        found = [source.tensors[entry.name] for entry in made_of]
        # Layers of several dtypes are stacked in one that holds all of their values.
        dtype = functools.reduce(np.promote_types, [tensors.DTYPES[t.dtype] for t in found])
        pieces = [_piece(*pair, np.dtype(dtype)) for pair in zip(made_of, found, strict=True)]
        return stream.StreamedParameter(
            shape=abstract.shape, dtype=np.dtype(dtype), axes=axes, pieces=tuple(pieces)
        )

    cfg = source.cfg
    return jax.tree_util.tree_map_with_path(leaf, saber.abstract(cfg), saber.axes(cfg))


def _piece(entry: TensorEntry, tensor: tensors.Tensor, dtype: np.dtype) -> stream.Piece:
    return stream.Piece(
        layer=entry.layer,
        nbytes=tensor.nbytes,
        place=(str(tensor.path), tensor.offset),
        read=lambda: entry.ours(tensor.read().astype(dtype, copy=False)),
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    # A training run has a config.json too, of its settings.
    if not path.is_file() or (directory / checkpoint.MODEL_FILE).is_file():
        raise FileNotFoundError(_what_it_is(directory))
    if tensors.is_pointer(path):
        raise ValueError(f"{path} {tensors.POINTER}")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Download it again.") from error
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise ValueError(f"{path} must hold a JSON object, got {kind}. Download it again.")
    return config


def _what_it_is(directory: Path) -> str:
    """An error message about what is at this path instead of a checkpoint, with advice."""
    give = "Give the directory that `hf download` or save_pretrained wrote."
    if not directory.exists():
        parts = directory.parts
        if len(parts) == 2 and not directory.is_absolute() and not directory.parent.exists():
            return (
                f"There is no directory {directory}. If it is a name on the Hub, download it: "
                f"hf download {directory} --local-dir {directory.name}"
            )
        return f"There is no directory {directory}. {give}"
    if not directory.is_dir():
        return f"{directory} is a file, and a checkpoint is a directory. {give}"
    if (directory / "adapter_config.json").is_file():
        return (
            f"{directory} holds adapters of peft, not a model. Merge them into their base first: "
            "PeftModel.from_pretrained(base, adapters).merge_and_unload().save_pretrained(DIR)."
        )
    if (directory / checkpoint.MODEL_FILE).is_file():
        return f"{directory} is a checkpoint of this project already: use it as --checkpoint."
    if snapshots := sorted(directory.glob("snapshots/*/config.json")):
        return f"{directory} is a download cache. Give {snapshots[-1].parent}, which is in it."
    if ggufs := sorted(path.name for path in directory.glob("*.gguf")):
        return f"{directory} holds {ggufs[0]}, which is GGUF; only safetensors are read. {give}"
    return f"{directory} is not a HuggingFace checkpoint: it has no config.json. {give}"


def _strip(found: Mapping[str, tensors.Tensor]) -> tuple[dict[str, Any], list[str]]:
    """(the thinker's tensors by their names in a thinker alone, problems)."""
    thinker = {name for name in found if name.startswith(PREFIX)}
    if not thinker:
        return dict(found), []
    named = {name.removeprefix(PREFIX): found[name] for name in sorted(thinker)}
    # "x" beside "thinker.x" could be either one's weights.
    strangers = [n for n in sorted(found.keys() - thinker) if not n.startswith(OTHER_MODELS)]
    return named, [f"unexpected {name}: the others begin with {PREFIX}" for name in strangers]


def _two_heads(named: Mapping[str, tensors.Tensor]) -> list[str]:
    """A problem if a head is stored that transformers would replace by the embedding."""
    head, embed = named[HEAD], named[EMBED]
    try:
        if head is embed or np.array_equal(head.read(), embed.read()):
            return []
    except ValueError as error:
        return [str(error)]
    return [
        f"config.json ties the head to the embedding, but {HEAD} differs from {EMBED}: set "
        "tie_word_embeddings to false if the head was trained, else delete it from the file"
    ]


def _compare(
    expected: Mapping[str, TensorEntry], found: Mapping[str, tensors.Tensor], *, complete: bool
) -> list[str]:
    problems = []
    if complete:
        absent = sorted(expected.keys() - found.keys())
        problems += [f"missing {name} {expected[name].shape}" for name in absent]
    extra = sorted(found.keys() - expected.keys())
    problems += [f"unexpected {name}" for name in extra if not name.endswith(DERIVED)]
    for name in sorted(expected.keys() & found.keys()):
        want, have = expected[name], found[name]
        if have.shape != want.shape:
            problems.append(f"{name}: expected shape {want.shape}, got {have.shape}")
        if have.dtype not in tensors.DTYPES:
            known = ", ".join(tensors.DTYPES)
            problems.append(f"{name}: expected dtype {known}, got {have.dtype}")
    return problems


def _report(directory: Path, problems: list[str]) -> str:
    listing = "\n  ".join(problems)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return (
        f"{directory} cannot be loaded, {count}:\n  {listing}\n"
        "If a file is damaged or was not copied, download or copy the directory again."
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--hf_dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args(argv)
    if (args.out / checkpoint.MODEL_FILE).exists():
        print(f"{args.out} is already there; nothing to do.")
        return 0
    if args.out.exists():
        print(f"{args.out} exists and is no checkpoint. Give --out a new name.", file=sys.stderr)
        return 1
    try:
        source = open_checkpoint(args.hf_dir)
        tokenizer = load_tokenizer(args.hf_dir)
        check_tokenizer(tokenizer, source.cfg)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if not jax.process_index() and (other := chat_template.difference(args.hf_dir)):
        print(f"note: the chat template of {args.hf_dir} is not used, but it is another: {other}")
    try:
        _write(args.out, source, tokenizer)
    except tensors.DamagedError as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"{args.out} could not be written: {saved.cause(error)}.", file=sys.stderr)
        return 1
    if not jax.process_index():
        print(f"{args.out} is ready: use it as --checkpoint.")
    return 0


def _write(out: Path, source: HfCheckpoint, tokenizer: Tokenizer) -> None:
    """Every process must call it."""
    partial = out.with_name(f".{out.name}.partial")
    if jax.process_index():  # The first process makes the folder and moves it.
        distributed.barrier("hf.load: the folder is there")
        stream.save(partial / "checkpoints" / "0", leaves(source))
        return
    with replacing_folder(out, partial=partial):
        print(f"writing {out}")
        distributed.barrier("hf.load: the folder is there")
        stream.save(partial / "checkpoints" / "0", leaves(source))
        origin = str(source.directory.absolute())
        checkpoint.write_model_files(partial, source.cfg, tokenizer, source=origin)


if __name__ == "__main__":
    # Conversion needs no accelerator, which another program may be using.
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)
    distributed.initialize()
    sys.exit(main())
