"""Faces of the embedded corpus: a parametric face drawn with Pillow, moved by FACS-like units.

Points are complex numbers x + iy, so that placing the head (turn, scale, shift) is one product and
one sum. They are fractions of the frame, x to the right and y down, with the head's centre as the
origin of everything on the head. Frames are drawn `SUPERSAMPLE` times larger and box-filtered.
Drawings and faces are the project's own.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Complex, UInt8
from PIL import Image, ImageDraw

FRAME_SIZE = 84
SUPERSAMPLE = 4

Colour = tuple[int, int, int]
Points = Complex[np.ndarray, " n"]

PALETTE: dict[str, Colour] = {
    "red": (196, 52, 48),
    "blue": (54, 96, 190),
    "green": (62, 142, 78),
    "yellow": (236, 196, 72),
    "purple": (126, 74, 158),
    "grey": (128, 132, 138),
    "orange": (232, 128, 48),
    "white": (238, 238, 234),
}
_SKINS = ((255, 222, 196), (241, 194, 158), (224, 172, 128), (198, 140, 98), (150, 100, 68))
_HAIRS = ((32, 26, 24), (78, 50, 32), (128, 82, 44), (206, 164, 92), (150, 62, 34), (150, 150, 152))
_TEETH = (250, 248, 240)
_HAIRSTYLES = {"female": ("long", "bob", "bun"), "male": ("short", "side", "crop")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What stays the same whenever one person is drawn."""

    skin: Colour
    hair: Colour
    hairstyle: str
    width: float  # Half width of the head.
    height: float  # Half height of the head.
    eye_gap: float  # Half distance of the eyes.
    glasses: bool
    brow_weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Units:
    """Face action units. 0 is rest and 1 full contraction; the codes are FACS action units."""

    brow_inner: float = 0.0  # AU1, negative AU4: inner ends lowered and drawn together.
    brow_outer: float = 0.0  # AU2, negative: outer ends lowered.
    eye_open: float = 1.0  # 1 at rest; AU5 above, AU7 below, 0 closed (AU45).
    cheek: float = 0.0  # AU6.
    nose: float = 0.0  # AU9.
    lip_corner: float = 0.0  # AU12, negative AU15.
    mouth_width: float = 0.0  # AU20, negative AU18.
    teeth: float = 0.0  # AU10 with AU25: teeth shown.
    jaw: float = 0.0  # AU26.


EXPRESSIONS = {
    "neutral": Units(),
    "happy": Units(
        brow_inner=0.3, brow_outer=0.45, eye_open=0.7, cheek=1.0, lip_corner=1.0,
        mouth_width=0.5, teeth=0.7, jaw=0.25,
    ),
    "sad": Units(
        brow_inner=1.0, brow_outer=-0.7, eye_open=0.6, lip_corner=-1.0, mouth_width=-0.15,
    ),
    "angry": Units(
        brow_inner=-1.0, brow_outer=0.6, eye_open=1.05, nose=1.0, lip_corner=-0.5,
        mouth_width=0.1, teeth=1.0, jaw=0.45,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pose:
    """Head placement in one frame: shifts and scale in frame fractions, roll in radians."""

    x: float = 0.0
    y: float = 0.0
    roll: float = 0.0
    turn: float = 0.0  # Features slide sideways on the head, -1 to 1.
    pitch: float = 0.0  # Features slide down on the head, -1 to 1.
    scale: float = 1.0
    hand: float = 0.0  # 0 out of sight, 1 raised.


@functools.lru_cache(maxsize=64)
def identity(number: int) -> Identity:
    """Face identity `number`, the same in every corpus; even numbers are women."""
    rng = np.random.default_rng([7, number])
    gender = "male" if number % 2 else "female"
    # Strides walk through skin, hair and style combinations, so neighbours differ in all three.
    return Identity(
        skin=_SKINS[(number * 2 + number // 5) % len(_SKINS)],
        hair=_HAIRS[(number // 2 * 5 + number % 3) % len(_HAIRS)],
        hairstyle=_HAIRSTYLES[gender][(number // 2) % 3],
        width=0.28 + 0.02 * rng.uniform(-1, 1) + (0.01 if gender == "male" else 0.0),
        height=0.36 + 0.015 * rng.uniform(-1, 1),
        eye_gap=0.122 + 0.01 * rng.uniform(-1, 1),
        glasses=number % 4 == 3 or number % 8 == 2,
        brow_weight=0.024 if gender == "male" else 0.02,
    )


def expression(emotion: str, intensity: float, rng: np.random.Generator) -> Units:
    """`emotion` at `intensity` (0 is rest, 1 is full), each unit varied a little by `rng`."""
    rest, full = dataclasses.asdict(Units()), dataclasses.asdict(EXPRESSIONS[emotion])
    return Units(
        **{k: rest[k] + intensity * (full[k] - rest[k]) + rng.normal(0, 0.05) for k in rest}
    )


def draw(
    person: Identity,
    units: Units,
    pose: Pose,
    *,
    shirt: str,
    background: str,
    covered: int = 0,
    size: int,
) -> UInt8[np.ndarray, "size size 3"]:
    """One RGB frame. `shirt` and `background` are colours of PALETTE; hair hides the brow and part
    of the eye on the side `covered`, -1 or 1."""
    colour = PALETTE[background]
    canvas = _Canvas(size, _shade(colour, 1.12), _shade(colour, 0.82))
    _back_hair(canvas, person, pose)
    _body(canvas, person, PALETTE[shirt], pose)
    canvas.head(pose)
    _head(canvas, person)
    slide = complex(0.03 * pose.turn, 0.025 * pose.pitch)
    _cheeks_and_nose(canvas, person, units, slide)
    _mouth(canvas, person, units, slide)
    _eyes(canvas, person, units, slide)
    _front_hair(canvas, person)
    if person.glasses:
        _glasses(canvas, person, slide)
    _brows(canvas, person, units, slide)
    if covered:
        _strand(canvas, person, covered)
    if pose.hand > 0:
        canvas.body()
        _hand(canvas, person, PALETTE[shirt], pose.hand)
    return canvas.pixels()


class _Canvas:
    """A supersampled picture whose points pass through the current placement."""

    def __init__(self, size: int, top: Colour, bottom: Colour):
        self._scale = size * SUPERSAMPLE
        self._image = _gradient(self._scale, top, bottom).copy()
        self._draw = ImageDraw.Draw(self._image)
        self.body()

    def body(self):
        """Draw in plain frame coordinates from here on."""
        self._place(0, 1)

    def head(self, pose: Pose):
        """Draw in head coordinates from here on."""
        self._place(complex(0.5 + pose.x, 0.5 + pose.y), pose.scale * np.exp(1j * pose.roll))

    def _place(self, origin: complex, turn: complex):
        self._origin, self._turn = origin * self._scale, turn * self._scale

    def fill(self, points: Points, colour: Colour):
        placed = points * self._turn + self._origin
        self._draw.polygon(placed.view(np.float64).tolist(), fill=colour)

    def ellipse(self, centre: complex, x_radius: float, y_radius: float, colour: Colour):
        self.fill(_ellipse(centre, x_radius, y_radius), colour)

    def stroke(self, points: Points, width: float, colour: Colour, *, taper: float = 1.0):
        """A round-ended line; `taper` is the width of its last point relative to its first."""
        steps = points[1:] - points[:-1]
        normal = 1j * np.concatenate([steps[:1], steps])
        half = 0.5 * width * (1 + (taper - 1) * np.arange(len(points)) / (len(points) - 1))
        offset = normal / np.maximum(np.abs(normal), 1e-9) * half
        self.fill(np.concatenate([points + offset, (points - offset)[::-1]]), colour)
        self.fill(points[0] + half[0] * _SMALL_CIRCLE, colour)
        self.fill(points[-1] + half[-1] * _SMALL_CIRCLE, colour)

    def pixels(self) -> UInt8[np.ndarray, "size size 3"]:
        return np.asarray(self._image.reduce(SUPERSAMPLE))


@functools.lru_cache(maxsize=16)
def _gradient(size: int, top: Colour, bottom: Colour) -> Image.Image:
    column = np.linspace(top, bottom, size).astype(np.uint8)[:, None]
    return Image.fromarray(column).resize((size, size))


_ANGLE = np.linspace(0, 2 * np.pi, 32, endpoint=False)
_COS, _SIN = np.cos(_ANGLE), np.sin(_ANGLE)
_CIRCLE = _COS + 1j * _SIN
_SMALL_CIRCLE = _CIRCLE[::4]
_TIME = np.linspace(0, 1, 14)
_BEZIER = np.stack([(1 - _TIME) ** 2, 2 * _TIME * (1 - _TIME), _TIME**2])


def _points(*points: complex) -> Points:
    return np.array(points, np.complex128)


def _ellipse(centre: complex, x_radius: float, y_radius: float) -> Points:
    return centre + x_radius * _COS + 1j * y_radius * _SIN


def _curve(start: complex, middle: complex, end: complex) -> Points:
    """Quadratic Bezier curve that passes through `middle` half way."""
    return _points(start, 2 * middle - (start + end) / 2, end) @ _BEZIER


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (int(min(255, max(0, c * factor))) for c in colour)
    return red, green, blue


def _blend(a: Colour, b: Colour, share: float) -> Colour:
    red, green, blue = (int((1 - share) * x + share * y) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _body(canvas: _Canvas, person: Identity, shirt: Colour, pose: Pose):
    left, right = (
        _curve(0.02 + 1.02j, 0.2 + 0.87j, 0.4 + 0.84j),
        _curve(0.6 + 0.84j, 0.8 + 0.87j, 0.98 + 1.02j),
    )
    canvas.fill(np.concatenate([left, right]), shirt)
    x = 0.5 + 0.5 * pose.x
    neck = _points(x - 0.1 + 0.7j, x + 0.1 + 0.7j, 0.61 + 0.88j, 0.5 + 0.95j, 0.39 + 0.88j)
    canvas.fill(neck, _shade(person.skin, 0.86))
    for side in (-1, 1):
        collar = _points(0.5 + side * 0.1 + 0.84j, 0.5 + side * 0.15 + 0.9j, 0.5 + 0.98j)
        canvas.fill(collar, _shade(shirt, 0.78))


def _back_hair(canvas: _Canvas, person: Identity, pose: Pose):
    canvas.head(pose)
    w, h, dark = person.width, person.height, _shade(person.hair, 0.8)
    if person.hairstyle == "long":
        canvas.ellipse(-0.06j, w + 0.07, h + 0.03, dark)
        top, bottom = w + 0.07, w + 0.05
        canvas.fill(_points(-top - 0.06j, top - 0.06j, bottom + 0.44j, -bottom + 0.44j), dark)
    elif person.hairstyle == "bob":
        canvas.ellipse(-0.04j, w + 0.075, h + 0.02, dark)
    elif person.hairstyle == "bun":
        canvas.ellipse(-1j * (h + 0.06), 0.11, 0.09, person.hair)
    canvas.body()


def _head(canvas: _Canvas, person: Identity):
    w, h, skin = person.width, person.height, person.skin
    for side in (-1, 1):
        canvas.ellipse(side * (w + 0.005) + 0.02j, 0.045, 0.07, _shade(skin, 0.9))
    # A superellipse: fuller cheeks than an ellipse, narrower chin than a box.
    c, s = _COS, _SIN
    x = np.sign(c) * np.abs(c) ** 0.85 * w * np.where(s > 0, 1 - 0.16 * s**2, 1)
    canvas.fill(x + 1j * np.sign(s) * np.abs(s) ** 0.95 * h, skin)


def _front_hair(canvas: _Canvas, person: Identity):
    w, h = person.width, person.height
    # Height of the hairline: at the temples, and its highest point.
    temple, middle = {
        "long": (-0.06, 0.03 - 1j * (h - 0.03)),
        "bob": (-0.1, -1j * (h - 0.1)),
        "bun": (-0.12, -1j * (h - 0.06)),
        "short": (-0.1, -1j * (h - 0.07)),
        "side": (-0.12, -0.06 - 1j * (h - 0.08)),
        "crop": (-0.15, -1j * (h - 0.03)),
    }[person.hairstyle]
    edge = w + 0.02
    top = 1j * temple - edge * np.cos(np.pi * _TIME)
    top = top - 1j * (h + 0.035 + temple) * np.sin(np.pi * _TIME)
    hairline = _curve(complex(edge, temple), middle, complex(-edge, temple))
    canvas.fill(np.concatenate([top, hairline]), person.hair)


def _cheeks_and_nose(canvas: _Canvas, person: Identity, units: Units, slide: complex):
    cheek, nose = max(0.0, units.cheek), max(0.0, units.nose)
    blush = _blend(person.skin, (232, 84, 84), 0.14 + 0.3 * cheek)
    for side in (-1, 1):
        centre = slide + complex(side * 0.165, 0.095 - 0.015 * cheek)
        canvas.ellipse(centre, 0.058, 0.036 + 0.012 * cheek, blush)
    shadow = _shade(person.skin, 0.74)
    tip = slide - 0.012j * nose
    canvas.stroke(tip + _curve(-0.038 + 0.088j, 0.108j, 0.038 + 0.088j), 0.014, shadow)
    if nose < 0.3:
        return
    for side in (-1, 1):
        fold = _curve(side * 0.05 + 0.055j, side * 0.1 + 0.1j, side * 0.13 + 0.165j)
        canvas.stroke(slide + fold, 0.012 * nose, shadow)
        frown = _points(side * 0.014 - 0.09j, side * 0.022 - 0.03j)
        canvas.stroke(slide + frown, 0.013 * nose, shadow)


def _eyes(canvas: _Canvas, person: Identity, units: Units, slide: complex):
    opening = float(np.clip(units.eye_open, 0.0, 1.25))
    width, height, line = 0.064, 0.046 * opening, (40, 28, 26)
    for side in (-1, 1):
        centre = slide + side * person.eye_gap - 0.035j
        if opening < 0.2:
            canvas.stroke(centre + _curve(-width, 0.014j, width), 0.016, line)
            continue
        # Sad eyes droop outside, a raised cheek pushes the lower lid up.
        corner = width + 0.009j * (units.brow_inner - units.brow_outer) * side
        upper = centre + _curve(-corner, -1j * height, corner)
        lower = centre + _curve(corner, 1j * height * (1 - 0.55 * max(0.0, units.cheek)), -corner)
        canvas.fill(np.concatenate([upper, lower]), (250, 250, 248))
        iris = min(0.036, height * 0.95)
        canvas.ellipse(centre + 0.3 * slide.real, 0.034, iris, (62, 44, 36))
        canvas.ellipse(centre + 0.012 - 0.3j * iris, 0.009, 0.009, (255, 255, 255))
        canvas.stroke(upper, 0.014, line)


def _brows(canvas: _Canvas, person: Identity, units: Units, slide: complex):
    for side in (-1, 1):
        squeeze = 0.022 * max(0.0, -units.brow_inner)
        inner = complex(side * (0.055 - squeeze), -0.118 - 0.07 * units.brow_inner)
        outer = complex(side * 0.2, -0.112 - 0.06 * units.brow_outer)
        arch = 0.02 * max(0.0, 1 - abs(units.brow_inner))
        middle = complex(side * 0.13, (inner.imag + outer.imag) / 2 - arch)
        points = slide + _curve(inner, middle, outer)
        canvas.stroke(points, 2 * person.brow_weight, _shade(person.hair, 0.42), taper=0.55)


def _strand(canvas: _Canvas, person: Identity, side: int):
    """A strand of hair from the hairline over one eye."""
    inner, outer = side * 0.07, side * (person.width + 0.01)
    top, tip = -1j * (person.height - 0.02), complex(side * (person.eye_gap + 0.05), -0.01)
    canvas.fill(_points(inner + top, outer - 0.1j, tip, inner - 0.1j), person.hair)


def _mouth(canvas: _Canvas, person: Identity, units: Units, slide: complex):
    width = 0.125 * (1 + 0.5 * units.mouth_width)
    opening = float(np.clip(units.jaw, 0.0, 1.0)) * 0.075
    height = 0.205 + 0.02 * units.lip_corner
    corner = height - 0.09 * units.lip_corner
    bare = 0.02 * max(0.0, units.teeth)
    left, right = slide + complex(-width, corner), slide + complex(width, corner)
    upper = _curve(left, slide + 1j * (height - bare), right)
    lower = _curve(left, slide + 1j * (height + bare + opening), right)
    lips = _blend(_shade(person.skin, 0.72), (176, 52, 58), 0.6)
    canvas.fill(_band(upper, lower, 0, 1), (84, 22, 30))
    if units.teeth > 0.2:
        canvas.fill(_band(upper, lower, 0.0, 0.5), _TEETH)
        if units.lip_corner < 0:  # Bared: both rows, with the line between them.
            canvas.fill(_band(upper, lower, 0.58, 1.0), _TEETH)
    canvas.stroke(upper, 0.018, lips)
    canvas.stroke(lower, 0.022, lips)


def _band(upper: Points, lower: Points, start: float, stop: float) -> Points:
    """The part of the mouth between two heights, 0 at the upper and 1 at the lower lip."""
    top, bottom = (upper + share * (lower - upper) for share in (start, stop))
    return np.concatenate([top, bottom[::-1]])


def _glasses(canvas: _Canvas, person: Identity, slide: complex):
    rim = (36, 38, 46)
    for side in (-1, 1):
        centre = slide + side * person.eye_gap - 0.03j
        lens = _ellipse(centre, 0.092, 0.078)
        canvas.stroke(np.append(lens, lens[:1]), 0.013, rim)
        temple = _points(centre + side * 0.09 - 0.01j, side * person.width - 0.04j)
        canvas.stroke(temple, 0.013, rim)
    bridge = person.eye_gap - 0.092
    canvas.stroke(slide + _curve(-bridge - 0.04j, -0.05j, bridge - 0.04j), 0.013, rim)


def _hand(canvas: _Canvas, person: Identity, shirt: Colour, height: float):
    palm = complex(0.87, 1.14 - 0.36 * height)
    sleeve = _points(palm - 0.07 + 0.12j, palm + 0.07 + 0.12j, 1.0 + 1.05j, 0.76 + 1.05j)
    canvas.fill(sleeve, _shade(shirt, 0.85))
    for lean in (-0.055, -0.02, 0.02, 0.055):
        tip = complex(1.5 * lean, -0.11 + 0.6 * abs(lean))
        canvas.stroke(palm + _points(lean, tip), 0.034, person.skin)
    canvas.stroke(palm + _points(-0.05 + 0.05j, -0.115 - 0.01j), 0.034, person.skin)
    canvas.ellipse(palm + 0.045j, 0.073, 0.08, _shade(person.skin, 0.97))
