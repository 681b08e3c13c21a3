"""The families' own processors of transformers, as users call them: text with markers and pictures in, ids out.

Built by hand from the JSON of tests/processors.py, since `AutoProcessor` needs torchvision for half of them. Where a class asks
for a video processor it gets none; nothing else differs from what a user has.
"""

from __future__ import annotations

import ast
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoTokenizer

Json = dict[str, Any]
# Name of a family: module and class of its processor, module and class of its image processor.
CLASSES = {
    "qwen2-vl": ("qwen2_vl", "Qwen2VLProcessor", "qwen2_vl", "Qwen2VLImageProcessorPil"),
    "qwen2.5-vl": ("qwen2_5_vl", "Qwen2_5_VLProcessor", "qwen2_vl", "Qwen2VLImageProcessorPil"),
    "qwen3-vl": ("qwen3_vl", "Qwen3VLProcessor", "qwen2_vl", "Qwen2VLImageProcessorPil"),
    "llava": ("llava", "LlavaProcessor", "clip", "CLIPImageProcessorPil"),
    "llava-next": ("llava_next", "LlavaNextProcessor", "llava_next", "LlavaNextImageProcessorPil"),
    "idefics3": ("idefics3", "Idefics3Processor", "idefics3", "Idefics3ImageProcessorPil"),
    "smolvlm": ("smolvlm", "SmolVLMProcessor", "smolvlm", "SmolVLMImageProcessorPil"),
    "internvl": ("internvl", "InternVLProcessor", "got_ocr2", "GotOcr2ImageProcessorPil"),
    "gemma3": ("gemma3", "Gemma3Processor", "gemma3", "Gemma3ImageProcessorPil"),
    "gemma4": ("gemma4", "Gemma4Processor", "gemma4", "Gemma4ImageProcessorPil"),
    "pixtral": ("pixtral", "PixtralProcessor", "pixtral", "PixtralImageProcessorPil"),
}
CLASSES["mistral3"] = CLASSES["pixtral"]
QUICK = {"resample": 0, "do_rescale": False, "do_normalize": False}
"""Pixels resized to the nearest and left as they are: the same sizes, for a tenth of the time."""


class Own:
    """A family's processor, made from a folder."""

    def __init__(self, family: str, folder: Path) -> None:
        module, cls, image_module, image_cls = CLASSES[family]
        whole = _read(folder / "processor_config.json")
        image = whole.pop("image_processor", None) or _read(folder / "preprocessor_config.json")
        if image.get("image_processor_type") == "SiglipImageProcessor":
            image_module, image_cls = "siglip", "SiglipImageProcessorPil"
        models = "transformers.models"
        if family in (
            "pixtral",
            "mistral3",
        ):  # the class needs one function of a module that imports torchvision; this one has it
            pil = import_module(f"{models}.pixtral.image_processing_pil_pixtral")
            sys.modules.setdefault(f"{models}.pixtral.image_processing_pixtral", pil)
        self.images = getattr(
            import_module(f"{models}.{image_module}.image_processing_pil_{image_module}"), image_cls
        )(
            **{
                key: value
                for key, value in image.items()
                if key not in ("image_processor_type", "processor_class")
            }
        )
        processing = import_module(f"{models}.{module}.processing_{module}")
        if family == "smolvlm":
            processing.num2words = str
        found = getattr(processing, cls)
        made = type(cls, (found,), {"check_argument_for_proper_class": lambda *_: None})
        others = {
            name: None for name in ("video_processor", "feature_extractor") if name in found.get_attributes()
        }
        whole.pop("processor_class", None)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = made(image_processor=self.images, tokenizer=tokenizer, **whole, **others)

    def ids(self, text: str, pictures: Sequence[Image.Image], *, quick: bool = True) -> list[int] | None:
        """Return the ids; None where the processor raises."""
        settings = QUICK if quick else {}
        try:
            out = self.processor(images=[*pictures], text=[text], images_kwargs=settings, return_tensors=None)
        except Exception:
            return None
        return [int(token) for token in out["input_ids"][0]]

    def of_sizes(self, text: str, sizes: Sequence[tuple[int, int]]) -> list[int] | None:
        """Return the ids of a text with blank pictures of these heights and widths."""
        return self.ids(text, [Image.new("RGB", (width, height)) for height, width in sizes])


def _read(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class OwnLlama4:
    """Llama 4, whose image processor needs torchvision: the functions that decide the canvas, taken out of its source."""

    def __init__(self, folder: Path) -> None:
        import torch

        self.torch = torch
        self.image, self.whole = (
            _read(folder / "preprocessor_config.json"),
            _read(folder / "processor_config.json"),
        )
        import transformers

        source = Path(transformers.__file__).parent / "models/llama4/image_processing_llama4.py"
        wanted = ("get_factors", "find_supported_resolutions", "get_best_fit")
        tree = ast.parse(source.read_text(encoding="utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
        for node in functions:
            node.decorator_list = []
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
        self.scope: Json = {"torch": torch, "math": math, "defaultdict": defaultdict, "lru_cache": lru_cache}
        exec(compile(ast.Module(functions, []), str(source), "exec"), self.scope)
        self.processor = import_module("transformers.models.llama4.processing_llama4").Llama4Processor

    def replacement(self, height: int, width: int) -> str:
        """Return what the processor writes for a picture."""
        from types import SimpleNamespace

        tile = self.image["size"]["height"]
        sizes = self.scope["find_supported_resolutions"](
            self.image["max_patches"], SimpleNamespace(height=tile, width=tile)
        )
        largest = self.image["resize_to_max_canvas"]
        best = self.scope["get_best_fit"](
            (height, width), self.torch.tensor(sizes), resize_to_max_canvas=largest
        )
        ratio = (int(best[0]) // tile, int(best[1]) // tile)
        made = self.processor.__new__(self.processor)
        made.patch_size = self.whole["patch_size"]
        made.downsample_ratio = round(1.0 / (self.whole["pixel_shuffle_ratio"] ** 2))
        pixels = self.torch.zeros(1, 3, tile, tile)
        return str(made.replace_image_token({"pixel_values": pixels, "aspect_ratios": [ratio]}, 0))
