"""Still pictures to the one frame of a record, with Pillow."""

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from saber_jax.data import media
from saber_jax.data.frame_sampling import (
    IMAGE_MAX_PIXELS,
    IMAGE_MIN_PIXELS,
    RELEASE_IMAGE_MAX_PIXELS,
    MediaError,
    Mode,
    check_shape,
)

PICTURES = (
    *(".apng", ".avif", ".bmp", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)
"""Suffixes of the files that are read by `decode_image`, not as videos."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""The formats that are read, by their first bytes. Pillow knows more, and runs Ghostscript for
PostScript, which is a program that a clip from elsewhere would bring along."""


def decode_image(path: str | Path, mode: Mode = "exact") -> UInt8[np.ndarray, "1 H W 3"]:
    """A picture as the single frame of a record, resized as by the released processor.

    It is rotated according to its EXIF data, transparent pixels become white, and 16-bit greyscale
    is scaled to 8 bits. Only the first picture or page of a file is used. Raises MediaError.
    """
    name = Path(path).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # See check_shape.
            with Image.open(path, formats=FORMATS) as opened:
                check_shape(name, opened.height, opened.width)
                stored = opened.tile[0].args if opened.tile else None  # Gone once it is loaded.
                opened.load()
                picture = _rgb(_upright(opened), stored)
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError("too_large", f"{name}: {error}") from error
    except Exception as error:  # Pillow's decoders raise exceptions of any type for damaged files.
        raise MediaError("unreadable", f"{name}: {type(error).__name__}: {error}") from error
    most = IMAGE_MAX_PIXELS if mode == "exact" else RELEASE_IMAGE_MAX_PIXELS
    height, width = media.smart_resize(picture.height, picture.width, IMAGE_MIN_PIXELS, most)
    # Pillow rounds between its two passes, so only Pillow gives exactly these pixels.
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))[None]


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # A picture with damaged EXIF data is used as it is.
        return picture


def _rgb(picture: Image.Image, stored: object) -> Image.Image:
    """`stored` is Pillow's name for the layout of the pixels in the file, such as "L;2"."""
    clear = picture.info.get("transparency")  # The transparent colour of a PNG without alpha.
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it as 8 bit")
    if picture.mode.startswith("I"):  # Pillow's own conversion would clip at 255.
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"its grey reaches {grey.max()}; save it as 8 or 16 bit")
        eight = np.where(grey == clear, 255, (grey + 128) // 257).astype(np.uint8)
        return Image.fromarray(eight).convert("RGB")
    if clear is not None and stored == "RGB;16B":  # Pillow keeps only 8 of the 16 bits.
        raise ValueError("one of its colours of 16 bits is transparent; save it with alpha")
    if clear is not None and stored in ("L;2", "L;4"):  # Pillow stretches the pixels alone.
        picture.info["transparency"] = clear * (255 // (2 ** int(stored[-1]) - 1))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return picture.convert("RGB")
