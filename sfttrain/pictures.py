"""Pictures of rows -> what a model takes of them beside ids. It runs in the workers of the loader.

file, hash as in the set -- decoded, size as in the set -- pixels, tokens as in the set -- joined

Nothing reaches the model that the set does not know: a picture that is another by now, that decodes to
another size, or of which the image processor makes more or fewer tokens, is refused by row and file.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sftdata.batches import Bool, Int64, offsets_of
from sftdata.errors import DataError, IntegrityError, UsageError, need
from sftdata.output import one_line
from sftdata.pictures.families import restored
from sftdata.pictures.reference import image_processor
from sftdata.pictures.settings import Settings as Given
from sftdata.set.images import StoredPictures, read_again
from sftdata.set.opened import ShardSet

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig

Arrays = dict[str, npt.NDArray[Any]]
Settings = Mapping[str, Any]
Grid = tuple[int, int]
"""Rows and columns of the tokens that stand for a picture."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_VERSION = "prepare the set again with --overwrite, with the transformers that is installed here."
_AGAIN = "restore the file, or prepare the set again with --overwrite."


class RowPicture(NamedTuple):
    """A picture of a row, and what its set says of it.

    Attributes:
        row: where the row is, for messages.
        path: of the file in `folder`; "" for one whose bytes the set has.
        data: these bytes; empty for one with a path.
        height, width: in pixels, as turned.
        tokens: that stand for it.
    """

    row: str
    path: str
    folder: Path
    data: Any  # bytes, or a buffer of pyarrow
    sha256: bytes
    height: int
    width: int
    tokens: int

    @property
    def where(self) -> str:
        """Row and file, for a message."""
        return f"{self.row}, picture {one_line(self.path) or self.sha256.hex()[:12]}"

    def read(self) -> bytes:
        """Return the bytes of its file.

        Raises:
            IntegrityError: it is gone, or another by now.
        """
        data = bytes(self.data) or read_again(self.path, self.folder)
        if data is None:
            raise IntegrityError(f"{self.where}: not there, below {self.folder}.", _AGAIN)
        if hashlib.sha256(data).digest() != self.sha256:
            raise IntegrityError(f"{self.where}: another picture by now, its hash differs.", _AGAIN)
        return data


def row_picture(row: str, folder: Path, stored: StoredPictures, index: int) -> RowPicture:
    """Return a picture of a sidecar as that of a row."""
    size = int(stored.height[index]), int(stored.width[index]), int(stored.tokens[index])
    return RowPicture(row, stored.path[index], folder, stored.data[index], stored.sha256[index], *size)


# ------------------------------------------------------------------------------------------------- families

Count = Callable[[Arrays, Settings, Settings], int]


def _merged(arrays: Arrays, image: Settings, whole: Settings) -> int:
    rows, columns = arrays["image_grid_thw"][0, 1:].tolist()
    return int(rows * columns // image.get("merge_size", 2) ** 2)


def _patches(arrays: Arrays, image: Settings, whole: Settings) -> int:
    height, width = arrays["pixel_values"].shape[-2:]
    more = whole.get("num_additional_image_tokens", 0)
    more -= whole.get("vision_feature_select_strategy") == "default"
    return int((height // whole["patch_size"]) * (width // whole["patch_size"]) + more)


def _unpadded(arrays: Arrays, image: Settings, whole: Settings) -> int:
    height, width = arrays["image_sizes"][0].tolist()
    return sum(restored("llava-next", image, whole).layout(height, width).runs)


def _tiles(name: str, default: int, axis: int) -> Count:
    return lambda arrays, image, whole: arrays["pixel_values"].shape[axis] * int(whole.get(name, default))


def _soft(arrays: Arrays, image: Settings, whole: Settings) -> int:
    patches = int((arrays["image_position_ids"][0, :, 0] >= 0).sum())
    return patches // int(image.get("pooling_kernel_size", 3) ** 2)


def _merged_patch(whole: Settings) -> int:
    return int(whole.get("patch_size", 16) * whole.get("spatial_merge_size", 1))


def _rows_of_patches(arrays: Arrays, image: Settings, whole: Settings) -> int:
    height, width = arrays["image_sizes"][0].tolist()
    return int((height // _merged_patch(whole)) * (width // _merged_patch(whole)))


@dataclass(frozen=True)
class Family:
    """How the models of a family take pictures.

    Attributes:
        models: `model_type` of their configs.
        inputs: what they take of the image processor's output.
        count: how many tokens stand for the picture of some arrays.
        axis: along which pictures are joined; other sizes are filled up with zeros.
        grids: whether positions have three dimensions.
        types: name of the input that says which tokens are of pictures, where these see each other both ways.
        side: of the squares that the tower sees, in pixels, by the settings; None where it takes any size.
        always: from the settings of the processor to those that it sets for its image processor.
    """

    models: tuple[str, ...]
    inputs: tuple[str, ...]
    count: Count
    axis: int = 0
    grids: bool = False
    types: str | None = None
    side: Callable[[Given], int] | None = None
    always: Callable[[Settings], Settings] = lambda whole: {}


_QWEN = ("pixel_values", "image_grid_thw")
_PADDED = "pixel_attention_mask"
_TILED = ("pixel_values", _PADDED)


def _tile(given: Given) -> int:
    return given.tile[0]


def _size(given: Given) -> int:
    return given.size[0]


def _edge(given: Given) -> int:
    return given.edge("max_image_size", 364)


FAMILIES: dict[str, Family] = {
    "qwen2-vl": Family(("qwen2_vl",), _QWEN, _merged, grids=True),
    "qwen2.5-vl": Family(("qwen2_5_vl",), _QWEN, _merged, grids=True),
    "qwen3-vl": Family(("qwen3_vl", "qwen3_vl_moe"), _QWEN, _merged, grids=True),
    "llava": Family(("llava",), ("pixel_values",), _patches, side=_tile),
    "llava-next": Family(("llava_next",), ("pixel_values", "image_sizes"), _unpadded, side=_tile),
    "idefics3": Family(("idefics3",), _TILED, _tiles("image_seq_len", 169, 1), axis=1, side=_edge),
    "smolvlm": Family(("smolvlm",), _TILED, _tiles("image_seq_len", 169, 1), axis=1, side=_edge),
    "internvl": Family(
        ("internvl",),
        ("pixel_values",),
        _tiles("image_seq_length", 256, 0),
        side=_size,
        always=lambda whole: {"crop_to_patches": True},
    ),
    "gemma3": Family(
        ("gemma3",), ("pixel_values",), _tiles("image_seq_length", 256, 0), types="token_type_ids", side=_size
    ),
    "gemma4": Family(("gemma4",), ("pixel_values", "image_position_ids"), _soft, types="mm_token_type_ids"),
    "pixtral": Family(
        ("llava", "mistral3"),
        ("pixel_values", "image_sizes"),
        _rows_of_patches,
        always=lambda whole: {"patch_size": _merged_patch(whole)},
    ),
}
"""Families of sets whose models a run trains, by the names that the sets have for them."""


# ---------------------------------------------------------------------------------------------- of the sets


def inputs_of(sets: Sequence[ShardSet]) -> PictureInputs | None:
    """Return what the pictures of sets become; None where all are of text.

    Raises:
        UsageError: two sets have other processors, or a run cannot train on pictures of the family.
    """
    seen = [(opened.folder, opened.manifest.vision) for opened in sets]
    pictured = [(folder, vision) for folder, vision in seen if vision is not None]
    if not pictured:
        return None
    folder, first = pictured[0]
    for other, vision in pictured[1:]:
        if vision.processor_sha256 != first.processor_sha256:
            what = f"{folder} and {other} were prepared with processors that make other pictures"
            fix = "prepare both with the processor of the model, and the same --max-pixels and --min-pixels."
            raise UsageError(f"{what}.", fix)
    if first.family not in FAMILIES:
        what = f"{folder}: pictures of {first.family}, whose image processor has no form without torchvision"
        raise UsageError(f"{what}.", f"train a model of {', '.join(FAMILIES)}.")
    return PictureInputs(first.family, first.image_settings, first.processor_settings, first.image_id)


def refuse_other_model(pictures: PictureInputs, config: PreTrainedConfig) -> None:
    """Refuse a model that takes other pictures than the sets have, or none.

    Raises:
        UsageError: its family or its image token is another.
    """
    models = pictures.kind.models
    if config.model_type not in models:
        what = f"the model is a {config.model_type}; the pictures were prepared for {pictures.family}"
        raise UsageError(f"{what}.", f"name a model of {' or '.join(models)}, or prepare with its processor.")
    own = getattr(config, "image_token_id", None)
    if own != pictures.image_id:
        what = f"pictures have token {pictures.image_id} in the set, and token {own} in the model"
        raise UsageError(f"{what}.", "prepare the set with the tokenizer of the model.")
    seen = getattr(config.vision_config, "image_size", None)
    if pictures.kind.side is None or seen is None:
        return
    made = pictures.kind.side(Given({**pictures.image_settings}, {**pictures.processor_settings}, {}))
    if made != (side := int(np.ravel(seen)[0])):
        what = f"pictures are cut to {made} pixels a side in the set, and the model sees {side}"
        raise UsageError(f"{what}.", "prepare the set with the processor of the model.")


# ---------------------------------------------------------------------------------------------- from files


@dataclass(frozen=True)
class PictureInputs:
    """Make what the models of a set's family take of pictures; small and picklable.

    Attributes:
        family: a name in `FAMILIES`.
        image_settings, processor_settings: as the manifest of the set has them.
        image_id: of the token that stands for pieces of pictures.
    """

    family: str
    image_settings: Settings
    processor_settings: Settings
    image_id: int

    @property
    def kind(self) -> Family:
        """How models of the family take pictures."""
        return FAMILIES[self.family]

    @cached_property
    def _processor(self) -> Callable[..., Mapping[str, npt.NDArray[Any]]]:
        made = image_processor(
            self.family, {**self.image_settings, **self.kind.always(self.processor_settings)}, "pil"
        )
        return cast(Callable[..., Mapping[str, npt.NDArray[Any]]], made)

    def __getstate__(self) -> dict[str, object]:
        """Leave the processor behind: another process makes its own."""
        return {name: value for name, value in vars(self).items() if name != "_processor"}

    def of_batch(
        self, pictures: Sequence[RowPicture], input_ids: Tensor, lengths: Int64
    ) -> dict[str, Tensor]:
        """Return the tensors that a batch has beside those of a text; they take the place of its own.

        Args:
            pictures: of the batch, in the order of their tokens.
            input_ids: int64[B, L].
            lengths: int64[D], of all its documents, padding included, row after row.

        Raises:
            SftError: a picture is not what its set says.
        """
        made = [self._arrays(picture) for picture in pictures]
        names = self.kind.inputs if made else ()
        found = {name: _joined([arrays[name] for arrays in made], self.kind.axis) for name in names}
        image = input_ids.numpy() == self.image_id
        if self.kind.grids:
            positions = grid_positions(image.ravel(), lengths, [self._grid(arrays) for arrays in made])
            found["position_ids"] = torch.from_numpy(positions).view(4, *input_ids.shape)
        if self.kind.types is not None:
            found[self.kind.types] = torch.from_numpy(image.astype(np.int64))
        return found

    def of_document(self, pictures: Sequence[RowPicture], input_ids: Tensor) -> dict[str, Tensor]:
        """Return the same for one document alone, as its processor hands it to the model: without positions.

        Args:
            input_ids: int64[1, L].
        """
        found = self.of_batch(pictures, input_ids, np.array([input_ids.shape[1]]))
        found.pop("position_ids", None)
        name = self.kind.types or "mm_token_type_ids"
        types = (input_ids == self.image_id).long()
        return {**found, name: types} if self.kind.types or self.kind.grids else found

    def _grid(self, arrays: Arrays) -> Grid:
        merge = int(self.image_settings.get("merge_size", 2))
        rows, columns = arrays["image_grid_thw"][0, 1:].tolist()
        return rows // merge, columns // merge

    def _arrays(self, picture: RowPicture) -> Arrays:
        """Decode a picture, prepare its pixels, and hold both against its set."""
        image = _decoded(picture)
        if (image.height, image.width) != (picture.height, picture.width):
            found = f"{image.width}x{image.height} pixels; the set says {picture.width}x{picture.height}"
            raise IntegrityError(f"{picture.where}: decodes to {found}.", _AGAIN)
        made = self._processor(images=[image], return_tensors="np")
        arrays = {name: np.asarray(made[name]) for name in self.kind.inputs}
        if _PADDED in arrays:  # true and false in eight bytes each, two fifths of all that a worker hands on
            arrays[_PADDED] = arrays[_PADDED].astype(np.bool_)
        tokens = self.kind.count(arrays, self.image_settings, self.processor_settings)
        if tokens != picture.tokens:
            found = f"the image processor makes {tokens:,} tokens of it; the set has {picture.tokens:,}"
            raise IntegrityError(f"{picture.where}: {found}.", _VERSION)
        return arrays


def _decoded(picture: RowPicture) -> Image:
    """Return a picture as every processor sees it: turned by EXIF, its first frame, in RGB.

    Raises:
        DataError: its pixels cannot be decoded.
    """
    pillow = need("PIL.Image", "vision", "Pictures are read with Pillow")
    turned = need("PIL.ImageOps", "vision", "Pictures are read with Pillow").exif_transpose
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Image = turned(pillow.open(io.BytesIO(picture.read()), formats=_FORMATS)).convert("RGB")
    except (IntegrityError, MemoryError):
        raise
    except Exception as error:  # Pillow raises what it likes on broken pixels
        what = f"{picture.where}: its pixels cannot be decoded ({one_line(str(error))[:120]})."
        raise DataError(what, "prepare with --check-pixels, which leaves such rows out.") from None
    return found


def _joined(parts: Sequence[npt.NDArray[Any]], axis: int) -> Tensor:
    """Join arrays along an axis, and fill the others up with zeros."""
    shape = np.max([part.shape for part in parts], axis=0)
    filled = []
    for part in parts:
        widths = [
            (0, 0 if place == axis else int(want - have))
            for place, (want, have) in enumerate(zip(shape, part.shape, strict=True))
        ]
        filled.append(np.pad(part, widths) if any(more for _, more in widths) else part)
    return torch.from_numpy(np.concatenate(filled, axis))


def grid_positions(image: Bool, lengths: Int64, grids: Sequence[Grid]) -> Int64:
    """int64[4, N], counting from 0 in every document: an ordinary position, then time, height and width.

    A text goes on behind a picture as if the picture were as long as its longer side. Models that take these
    (mRoPE of Qwen-VL) build the mask of packed documents from the first row: with three rows, or in two
    dimensions, documents see each other. The time of a picture stands still, so it cannot be that row.

    Args:
        image: bool[N], the tokens that stand for pictures.
        lengths: int64[D], of the documents, padding included; they sum to N.
        grids: of the pictures, in order.

    >>> image = np.array([False, True, True, True, True, False, False])
    >>> grid_positions(image, np.array([6, 1]), [(2, 2)]).tolist()
    [[0, 1, 2, 3, 4, 5, 0], [0, 1, 1, 1, 1, 3, 0], [0, 1, 1, 2, 2, 3, 0], [0, 1, 2, 1, 2, 3, 0]]
    """
    begins = np.repeat(offsets_of(lengths)[:-1], lengths)
    plain = np.arange(len(image), dtype=np.int64) - begins
    places, sizes = np.flatnonzero(image), [rows * columns for rows, columns in grids]
    saved = np.zeros(len(image) + 1, np.int64)  # by which a picture is shorter than its tokens are many
    starts = [places[first] for first in offsets_of(sizes)[:-1]]
    for start, size, grid in zip(starts, sizes, grids, strict=True):
        saved[start + size] += size - max(grid)
    before = np.cumsum(saved[:-1])
    found = np.tile(plain - (before - before[begins]), (4, 1))
    for start, size, (rows, columns) in zip(starts, sizes, grids, strict=True):
        own = slice(start, start + size)
        found[1:, own] = found[1, start] + np.stack(
            [np.zeros(size, np.int64), np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)]
        )
    found[0] = plain
    return found
