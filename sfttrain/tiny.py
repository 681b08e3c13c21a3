"""The proof's model: the same class at tiny size, with random weights large enough for a leak to show.

Its config has fewer layers, heads, experts and tokens, but every width of a head as it is. Widths of a head
hang together in ways that only the family knows (rotary parts, sections and factors, low ranks), so they
stay; counts are free as long as groups divide them. Every kind of layer that the model mixes is kept. Lengths
at which a model behaves otherwise (windows, chunks, the original context) become short enough for a short row
to pass them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from sfttrain.attention import attentions, auto_class
from sfttrain.data import Batch
from sfttrain.forward import disable_cache, text_config
from sfttrain.pictures import PictureInputs
from sfttrain.tiny_pictures import shrink_tower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Fields = dict[str, Any]  # of a config, as text of its JSON has them
VOCABULARY = 96
LIMIT = 8  # what a length becomes that rows pass
_HEADS, _INNER_SIZE, _EXPERTS, _GROUPS, _CHOSEN = 4, 128, 8, 2, 2
_ALIGNED, _FAR = 64, 1 << 14  # a length that no short row passes
_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers",
    "encoder_layers", "num_decoder_layers", "num_encoder_layers", "depth",
)  # fmt: skip
_LAYER_NUMBERS = (
    "moe_layers", "mlp_only_layers", "full_attn_idxs", "hybrid_layer_ids", "cross_attention_layers",
)  # fmt: skip
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")  # of another kind than the others
_HEAD_COUNTS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
    "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
    "swa_num_attention_heads",
)  # fmt: skip
_KEY_HEAD_COUNTS = (
    "num_key_value_heads", "num_kv_heads", "kv_n_heads", "num_query_groups", "swa_num_key_value_heads",
)  # fmt: skip
_HEAD_GROUPS = ("n_groups", "mamba_n_groups")
_WIDTHS = (
    "hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "word_embed_proj_dim", "lru_width",
    "attention_hidden_size", "embed_dim", "embedding_size", "input_embedding_size", "output_embedding_size",
)  # fmt: skip
_INNER = (
    "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim",
    "moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size",
    "shared_experts_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp",
    "shared_intermediate_size", "moe_shared_expert_intermediate_size", "dff", "dim_ff", "d_inner",
    "feed_forward_size",
)  # fmt: skip
_EXPERT_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num",
)  # fmt: skip
_EXPERT_GROUPS = ("n_group", "num_expert_group", "topk_group")
_CHOSEN_EXPERTS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts",
    "topk_group",
)  # fmt: skip
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size")
_LENGTHS = (
    "sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "floor_scale",
    "window_size", "log_scaling_n_floor", "local_attention", "keep_window_size", "index_topk",
    "original_max_position_embeddings",
)  # fmt: skip
_STATE_WEIGHTS = ("A_log", "dt_", "time_", "decay")  # their scale is what makes the recurrence stable
_MOST_WEIGHTS = 400_000_000


def smallest_that_runs(
    config: PreTrainedConfig, trusted: bool, reach: int | None, pictures: PictureInputs | None = None
) -> PreTrainedConfig:
    """Return the config of the smallest model of this architecture that takes a row.

    Args:
        pictures: those of the set; None for one of text.

    Raises:
        Exception: whatever the family raises on the smallest, where none does.
    """
    failure: Exception | None = None
    for small in shrunk(config, reach, pictures):
        try:
            with torch.device("meta"):
                empty = tiny_model(small, "eager", trusted, pictures is not None, fill=False)
                weights = sum(weight.numel() for weight in empty.parameters())
            if weights > _MOST_WEIGHTS:
                raise ValueError(f"its smallest model has {weights:,} weights")
            with torch.no_grad():
                tiny_model(small, "eager", trusted, pictures is not None)(input_ids=torch.arange(3, 36)[None])
        except Exception as error:  # whatever a family raises where heads are too few for it
            failure = failure or error
            continue
        return small
    assert failure is not None
    raise failure


def tiny_model(
    small: PreTrainedConfig, attention: str, trusted: bool, pictured: bool = False, fill: bool = True
) -> PreTrainedModel:
    """Make a model of a small config; the same weights each time, whatever the attention."""
    own = copy.deepcopy(small)
    with fixed_seed():
        model: PreTrainedModel = auto_class(own, pictured).from_config(
            own,
            attn_implementation=attentions(attention, own, pictured),
            dtype=torch.float32,
            trust_remote_code=trusted,
        )
    disable_cache(model)
    if fill:
        _fill(model)
    model.eval()
    return model


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Draw weights so large that all parts of a layer matter, and none that begin at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() < 2 or any(mark in name for mark in _STATE_WEIGHTS):
            weight.add_(noise, alpha=0.1)
        else:
            weight.copy_(noise * (1.2 / weight.shape[-1] ** 0.5))
    for module in model.modules():  # Gemma 3n and 4 learn in their norms what others divide scores by
        learnt = getattr(getattr(module, "q_norm", None), "weight", None)
        if learnt is not None and getattr(module, "scaling", None) == 1.0:
            learnt.mul_(learnt.numel() ** -0.5)


def unreached(model: PreTrainedModel, batch: Batch) -> tuple[str, ...]:
    """Return names of the largest modules outside the language model that get no gradient from text."""
    decoder = model.get_decoder()
    with torch.enable_grad():
        model(**batch).loss.backward()
    names: list[str] = []
    for name, module in model.named_modules():
        weights = list(module.parameters())
        inside = any(part is decoder for part in module.modules()) or any(
            name.startswith(f"{one}.") for one in names
        )
        if (
            name
            and weights
            and not inside
            and all(weight.grad is None for weight in weights)
            and not _within(decoder, module)
        ):
            names.append(name)
    model.zero_grad(set_to_none=True)
    return tuple(names)


def _within(decoder: nn.Module, module: nn.Module) -> bool:
    return any(part is module for part in decoder.modules())


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Leave the random state of the run as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Let float32 be float32, whatever the run allows its matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def shrunk(
    config: PreTrainedConfig, reach: int | None = None, pictures: PictureInputs | None = None
) -> Iterator[PreTrainedConfig]:
    """Yield copies of a config at tiny size, the smallest first; a family may work only at a larger one.

    Args:
        config: of a causal language model, or of a model with one inside.
        reach: the longest row; lengths of the config from it on do not matter. None: any row may come.
        pictures: those of the set; None for one of text.
    """
    for heads in (_HEADS, None):
        yield _rebuilt(config, heads, reach, pictures)


def _rebuilt(
    config: PreTrainedConfig, heads: int | None, reach: int | None, pictures: PictureInputs | None
) -> PreTrainedConfig:
    """Shrink the text part's fields and rebuild the config, since some fields are computed from others."""
    text = text_config(config)
    fields = copy.deepcopy(config.to_dict())
    if text is config:
        _shrink_text(fields, text, heads, reach)
    else:
        for name, part in fields.items():
            if not isinstance(part, dict):
                continue
            if getattr(config, name, None) is text:
                _shrink_text(part, text, heads, reach)
            else:
                _shrink_tower(part, heads if pictures else None)
    if pictures is not None:
        shrink_tower(fields, pictures, VOCABULARY)
    return type(config).from_dict(fields)


def _shrink_tower(fields: Fields, heads: int | None) -> None:
    """Keep the weights of a tower few; where pictures come to it, its work too."""
    _cap(fields, _LAYERS, 1 if heads is None else 2)
    if heads is not None:
        _shrink_heads(fields, heads)
        _cap(fields, _INNER, _INNER_SIZE)


def _shrink_text(fields: Fields, text: PreTrainedConfig, heads: int | None, reach: int | None) -> None:
    _keep_kinds_of_layers(fields, text)
    if heads is not None:
        _shrink_heads(fields, heads)
    _cap(fields, _INNER, _INNER_SIZE)
    _cap(fields, _EXPERT_COUNTS, _EXPERTS)
    _cap(fields, _EXPERT_GROUPS, _GROUPS)
    _cap(fields, _CHOSEN_EXPERTS, _CHOSEN)
    _cap(fields, _VOCABULARIES, VOCABULARY)
    _shorten(fields, reach)
    for name, value in fields.items():
        if name.endswith("token_id") and value is not None:
            fields[name] = 0
        elif name.endswith(("dropout", "_pdrop", "dropout_rate", "dropout_prob", "layerdrop")) and isinstance(
            value, float
        ):
            fields[name] = 0.0
        elif isinstance(value, dict) and name in ("attn_config", "ffn_config"):
            _shrink_part(value, heads)


def _shrink_part(fields: Fields, heads: int | None) -> None:
    _cap(fields, (*_INNER, "ffn_hidden_size"), _INNER_SIZE)
    _cap(fields, _EXPERT_COUNTS, _EXPERTS)
    _cap(fields, _CHOSEN_EXPERTS, _CHOSEN)
    if heads is not None:
        _cap(fields, _KEY_HEAD_COUNTS, heads // 2)


def _cap(fields: Fields, names: tuple[str, ...], most: int) -> None:
    for name in names:
        value = fields.get(name)
        if _is_count(value):
            fields[name] = min(value, most)
        elif isinstance(value, list) and all(map(_is_count, value)):
            fields[name] = [min(one, most) for one in value]


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shrink_heads(fields: Fields, most: int) -> None:
    """Divide heads and the widths that are made of heads by the same number."""
    count = next(
        (fields[name] for name in _HEAD_COUNTS if _is_count(fields.get(name)) and fields[name]), None
    )
    if count is None:
        return
    most = max(most, *(fields.get(name) or 1 for name in _HEAD_GROUPS))
    divisor = next(divisor for divisor in range(max(1, count // most), count + 1) if count % divisor == 0)
    for name in (*_HEAD_COUNTS, *_WIDTHS):
        if _is_count(fields.get(name)) and fields[name]:
            fields[name] = max(1, fields[name] // divisor)
    if (
        _is_count(fields.get("head_dim"))
        and _is_count(fields.get("hidden_size"))
        and "n_groups" not in fields
    ):
        # Grouped matrix products need aligned rows.
        fields["hidden_size"] = -(-fields["hidden_size"] // _ALIGNED) * _ALIGNED
    left = count // divisor
    _shrink_key_heads(fields, count, left)
    for part in (fields.get("per_layer_config") or {}).values():
        _shrink_key_heads(part, count, left)
        _cap(part, _HEAD_COUNTS, left)
    if fields.get("num_attention_heads_per_layer"):
        fields["num_attention_heads_per_layer"] = [left] * len(fields["num_attention_heads_per_layer"])
    if (
        _is_count(fields.get("mamba_n_heads"))
        and _is_count(fields.get("mamba_expand"))
        and "mamba_d_ssm" not in fields
    ):
        fields["mamba_n_heads"] = fields["mamba_expand"] * fields["hidden_size"] // fields["mamba_d_head"]


def _shrink_key_heads(fields: Fields, heads: int, left: int) -> None:
    for name in _KEY_HEAD_COUNTS:
        if _is_count(fields.get(name)):
            fields[name] = _key_heads(fields[name], heads, left)


def _key_heads(now: int, heads: int, left: int) -> int:
    """Keep one, some or all of the heads."""
    if now == heads:
        return left
    return 1 if now == 1 else max(1, left // 2)


def _keep_kinds_of_layers(fields: Fields, text: PreTrainedConfig) -> None:
    """Take layers from the bottom until every kind has come up."""
    total: int = getattr(text, "num_hidden_layers", 2)
    listed = [name for name, value in fields.items() if isinstance(value, list) and len(value) == total > 1]
    _cap(fields, _FIRST_LAYERS, 1)
    layers = _layers_to_see_all(fields, text, listed, total)
    times = 1
    if fields.get("num_kv_shared_layers"):  # the upper layers use keys and values of the lower ones
        fields["num_kv_shared_layers"], times = layers, 2
    for name in listed:
        fields[name] = fields[name][:layers] * times
    layers *= times
    _cap(fields, _LAYERS, layers)
    for name in _LAYER_NUMBERS:
        if isinstance(fields.get(name), list):
            fields[name] = [number for number in fields[name] if number < layers]
    if isinstance(fields.get("per_layer_config"), dict):
        fields["per_layer_config"] = {
            key: part for key, part in fields["per_layer_config"].items() if int(key) < layers
        }


def _layers_to_see_all(fields: Fields, text: PreTrainedConfig, listed: list[str], total: int) -> int:
    kinds = [
        fields[name] for name in listed if all(isinstance(one, str | int | bool) for one in fields[name])
    ]
    computed = getattr(text, "layers_block_type", None)
    if isinstance(computed, list):  # in some families it is no field
        kinds.append(computed)
    firsts: list[int] = [
        value.index(kind) + 1 for value in kinds for kind in set(value) if len(set(value)) < total
    ]
    return max([min(2, total), *firsts])


def _shorten(fields: Fields, reach: int | None) -> None:
    """Bring lengths that rows pass within a short row, and put the others beyond it."""
    _set_lengths(fields, _LENGTHS, reach)
    rope = fields.get("rope_parameters")
    for part in (rope, *(rope.values() if isinstance(rope, dict) else ())):
        if isinstance(part, dict):
            _set_lengths(part, ("original_max_position_embeddings",), reach)
            if part.get("rope_type") == "dynamic":
                _set_lengths(fields, ("max_position_embeddings",), reach)


def _set_lengths(fields: Fields, names: tuple[str, ...], reach: int | None) -> None:
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and value > 0 and not isinstance(value, bool):
            fields[name] = min(value, LIMIT) if reach is None or value < reach else max(value, _FAR)
