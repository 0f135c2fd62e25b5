"""Builds the embedded corpus `saber_mini`: drawn faces with synthetic speech, fully annotated.

    python -m data_prep.corpus --out DIR [--seed 0] [--clips N] [--workers 2]

writes DIR/clips/ID.mp4, DIR/annotations/ID.json (SABER JSON), DIR/labels.jsonl and, last,
DIR/corpus.json. The default 4,920 clips take about two minutes on two cores. The same seed and
sizes give the same files; a run that was stopped continues where it was, and a finished one returns
at once.

License: pictures, sentences and annotations are this project's own. Speech is synthesised at build
time by espeak-ng (GPL-3, from the espeakng-loader wheel), which runs in its own process; none of
its code is part of this project or its output.
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
import threading
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import Int16, UInt8
from tqdm import tqdm

from data_prep.corpus import film, text, voice
from data_prep.corpus.plan import SPLITS, Clip, Sizes, plan
from saber_jax.flags import Parser
from saber_jax.runs import manifest
from saber_jax.runs.files import replacing, write_json, write_jsonl

VERSION = "2.2.0"
# One per worker process, set by `_start_worker`.
_speaker: voice.Speaker
_out: Path


def render(
    clip: Clip, speaker: voice.Speaker
) -> tuple[UInt8[np.ndarray, "frames 84 84 3"], Int16[np.ndarray, " samples"]]:
    """(RGB frames uint8 [T, 84, 84, 3] at 10 fps, mono int16 [n] at 16 kHz) of one clip."""
    rng = np.random.default_rng(clip.noise_seed)
    style = voice.prosody(clip.voice, clip.voice_intensity, rng)
    track, frames = voice.voice_track(
        speaker, text.sentence(clip), clip.language, clip.variant, style, rng
    )
    return film.film(clip, track, frames, rng), track


def build(
    out: str | Path, *, sizes: Sizes | None = None, seed: int = 0, workers: int = 2
) -> dict[str, int]:
    """Builds or completes the corpus in `out`; returns clips per split.

    Raises ValueError when `out` holds a corpus with other settings.
    """
    out, sizes = Path(out), sizes or Sizes()
    settings = {"version": VERSION, "seed": seed, "sizes": dataclasses.asdict(sizes)}
    _claim(out, settings)
    clips = plan(sizes, seed=seed)
    counts = dict(Counter(clip.split for clip in clips))
    finished = _names(out / "annotations", ".json") & _names(out / "clips", ".mp4")
    missing = [clip for clip in clips if clip.clip_id not in finished]
    if not missing and (out / "corpus.json").exists():
        print(f"{out}: {len(clips)} clips are already there, done.")
        return counts
    print(f"{out}: rendering {len(missing)} of {len(clips)} clips with {workers} processes.")
    # Fresh processes, not forks of a caller that may run JAX's threads. They import this module, so
    # it cannot be a __main__.py, which multiprocessing never imports.
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_worker, (out,)) as pool:
        made = pool.imap_unordered(_make, missing, chunksize=4)
        for _ in tqdm(made, total=len(missing), desc="render", unit="clip"):
            pass
    write_jsonl(out / "labels.jsonl", [clip.labels for clip in clips])
    made_with = {name: version(name) for name in ("av", "espeakng-loader", "numpy", "pillow")}
    summary = {**settings, "counts": counts, "made_with": made_with}
    write_json(out / "corpus.json", summary)
    print(f"{out}: {len(clips)} clips, " + ", ".join(f"{s} {counts[s]}" for s in SPLITS) + ".")
    return counts


def _claim(out: Path, settings: dict):
    """Writes the manifest of this corpus to `out`; raises ValueError if another one is there."""
    manifest.claim(
        out / "settings.json",
        settings,
        what=f"{out} holds a corpus built with other settings",
        remedy=f"Choose another --out or delete {out}.",
    )
    for folder in ("clips", "annotations"):
        (out / folder).mkdir(exist_ok=True)


def _names(folder: Path, suffix: str) -> set[str]:
    return {name.removesuffix(suffix) for name in os.listdir(folder) if name.endswith(suffix)}


def _start_worker(out: Path):
    global _speaker, _out
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _speaker, _out = voice.Speaker(), out


def _end_with_parent():
    # Without this, a pool whose parent was killed would wait for work forever.
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _make(clip: Clip):
    frames, track = render(clip, _speaker)
    with replacing(_out / "clips" / f"{clip.clip_id}.mp4") as partial:
        film.write_mp4(partial, frames, track)
    # Written last: a clip is finished if its annotation exists.
    write_json(_out / "annotations" / f"{clip.clip_id}.json", text.annotation(clip))


def _sizes(args: argparse.Namespace) -> Sizes:
    sizes = Sizes(
        train=args.train,
        preference=args.preference,
        validation=args.validation,
        test=args.test,
        train_inconsistent=args.train_inconsistent,
    )
    if args.clips is None:
        return sizes
    share = args.clips / sum(getattr(sizes, split) for split in SPLITS)
    others = {split: round(getattr(sizes, split) * share) for split in SPLITS[1:]}
    return dataclasses.replace(sizes, train=args.clips - sum(others.values()), **others)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0, or 2 after printing what is wrong with the request."""
    default = Sizes()
    parser = Parser(prog="python -m data_prep.corpus", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, help="scale all splits to this many clips in total")
    for split in SPLITS:
        parser.add_argument(
            f"--{split}", type=int, default=getattr(default, split), help="clips of this split"
        )
    parser.add_argument(
        "--train-inconsistent",
        type=float,
        default=default.train_inconsistent,
        help="fraction of train clips whose modalities conflict",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    try:
        build(args.out, sizes=_sizes(args), seed=args.seed, workers=args.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
