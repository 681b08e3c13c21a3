"""What a document costs a model, read from its config: so much a token, and attention by its length.

A picture costs its tokens, and the vision tower the patches behind them. The tower is taken to be frozen, as
it is unless asked otherwise: its forward pass is a third of what the same work costs with trained weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from sftdata.errors import UsageError
from sftdata.output import counted
from sftdata.set.manifest import MANIFEST_NAME, read_manifest
from sftdata.set.steps import Cost, stored_steps

_USUAL_WIDTH = 4096
"""Of the model that is assumed where none is named."""
_Fields = dict[str, object]


def read_cost(model: Path | None) -> tuple[Cost, str]:
    """Return what a document costs a model, and say in one sentence how that was found.

    Left out is the output layer, which only trained tokens need.

    Args:
        model: folder of a model, its config.json, or a set made for steps; None for a dense decoder of usual
            proportions.

    Raises:
        UsageError: it cannot be read, or does not say what shape the model has.
    """
    if model is None:
        cost = Cost(token=24 * _USUAL_WIDTH**2, square=2 * _USUAL_WIDTH)  # of a layer: all layers are alike
        return cost, f"Cost of rows: of a decoder {_USUAL_WIDTH:,} wide, as --model names none; {_said(cost)}"
    if (model / MANIFEST_NAME).is_file():
        return _of_set(model)
    whole = _read_config(model)
    fields = whole.get("text_config", whole)
    if not isinstance(fields, dict):
        raise UsageError(f"--model {model}: no config of a model.", "name its config.json.")
    layers = _number(fields, model, "num_hidden_layers", "n_layer")
    far, near = _attention_layers(fields, layers)
    pair = _pair_cost(fields, model)
    cost = Cost(
        token=2 * _weights(fields, model, layers),
        square=far * pair,
        windowed=near * pair,
        window=_given(fields, "sliding_window", "attention_chunk_size") if near else 0,
        picture=_tower(whole),
    )
    kinds = f"{counted(layers, 'layer')}, {far} with full attention" + (
        f", {near} within {cost.window:,} tokens" if near else ""
    )
    if cost.picture is not None:
        kinds += f"; a token of a picture costs {1 + cost.picture.token / cost.token:.2f} of text"
    return cost, f"Cost of rows: of {fields.get('model_type') or model.name}, {kinds}; {_said(cost)}"


def _of_set(folder: Path) -> tuple[Cost, str]:
    """Return the cost that the steps of a set go by.

    Raises:
        UsageError: it has none.
    """
    steps = stored_steps(read_manifest(folder))
    if steps is None:
        what = f"--model {folder}: a set, and not in steps of equal work."
        raise UsageError(what, "name the folder of a model, its config.json, or a set made with --steps-for.")
    return steps.cost, f"Cost of rows: as of the steps of {folder}; {_said(steps.cost)}"


def _said(cost: Cost) -> str:
    if not cost.square:
        return "it grows with the tokens alone."
    return f"full attention over {cost.token // cost.square:,} tokens costs as much as the rest."


def _read_config(model: Path) -> _Fields:
    path = model / "config.json" if model.is_dir() else model
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        what = f"--model {model}: cannot be read: {reason}."
        raise UsageError(what, "name the folder of a model, or its config.json.") from None
    return fields if isinstance(fields, dict) else {"text_config": None}


def _number(fields: _Fields, model: Path, *names: str) -> int:
    """Return the first of these fields that is a number."""
    found = _given(fields, *names)
    if not found:
        what = f"--model {model}: its config has no {names[0]}."
        raise UsageError(what, "name the config.json of a transformer, or leave --model out.")
    return found


def _given(fields: _Fields, *names: str) -> int:
    """Return the first of these fields that is a number above 0; 0 where none is."""
    return next((value for name in names if isinstance(value := fields.get(name), int) and value > 0), 0)


def _attention_layers(fields: _Fields, layers: int) -> tuple[int, int]:
    """Return how many layers attend to the whole document, and how many within a window."""
    kinds = fields.get("layer_types")
    if isinstance(kinds, list):
        far = sum(kind in ("full_attention", "attention") for kind in kinds)
        return far, sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds)
    if not _given(fields, "sliding_window") or fields.get("use_sliding_window") is False:
        return layers, 0
    far = min(_given(fields, "max_window_layers"), layers)  # Qwen2: those above have the window
    return far, layers - far


def _head_sizes(fields: _Fields, model: Path) -> tuple[int, int, int]:
    """Return the number of heads, and the width of their keys and of their values."""
    width, heads = (
        _number(fields, model, "hidden_size", "n_embd"),
        _number(fields, model, "num_attention_heads", "n_head"),
    )
    plain = _given(fields, "head_dim") or max(width // heads, 1)
    if not _given(fields, "kv_lora_rank"):
        return heads, plain, plain
    keys = _given(fields, "qk_nope_head_dim") + _given(fields, "qk_rope_head_dim")
    return heads, keys or plain, _given(fields, "v_head_dim") or plain


def _pair_cost(fields: _Fields, model: Path) -> int:
    """Return what attention costs for each squared token: of n tokens, each sees n / 2."""
    heads, keys, values = _head_sizes(fields, model)
    return heads * (keys + values)


def _weights(fields: _Fields, model: Path, layers: int) -> int:
    """Count the weights of all layers that one token meets."""
    width = _number(fields, model, "hidden_size", "n_embd")
    heads, keys, values = _head_sizes(fields, model)
    shared = _given(fields, "num_key_value_heads") or heads
    attention = width * (heads * (keys + values) + shared * (keys + values))
    if rank := _given(fields, "kv_lora_rank"):
        query = _given(fields, "q_lora_rank")
        attention = (width + heads * keys) * query if query else width * heads * keys
        rope = _given(fields, "qk_rope_head_dim")
        attention += width * (rank + rope) + rank * heads * (keys - rope + values) + heads * values * width
    dense = _given(fields, "intermediate_size", "n_inner") or 4 * width
    chosen, expert = _given(fields, "num_experts_per_tok"), _given(fields, "moe_intermediate_size") or dense
    first = min(_given(fields, "first_k_dense_replace"), layers) if chosen else layers
    experts = chosen * expert + _given(fields, "shared_expert_intermediate_size")
    experts += _given(fields, "n_shared_experts") * expert
    return layers * attention + 3 * width * (first * dense + (layers - first) * experts)


# ------------------------------------------------------------------------------------------ vision towers

_GATED = ("pixtral", "gemma4_vision")  # whose layers have a gate, whatever their activation
_FORWARD_ALONE = 3


def _tower(whole: _Fields) -> Cost | None:
    """Return what a picture costs the vision tower, by its image tokens; None for a model without one."""
    tower = whole.get("vision_config")
    if not isinstance(tower, dict):
        return None
    width = _given(tower, "embed_dim", "hidden_size")  # Qwen2-VL: hidden_size is that of the language model
    layers = _given(tower, "depth", "num_hidden_layers")
    if not width or not layers:
        return None
    inner = _given(tower, "intermediate_size") or _given(tower, "mlp_ratio") * width or 4 * width
    gated = tower.get("hidden_act") == "silu" or tower.get("model_type") in _GATED
    weights = layers * width * (4 * width + (2 + gated) * inner)
    patches, pair = _patches(whole, tower), 4 * width
    full, seen = _seen(tower, layers)
    token = patches * (2 * weights + pair * seen * (layers - full))
    square = round(patches**2 * pair * full)
    return Cost(token=max(round(token) // _FORWARD_ALONE, 1), square=square // _FORWARD_ALONE)


def _patches(whole: _Fields, tower: _Fields) -> float:
    """Return how many patches one image token stands for."""
    for fields in (tower, whole):
        if side := _given(fields, "spatial_merge_size", "scale_factor", "pooling_kernel_size"):
            return side**2
        for name in ("downsample_ratio", "pixel_shuffle_ratio"):
            ratio = fields.get(name)
            if isinstance(ratio, float) and 0 < ratio <= 1:
                return 1 / ratio**2
    count = _given(whole, "mm_tokens_per_image")
    return _tile(tower) / count if count else 1


def _seen(tower: _Fields, layers: int) -> tuple[int, int]:
    """Return how many layers attend over a whole picture, and over how many patches the others do."""
    patch, window = _side(tower, "patch_size") or 14, _given(tower, "window_size")
    if window:
        full = tower.get("fullatt_block_indexes")
        return len(full) if isinstance(full, list | tuple) else 0, (window // patch) ** 2
    if tower.get("model_type") == "pixtral" or not _tile(tower):
        return layers, 0
    return 0, _tile(tower)


def _tile(tower: _Fields) -> int:
    """Return the patches of what a tower sees at a time; 0 where that is the picture."""
    size, patch = _side(tower, "image_size"), _side(tower, "patch_size")
    return (size // patch) ** 2 if size and patch else 0


def _side(fields: _Fields, name: str) -> int:
    """Return a size, or the first of two."""
    value = fields.get(name)
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, int) else 0
