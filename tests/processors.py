"""Processors of vision-language families as JSON, and the families' own classes of transformers to hold the rules against.

The values are those of the public files named beside each (`preprocessor_config.json`, `processor_config.json`), with nothing
left out that decides a token. The tokenizer is made here: the added tokens of all families, and one token for each byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors

from tests.made_tokenizers import MADE

Json = dict[str, Any]

_RESIZED = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True}
_QWEN = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_processor_type": "Qwen2VLImageProcessor",
}  # fmt: skip
_CLIP = _RESIZED | {
    "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "size": {"shortest_edge": 336}, "resample": 3,
}  # fmt: skip
_LLAVA = {
    "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14,
    "vision_feature_select_strategy": "default",
}  # fmt: skip
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_SPLIT = _RESIZED | {"do_image_splitting": True, "do_pad": True, "resample": 1}
_BREAKS = {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "image_token": "[IMG]"}
_BOXES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_GEMMA3 = {
    "boi_token": "<start_of_image>",
    "image_token": "<image_soft_token>",
    "eoi_token": "<end_of_image>",
}
_GEMMA4 = {
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
}
_GEMMA4 |= {"boa_token": "<|audio>", "eoa_token": "<audio|>"}

# Name: preprocessor_config.json, processor_config.json, named tokens of tokenizer_config.json.
PROCESSORS: dict[str, tuple[Json, Json, Json]] = {
    "qwen2-vl": (_QWEN | {"processor_class": "Qwen2VLProcessor"}, {}, {}),  # Qwen/Qwen2-VL-7B-Instruct
    "qwen2.5-vl": (_QWEN | {"processor_class": "Qwen2_5_VLProcessor"}, {}, {}),  # Qwen/Qwen2.5-VL-7B-Instruct
    "qwen3-vl": (  # Qwen/Qwen3-VL-8B-Instruct
        {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2,
            "merge_size": 2, "processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        {}, {},
    ),
    "llava": (  # llava-hf/llava-1.5-7b-hf
        _CLIP | {"image_processor_type": "CLIPImageProcessor"}, _LLAVA | {"processor_class": "LlavaProcessor"}, {},
    ),
    "llava-next": (  # llava-hf/llava-v1.6-mistral-7b-hf
        _CLIP | {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": _PINPOINTS, "do_pad": True},
        _LLAVA | {"processor_class": "LlavaNextProcessor"}, {},
    ),
    "idefics3": (  # HuggingFaceM4/Idefics3-8B-Llama3
        _SPLIT | {
            "image_processor_type": "Idefics3ImageProcessor", "max_image_size": {"longest_edge": 364},
            "size": {"longest_edge": 1456}, "processor_class": "Idefics3Processor",
        },
        {"image_seq_len": 169, "processor_class": "Idefics3Processor"}, {},
    ),
    "smolvlm": (  # HuggingFaceTB/SmolVLM2-2.2B-Instruct
        _SPLIT | {
            "image_processor_type": "SmolVLMImageProcessor", "max_image_size": {"longest_edge": 384},
            "size": {"longest_edge": 1536}, "processor_class": "SmolVLMProcessor",
        },
        {"image_seq_len": 81, "processor_class": "SmolVLMProcessor"}, {},
    ),
    "internvl": (  # OpenGVLab/InternVL3-8B-hf
        _RESIZED | {
            "crop_size": None, "crop_to_patches": False, "image_processor_type": "GotOcr2ImageProcessorFast",
            "max_patches": 12, "min_patches": 1, "processor_class": "InternVLProcessor", "size": {"height": 448, "width": 448},
        },
        {"image_seq_length": 256, "processor_class": "InternVLProcessor"}, {"extra_special_tokens": _BOXES},
    ),
    "gemma3": (  # google/gemma-3-4b-it
        {
            "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True, "do_resize": True,
            "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 256, "pan_and_scan_max_num_crops": None,
            "pan_and_scan_min_crop_size": None, "pan_and_scan_min_ratio_to_activate": None, "resample": 2,
            "processor_class": "Gemma3Processor", "size": {"height": 896, "width": 896},
        },
        {"image_seq_length": 256, "processor_class": "Gemma3Processor"}, {"extra_special_tokens": _GEMMA3},
    ),
    "gemma4": (  # google/gemma-4: the image processor is nested
        {},
        {
            "image_processor": {
                "image_processor_type": "Gemma4ImageProcessor", "max_soft_tokens": 280, "patch_size": 16,
                "pooling_kernel_size": 3,
            },
            "image_seq_length": 280, "processor_class": "Gemma4Processor",
        },
        {"extra_special_tokens": _GEMMA4},
    ),
    "pixtral": (  # mistral-community/pixtral-12b
        _RESIZED | {
            "image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 16, "width": 16}, "resample": 3,
            "processor_class": "PixtralProcessor", "size": {"longest_edge": 1024},
        },
        _BREAKS | {"patch_size": 16, "processor_class": "PixtralProcessor"}, {},
    ),
    "mistral3": (  # mistralai/Mistral-Small-3.1-24B-Instruct-2503
        _RESIZED | {
            "image_processor_type": "PixtralImageProcessorFast", "patch_size": 14, "processor_class": "PixtralProcessor",
            "size": {"longest_edge": 1540},
        },
        _BREAKS | {"patch_size": 14, "spatial_merge_size": 2, "processor_class": "PixtralProcessor"}, {},
    ),
    "llama4": (  # meta-llama/Llama-4-Scout-17B-16E-Instruct
        {
            "image_processor_type": "Llama4ImageProcessorFast", "max_patches": 16, "resize_to_max_canvas": False,
            "processor_class": "Llama4Processor", "size": {"height": 336, "width": 336},
        },
        {"patch_size": 14, "pixel_shuffle_ratio": 0.5, "processor_class": "Llama4Processor"}, {},
    ),
}  # fmt: skip
# The same families with other settings: what a rule takes for granted shows where a number is odd.
OTHERS: dict[str, tuple[str, Json, Json]] = {
    "qwen2.5-vl, small": ("qwen2.5-vl", {"min_pixels": 200704, "max_pixels": 401408}, {}),
    "qwen3-vl, small": ("qwen3-vl", {"size": {"longest_edge": 300000, "shortest_edge": 65536}}, {}),
    "llava, whole": ("llava", {}, {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}),
    "llava, SigLIP": (
        "llava", {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}},
        {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
    ),
    "llava-next, wide": ("llava-next", {"image_grid_pinpoints": [[336, 1344], [672, 1008], [1344, 336], [336, 336]]}, {}),
    "idefics3, odd": ("idefics3", {"size": {"longest_edge": 1000}}, {"image_seq_len": 5}),
    "idefics3, whole": ("idefics3", {"do_image_splitting": False}, {}),
    "smolvlm, small": (
        "smolvlm", {"max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}}, {"image_seq_len": 64},
    ),
    "internvl, few": ("internvl", {"min_patches": 2, "max_patches": 6}, {"image_seq_length": 7}),
    "gemma3, few": ("gemma3", {}, {"image_seq_length": 9}),
    "pixtral, small": ("pixtral", {"size": {"longest_edge": 333}}, {}),
    "llama4, largest": ("llama4", {"resize_to_max_canvas": True, "max_patches": 12}, {}),
}  # fmt: skip
BOS = "<|endoftext|>"
TOKENS = (
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>", "<video>", "<fake_token_around_image>",
    "<end_of_utterance>", "<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    *_BOXES.values(), *_GEMMA3.values(), *_GEMMA4.values(), "<|video|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]",
    "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
)  # fmt: skip


def write_processor(folder: Path, name: str, *, bos: bool = False) -> Path:
    """Write the processor of a name above, and its tokenizer, as one folder; `bos`: one that writes BOS."""
    family, image, whole = OTHERS.get(name, (name, {}, {}))
    before, around, tokens = PROCESSORS[family]
    folder.mkdir(parents=True, exist_ok=True)
    build, config = MADE["made-bytes"]
    tokenizer = build()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(TOKENS)]
    )
    if bos:
        single = [(BOS, tokenizer.token_to_id(BOS))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=single)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = (
        config
        | tokens
        | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    )
    if bos:
        config |= {"bos_token": BOS}
    files = {
        "tokenizer_config.json": config,
        "preprocessor_config.json": before | image,
        "processor_config.json": around | whole,
    }
    for file, content in files.items():
        if content:
            (folder / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder
