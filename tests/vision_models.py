"""Tiny vision-language models of every family, processors that see as little as they do, and sets for both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sftdata
from sftdata.pictures.families import read_processor
from sfttrain.pictures import PictureInputs
from tests.made_pictures import make, saved
from tests.picture_sets import Row, asked, write_rows
from tests.processors import write_processor
from tests.unit.test_pictures_masks import _PARTS, FIRST, QWEN

Json = dict[str, Any]
_SIDE = {"height": 28, "width": 28}
_CLIP = {"crop_size": _SIDE, "size": {"shortest_edge": 28}}
_POINTS = [[28, 56], [56, 28]]
_TILES = {"max_image_size": {"longest_edge": 56}, "size": {"longest_edge": 112}}
_QWEN = {"size": {"shortest_edge": 28**2, "longest_edge": 16 * 28**2}, "min_pixels": None, "max_pixels": None}
_CLIP_TOWER = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
_PIXTRAL = {"model_type": "pixtral", "image_size": 64, "hidden_size": 64}
_IDEFICS_TOWER = {"image_size": 56, "patch_size": 14}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_QWEN_TEXT = {"rope_parameters": _ROPE}
_QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 14}
_GEMMA4 = {"patch_size": 4, "pooling_kernel_size": 2}
_GEMMA4_PICTURES = _GEMMA4 | {"image_processor_type": "Gemma4ImageProcessor", "max_soft_tokens": 70}
_DEEP = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}

# Family: model_type, chat template, what its processor has small, the processor around it, its text, its tower, and the rest.
SMALL: dict[str, tuple[str, str, Json, Json, Json, Json, Json]] = {
    "qwen2-vl": (
        "qwen2_vl", QWEN, _QWEN, {}, _QWEN_TEXT, _QWEN_TOWER | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, {},
    ),
    "qwen2.5-vl": ("qwen2_5_vl", QWEN, _QWEN, {}, _QWEN_TEXT, _QWEN_TOWER | _DEEP | {"fullatt_block_indexes": [1]}, {}),
    "qwen3-vl": (
        "qwen3_vl", QWEN, {"size": {"shortest_edge": 32**2, "longest_edge": 16 * 32**2}}, {}, _QWEN_TEXT,
        _QWEN_TOWER | _DEEP | {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}, {},
    ),
    "llava": ("llava", _PARTS % "<image>", _CLIP, {}, {}, _CLIP_TOWER, {"vision_feature_layer": -2}),
    "llava-next": (
        "llava_next", FIRST, _CLIP | {"image_grid_pinpoints": _POINTS}, {}, {}, _CLIP_TOWER, {"image_grid_pinpoints": _POINTS},
    ),
    "idefics3": ("idefics3", _PARTS % "<image>", _TILES, {"image_seq_len": 4}, {}, _IDEFICS_TOWER, {"scale_factor": 2}),
    "smolvlm": ("smolvlm", _PARTS % "<image>", _TILES, {"image_seq_len": 4}, {}, _IDEFICS_TOWER, {"scale_factor": 2}),
    "internvl": (
        "internvl", _PARTS % "<IMG_CONTEXT>\n", {"size": {"height": 56, "width": 56}, "max_patches": 2},
        {"image_seq_length": 4}, {}, {"image_size": [56, 56], "patch_size": [14, 14]}, {"image_seq_length": 4},
    ),
    "gemma3": (
        "gemma3", _PARTS % "<start_of_image>", {"size": {"height": 56, "width": 56}}, {"image_seq_length": 4},
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}, {"image_size": 56, "patch_size": 14},
        {"mm_tokens_per_image": 4},
    ),
    "gemma4": (
        "gemma4", _PARTS % "<|image|>", {}, {"image_processor": _GEMMA4_PICTURES},
        {
            "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8,
            "use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 8,
        },
        _GEMMA4 | {"num_key_value_heads": 2, "head_dim": 16}, {},
    ),
    "pixtral": (
        "llava", _PARTS % "[IMG]", {"size": {"longest_edge": 64}}, {}, {}, _PIXTRAL | {"patch_size": 16},
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "mistral3": (
        "mistral3", _PARTS % "[IMG]", {"size": {"longest_edge": 64}}, {}, {}, _PIXTRAL | {"patch_size": 14},
        {"spatial_merge_size": 2},
    ),
}  # fmt: skip
# Tokens of a row, where 64 are too few: no picture of Gemma 4 has fewer than some 60.
LENGTH = {"gemma4": 192}
_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_small_processor(folder: Path, name: str) -> Path:
    """Write tokenizer, template and processor of a family, with few tokens for a picture."""
    _, template, image, whole, *_ = SMALL[name]
    write_processor(folder, name)
    for file, more in (("preprocessor_config.json", image), ("processor_config.json", whole)):
        path = folder / file
        content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        content = {key: value for key, value in (content | more).items() if value is not None}
        if content:
            path.write_text(json.dumps(content), "utf-8")
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


def small_config(name: str, folder: Path, **text: Any) -> Any:
    """Return the config of a tiny model for the processor in a folder."""
    from transformers import AutoConfig

    kind, *_, own_text, tower, rest = SMALL[name]
    ids = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    size = 1 + max(token["id"] for token in ids)
    image = next(token["id"] for token in ids if token["content"] == read_processor(folder).image_token)
    towers = tower if "depth" in tower else _TOWER | tower
    return AutoConfig.for_model(
        kind, text_config=_TEXT | {"vocab_size": size} | own_text | text, vision_config=towers, image_token_id=image, **rest
    )  # fmt: skip


def write_small_model(folder: Path, name: str) -> Path:
    """Write processor and a model with fresh weights as one folder."""
    import torch
    from transformers import AutoModelForImageTextToText

    write_small_processor(folder, name)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(small_config(name, folder))
    text = {id(weight) for weight in model.get_decoder().parameters()}
    for weight in model.model.parameters():
        if (
            weight.dim() > 1 and id(weight) not in text
        ):  # so that a tower tells pictures apart before it is trained
            torch.nn.init.normal_(weight, std=1.5 / weight[0].numel() ** 0.5)
    model.save_pretrained(folder)
    return folder


def pictured_rows(folder: Path, number: int = 20) -> list[Row]:
    """Return rows with the same question, whose answers only their pictures tell; every fifth is text alone."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(number):
        sizes = [(56, 56), (84, 56), (60, 90)]
        height, width = sizes[index % 3]
        path = folder / "pictures" / f"{index}.png"
        path.write_bytes(saved(make(height, width, seed=100 + index), "PNG"))
        name = f"pictures/{index}.png"
        if index % 5 == 4:
            rows.append(asked(f"Say {index}", chr(65 + index)))
        elif index % 5 == 3:
            rows.append(asked("<image> or <image>?", chr(65 + index), images=[name, "pictures/0.png"]))
        else:
            rows.append(asked("<image>?", chr(65 + index), images=[name]))
    return rows


def make_pictured_set(model: Path, place: Path, output: Path, number: int = 20, **settings: Any) -> Path:
    """Prepare such rows with the processor of a folder."""
    rows = write_rows(place, pictured_rows(place, number))
    length = LENGTH.get(read_processor(model).family, 64)
    given = {"tokenizer": str(model), "max_length": length, "workers": 1} | settings
    sftdata.prepare(str(rows), output=output, **given)
    return output


def inputs_of_folder(folder: Path, image_id: int) -> PictureInputs:
    """Return what the processor of a folder makes of pictures."""
    found = read_processor(folder)
    return PictureInputs(
        found.family, json.loads(found.image_settings), json.loads(found.processor_settings), image_id
    )
