"""The table of families: how each is recognised by the JSON beside its tokenizer, and which rule it follows.

To add a family, add one entry to FAMILIES, its JSON and its class to the tests, and nothing else. A
processor is read from its JSON alone: `AutoProcessor` needs torchvision for families that work without.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from sftdata.errors import UsageError, did_you_mean
from sftdata.pictures.layouts import (
    BreakTokens,
    Layout,
    Rule,
    SplitTokens,
    best_canvas,
    best_pinpoint,
    closest_tiling,
    fixed,
    patch_rows,
    smart_resize,
    soft_budget,
    split_rows,
)
from sftdata.pictures.settings import Settings
from sftdata.sources.jsonrows import JsonObject

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Family:
    """Models whose processors write the same tokens for a picture of the same size.

    Attributes:
        processor: the name of its class in transformers.
        image_processors: those that may prepare its pixels, without the endings of their backends.
        tokens: named tokens with their default texts; a tokenizer may name others.
        rule: from the settings to the rule.
        marker: name of the token that a chat template writes for a picture.
        image: name of the token that stands once for each piece of it.
        after: what else stands behind a picture that belongs to it, as the chat template writes it.
        backend: what the family's image processor needs, and so the gate.
        by_area: whether its settings bound the pixels of a resized picture.
    """

    name: str
    processor: str
    image_processors: tuple[str, ...]
    tokens: Mapping[str, str]
    rule: Callable[[Settings], Rule]
    marker: str = "image_token"
    image: str = "image_token"
    after: tuple[str, ...] = ()
    backend: Literal["pil", "torchvision"] = "pil"
    by_area: bool = False


# ------------------------------------------------------------------------------------------------- the rules


def _qwen(given: Settings) -> Rule:
    low, high = given.area
    patch, merge = given.number("patch_size", 14), given.number("merge_size", 2)
    return smart_resize(given.token("image_token"), patch, merge, low, high)


def _class_token(given: Settings) -> int:
    """Return the tokens beside those of patches."""
    more = given.of_processor("num_additional_image_tokens", 0)
    return more - (given.choice("vision_feature_select_strategy", ("default", "full")) == "default")


def _llava(given: Settings) -> Rule:
    (height, width), patch = given.tile, given.of_processor("patch_size")
    return fixed(given.token("image_token"), (height // patch) * (width // patch) + _class_token(given))


def _llava_next(given: Settings) -> Rule:
    patch, text = given.of_processor("patch_size"), given.token("image_token")
    return best_pinpoint(text, given.pinpoints, given.tile, patch, _class_token(given))


def _idefics(given: Settings) -> Rule:
    tokens = SplitTokens(
        given.token("image_token"), given.token("fake_image_token"), given.token("global_image_token")
    )
    longest, tile = given.edge("size", 4 * 364), given.edge("max_image_size", 364)
    count = given.of_processor("image_seq_len", 169)
    return split_rows(tokens, longest, tile, count, split=given.flag("do_image_splitting", True))


def _internvl(given: Settings) -> Rule:
    start, image, end = map(given.token, ("start_image_token", "context_image_token", "end_image_token"))
    least, most = given.number("min_patches", 1), given.number("max_patches", 12)
    count = given.of_processor("image_seq_length", 256)
    return closest_tiling(start + image + end, given.size, least, most, count)


def _gemma3(given: Settings) -> Rule:
    if given.flag("do_pan_and_scan", False):
        found = "true, which the processor of transformers never reads"
        raise given.refusal("do_pan_and_scan", found, "false")
    begin, image, end = map(given.token, ("boi_token", "image_token", "eoi_token"))
    return fixed(f"\n\n{begin}{image}{end}\n\n", given.of_processor("image_seq_length", 256))


def _gemma4(given: Settings) -> Rule:
    text = "".join(map(given.token, ("boi_token", "image_token", "eoi_token")))
    patch, pool = given.number("patch_size", 16), given.number("pooling_kernel_size", 3)
    return soft_budget(text, patch, pool, given.number("max_soft_tokens", 280))


def _pixtral(given: Settings) -> Rule:
    names = ("image_token", "image_break_token", "image_end_token")
    patch = given.of_processor("patch_size", 16) * given.of_processor("spatial_merge_size", 1)
    return patch_rows(BreakTokens(*map(given.token, names)), given.edge("size", 1024), patch)


def _llama4(given: Settings) -> Rule:
    tile, patch = given.size[0], given.of_processor("patch_size", 14)
    count = (tile // patch) ** 2 // round(1 / given.ratio("pixel_shuffle_ratio", 0.5) ** 2)
    largest = given.flag("resize_to_max_canvas", False)
    return best_canvas(tile, given.number("max_patches", 16), count, largest=largest)


# ------------------------------------------------------------------------------------------------- the table

_QWEN, _SEEN = {"image_token": "<|image_pad|>"}, ("<|vision_end|>",)
_LLAVA = {"image_token": "<image>"}
_SPLIT = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
}
_BOXES = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
_GEMMA3 = {
    "boi_token": "<start_of_image>",
    "image_token": "<image_soft_token>",
    "eoi_token": "<end_of_image>",
}
_GEMMA4 = {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>"}
_BREAKS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
_PATCHES = {"image_token": "<|image|>", "patch_token": "<|patch|>"}
_QWEN_IMAGES = ("Qwen2VLImageProcessor",)
_CLIP_IMAGES = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")

FAMILIES: tuple[Family, ...] = (
    Family("qwen2-vl", "Qwen2VLProcessor", _QWEN_IMAGES, _QWEN, _qwen, after=_SEEN, by_area=True),
    Family("qwen2.5-vl", "Qwen2_5_VLProcessor", _QWEN_IMAGES, _QWEN, _qwen, after=_SEEN, by_area=True),
    Family("qwen3-vl", "Qwen3VLProcessor", _QWEN_IMAGES, _QWEN, _qwen, after=_SEEN, by_area=True),
    Family("llava", "LlavaProcessor", _CLIP_IMAGES, _LLAVA, _llava),
    Family("llava-next", "LlavaNextProcessor", ("LlavaNextImageProcessor",), _LLAVA, _llava_next),
    Family("idefics3", "Idefics3Processor", ("Idefics3ImageProcessor",), _SPLIT, _idefics),
    Family("smolvlm", "SmolVLMProcessor", ("SmolVLMImageProcessor",), _SPLIT, _idefics),
    Family(
        "internvl",
        "InternVLProcessor",
        ("GotOcr2ImageProcessor",),
        _BOXES,
        _internvl,
        marker="context_image_token",
        image="context_image_token",
    ),
    Family("gemma3", "Gemma3Processor", ("Gemma3ImageProcessor",), _GEMMA3, _gemma3, marker="boi_token"),
    Family("gemma4", "Gemma4Processor", ("Gemma4ImageProcessor",), _GEMMA4, _gemma4),
    Family("pixtral", "PixtralProcessor", ("PixtralImageProcessor",), _BREAKS, _pixtral),
    Family(
        "llama4",
        "Llama4Processor",
        ("Llama4ImageProcessor",),
        _PATCHES,
        _llama4,
        image="patch_token",
        after=("<|image_end|>",),
        backend="torchvision",
    ),
)

REFUSED = {
    "PaliGemmaProcessor": "it has no chat template, and its model sees the prompt in both directions",
    "MllamaProcessor": "its model attends to pictures beside the text, where no token stands for them",
    "ColPaliProcessor": "it makes embeddings for retrieval",
    "ColQwen2Processor": "it makes embeddings for retrieval",
}
"""Processors that are known, and why their rows cannot be prepared."""

_BY_NAME = {family.name: family for family in FAMILIES}
_BY_CLASS = {family.processor: family for family in FAMILIES}


# --------------------------------------------------------------------------------------------- one processor


@dataclass(frozen=True, slots=True)
class PictureProcessor:
    """What decides the tokens of every picture; small, hashable and picklable.

    Attributes:
        family: its name in the table.
        image_settings: those of the image processor as they act, as JSON with sorted keys.
        processor_settings: those of the processor around it.
        tokens: (name, text) of the family's tokens.
    """

    family: str
    image_settings: str
    processor_settings: str
    tokens: tuple[tuple[str, str], ...]

    @property
    def marker(self) -> str:
        """What the chat template writes for a picture."""
        return dict(self.tokens)[_BY_NAME[self.family].marker]

    @property
    def image_token(self) -> str:
        """The token that repeats."""
        return dict(self.tokens)[_BY_NAME[self.family].image]

    @property
    def closing(self) -> tuple[str, ...]:
        """The tokens that, behind a picture, belong to it."""
        texts = (text for _, text in self.tokens if text != self.image_token)
        return (*texts, *_BY_NAME[self.family].after)

    @property
    def processor_class(self) -> str:
        """The name of the family's processor in transformers."""
        return _BY_NAME[self.family].processor

    @property
    def backend(self) -> Literal["pil", "torchvision"]:
        """What the family's own image processor needs."""
        return _BY_NAME[self.family].backend

    @property
    def sha256(self) -> str:
        """Over everything that decides a layout."""
        parts = [self.family, self.image_settings, self.processor_settings, *sum(self.tokens, ())]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def layout(self, height: int, width: int) -> Layout:
        """Return what stands for a picture of this size, in pixels as turned.

        Raises:
            RowError: the family's processor cannot take a picture of this size.
        """
        return _layout(self, height, width)


@lru_cache(maxsize=1 << 16)
def _layout(processor: PictureProcessor, height: int, width: int) -> Layout:
    return _rule(processor)(height, width)


@lru_cache(maxsize=64)
def _rule(processor: PictureProcessor) -> Rule:
    image, whole = json.loads(processor.image_settings), json.loads(processor.processor_settings)
    return _BY_NAME[processor.family].rule(Settings(image, whole, dict(processor.tokens)))


def read_processor(
    folder: Path, *, max_pixels: int | None = None, min_pixels: int | None = None
) -> PictureProcessor:
    """Read the processor of a folder of JSON files, as saved with a model.

    Args:
        max_pixels, min_pixels: bounds of a resized picture that replace those of the folder.

    Raises:
        UsageError: no processor, one of a family that is refused, or settings that no rule follows.
    """
    whole, image, tokenizer = (_read(folder / name) for name in PROCESSOR_FILES)
    nested = whole.get("image_processor")
    image = nested if isinstance(nested, dict) else image
    if not image and not whole:
        found = f"{folder}: neither {PROCESSOR_FILES[0]} nor {PROCESSOR_FILES[1]} is there"
        raise UsageError(f"{found}; pictures need one.", "give the folder of the model's processor.")
    family = _find_family((whole, image, tokenizer), folder)
    kind = str(image.get("image_processor_type") or family.image_processors[0])
    plain = kind.removesuffix("Fast").removesuffix("Pil")
    if plain not in family.image_processors:
        expected = " or ".join(family.image_processors)
        what = f"{folder}: image_processor_type is {kind}; {family.processor} is known with {expected}."
        raise UsageError(what, "use the files that were saved with the model.")
    image = {key: value for key, value in image.items() if key not in _NOT_SETTINGS and value is not None}
    whole = {key: value for key, value in whole.items() if key in _OF_PROCESSOR and value is not None}
    tokens = {name: _named(name, tokenizer, whole) or text for name, text in family.tokens.items()}
    settings = Settings(image | {"image_processor_type": plain}, whole, tokens, str(folder))
    if family.by_area:
        settings = settings.with_area(max_pixels, min_pixels)
    elif max_pixels is not None or min_pixels is not None:
        name = "max_pixels" if max_pixels is not None else "min_pixels"
        what = f"{name} has no effect: the processor of {family.name} does not size pictures by their area."
        raise UsageError(what, f"leave {name} out.")
    family.rule(settings)
    image_settings, processor_settings = (
        json.dumps(part, sort_keys=True) for part in (settings.image, settings.whole)
    )
    return PictureProcessor(family.name, image_settings, processor_settings, tuple(sorted(tokens.items())))


def restored(
    family: str, image_settings: Mapping[str, object], processor_settings: Mapping[str, object]
) -> PictureProcessor:
    """Return the processor of a set from its manifest, with the default texts of its tokens."""
    image, whole = (json.dumps(part, sort_keys=True) for part in (image_settings, processor_settings))
    return PictureProcessor(family, image, whole, tuple(sorted(_BY_NAME[family].tokens.items())))


_NOT_SETTINGS = {"auto_map", "processor_class", "feature_extractor_type", "image_processor_type"}
_OF_PROCESSOR = {
    "patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "image_seq_len",
    "image_seq_length", "spatial_merge_size", "pixel_shuffle_ratio", "image_token", "image_break_token",
    "image_end_token",
}  # fmt: skip


def _read(path: Path) -> JsonObject:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is no JSON ({error}).", "save the processor again.") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON object.", "save the processor again.")
    return found


def _find_family(files: Sequence[JsonObject], folder: Path) -> Family:
    name = next((str(found["processor_class"]) for found in files if found.get("processor_class")), None)
    family = _BY_CLASS.get(name or "")
    if family is not None:
        return family
    others = "; ".join(sorted(_BY_CLASS))
    if name in REFUSED:
        what = f"{folder}: {name} is not supported: {REFUSED[name]}."
        raise UsageError(what, f"use a model with one of {others}.")
    if any("AutoProcessor" in _mapping(found) or "AutoImageProcessor" in _mapping(found) for found in files):
        what = f"{folder}: the processor asks to run its own Python code, which is never done"
        raise UsageError(f"{what}; so its tokens cannot be known.", f"use a model with one of {others}.")
    if name is None:
        what = f"{folder}: no processor_class in {', '.join(PROCESSOR_FILES)}."
        raise UsageError(what, "use the files that were saved with the model.")
    fix = did_you_mean(name, _BY_CLASS, f"use a model with one of {others}.")
    raise UsageError(f"{folder}: the processor {name} is not supported.", fix)


def _mapping(found: JsonObject) -> Mapping[str, object]:
    mapped = found.get("auto_map")
    return mapped if isinstance(mapped, dict) else {}


def _named(name: str, tokenizer: JsonObject, whole: JsonObject) -> str | None:
    """Return the text of a named token: the tokenizer outranks the processor."""
    extra = tokenizer.get("extra_special_tokens")
    places = (tokenizer, extra if isinstance(extra, dict) else {}, whole)
    values = [place.get(name) for place in places]
    texts = [value.get("content") if isinstance(value, dict) else value for value in values]
    return next((text for text in texts if isinstance(text, str)), None)
