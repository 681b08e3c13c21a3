"""Masks and positions that are right in packed rows too, where those of transformers are not.

Tokens of a picture see each other both ways in Gemma 3 and 4. In local layers transformers looks the picture
of a token up by its position in its document, so that later documents get the pictures of the first one, and
a document of text alone sees its own future. These masks are made where the model runs, from the document and
the picture that each token is in.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from sfttrain.forward import Forward, keep_rotary_apart, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.generic import ModelOutput

    from sfttrain.pictures import PictureInputs

_TAKE_BOOLS = "sdpa"  # begins the names of what takes masks of true and false; eager adds its mask


def keep_apart(model: PreTrainedModel, restart: bool, pictures: PictureInputs | None) -> None:
    """Keep the documents of a row apart where transformers does not.

    Args:
        model: with a head; changed in place.
        restart: rotary factors depend on the longest position.
        pictures: those of the sets; None where they are of text.
    """
    if restart:
        keep_rotary_apart(model)
    if pictures is not None and pictures.kind.types:
        mask_pictures(model, pictures.kind.types)
    if "mrope_section" in (getattr(text_config(model.config), "rope_parameters", None) or {}):
        _repeat_positions(model)


def _repeat_positions(model: PreTrainedModel) -> None:
    """Hand the positions of a text on in four rows: by a single one, mRoPE may mask no documents."""
    inner = cast("PreTrainedModel", model.base_model)
    own_forward: Forward = inner.forward

    def forward(self: PreTrainedModel, position_ids: Tensor | None = None, **inputs: object) -> ModelOutput:
        if position_ids is not None and position_ids.dim() == 2:
            position_ids = position_ids.expand(4, *position_ids.shape)
        return own_forward(position_ids=position_ids, **inputs)

    inner.forward = types.MethodType(forward, inner)


def mask_pictures(model: PreTrainedModel, kinds: str) -> None:
    """Let a model mask packed rows by these masks.

    Args:
        model: with a head; the model inside it is changed.
        kinds: the name of the input that says which tokens are of pictures.

    Raises:
        RuntimeError: in a forward, where the attention takes no such masks.
    """
    inner, text = cast("PreTrainedModel", model.base_model), text_config(model.config)
    own_forward: Forward = inner.forward
    everywhere = not text.model_type.startswith("gemma4")
    if not everywhere and text.use_bidirectional_attention != "vision":
        return  # the small models of Gemma 4 read pictures as text

    def forward(
        self: PreTrainedModel,
        position_ids: Tensor | None = None,
        attention_mask: object = None,
        **inputs: object,
    ) -> ModelOutput:
        seen = inputs.get(kinds)
        if position_ids is not None and attention_mask is None and isinstance(seen, Tensor):
            attention = str(text._attn_implementation)
            if attention != "eager" and not attention.startswith(_TAKE_BOOLS):
                raise RuntimeError(f"{attention} takes no masks of pictures")
            masks = picture_masks(position_ids, seen == 1, text.sliding_window, everywhere)
            dtype = None if attention.startswith(_TAKE_BOOLS) else self.dtype
            attention_mask = {name: _added(mask, dtype) for name, mask in masks.items()}
        return own_forward(position_ids=position_ids, attention_mask=attention_mask, **inputs)

    inner.forward = types.MethodType(forward, inner)


def picture_masks(
    position_ids: Tensor, image: Tensor, window: int, everywhere: bool = True
) -> dict[str, Tensor]:
    """Return bool[B, 1, L, L], what each token sees, in layers that see all and in those that see a window.

    A token sees those before it in its document, and all of its own picture.

    Args:
        position_ids: int64[B, L], that begin again at every document.
        image: bool[B, L], tokens of pictures; between two pictures stands at least one that is of none.
        window: tokens back that a local layer sees, itself included.
        everywhere: layers that see all see pictures both ways too, as Gemma 4's do not.
    """
    document = (position_ids == 0).cumsum(1)
    before = torch.nn.functional.pad(image, (1, 0))[:, :-1] & (position_ids != 0)
    picture = torch.where(image, (image & ~before).cumsum(1), 0)
    place = torch.arange(image.shape[1], device=image.device)
    back = place[:, None] - place
    same = (picture[:, :, None] == picture[:, None]) & image[:, :, None]
    apart, past = document[:, :, None] == document[:, None], back >= 0
    local = apart & (past | same) & (back < window)
    whole = apart & (past | same) if everywhere else apart & past
    return {"full_attention": whole[:, None], "sliding_attention": local[:, None]}


def _added(mask: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a mask as what is added to scores, in a dtype; as it is without one."""
    if dtype is None:
        return mask
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), hidden)
