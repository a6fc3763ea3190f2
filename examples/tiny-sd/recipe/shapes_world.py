"""A world small enough to learn on one processor core: a shape in a colour on a background.

It draws scenes, describes them in words, and recognises them again, so a model trained on it can be measured: what was
asked for either is in the picture or is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (height, width, 3), RGB
Colour = tuple[float, float, float]  # RGB, 0..255
Size = tuple[int, int]  # (width, height)
Fill = Callable[[Size, np.random.Generator], NDArray[np.float32]]  # what covers the shape: (height, width, 3), 0..255

COLOURS: Final[dict[str, Colour]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (35, 60, 215),
    "yellow": (245, 220, 30),
    "purple": (135, 40, 170),
    "orange": (250, 135, 15),
    "pink": (255, 130, 190),
    "brown": (120, 70, 30),
}
SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring")
# Colour at the upper edge, colour at the lower edge.
BACKGROUNDS: Final[dict[str, tuple[Colour, Colour]]] = {
    "white": ((250, 250, 250), (250, 250, 250)),
    "gray": ((128, 128, 128), (128, 128, 128)),
    "black": ((12, 12, 12), (12, 12, 12)),
    "sky": ((120, 190, 250), (235, 245, 255)),
    "sunset": ((255, 225, 150), (235, 170, 150)),
}

_RING_HOLE: Final = 0.52  # radius of the hole of a ring, as a share of its radius
_BORDER: Final = 4  # width in pixels of the frame that always shows the background
_FOREGROUND: Final = 38  # a pixel farther than this (largest channel difference) from the background is foreground
_SMALLEST_OBJECT: Final = 60  # pixels; less is noise
_TEMPLATE: Final = 40  # side in pixels of the normalised silhouettes that are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a picture shows: names out of ``SHAPES``, ``COLOURS`` and ``BACKGROUNDS``."""

    shape: str
    colour: str
    background: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What :func:`classify` found in a picture; ``overlap`` (0..1) is how well the silhouette fits the shape's."""

    scene: Scene
    overlap: float


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with every part drawn evenly."""
    return Scene(
        shape=SHAPES[rng.integers(len(SHAPES))],
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        background=list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
    )


# --- drawing ---------------------------------------------------------------------------------------------------------


def outline(shape: str) -> NDArray[np.float64]:
    """The polygon of ``shape``: (points, 2) as (x, y), about one unit around the origin, y pointing down."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    if shape in ("circle", "ring"):
        return np.stack([np.cos(turn), np.sin(turn)], 1)
    if shape == "star":
        turn = -np.pi / 2 + np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 1.1, 0.46)
        return np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1)
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return np.stack([x / 16.5, (1 - y) / 15], 1)
    arm = 0.33  # half the width of a cross' beams
    corners = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
        "diamond": [(0, -1.05), (0.8, 0), (0, 1.05), (-0.8, 0)],
        "cross": [
            *((-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)),
            *((arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)),
        ],
    }
    return np.array(corners[shape], np.float64)


def coverage(
    shape: str, size: Size, *, centre: tuple[float, float], radius: float, angle: float = 0.0, oversampling: int = 3
) -> NDArray[np.float32]:
    """How much of each pixel ``shape`` covers: (height, width, 1), 0..1.

    Args:
        shape: A name out of ``SHAPES``.
        size: Width and height of the picture.
        centre: Where the shape's origin lies, in pixels.
        radius: One unit of the outline, in pixels.
        angle: Turn in radians.
        oversampling: Sub-pixels a side that the soft edge is averaged from.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    points = outline(shape) @ np.array([[cos, sin], [-sin, cos]]) * radius + centre
    width, height = size
    fine = np.zeros((height * oversampling, width * oversampling), np.uint8)
    cv2.fillPoly(fine, [np.round(points * oversampling).astype(np.int32)], 255)
    if shape == "ring":
        middle = (int(centre[0] * oversampling), int(centre[1] * oversampling))
        cv2.circle(fine, middle, int(radius * oversampling * _RING_HOLE), 0, -1)
    soft = cv2.resize(fine, size, interpolation=cv2.INTER_AREA)
    return soft.astype(np.float32)[..., None] / 255


def gradient(start: Colour, end: Colour, size: Size, *, downwards: bool = True) -> NDArray[np.float32]:
    """A smooth change from one colour to another, along the height or the width: (height, width, 3), 0..255."""
    width, height = size
    share = np.linspace(0, 1, height if downwards else width, dtype=np.float32)
    share = share[:, None, None] if downwards else share[None, :, None]
    blend = np.float32(start) * (1 - share) + np.float32(end) * share
    return np.broadcast_to(blend, (height, width, 3)).copy()


def stripes(first: Colour, second: Colour, period: float, *, shift: float | None = None) -> Fill:
    """Level stripes of two colours in turn, each ``period`` pixels high.

    Args:
        first: Colour of every other stripe.
        second: Colour of the stripes between.
        period: Height of one stripe in pixels.
        shift: How far below the middle of the picture a stripe of ``first`` begins, in pixels; anywhere when absent.
    """

    def fill(size: Size, rng: np.random.Generator) -> NDArray[np.float32]:
        width, height = size
        start = rng.uniform(0, period * 2) if shift is None else -height / 2 - shift
        band = np.floor((np.arange(height) + start) / period).astype(int) % 2
        colours = np.where(band[:, None] == 0, np.float32(first), np.float32(second))
        return np.repeat(colours[:, None].astype(np.float32), width, axis=1)

    return fill


def plain(colour: Colour) -> Fill:
    """One colour, a little different each time."""

    def fill(size: Size, rng: np.random.Generator) -> NDArray[np.float32]:
        width, height = size
        shade = (np.float32(colour) + rng.normal(0, 5, 3)).astype(np.float32)
        return np.broadcast_to(shade, (height, width, 3)).copy()

    return fill


def render(scene: Scene, size: Size, rng: np.random.Generator, *, fill: Fill | None = None) -> Pixels:
    """Draw ``scene``: one large upright shape near the middle, covered by ``fill`` (default: the scene's colour).

    Large, centred, upright shapes are learnt several times faster than scattered ones.
    """
    width, height = size
    upper, lower = (np.float32(edge) + rng.normal(0, 3, 3) for edge in BACKGROUNDS[scene.background])
    picture = gradient(upper, lower, size)
    radius = rng.uniform(0.36, 0.42) * min(size)
    centre = (width / 2 + rng.uniform(-4, 4), height / 2 + rng.uniform(-4, 4))
    covered = coverage(scene.shape, size, centre=centre, radius=radius)
    inside = (fill or plain(COLOURS[scene.colour]))(size, rng)
    return _to_pixels(picture * (1 - covered) + inside * covered)


def clutter(size: Size, rng: np.random.Generator) -> Pixels:
    """A picture for the VAE, wider than the world: up to four shapes of any colour, size and angle, some striped."""
    width, height = size
    start = rng.uniform(0, 255, 3)
    end = start if rng.random() < 0.5 else rng.uniform(0, 255, 3)
    picture = gradient(start, end, size, downwards=rng.random() < 0.5)
    for _ in range(rng.integers(1, 5)):
        covered = coverage(
            SHAPES[rng.integers(len(SHAPES))],
            size,
            centre=(rng.uniform(0, width), rng.uniform(0, height)),
            radius=rng.uniform(0.1, 0.45) * min(size),
            angle=rng.uniform(0, 2 * np.pi),
            oversampling=2,
        )
        colour = rng.uniform(0, 255, 3)
        inside = plain(colour)(size, rng)
        if rng.random() < 0.35:
            inside = stripes(colour, rng.uniform(0, 255, 3), rng.integers(5, 20))(size, rng)
            if width == height and rng.random() < 0.5:
                inside = inside.transpose(1, 0, 2)
        picture = picture * (1 - covered) + inside * covered
    return _to_pixels(picture)


def _to_pixels(picture: NDArray[np.float32]) -> Pixels:
    return np.clip(picture, 0, 255).astype(np.uint8)


# --- words -----------------------------------------------------------------------------------------------------------


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A caption: mostly whole sentences, some lists of tags, some that leave the colour or the background out."""
    shape, colour = scene.shape, scene.colour
    ground = f"{scene.background} background"
    style = rng.random()
    if style < 0.45:
        medium = _one_of(("", "a photo of ", "a picture of ", "a drawing of ", "an image of "), rng)
        return f"{medium}{with_article(colour)} {shape} on a {ground}"
    if style < 0.62:
        tags = [colour, shape, ground]
        if rng.random() < 0.4:
            rng.shuffle(tags)
        return ", ".join(tags)
    if style < 0.72:
        return f"{with_article(shape)} in {colour}, {ground}"
    if style < 0.80:
        return f"{with_article(colour)} {shape}"
    if style < 0.88:
        return f"{with_article(shape)} on a {ground}"
    if style < 0.96:
        return _one_of(("", "a photo of ", "a picture of "), rng) + with_article(shape)
    return f"{colour} {shape}"


def with_article(noun: str) -> str:
    """``noun`` after its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _one_of(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]


# --- recognising -----------------------------------------------------------------------------------------------------


def segment(image: Pixels) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Split a picture into its object and its background.

    The background is a vertical gradient fitted to the frame of the picture; what differs from it is foreground, and
    the largest connected part of that is the object.

    Returns:
        The object as (height, width) of 0 and 1, all 0 where there is none; the background as (height, width, 3).
    """
    height, width = image.shape[:2]
    colours = image.astype(np.float32).reshape(-1, 3)
    frame = np.ones((height, width), bool)
    frame[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    frame = frame.ravel()
    rows = np.repeat(np.arange(height) / height, width)
    basis = np.stack([np.ones(height * width), rows], 1)
    trusted = frame
    for _ in range(3):  # a shape that touches the frame is left out from the second fit on
        fit, *_ = np.linalg.lstsq(basis[trusted], colours[trusted], rcond=None)
        distance = np.abs(basis @ fit - colours).max(1)
        trusted = frame & (distance < max(25, np.median(distance[frame]) * 2))
    foreground = (distance.reshape(height, width) > _FOREGROUND).astype(np.uint8)
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(foreground)
    background = (basis @ fit).reshape(height, width, 3).astype(np.float32)
    if count < 2:
        return np.zeros_like(foreground), background
    largest = 1 + statistics[1:, cv2.CC_STAT_AREA].argmax()
    return (labels == largest).astype(np.uint8), background


def classify(image: Pixels) -> Seen | None:
    """Name shape, colour and background of a picture; ``None`` when it shows no object."""
    found, background = segment(image)
    if found.sum() < _SMALLEST_OBJECT:
        return None
    silhouette = _normalised(found)
    overlap, shape = max((_overlap(silhouette, template), name) for name, template in _templates())
    colour = _nearest_colour(image[interior(found) > 0])
    scene = Scene(shape=shape, colour=colour, background=_nearest_ground(background))
    return Seen(scene=scene, overlap=overlap)


def interior(found: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The object without its two outermost pixels, where colours mix; the whole object if nothing else is left."""
    inner = cv2.erode(found, np.ones((3, 3), np.uint8), iterations=2)
    return inner if inner.sum() > 20 else found


def _nearest_colour(pixels: Pixels) -> str:
    median = _to_lab(np.median(pixels.astype(np.float32), 0))
    return min(COLOURS, key=lambda name: float(np.linalg.norm(_to_lab(COLOURS[name]) - median)))


def _to_lab(colour: Colour | NDArray[np.float32]) -> NDArray[np.float32]:
    return cv2.cvtColor(np.float32([[colour]]) / 255, cv2.COLOR_RGB2Lab)[0, 0]


def _nearest_ground(background: NDArray[np.float32]) -> str:
    edges = background[[0, -1], 0]
    return min(BACKGROUNDS, key=lambda name: float(np.abs(np.float32(BACKGROUNDS[name]) - edges).sum()))


def _normalised(found: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The silhouette cut out, centred in a square and scaled to (_TEMPLATE, _TEMPLATE), 0..1."""
    rows, columns = np.nonzero(found)
    cut = found[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = cut.shape
    side = max(height, width)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = cut * 255
    return cv2.resize(square, (_TEMPLATE, _TEMPLATE), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _overlap(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Intersection over union of two silhouettes, 0..1."""
    return float(np.minimum(first, second).sum() / np.maximum(first, second).sum())


@cache
def _templates() -> list[tuple[str, NDArray[np.float32]]]:
    """Silhouettes of every shape, upright and slightly turned."""
    return [
        (shape, _normalised((soft[..., 0] > 0.5).astype(np.uint8)))
        for shape in SHAPES
        for degrees in (-10, -5, 0, 5, 10)
        for soft in [coverage(shape, (128, 128), centre=(64, 64), radius=45, angle=np.deg2rad(degrees))]
    ]


def contact_sheet(images: list[Pixels], columns: int, *, gap: int = 2) -> Pixels:
    """Pictures in rows of ``columns``, each in a cell as large as the largest, on light grey."""
    height = max(image.shape[0] for image in images) + gap
    width = max(image.shape[1] for image in images) + gap
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height, columns * width, 3), 200, np.uint8)
    for position, image in enumerate(images):
        top, left = position // columns * height, position % columns * width
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet
