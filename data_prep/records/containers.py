"""Which files may hold a video with sound: by their suffix, and any other file by its first bytes.

The containers are those that FFmpeg reads in PyAV's wheels and that have both picture and sound.
"""

from pathlib import Path

EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".ismv", ".mkv", ".mk3d", ".webm"),
    *(".avi", ".divx", ".flv", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".wmv"),
    *(".asf", ".ogv", ".ogm", ".mxf", ".gxf", ".gif", ".rm", ".rmvb", ".dv", ".wtv", ".swf"),
)
"""Suffixes of files that are taken whatever they hold, so that a damaged one is refused by name."""

OF_OTHERS = frozenset(
    (
        *(".m4a", ".m4b", ".m4r", ".aax", ".mka", ".weba", ".oga", ".ogg", ".opus", ".spx", ".wma"),
        *(".ra", ".mks", ".heic", ".heif", ".hif", ".avif", ".jp2", ".cr3"),
    )
)
"""Suffixes of sounds, subtitles and pictures in the same containers."""

STARTS = {
    b"\x1aE\xdf\xa3": "Matroska, WebM",
    b"FLV\x01": "Flash",
    b"FWS": "Flash",
    b"\x00\x00\x01\xba": "MPEG programme stream, of camcorders (.mod) and discs (.evo, .m2p)",
    b"0&\xb2u\x8ef\xcf\x11": "ASF, of Windows Media (.wm) and recorders (.dvr-ms)",
    b"\xb7\xd8\x00 7I\xda\x11": "WTV",
    b".RMF": "RealMedia",
    b"\x06\x0e+4\x02\x05\x01\x01": "MXF",
}
"""The first bytes of containers."""

ATOMS = (b"ftyp", b"moov", b"mdat", b"wide")
"""Bytes 4 to 8 of QuickTime and MP4."""

HEAD = 1024
"""Bytes that are read of a file."""


def is_video(path: Path) -> bool:
    """Whether a file has a suffix of EXTENSIONS, or the first bytes of such a container."""
    suffix = path.suffix.lower()
    if suffix in EXTENSIONS:
        return True
    if suffix in OF_OTHERS:
        return False
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return False
    return (
        head.startswith(tuple(STARTS))
        or head[4:8] in ATOMS
        or (head.startswith(b"RIFF") and head[8:12] in (b"AVI ", b"AVIX", b"CDXA"))
        or (head.startswith(b"OggS") and any(codec in head for codec in (b"theora", b"OVP80")))
        or _is_transport_stream(head)
    )


def _is_transport_stream(head: bytes) -> bool:
    """MPEG-TS has a 0x47 every 188 bytes; on Blu-ray, with timestamps between, every 192."""
    return any(
        len(head) > first + 4 * size and set(head[first : first + 5 * size : size]) == {0x47}
        for first, size in ((0, 188), (4, 192))
    )
