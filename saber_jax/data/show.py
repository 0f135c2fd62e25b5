"""Draws one record for a person: its fields, frames, sound, and the exact tokens it becomes.

python -m saber_jax.data.show RECORDS [--split train] [--index 0 | --clip ID] [--out record]
"""

import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from saber_jax.batch import row_of
from saber_jax.data import chat
from saber_jax.data.examples import encode_record, size_of
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.records import FIELDS, Record, RecordSource
from saber_jax.data.tokenizer import Tokenizer, load_tokenizer
from saber_jax.flags import Parser

SHEET_COLUMNS, THUMBNAIL = 8, 160
PLOT = (960, 160)
KINDS = {chat.TEXT: "text", chat.VISION: "video", chat.AUDIO: "audio"}


def contact_sheet(record: Record) -> Image.Image | None:
    """All frames, in reading order; None without any."""
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
    """Least and greatest sample of every column of pixels; None without sound."""
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
    """Runs of slots of the packed row: what stands there, its segment, positions and loss weight.

    The row is made by `pack_rows`, as training makes it, so what is shown is what is trained on.
    Text is one line a token, media one line a run.
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
    """Every field but the media's content."""
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
    """OUT/record.txt, record.html, frames.png, waveform.png."""
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
    (out / "record.html").write_text(_page(fields, runs, pictures), encoding="utf-8")


def _page(fields: dict[str, str], runs: list[dict[str, str]], pictures: dict) -> str:
    def row(cells, tag="td", kind=""):
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f'<tr class="{kind}">{inner}</tr>'

    images = "".join(f'<p><img src="{n}" alt="{n}"></p>' for n, p in pictures.items() if p)
    body = "".join(
        row(run.values(), kind=f"{run['kind']} {'learnt' if run['loss'] != '0' else ''}")
        for run in runs
    )
    style = (
        "body{font:14px sans-serif;margin:24px;max-width:1100px}td,th{padding:2px 10px;"
        "text-align:left;vertical-align:top}table{border-collapse:collapse;margin:16px 0}"
        ".video{background:#e3f0fb}.audio{background:#e6f5e6}.learnt{background:#fdf1dc}"
        "img{max-width:100%}"
    )
    title = html.escape(fields["clip_id"])
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1>{images}<table>{''.join(row(i) for i in fields.items())}</table>"
        f"<p>Blue: video, green: sound, orange: what the loss is about.</p>"
        f"<table>{row(runs[0], 'th')}{body}</table>"
    )


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
    print(f"\n{source.where(index)}; see {flags.out / 'record.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
