"""Annotates a folder of clips with a multimodal model behind an OpenAI-compatible endpoint.

    python -m data_prep.annotate --clips DIR --out ANNOTATIONS --url http://localhost:8000/v1 \
        --model Qwen/Qwen2.5-Omni-7B [--labels labels.jsonl]

Writes ANNOTATIONS/NAME.json for every clip DIR/NAME.mp4, as `python -m data_prep.build` reads it,
and caches the endpoint's answers in ANNOTATIONS.answers, so that no request is paid for twice.
Check some annotations before you train on them. Existing annotation files are kept, so an
interrupted run continues, and files that you write or correct by hand are not changed. Exit code 0
if every clip has an annotation, 1 if some have none, 2 if no request could be made.

For more than a few hundred clips, and to have annotations checked, use `python -m data_prep.run`.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.raw.annotate import AnnotateSettings, work
from data_prep.raw.answers import EndpointSettings
from data_prep.raw.attach import AttachSettings
from data_prep.raw.shards import Dropped, Outcome, Row
from data_prep.records import clips
from saber_jax.data.records import LANGUAGES
from saber_jax.endpoint import KEY_VARIABLE, Endpoint, EndpointError
from saber_jax.flags import Parser
from saber_jax.runs.files import write_json


def annotate(
    todo: Sequence[tuple[Row, Path]], client: Endpoint, settings: AnnotateSettings
) -> list[Dropped]:
    """Writes the annotation of each row to its path; returns the clips that got none.

    Raises EndpointError if further requests would fail too, for example with a wrong key.
    """
    dropped = []
    with ThreadPoolExecutor(settings.endpoint.concurrency) as pool:
        futures = {pool.submit(_one, row, client, settings): path for row, path in todo}
        try:
            for future in tqdm(as_completed(futures), total=len(todo), desc="asked", unit="clip"):
                outcome = future.result()
                if isinstance(outcome, Dropped):
                    dropped.append(outcome)
                else:
                    write_json(futures[future], outcome["annotation"])
        except BaseException:
            client.stopped.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return dropped


def _one(row: Row, client: Endpoint, settings: AnnotateSettings) -> Outcome:
    with ThreadPoolExecutor(1) as alone:
        return next(iter(work([row], {"annotate": client}, alone, settings=settings)))


def rows(flags: Any) -> list[tuple[Row, Path]]:
    """(row to annotate, path of its annotation) for each clip that has no annotation yet.

    Raises FileNotFoundError or ValueError for folders and labels that cannot be read.
    """
    videos = clips.find_videos(flags.clips)
    labels = clips.read_labels(flags.labels) if flags.labels else {}
    todo = []
    for video in videos:
        name = clips.name_of(video, flags.clips)
        path = flags.out / f"{name}.json"
        row = {
            "clip_id": name,
            "file": str(video),
            "language": labels.get(name, {}).get("language", flags.language),
            "transcript": "",
            "provenance": [],
        }
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            todo.append((row, path))
    return todo


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; see the module docstring."""
    flags = _flags(argv)
    endpoint = EndpointSettings(
        url=flags.url,
        model=flags.model,
        concurrency=flags.concurrency,
        most_tokens=flags.most_tokens,
    )
    settings = AnnotateSettings(endpoint=endpoint, clip=AttachSettings(send=flags.send))
    try:
        todo = rows(flags)
        if not todo:
            print(f"Every clip of {flags.clips} has an annotation in {flags.out}.")
            return 0
        dropped = annotate(todo, endpoint.open(f"{flags.out}.answers"), settings)
    except (ValueError, OSError, EndpointError) as error:
        print(f"data_prep.annotate: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command continues from here.", file=sys.stderr)
        return 130
    print(f"{len(todo) - len(dropped)} of {len(todo)} clips annotated, in {flags.out}")
    for one in dropped:
        print(f"{one.row['clip_id']}: {one.reason}: {one.detail}", file=sys.stderr)
    return 1 if dropped else 0


def _flags(argv: Sequence[str] | None) -> Any:
    parser = Parser(__doc__)
    parser.add_argument("--clips", type=Path, required=True, help="folder of videos")
    parser.add_argument("--out", type=Path, required=True, help="folder for the NAME.json files")
    key = f"its API key, if it needs one, is read from {KEY_VARIABLE}"
    parser.add_argument("--url", required=True, help=f"URL of the endpoint, with /v1; {key}")
    parser.add_argument("--model", required=True, help="name of the model at the endpoint")
    parser.add_argument("--labels", type=Path, help="labels.jsonl with languages")
    parser.add_argument(
        "--language", choices=LANGUAGES, default="en", help="language of annotations"
    )
    parser.add_argument("--send", choices=("frames", "video"), default="frames")
    parser.add_argument("--concurrency", type=int, default=4, help="concurrent requests")
    parser.add_argument("--most_tokens", type=int, help="stop at this number of tokens")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
