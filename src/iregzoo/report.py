"""What a person looks at to see whether a registration can be trusted.

Drawn with Pillow: to import matplotlib and let it lay out 22 axes took a fifth of the time of a small registration.
"""

from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from itertools import accumulate, compress
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from iregzoo.errors import InputError
from iregzoo.planes import GRID_LINES, JACOBIAN_LIMITS, PLANES, Plane, Volume, canonical, canonical_vectors, middle
from iregzoo.quality import Comparison
from iregzoo.register import Result
from iregzoo.space.grid import canonical_axes

COLUMNS = (
    "fixed",
    "moving at affine start",
    "warped",
    "difference at affine start",
    "difference after",
    "deformed grid",
    "Jacobian",
)
Colour = tuple[int, int, int]
Picture = NDArray[np.uint8]
# Of values from 0 to 1, at even steps between them.
GREYS = ((0, 0, 0), (255, 255, 255))
DIFFERENCES = ((0, 0, 90), (0, 0, 255), (255, 255, 255), (255, 0, 0), (120, 0, 0))
EXPANSIONS = ((5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31))
GOLD, MAGENTA = (255, 215, 0), (255, 0, 255)
# Pixels: of the largest plane's longer side, between pictures, and around all of them.
SIDE, GAP, LEFT, TOP, RIGHT = 190, 8, 30, 80, 84
TEXT = 12  # its height
BAR_WIDTH, BAR_HEIGHT = 14, 290
FINER = 3  # times as large as it is shown is the grid drawn, for its lines to be smooth
# Where the letters of a plane stand in a picture: x, y and Pillow's anchor.
SIDES = ((0.03, 0.5, "lm"), (0.97, 0.5, "rm"), (0.5, 0.02, "mt"), (0.5, 0.98, "mb"))


def picture(result: Result, images: Comparison, figures: Mapping[str, Any], path: Path) -> None:
    """Draw three planes of fixed, moving, warped, their differences, the deformed grid and the Jacobian determinant.

    The moving image is shown where the affine start puts it. Folds (det J at or below 0) are marked in magenta.

    Raises:
        InputError: where the file cannot be written.
    """
    grid = result.frame.fixed
    order, _ = canonical_axes(grid)
    shown = {"fixed": images.fixed, "start": images.start, "warped": images.after, "jacobian": images.determinant[None]}
    volumes = {name: canonical(volume[0, 0], grid) for name, volume in shown.items()}
    place = middle(volumes["fixed"])
    extent = grid.spacing[order] * volumes["fixed"].shape
    size = np.maximum(1, np.round(extent * SIDE / extent.max())).astype(int)
    # No narrower than their titles, and no lower than their planes' names.
    width = max(int(size[0]), int(size[1]), *(_length(title) for title in COLUMNS))
    heights = [max(int(size[plane.up]), _length(plane.name)) for plane in PLANES]
    left = [LEFT + column * (width + GAP) for column in range(len(COLUMNS))]
    top = list(accumulate((height + GAP for height in heights), initial=TOP))
    lines = headline(result, figures)
    right = max(left[-1] + width + RIGHT, *(2 * GAP + _length(line) for line in lines))
    canvas = Image.new("RGB", (right, max(top[-1], TOP + BAR_HEIGHT + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((GAP, GAP), "\n".join(lines), "black", font(TEXT))
    for x, title in zip(left, COLUMNS, strict=True):
        draw.text((x + width // 2, TOP - 4), title, "black", font(TEXT), anchor="ms")
    for y, height, plane in zip(top, heights, PLANES, strict=False):
        cuts = {name: np.take(volume, place[plane.across], axis=plane.across) for name, volume in volumes.items()}
        shape = int(size[plane.along]), int(size[plane.up])
        pictures = _row(cuts, _lines(result, plane, place[plane.across]), shape)
        _name(pictures[0], plane)
        for x, cut in zip(left, pictures, strict=True):
            canvas.paste(cut, (x + (width - shape[0]) // 2, y + (height - shape[1]) // 2))
        _write_upwards(canvas, plane.name, (LEFT // 2, y + height // 2))
    _draw_bar(canvas, left[-1] + width + GAP, TOP)
    stream = BytesIO()  # Pillow would not say what keeps it from writing a file
    canvas.save(stream, "PNG")
    try:
        path.write_bytes(stream.getvalue())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); free up disk space") from None


def headline(result: Result, figures: Mapping[str, Any]) -> list[str]:
    """What was registered, how it is shown, and the figures that matter, a line each."""
    names = [result.scans.moving.path.name, result.scans.fixed.path.name]
    return [
        "  →  ".join("".join(letter if letter.isprintable() else "�" for letter in name) for name in names),
        f"start: {result.init}; radiological convention, letters mark the patient's sides; difference: red where "
        "brighter than the fixed scan, blue where darker",
        "   ·   ".join(key_figures(figures)),
    ]


def key_figures(figures: Mapping[str, Any]) -> list[str]:
    """The figures that matter, in words."""
    parts = [
        "NCC {ncc_before:.3f} before, {ncc_start:.3f} at affine start, {ncc_after:.3f} after".format_map(figures),
        f"folding {figures['folding_percent']:.3f} %",
        f"deformation {figures['displacement_mean_mm']:.1f} mm mean, {figures['displacement_max_mm']:.1f} mm maximum",
    ]
    if "dice_mean" in figures:
        parts.insert(1, "Dice {dice_before_mean:.3f} before, {dice_mean:.3f} after".format_map(figures))
    return parts


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: it has the arrow, and the letters of most files' names."""
    spec = find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    return ImageFont.truetype(str(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _length(text: str) -> int:
    """Of a text, in pixels."""
    return ceil(font(TEXT).getlength(text))


def coloured(values: NDArray[np.floating[Any]], colours: tuple[Colour, ...]) -> Picture:
    """Values from 0 to 1 in colours, which stand at even steps between: (…, 3). No number is as 0."""
    steps, values = np.linspace(0, 1, len(colours)), np.nan_to_num(values)
    channels = [np.interp(values, steps, channel) for channel in zip(*colours, strict=True)]
    found: Picture = np.stack(channels, axis=-1).round().astype(np.uint8)
    return found


def expansion(determinant: Volume) -> NDArray[np.float64]:
    """Jacobian determinants as values from 0 to 1; one half is where nothing changes its volume."""
    low, high = JACOBIAN_LIMITS
    found: NDArray[np.float64] = np.interp(determinant, (low, 1, high), (0, 0.5, 1))
    return found


def _row(cuts: Mapping[str, Volume], lines: list[NDArray[np.float64]], shape: tuple[int, int]) -> list[Image.Image]:
    """A plane's pictures, in the order of the columns."""
    fixed = cuts["fixed"]
    parts = [coloured(cuts[name], GREYS) for name in ("fixed", "start", "warped")]
    parts += [coloured((cuts[name] - fixed + 1) / 2, DIFFERENCES) for name in ("start", "warped")]
    laid = [_laid(part, shape) for part in parts]
    under = _laid(coloured(fixed / 2, GREYS), (FINER * shape[0], FINER * shape[1]))
    jacobian = _laid(coloured(expansion(cuts["jacobian"]), EXPANSIONS), shape)
    return [*laid, _with_grid(under, lines), _with_folds(jacobian, cuts["jacobian"])]


def _laid(cut: Picture, shape: tuple[int, int]) -> Image.Image:
    """A plane (along, up, 3) as a picture of some size in pixels, which begins where both end."""
    whole = np.ascontiguousarray(cut.transpose(1, 0, 2)[::-1, ::-1])
    return Image.fromarray(whole).resize(shape, Image.Resampling.NEAREST)


def _with_grid(under: Image.Image, lines: list[NDArray[np.float64]]) -> Image.Image:
    """Lines of the fixed grid at the places where the deformation reads the moving image."""
    places = np.stack(lines, axis=-1)
    voxels = np.array(places.shape[:2])
    scale = np.array(under.size) / voxels
    pixels = (voxels - 0.5 - places) * scale
    # As many mm apart along every axis of all planes, however large the voxels are along it.
    along, up = np.maximum(1, np.round(FINER * SIDE / GRID_LINES / scale)).astype(int)
    draw = ImageDraw.Draw(under)
    for line in (*pixels[::along], *pixels[:, ::up].swapaxes(0, 1)):
        draw.line(line.ravel().tolist(), GOLD, width=2)
    return under.reduce(FINER)


def _with_folds(jacobian: Image.Image, determinant: Volume) -> Image.Image:
    """Every folded voxel, in two pixels at least, however many voxels a pixel stands for."""
    begin, end = ((np.argwhere(determinant <= 0) + side) * jacobian.size / determinant.shape for side in (0, 1))
    draw = ImageDraw.Draw(jacobian)
    # The picture begins where both axes end; Pillow's rectangles hold their last pixels.
    first, last = np.floor(jacobian.size - end), np.ceil(jacobian.size - begin) - 1
    for corner, other in zip(first, np.maximum(first + 1, last), strict=True):
        draw.rectangle((*corner, *other), MAGENTA)
    return jacobian


def _lines(result: Result, plane: Plane, index: int) -> list[NDArray[np.float64]]:
    """Where the deformation reads the moving image from a plane, in voxels along the plane's two axes."""
    grid = result.frame.fixed
    moved = np.stack([np.take(canonical(channel, grid), index, axis=plane.across) for channel in result.deformation[0]])
    turn = canonical_vectors(grid)[[plane.along, plane.up]]
    return list(np.tensordot(turn, moved, 1) + np.indices(moved.shape[1:]))


def _name(cut: Image.Image, plane: Plane) -> None:
    """Write the patient's sides on a picture, those for which it has room."""
    draw = ImageDraw.Draw(cut)
    sides, ends = cut.width >= 2 * TEXT and cut.height >= TEXT, cut.width >= TEXT and cut.height >= 3 * TEXT
    fits = (sides, sides, ends, ends)
    for (x, y, anchor), letter in compress(zip(SIDES, plane.sides, strict=True), fits):
        place = x * cut.width, y * cut.height
        draw.text(place, letter, "white", font(TEXT), anchor=anchor, stroke_width=1, stroke_fill="black")


def _write_upwards(canvas: Image.Image, text: str, place: tuple[int, int]) -> None:
    """Write a text that runs from bottom to top, its middle at a place."""
    wide, high = _length(text), TEXT + 8
    written = Image.new("RGB", (wide, high), "white")
    ImageDraw.Draw(written).text((wide / 2, high / 2), text, "black", font(TEXT), anchor="mm")
    canvas.paste(written.rotate(90, expand=True), (place[0] - high // 2, place[1] - wide // 2))


def _draw_bar(canvas: Image.Image, x: int, y: int) -> None:
    """The colours of the Jacobian determinant."""
    draw = ImageDraw.Draw(canvas)
    low, high = JACOBIAN_LIMITS
    falling = np.linspace(high, low, BAR_HEIGHT, dtype=np.float32)
    strip = coloured(expansion(falling), EXPANSIONS)[:, None].repeat(BAR_WIDTH, axis=1)
    canvas.paste(Image.fromarray(strip), (x, y))
    for value in (low, 1.0, high):
        place = y + (high - value) / (high - low) * BAR_HEIGHT
        draw.text((x + BAR_WIDTH + 4, place), f"{value:g}", "black", font(TEXT), anchor="lm")
    _write_upwards(canvas, "det J", (x + BAR_WIDTH + 40, y + BAR_HEIGHT // 2))
