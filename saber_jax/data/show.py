"""Shows one record as a page: its fields, frames, sound, and the exact tokens that it becomes.

python -m saber_jax.data.show RECORDS [--split train] [--index 0 | --clip ID] [--out record]
"""

import base64
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from saber_jax.batch import row_of
from saber_jax.data import chat, player
from saber_jax.data.examples import encode_record, size_of
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.records import FIELDS, Record, RecordSource
from saber_jax.data.tokenizer import Tokenizer, load_tokenizer
from saber_jax.flags import Parser

SHEET_COLUMNS, THUMBNAIL = 8, 160
PLOT = (960, 160)
KINDS = {chat.TEXT: "text", chat.VISION: "video", chat.AUDIO: "audio"}


def contact_sheet(record: Record) -> Image.Image | None:
    """All frames in one picture, in reading order; None without frames."""
    if not len(record.frames):
        return None
    height, width = record.frames.shape[1:3]
    size = (THUMBNAIL, max(1, round(THUMBNAIL * height / width)))
    columns = min(SHEET_COLUMNS, len(record.frames))
    rows = -(-len(record.frames) // columns)
    sheet = Image.new("RGB", (columns * (size[0] + 4), rows * (size[1] + 4)), "white")
    for number, frame in enumerate(record.frames):
        y, x = divmod(number, columns)
        sheet.paste(Image.fromarray(frame).resize(size), (x * (size[0] + 4), y * (size[1] + 4)))
    return sheet


def waveform(record: Record) -> Image.Image | None:
    """Picture of the minimum and maximum sample per column; None without sound."""
    if not len(record.audio):
        return None
    width, height = PLOT
    plot = np.full((height, width, 3), 255, np.uint8)
    plot[height // 2] = 200
    edges = np.linspace(0, len(record.audio), width + 1).astype(int)
    for x, (start, stop) in enumerate(
        zip(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1), strict=True)
    ):
        piece = record.audio[start:stop].astype(np.float32) / 32768
        low, high = (int((1 - v) / 2 * (height - 1)) for v in (piece.max(), piece.min()))
        plot[low : high + 1, x] = (31, 119, 180)
    return Image.fromarray(plot)


def layout(record: Record, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The slots of the packed row: tokens, segment, positions and loss weight.

    The row is made by `pack_rows`, so it shows exactly what training uses. Text has one line per
    token, media one line per run of tokens.
    """
    example = encode_record(record, tokenizer)
    size = size_of(example)
    targets = max(size.targets, 1)
    budget = Budget(
        length=size.text,
        patches=size.patches,
        chunks=size.chunks,
        targets=targets,
        segments=1,
    )
    row = row_of(pack_rows([[example]], budget), 0)
    text_slots, targets_of = row.text, row.targets
    weights, sections = np.zeros(size.text), np.zeros(size.text, int)
    used = targets_of.weights > 0
    predicted = targets_of.source[used] + 1  # The slot whose token the loss is about.
    weights[predicted] = targets_of.weights[used]
    sections[predicted] = targets_of.section[used]
    kinds = np.zeros(size.text, int)
    kinds[: len(example.prompt.tokens)] = example.prompt.media_kind
    runs, start = [], 0
    while start < size.text:
        stop = start + 1
        while kinds[start] != chat.TEXT and stop < size.text and kinds[stop] == kinds[start]:
            stop += 1
        first, last = text_slots.positions[:, start], text_slots.positions[:, stop - 1]
        media = kinds[start] != chat.TEXT
        text = tokenizer.decode(text_slots.tokens[start : start + 1])
        runs.append(
            {
                "slots": f"{start}" if stop == start + 1 else f"{start}-{stop - 1}",
                "kind": KINDS[int(kinds[start])],
                "token": f"{stop - start} x {KINDS[int(kinds[start])]}" if media else repr(text),
                "id": str(text_slots.tokens[start]),
                "segment": str(text_slots.segments[start]),
                "t h w": " ".join(map(str, first))
                + ("" if stop == start + 1 else " .. " + " ".join(map(str, last))),
                "loss": f"{weights[start]:g}",
                "section": FIELDS[sections[start] - 1] if sections[start] else "",
            }
        )
        start = stop
    return runs


def facts(record: Record) -> dict[str, str]:
    """Every field of the record except the contents of its media."""
    frames = " x ".join(map(str, record.frames.shape[:3]))
    values = {
        "clip_id": record.clip_id,
        "language": record.language,
        "frames": f"{frames}, {record.seconds_per_grid:g} s between pairs",
        "audio": f"{len(record.audio)} samples, {len(record.audio) / 16_000:.2f} s",
        "audio_in_video": str(record.audio_in_video),
    }
    values |= dict(record.annotation)
    values |= {f"{m['role']}": m["content"] for m in record.messages}
    values |= {"answer": record.answer} if record.answer else {}
    values |= {"labels": json.dumps(dict(record.labels), ensure_ascii=False)}
    return values | {"provenance": json.dumps(dict(record.provenance), ensure_ascii=False)}


def write(record: Record, tokenizer: Tokenizer, out: Path) -> None:
    """Writes OUT/record.txt, frames.png, waveform.png, and record.html, which has everything."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"frames.png": contact_sheet(record), "waveform.png": waveform(record)}
    for name, picture in pictures.items():
        if picture is not None:
            picture.save(out / name)
    fields, runs = facts(record), layout(record, tokenizer)
    lines = [f"{name:20s} {value}" for name, value in fields.items()]
    heads = list(runs[0])
    widths = [max(len(head), *(len(run[head]) for run in runs)) for head in heads]
    table = [dict(zip(heads, heads, strict=True)), *runs]
    lines += [""] + [
        "  ".join(run[h].ljust(w) for h, w in zip(heads, widths, strict=True)).rstrip()
        for run in table
    ]
    (out / "record.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "record.html").write_text(_page(record, fields, runs, pictures), encoding="utf-8")


def _page(
    record: Record,
    fields: dict[str, str],
    runs: list[dict[str, str]],
    pictures: Mapping[str, Image.Image | None],
) -> str:
    """A self-contained HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("record.html.j2").render(
        title=record.clip_id,
        language=record.language,
        film=_base64(player.film(record)),
        sound=_base64(player.sound(record)),
        pictures={name: _base64(_png(p)) for name, p in pictures.items() if p is not None},
        fields=fields,
        runs=runs,
    )


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _base64(content: bytes | None) -> str:
    return base64.b64encode(content or b"").decode()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; see the module docstring."""
    parser = Parser(
        prog="python -m saber_jax.data.show",
        description=__doc__,
    )
    parser.add_argument("records", metavar="RECORDS", help="the folder that a build wrote")
    parser.add_argument("--split", default="train")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--clip", help="a clip id, instead of --index")
    parser.add_argument("--tokenizer", help="default: the one beside the records")
    parser.add_argument("--out", type=Path, default=Path("record"), help="directory to write")
    flags = parser.parse_args(argv)
    try:
        source = RecordSource(flags.records, flags.split)
        index = source.index(flags.clip) if flags.clip else flags.index
        record, vocabulary = source[index], load_tokenizer(flags.tokenizer or flags.records)
        write(record, vocabulary, flags.out)
    except (ValueError, OSError, LookupError) as error:
        print(f"saber_jax.data.show: {error}", file=sys.stderr)
        return 1
    print((flags.out / "record.txt").read_text(encoding="utf-8"), end="")
    print(
        f"\nRecord {index} of the split {flags.split}, {source.where(index)}; see "
        f"{flags.out / 'record.html'}, which plays it in a browser."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
