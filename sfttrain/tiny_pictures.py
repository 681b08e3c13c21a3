"""Pictures of the proof: a tower so small that it is quick, an image processor that fits it, made pictures.

What a tower sees is fixed in two places that have to agree, the config of the model and the settings of the
processor, and each family names it in its own way. A picture becomes a handful of tokens.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sftdata.errors import need
from sftdata.pictures.families import restored
from sfttrain.pictures import PictureInputs, RowPicture

Fields = dict[str, Any]  # of a config, as text of its JSON has them
_SIZES = ((60, 90), (90, 33), (40, 60))  # height and width of made pictures


def shrink_tower(fields: Fields, pictures: PictureInputs, vocabulary: int) -> PictureInputs:
    """Shrink what a model sees, in the JSON of its config; return pictures that fit it.

    Args:
        fields: whose text part is small already; changed in place.
        pictures: of the set.
        vocabulary: of the small model, whose last token stands for pictures.
    """
    image_id = vocabulary - 1
    for name, value in fields.items():
        if isinstance(value, int) and name.endswith(("token_id", "token_index")):
            fields[name] = image_id if name.startswith("image_token") else vocabulary - 2
    vision, text = fields["vision_config"], fields["text_config"]
    if "embed_dim" in vision:
        vision["hidden_size"] = text["hidden_size"]
    if "out_hidden_size" in vision:
        vision["out_hidden_size"] = text["hidden_size"]
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if name in vision:
            vision[name] = [1]
    image, whole = _small_settings(pictures, fields, vision)
    settings = {**pictures.image_settings, **image}, {**pictures.processor_settings, **whole}
    return replace(pictures, image_settings=settings[0], processor_settings=settings[1], image_id=image_id)


def _small_settings(pictures: PictureInputs, fields: Fields, vision: Fields) -> tuple[Fields, Fields]:
    """Return settings of the image processor and of the processor, and bring the config in line."""
    image, patch = pictures.image_settings, vision["patch_size"]
    if pictures.kind.grids:
        side = patch * vision["spatial_merge_size"]
        return {"size": {"shortest_edge": side**2, "longest_edge": 16 * side**2}}, {}
    if pictures.family in ("llava", "llava-next"):
        side = vision["image_size"] = 3 * patch
        size = {"height": side, "width": side}
        more: Fields = {
            "crop_size": size,
            "size": size if "height" in image["size"] else {"shortest_edge": side},
        }
        if pictures.family == "llava-next":
            fields["image_grid_pinpoints"] = more["image_grid_pinpoints"] = [
                [side, 2 * side],
                [2 * side, side],
            ]
        return more, {}
    if pictures.family in ("idefics3", "smolvlm"):
        side = vision["image_size"] = 2 * patch * fields["scale_factor"]
        return {"max_image_size": {"longest_edge": side}, "size": {"longest_edge": 2 * side}}, {
            "image_seq_len": 4
        }
    if pictures.family == "internvl":
        tall, wide = (2 * round(one / fields["downsample_ratio"]) for one in patch)
        vision["image_size"], fields["image_seq_length"] = [tall, wide], 4
        return {"size": {"height": tall, "width": wide}}, {"image_seq_length": 4}
    if pictures.family == "gemma3":
        side, fields["mm_tokens_per_image"] = 8 * patch, 4
        vision["image_size"] = side
        return {"size": {"height": side, "width": side}}, {"image_seq_length": 4}
    return ({"max_soft_tokens": 70}, {}) if pictures.family == "gemma4" else ({}, {})


def made_pictures(pictures: PictureInputs, number: int, seed: int) -> list[RowPicture]:
    """Return pictures of noise, as rows of a set have them.

    Args:
        pictures: whose rule says how many tokens each has.
        number: of pictures.
        seed: of the noise.
    """
    pillow = need("PIL.Image", "vision", "Pictures are read with Pillow")
    rule = restored(pictures.family, pictures.image_settings, pictures.processor_settings)
    noise, found = torch.Generator().manual_seed(seed), []
    for height, width in _SIZES[:number]:
        dots = torch.randint(256, (4, 4, 3), generator=noise, dtype=torch.uint8).numpy()
        sink = io.BytesIO()
        pillow.fromarray(dots).resize((width, height)).save(sink, "PNG")
        data, tokens = sink.getvalue(), sum(rule.layout(height, width).runs)
        digest = hashlib.sha256(data).digest()
        found.append(RowPicture("the proof", "", Path(), data, digest, height, width, tokens))
    return found
