"""What stands for a picture of a given size: one rule for each way in which families lay out their tokens.

Each rule is arithmetic on height and width, in the order and the precision in which transformers does it: a
product that is rounded at another place moves a token somewhere. The gate holds each against transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sftdata.errors import RowError


@dataclass(frozen=True, slots=True)
class Layout:
    """What replaces the marker of one picture.

    Attributes:
        text: with the family's image token once for each run of them.
        runs: how many tokens each of these stands for.
    """

    text: str
    runs: tuple[int, ...]

    def expanded(self, image_token: str) -> str:
        """Return the text with every run written out, as the processor writes it.

        >>> Layout("<img>@</img>", (3,)).expanded("@")
        '<img>@@@</img>'
        """
        pieces = self.text.split(image_token)
        runs = zip(self.runs, pieces[1:], strict=True)
        return pieces[0] + "".join(image_token * run + piece for run, piece in runs)


Size = tuple[int, int]
"""Height and width."""
Rule = Callable[[int, int], Layout]
"""Height and width in pixels -> the layout; raises RowError where the processor has no answer."""


def _extreme(height: int, width: int, why: str) -> RowError:
    what = f"{width}x{height} pixels: {why}."
    return RowError("image-aspect", what, "crop the picture, or leave the row out.")


# ---------------------------------------------------------------------------------------- one run of tokens


def fixed(text: str, count: int) -> Rule:
    """Every picture is resized to one size (LLaVA-1.5, Gemma 3)."""
    layout = Layout(text, (count,))
    return lambda height, width: layout


def smart_resize(text: str, patch: int, merge: int, low: int, high: int) -> Rule:
    """Sides are multiples of `patch * merge`, the area is from `low` to `high` pixels (Qwen-VL)."""
    factor = patch * merge

    def rule(height: int, width: int) -> Layout:
        if max(height, width) / min(height, width) > 200:
            raise _extreme(height, width, "one side is more than 200 times the other")
        tall, wide = round(height / factor) * factor, round(width / factor) * factor
        if tall * wide > high:
            beta = math.sqrt((height * width) / high)
            tall = max(factor, math.floor(height / beta / factor) * factor)
            wide = max(factor, math.floor(width / beta / factor) * factor)
        elif tall * wide < low:
            beta = math.sqrt(low / (height * width))
            tall = math.ceil(height * beta / factor) * factor
            wide = math.ceil(width * beta / factor) * factor
        return Layout(text, ((tall // patch) * (wide // patch) // merge**2,))

    return rule


def soft_budget(text: str, patch: int, pool: int, budget: int) -> Rule:
    """The largest size that keeps the aspect and needs at most `budget` tokens (Gemma 4)."""
    area, side = budget * pool**2 * patch**2, pool * patch

    def rule(height: int, width: int) -> Layout:
        factor = math.sqrt(area / (height * width))
        tall = math.floor(factor * height / side) * side
        wide = math.floor(factor * width / side) * side
        if not tall and not wide:
            raise _extreme(height, width, "it would be resized to nothing")
        if not tall:
            tall, wide = side, min(math.floor(width / height) * side, budget * side)
        elif not wide:
            tall, wide = min(math.floor(height / width) * side, budget * side), side
        if tall * wide > area:
            raise _extreme(height, width, f"it needs more than {budget} tokens")
        return Layout(text, ((tall // patch) * (wide // patch) // pool**2,))

    return rule


def closest_tiling(text: str, tile: tuple[int, int], least: int, most: int, count: int) -> Rule:
    """The tiling whose aspect is closest, and a thumbnail beside several tiles (InternVL).

    Args:
        tile: its height and width in pixels.
        least, most: tiles.
        count: tokens for each tile.
    """
    sides = range(1, most + 1)
    grids = [(wide, tall) for wide in sides for tall in sides if least <= wide * tall <= most]
    grids.sort(key=lambda grid: grid[0] * grid[1])

    def tiles(height: int, width: int) -> int:
        if most <= 1:
            return 1
        aspect, area = width / height, width * height
        best, nearest = (1, 1), math.inf
        for wide, tall in grids:
            distance = abs(aspect - wide / tall)
            if distance < nearest:
                best, nearest = (wide, tall), distance
            elif distance == nearest and area > 0.5 * tile[0] * tile[1] * wide * tall:
                best = (wide, tall)
        number = best[0] * best[1]
        return number + (number != 1)

    return lambda height, width: Layout(text, (tiles(height, width) * count,))


def best_pinpoint(text: str, pinpoints: list[Size], tile: Size, patch: int, more: int) -> Rule:
    """The resolution that wastes least without its padding, newlines, and the whole (LLaVA-NeXT).

    Args:
        pinpoints: heights and widths to choose from.
        tile: height and width of what the vision tower sees.
        more: tokens beside those of patches (the class token, where it is kept).
    """
    rows, columns = tile[0] // patch, tile[1] // patch

    def rule(height: int, width: int) -> Layout:
        best = _least_waste(height, width, pinpoints)
        if best is None:
            raise _extreme(height, width, "no resolution of the processor keeps both of its sides")
        tall, wide = rows * (best[0] // tile[0]), columns * (best[1] // tile[1])
        if width / height > wide / tall:
            tall -= (tall - int(round(height * (wide / width), 7))) // 2 * 2
        else:
            wide -= (wide - int(round(width * (tall / height), 7))) // 2 * 2
        return Layout(text, (tall * wide + tall + rows * columns + more,))

    return rule


def _least_waste(height: int, width: int, sizes: list[Size]) -> Size | None:
    best, most, least = None, 0, math.inf
    for tall, wide in sizes:
        scale = min(wide / width, tall / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        wasted = tall * wide - used
        if used > most or (used == most and wasted < least):
            best, most, least = (tall, wide), used, wasted
    return best


# --------------------------------------------------------------------------------------------- rows of tiles


@dataclass(frozen=True, slots=True)
class SplitTokens:
    """What Idefics3 and SmolVLM write around a picture and its parts."""

    image: str = "<image>"
    around: str = "<fake_token_around_image>"
    whole: str = "<global-img>"


def split_rows(tokens: SplitTokens, longest: int, tile: int, count: int, *, split: bool) -> Rule:
    """Tiles in rows, each with its place, then the whole picture (Idefics3, SmolVLM).

    Args:
        longest: pixels of the longer side after resizing.
        tile: pixels of a side of a tile.
        count: tokens for each tile.
    """

    def rule(height: int, width: int) -> Layout:
        rows, columns = _split(height, width, longest, tile) if split else (0, 0)
        whole = f"{tokens.around}{tokens.whole}{tokens.image}{tokens.around}"
        if not rows:
            return Layout(whole, (count,))
        lines = [
            "".join(
                f"{tokens.around}<row_{row}_col_{column}>{tokens.image}" for column in range(1, columns + 1)
            )
            for row in range(1, rows + 1)
        ]
        return Layout("\n".join(lines) + "\n\n" + whole, (count,) * (rows * columns + 1))

    return rule


_MOST_PIXELS_OF_A_SIDE = 4096  # MAX_IMAGE_SIZE of Idefics3


def _split(height: int, width: int, longest: int, tile: int) -> tuple[int, int]:
    """Return rows and columns of tiles; 0, 0 for a picture of one tile."""
    height, width = _to_longest(height, width, longest, even=True)
    if max(height, width) > _MOST_PIXELS_OF_A_SIDE:
        height, width = _to_longest(height, width, _MOST_PIXELS_OF_A_SIDE)
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return (height // tile, width // tile) if height > tile or width > tile else (0, 0)


def _to_longest(height: int, width: int, longest: int, *, even: bool = False) -> tuple[int, int]:
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += even and height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += even and width % 2
    return max(height, 1), max(width, 1)


@dataclass(frozen=True, slots=True)
class BreakTokens:
    """What Pixtral and Mistral 3 write for a patch, after a row and after the last one."""

    image: str = "[IMG]"
    after_row: str = "[IMG_BREAK]"
    after_all: str = "[IMG_END]"


def patch_rows(tokens: BreakTokens, longest: int, patch: int) -> Rule:
    """Rows of patches, each closed by a token (Pixtral, Mistral 3).

    Args:
        longest: pixels that no side exceeds.
        patch: pixels of a side of what one token stands for.
    """

    def rule(height: int, width: int) -> Layout:
        tall, wide = height, width
        ratio = max(height / longest, width / longest)
        if ratio > 1:
            tall, wide = math.floor(height / ratio), math.floor(width / ratio)
        rows, columns = (tall - 1) // patch + 1, (wide - 1) // patch + 1
        if not rows or not columns:
            raise _extreme(height, width, "a side would be resized to nothing")
        lines = (tokens.image + tokens.after_row) * (rows - 1) + tokens.image + tokens.after_all
        return Layout(lines, (columns,) * rows)

    return rule


def best_canvas(tile: int, most: int, count: int, *, largest: bool) -> Rule:
    """Tiles of the canvas that upscales least, in float32 as torch does it, and the whole (Llama 4).

    Args:
        tile: pixels of a side.
        most: tiles.
        count: tokens for each tile.
        largest: take the largest canvas rather than the one that upscales least.
    """
    by_aspect: dict[float, list[tuple[int, int]]] = {}
    for number in range(most, 0, -1):
        for rows in (side for side in range(1, number + 1) if number % side == 0):
            by_aspect.setdefault(rows / (number // rows), []).append((rows, number // rows))
    grids = [grid for same in by_aspect.values() for grid in same]
    canvases = np.array(grids, np.float32) * np.float32(tile)

    def rule(height: int, width: int) -> Layout:
        scales = (canvases / np.array([height, width], np.float32)).min(axis=1)
        up = scales[scales >= 1]
        chosen = (up.max() if largest else up.min()) if len(up) else scales.max()
        rows, columns = min(
            (grid for grid, scale in zip(grids, scales, strict=True) if scale == chosen),
            key=lambda grid: grid[0] * grid[1],
        )
        line = "<|tile_x_separator|>".join(["<|patch|>"] * columns) + "<|tile_y_separator|>"
        tiles = rows * columns if rows * columns > 1 else 0
        text = f"<|image_start|>{line * rows if tiles else ''}<|image|><|patch|><|image_end|>"
        return Layout(text, (count,) * (tiles + 1))

    return rule
