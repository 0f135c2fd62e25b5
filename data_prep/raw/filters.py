"""Stage `filter`: applies thresholds to the measures, and finds duplicates.

Changing a threshold does not need decoding. To help you judge the thresholds, the stage writes a
contact sheet for every reason, `sheets/REASON.png`, with pictures of dropped clips and the value
that decided, and `sheets/kept.png` to compare with.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from data_prep.raw import storage
from data_prep.raw.shards import Dropped, Outcome, Row, ShardedStage
from saber_jax.data import isolation, timeline
from saber_jax.data.frame_sampling import MediaError
from saber_jax.data.timeline import opened, playable

REASONS = {
    "too_short": "shorter than `shortest`",
    "too_long": "longer than `longest`",
    "mute": "too quiet, or too little speech",
    "low_resolution": "the picture is too small",
    "low_bitrate": "compressed so far that detail is gone",
    "black": "black for too long",
    "frozen": "the picture stands still for too long",
    "blurred": "nothing in the picture has sharp edges",
    "no_face": "no frontal face is seen often enough",
    "face_lost": "no single face stays in the picture for long enough",
    "duplicate": "looks and sounds like a clip that is kept",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """Limits on the measures of data_prep.raw.measure; a clip that violates one is dropped."""

    shortest: float = 1.0  # Seconds.
    longest: float = 30.0
    quietest: float = -45.0  # LUFS.
    least_speech: float = 0.4  # Seconds.
    least_height: int = 144  # Of the shorter side, in pixels.
    least_kilobits: float = 60.0  # Per second, for 360 x 288 pixels; scaled with the picture.
    most_black: float = 0.3  # Share of the time.
    most_frozen: float = 0.6
    most_blur: float = 14.0  # Width of edges at 320 pixels.
    least_faces: float = 0.5  # Share of the looked-at pictures.
    least_face_track: float = 0.4
    picture_bits: int = 6  # Of 64 that may differ, for each of three pictures of duplicates.
    sound_bits: int = 10  # Of 64, for their sound.


def verdicts(measures: dict[str, Any], limits: FilterSettings) -> Iterator[tuple[str, str]]:
    """All (reason, detail) for which a clip with these measures is dropped; none if it is kept."""
    m = measures
    shorter = min(m["height"], m["width"])
    kilobits = limits.least_kilobits * (m["height"] * m["width"] / (360 * 288)) ** 0.5
    checks = [
        ("too_short", m["seconds"] < limits.shortest, f"{m['seconds']:.2f} s"),
        ("too_long", m["seconds"] > limits.longest, f"{m['seconds']:.1f} s"),
        ("mute", m["loudness"] < limits.quietest, f"{m['loudness']:.1f} LUFS"),
        ("mute", m["speech"] < limits.least_speech, f"{m['speech']:.2f} s of speech"),
        ("low_resolution", shorter < limits.least_height, f"{m['width']} x {m['height']}"),
        (
            "low_bitrate",
            m["kilobits_per_second"] < kilobits,
            f"{m['kilobits_per_second']:.0f} of {kilobits:.0f} kbit/s",
        ),
        ("black", m["black"] > limits.most_black, f"{m['black']:.0%} black"),
        ("frozen", m["frozen"] > limits.most_frozen, f"{m['frozen']:.0%} still"),
        ("blurred", m["blur"] > limits.most_blur, f"edges {m['blur']:.1f} wide"),
        ("no_face", m["faces"] < limits.least_faces, f"{m['faces']:.0%} with a face"),
        ("face_lost", m["face_track"] < limits.least_face_track, f"{m['face_track']:.0%} tracked"),
    ]
    return ((reason, detail) for reason, fails, detail in checks if fails)


class Duplicates:
    """Finds clips that look and sound like an earlier one, in nearly constant time per clip.

    Candidates share 16 bits at the same place of a picture's hash. They are then compared in all
    three pictures and in the sound: one speaker in one room looks the same in every clip, and a
    dubbed copy sounds different.
    """

    def __init__(self, limits: FilterSettings):
        self._limits = limits
        self._buckets: dict[tuple[int, int, int], list[str]] = {}
        self._hashes: dict[str, tuple[list[int], int]] = {}

    def find(self, measures: dict[str, Any]) -> str | None:
        """The clip_id of the clip this one repeats."""
        pictures, sound = _hashes(measures)
        tried = set()
        for key in self._keys(pictures):
            for clip_id in self._buckets.get(key, ()):
                if clip_id in tried:
                    continue
                tried.add(clip_id)
                others, other_sound = self._hashes[clip_id]
                if (sound ^ other_sound).bit_count() <= self._limits.sound_bits and all(
                    (a ^ b).bit_count() <= self._limits.picture_bits
                    for a, b in zip(pictures, others, strict=True)
                ):
                    return clip_id
        return None

    def add(self, clip_id: str, measures: dict[str, Any]) -> None:
        pictures, sound = _hashes(measures)
        self._hashes[clip_id] = (pictures, sound)
        for key in self._keys(pictures):
            self._buckets.setdefault(key, []).append(clip_id)

    def _keys(self, pictures: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        for place, band in itertools.product(range(len(pictures)), range(4)):
            yield place, band, (pictures[place] >> (16 * band)) & 0xFFFF


def _hashes(measures: dict[str, Any]) -> tuple[list[int], int]:
    return [int(h, 16) for h in measures["hashes"]], int(measures["sound_hash"], 16)


def run(stage: ShardedStage, source: ShardedStage, limits: FilterSettings) -> dict[str, Any]:
    """Runs the stage, shard after shard so that the first of duplicates is kept; the summary."""
    stage.claim(source.fingerprint())
    todo = set(stage.missing())
    known = Duplicates(limits)
    for shard in tqdm(range(stage.shards), desc=stage.name, unit="shard"):
        if shard in todo:
            rows = source.kept(shard)
            stage.write(shard, rows, [_decide(row, limits, known) for row in rows])
        else:
            for row in stage.kept(shard):
                known.add(row["clip_id"], row["measures"])
    summary = stage.summarise()
    if todo or not storage.names(stage.file("sheets")):
        contact_sheets(stage)
    return summary


def _decide(row: Row, limits: FilterSettings, known: Duplicates) -> Outcome:
    failed = list(verdicts(row["measures"], limits))
    if failed:
        detail = "; ".join(text for _, text in failed)
        return Dropped(row=row, reason=failed[0][0], detail=detail)
    if twin := known.find(row["measures"]):
        return Dropped(row=row, reason="duplicate", detail=f"of {twin}")
    known.add(row["clip_id"], row["measures"])
    return row


COLUMNS, TILE, CAPTION, MOST = 6, 160, 30, 24


def contact_sheets(stage: ShardedStage) -> None:
    """One PNG per reason that occurred, and one of kept clips; at most 24 clips each."""
    chosen: dict[str, list[tuple[Row, str]]] = {}
    for shard in range(stage.shards):
        for item in stage.dropped(shard):
            clips = chosen.setdefault(item["reason"], [])
            if len(clips) < MOST:
                clips.append((item["row"], item["detail"]))
        kept = chosen.setdefault("kept", [])
        kept += [(row, "") for row in stage.kept(shard)[: MOST - len(kept)]]
    for reason, clips in chosen.items():
        if clips:
            with storage.new_file(stage.file(f"sheets/{reason}.png")) as path:
                sheet(clips).save(path, format="PNG")


def sheet(clips: Sequence[tuple[Row, str]]) -> Image.Image:
    """A grid of middle pictures, each with its clip_id and a word below."""
    rows = -(-len(clips) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + CAPTION)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for index, (row, detail) in enumerate(clips):
        x, y = index % COLUMNS * TILE, index // COLUMNS * (TILE + CAPTION)
        if picture := _middle_picture(row["file"]):
            page.paste(picture, (x + 2, y + 2))
        draw.text((x + 3, y + TILE), row["clip_id"][-26:], "black", font)
        draw.text((x + 3, y + TILE + 13), detail[:28], "firebrick", font)
    return page


def _middle_picture(file: str) -> Image.Image | None:
    """None of a clip that cannot be decoded, which stays an empty tile."""
    try:
        with storage.local_copy(file) as path:
            return isolation.call(_decode_middle, path)
    except (MediaError, OSError):
        return None


def _decode_middle(path: Path) -> Image.Image:
    """The picture in the middle, as large as a tile holds. Raises MediaError or OSError."""
    with opened(path) as container:
        stream = playable(container.streams.video)[0]
        if seconds := timeline.stated_length(container):
            container.seek(round((timeline.start(container) + seconds / 2) * av.time_base))
        return ImageOps.contain(next(container.decode(stream)).to_image(), (TILE - 4, TILE - 4))
