"""The settings of a processor as its rule reads them: defaults of transformers, odd values refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sftdata.errors import UsageError
from sftdata.sources.jsonrows import JsonObject


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one processor; what is missing has the default of transformers.

    Attributes:
        image: of the image processor.
        whole: of the processor around it.
        tokens: name -> text.
        folder: for messages.
    """

    image: JsonObject
    whole: JsonObject
    tokens: Mapping[str, str]
    folder: str = "the processor"

    def refusal(self, name: str, found: object, expected: str) -> UsageError:
        """Return the error for a setting that the rule cannot follow."""
        what = f"{self.folder}: {name} is {found}; expected {expected}."
        return UsageError(what, "use the files that were saved with the model.")

    def token(self, name: str) -> str:
        """Return the text of a named token."""
        return self.tokens[name]

    def number(self, name: str, default: int) -> int:
        """Return a whole number above 0 of the image processor."""
        return self._whole_number(self.image, name, default, least=1)

    def of_processor(self, name: str, default: int | None = None) -> int:
        """Return a whole number of the processor; without a default it has to be there."""
        return self._whole_number(self.whole, name, default, least=0 if default == 0 else 1)

    def _whole_number(self, place: JsonObject, name: str, default: int | None, least: int) -> int:
        value = place.get(name, default)
        if value is None:
            raise self.refusal(name, "missing in processor_config.json", "a whole number")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refusal(name, repr(value), f"a whole number from {least} on")
        return value

    def ratio(self, name: str, default: float) -> float:
        """Return a number above 0, and at most 1, of the processor."""
        value = self.whole.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise self.refusal(name, repr(value), "a number above 0, at most 1")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return a switch of the image processor."""
        value = self.image.get(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, repr(value), "true or false")
        return value

    def choice(self, name: str, known: Sequence[str]) -> str | None:
        """Return a word of the processor; None where it has none."""
        value = self.whole.get(name)
        if value is not None and value not in known:
            raise self.refusal(name, repr(value), " or ".join(known))
        return None if value is None else str(value)

    # --------------------------------------------------------------------------------------------- sizes

    def _resizes(self) -> None:
        if not self.flag("do_resize", True):
            raise self.refusal("do_resize", "false", "true, since models take few sizes")

    def _sizes(self, name: str) -> Mapping[str, int]:
        value = self.image.get(name, {})
        if isinstance(value, int) and not isinstance(value, bool):
            value = {"height": value, "width": value}
        given = value if isinstance(value, dict) else {"": value}
        sizes = {key: size for key, size in given.items() if type(size) is int and size > 0}
        if len(sizes) < sum(size is not None for size in given.values()):
            raise self.refusal(name, repr(value), "sizes in pixels")
        return sizes

    def edge(self, name: str, default: int) -> int:
        """Return the longest edge that a size allows."""
        self._resizes()
        sizes = self._sizes(name)
        if sizes and "longest_edge" not in sizes:
            raise self.refusal(name, repr(dict(sizes)), "one with longest_edge")
        return sizes.get("longest_edge", default)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width to which every tile is resized."""
        self._resizes()
        return self._rectangle("size")

    def _rectangle(self, name: str) -> tuple[int, int]:
        sizes = self._sizes(name)
        if not {"height", "width"} <= sizes.keys():
            raise self.refusal(name, repr(dict(sizes)), "one with height and width")
        return sizes["height"], sizes["width"]

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of what the vision tower sees, by cropping or by resizing."""
        crops = self.flag("do_center_crop", self.image.get("image_processor_type") != "SiglipImageProcessor")
        return self._rectangle("crop_size") if crops else self.size

    @property
    def area(self) -> tuple[int, int]:
        """Fewest and most pixels of a resized picture."""
        self._resizes()
        sizes = dict(self._sizes("size")) or {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
        for name, key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if name in self.image:
                sizes[key] = self.number(name, 1)
        if not {"shortest_edge", "longest_edge"} <= sizes.keys():
            raise self.refusal("size", repr(sizes), "one with shortest_edge and longest_edge")
        return sizes["shortest_edge"], sizes["longest_edge"]

    def with_area(self, max_pixels: int | None, min_pixels: int | None) -> Settings:
        """Return these settings with bounds of the area; those that are None stay.

        Raises:
            UsageError: bounds that no picture meets.
        """
        low, high = self.area
        low = low if min_pixels is None else min_pixels
        high = high if max_pixels is None else max_pixels
        least = (self.number("patch_size", 14) * self.number("merge_size", 2)) ** 2
        if high < max(low, least):
            what = f"max_pixels is {high:,}; one token is {least:,} pixels, and min_pixels is {low:,}."
            raise UsageError(what, f"give a larger --max-pixels, from {max(low, least)} on.")
        image = {key: value for key, value in self.image.items() if key not in ("min_pixels", "max_pixels")}
        return replace(self, image=image | {"size": {"shortest_edge": low, "longest_edge": high}})

    @property
    def pinpoints(self) -> list[tuple[int, int]]:
        """The resolutions that a processor chooses from, height and width."""
        value = self.image.get("image_grid_pinpoints")
        sizes = value if isinstance(value, list) else []
        pairs = [tuple(pair) for pair in sizes if isinstance(pair, list) and len(pair) == 2]
        whole = all(type(side) is int and side > 0 for pair in pairs for side in pair)
        if not pairs or len(pairs) < len(sizes) or not whole:
            raise self.refusal("image_grid_pinpoints", repr(value)[:60], "a list of heights and widths")
        return [(height, width) for height, width in pairs]
