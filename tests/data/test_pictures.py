import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from saber_jax.data.decode import MediaError, decode_image
from saber_jax.data.frame_sampling import MOST_PIXELS

SIZE = (84, 56)
WHITE, RED = (255, 255, 255), (200, 0, 0)


def saved(folder, name: str, picture: Image.Image, **settings):
    picture.save(folder / name, **settings)
    return folder / name


GREY, COLOUR = 0, 2  # PNG's numbers for the two kinds of pixels without alpha.


def png(path, width: int, height: int, *, bits: int, kind: int, pixels: bytes, clear: bytes = b""):
    """A PNG written by hand; `clear` is the colour that is transparent."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
        if data or name != b"tRNS"
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def transparent(mode: str) -> Image.Image:
    """Left half opaque, right half transparent."""
    picture = Image.new("RGBA", SIZE, (*RED, 0))
    picture.paste((*RED, 255), (0, 0, SIZE[0] // 2, SIZE[1]))
    if mode != "P":
        return picture.convert(mode)
    palette = Image.new("P", SIZE, 1)
    palette.putpalette([*RED, 0, 255, 0])
    palette.paste(0, (0, 0, SIZE[0] // 2, SIZE[1]))
    palette.info["transparency"] = 1
    return palette


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "RGBA"),
        ("a.png", "LA"),
        ("a.png", "P"),
        ("a.webp", "RGBA"),
        ("a.gif", "P"),
        ("a.tiff", "RGBA"),
    ],
)
def test_what_is_transparent_is_white(tmp_path, name, mode):
    lossless = {"lossless": True} if name.endswith("webp") else {}
    pixels = decode_image(saved(tmp_path, name, transparent(mode), **lossless))[0]
    assert tuple(pixels[28, -4]) == WHITE
    left = pixels[28, 4].astype(int)
    grey = round(0.299 * RED[0])
    assert np.abs(left - ((grey,) * 3 if mode == "LA" else RED)).max() <= 1


def test_postscript_under_the_name_of_a_picture_is_not_run(tmp_path):
    path = saved(tmp_path, "a.png", Image.new("RGB", SIZE, RED), format="EPS")
    with pytest.raises(MediaError, match="cannot identify"):
        decode_image(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("clear", [0, 1])
def test_the_one_grey_of_a_png_that_is_transparent_is_white(tmp_path, bits, clear):
    row = b"\0" + np.packbits(np.tile([*[0] * (bits - 1), 1], 56)).tobytes()  # All pixels are 1.
    settings = {"kind": GREY, "pixels": row * 56, "clear": struct.pack(">H", clear)}
    pixels = decode_image(png(tmp_path / "a.png", 56, 56, bits=bits, **settings))
    assert (pixels == (255 if clear else round(255 / (2**bits - 1)))).all()


def test_one_transparent_colour_among_those_of_sixteen_bits_is_refused(tmp_path):
    row = b"\0" + struct.pack(">HHH", 1000, 2000, 60_000) * 56
    settings = {"kind": COLOUR, "pixels": row * 56, "clear": row[1:7]}
    with pytest.raises(MediaError, match="16 bits is transparent; save it with alpha"):
        decode_image(png(tmp_path / "a.png", 56, 56, bits=16, **settings))


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_sixteen_bits_of_grey_become_eight(tmp_path, name):
    levels = np.tile(np.linspace(0, 65535, SIZE[0]).astype(np.uint16), (SIZE[1], 1))
    pixels = decode_image(saved(tmp_path, name, Image.fromarray(levels)))[0, 28, :, 0]
    np.testing.assert_allclose(pixels, np.linspace(0, 255, SIZE[0]), atol=1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LAB", "RGB"])
def test_other_modes_are_read_as_rgb(tmp_path, mode):
    picture = Image.new("RGB", SIZE, (255, 255, 255)).convert(mode)
    pixels = decode_image(saved(tmp_path, "a.tiff", picture))
    assert pixels.shape == (1, 56, 84, 3) and pixels.min() > 250


def test_numbers_of_unknown_range_are_refused(tmp_path):
    path = saved(tmp_path, "a.tiff", Image.fromarray(np.zeros(SIZE, np.float32)))
    with pytest.raises(MediaError, match="floating-point"):
        decode_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright_as_its_exif_says(tmp_path, suffix, orientation):
    upright = Image.new("RGB", SIZE)
    upright.paste(WHITE, (0, 0, SIZE[0] // 2, SIZE[1] // 2))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(saved(tmp_path, f"a.{suffix}", stored, exif=exif))[0]
    assert pixels.shape == (56, 84, 3)
    assert pixels[10, 10].min() > 200 and pixels[10, -10].max() < 50 and pixels[-10, 10].max() < 50


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    path = saved(
        tmp_path, "a.jpg", Image.new("RGB", SIZE, RED), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"
    )
    assert decode_image(path).shape == (1, 56, 84, 3)


def test_extreme_sides_are_refused_by_name(tmp_path):
    with pytest.raises(MediaError, match=r"thin\.png: 1000 x 3") as error:
        decode_image(saved(tmp_path, "thin.png", Image.new("RGB", (1000, 3))))
    assert error.value.reason == "too_thin"


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_picture_too_large_to_decode_is_refused_before_it_is(tmp_path, side):
    path = png(tmp_path / "bomb.png", side, side, bits=8, kind=GREY, pixels=b"")
    assert side * side > MOST_PIXELS
    with pytest.raises(MediaError, match=r"bomb\.png") as error:
        decode_image(path)
    assert error.value.reason == "too_large"


def test_any_damage_is_a_refusal(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    for suffix in ("png", "jpg", "webp", "gif", "tiff", "bmp"):
        raw = saved(tmp_path, f"a.{suffix}", noise).read_bytes()
        for _ in range(40):
            damaged = bytearray(raw)
            for place in rng.integers(0, min(len(raw), 300), 4):
                damaged[place] = rng.integers(256)
            path = tmp_path / f"b.{suffix}"
            path.write_bytes(damaged[: rng.integers(1, len(raw) + 1)])
            try:
                assert decode_image(path).dtype == np.uint8
            except MediaError as error:
                assert path.name in str(error)
