"""The child process behind the gate: the family's own processor of transformers, on blank pictures.

Reads a request on stdin, writes one answer for each size on stdout. It is a process of its own because
transformers imports torch wherever it finds it, and because what is hidden or replaced here must not outlive
this one use. Nothing is replaced that decides a token: classes that ask for a video processor get none, and
pixels are resized to the nearest and left as they are, which changes no size.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TypedDict

from sftdata.errors import need
from sftdata.output import one_line

# Name of the family -> its module.
_MODULES = {
    "qwen2-vl": "qwen2_vl", "qwen2.5-vl": "qwen2_5_vl", "qwen3-vl": "qwen3_vl", "llava": "llava",
    "llava-next": "llava_next", "idefics3": "idefics3", "smolvlm": "smolvlm", "internvl": "internvl",
    "gemma3": "gemma3", "gemma4": "gemma4", "pixtral": "pixtral", "llama4": "llama4",
}  # fmt: skip
# Image processors that a family has from another model.
_OTHERS = {
    "CLIPImageProcessor": "clip", "SiglipImageProcessor": "siglip", "GotOcr2ImageProcessor": "got_ocr2",
    "Qwen2VLImageProcessor": "qwen2_vl",
}  # fmt: skip
_NEAREST = 0


class ReferenceRequest(TypedDict):
    """What the child is asked for.

    Attributes:
        processor: name of the class.
        backend: of the image processor; with "pil", torch is hidden.
        image_settings, processor_settings: JSON of the processor.
        tokenizer: a folder.
        text: with one marker.
        sizes: height and width of each picture.
    """

    family: str
    processor: str
    backend: str
    image_settings: str
    processor_settings: str
    tokenizer: str
    text: str
    sizes: list[list[int]]


_Processor = Callable[..., dict[str, list[list[int]]]]
Answer = list[int] | str
"""Ids of the text with the picture, or why the processor refuses it."""


def main() -> int:
    """Serve one request."""
    request: ReferenceRequest = json.load(sys.stdin)
    if request["backend"] == "pil":
        sys.modules["torch"] = None  # type: ignore[assignment]  # "not installed": nothing here needs it
    warnings.simplefilter("ignore")
    ask = load(request)
    answers = [ask(request["text"], [(height, width)]) for height, width in request["sizes"]]
    sys.stdout.write(json.dumps(answers))
    return 0


def load(request: ReferenceRequest) -> Callable[[str, Sequence[tuple[int, int]]], Answer]:
    """Return what answers a text with blank pictures of these heights and widths."""
    from transformers import AutoTokenizer

    pillow = need("PIL.Image", "vision", "Pictures are read with Pillow")
    cls = _processor_class(request["family"], request["processor"])
    images = image_processor(request["family"], json.loads(request["image_settings"]), request["backend"])
    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"], trust_remote_code=False)
    wanted = {"image_processor": images, "tokenizer": tokenizer, **json.loads(request["processor_settings"])}
    made = cls(**wanted, **dict.fromkeys(_unneeded(cls)))

    def ask(text: str, sizes: Sequence[tuple[int, int]]) -> Answer:
        pictures = [pillow.new("RGB", (width, height)) for height, width in sizes]
        quick = {"resample": _NEAREST, "do_rescale": False, "do_normalize": False}
        try:
            out = made(images=pictures, text=[text], images_kwargs=quick, return_tensors=None)
        except Exception as error:  # a processor raises what it likes on a size that it cannot take
            return one_line(f"{type(error).__name__}: {error}")[:200]
        return [int(token) for token in out["input_ids"][0]]

    return ask


def _processor_class(family: str, cls: str) -> Callable[..., _Processor]:
    """Import a processor's class, which then takes a processor without its other media."""
    name = _MODULES[family]
    if (
        family == "pixtral"
    ):  # its module imports one function from a module that needs torchvision; both have it
        pil = import_module("transformers.models.pixtral.image_processing_pil_pixtral")
        sys.modules["transformers.models.pixtral.image_processing_pixtral"] = pil
    module = import_module(f"transformers.models.{name}.processing_{name}")
    if family == "smolvlm":
        vars(module)["num2words"] = str  # only spells out how many frames a film has
    found: Callable[..., _Processor] = vars(module)[cls]
    found.check_argument_for_proper_class = lambda *_: None  # type: ignore[attr-defined]
    return found


def image_processor(family: str, settings: Mapping[str, object], backend: str) -> Callable[..., object]:
    """Return a family's image processor, in its PIL form where it has one."""
    kind = str(settings["image_processor_type"])
    name = _OTHERS.get(kind) or _MODULES[family]
    infix, ending = ("pil_", "Pil") if backend == "pil" else ("", "")
    module = import_module(f"transformers.models.{name}.image_processing_{infix}{name}")
    made: Callable[..., object] = vars(module)[f"{kind}{ending}"](
        **{key: value for key, value in settings.items() if key != "image_processor_type"}
    )
    return made


def _unneeded(cls: object) -> list[str]:
    """Return the parts of a processor that pictures do not need."""
    parts: list[str] = cls.get_attributes()  # type: ignore[attr-defined]
    return [name for name in parts if name not in ("image_processor", "tokenizer")]


if __name__ == "__main__":
    sys.exit(main())
