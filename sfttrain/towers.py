"""The parts of a model that see, its vision tower and its projector: frozen, or trained in step on all ranks.

A batch may hold no picture. Then the weights that pictures reach get no gradient, while another rank waits
for it. So where such weights are trained, a forward without pictures looks at a small one, and counts nothing
of it: every rank walks through the same modules in every step, and one rank takes the steps of many.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sftdata.output import counted
from sfttrain.forward import Forward
from sfttrain.process import Say
from sfttrain.tiny_pictures import made_pictures

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.generic import ModelOutput

    from sfttrain.pictures import PictureInputs

FREEZES = {
    "none": (), "vision": ("vision",), "vision+projector": ("vision", "projector"),
}  # fmt: skip
_PROJECTORS = ("multi_modal_projector", "connector", "merger", "deepstack_merger_list", "embed_vision")
_FEATURES = ("pooler_output", "deepstack_features")  # what a language model gets of pictures


def tower_of(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Return the vision tower of a model, with its name."""
    tower = cast(nn.Module, model.get_encoder(modality="image"))
    return next((name, module) for name, module in model.named_modules() if module is tower)


def parts_that_see(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return the names of the modules of `vision` and of `projector`."""
    inside, tower = tower_of(model)
    projector = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in _PROJECTORS]
    if not any(name.startswith(f"{inside}.") for name in projector):
        return {"vision": [inside], "projector": projector}
    beside = [f"{inside}.{name}" for name, _ in tower.named_children()]
    return {"vision": [name for name in beside if name not in projector], "projector": projector}


def frozen_parts(model: PreTrainedModel, freeze: str, adapted: bool) -> list[str]:
    """Return the names of modules that are not trained, and get no adapters.

    Args:
        freeze: a key of `FREEZES`; "auto" is the tower, and under adapters the projector too.
        adapted: adapters are trained on a frozen model.
    """
    chosen = FREEZES.get(freeze, FREEZES["vision+projector" if adapted else "vision"])
    parts = parts_that_see(model)
    return [name for part in chosen for name in parts[part]]


def keep_in_step(model: PreTrainedModel, pictures: PictureInputs, sharded: bool, say: Say) -> None:
    """Let all ranks walk through the same modules, where what pictures reach is trained or sharded.

    Weights of a tower that no picture reaches, such as a last layer whose output is not used, are frozen.

    Args:
        model: with adapters, if any; the model inside it is changed.
        pictures: of the sets.
        sharded: each process holds a part of every weight, and the others wait for it.
    """
    seeing = [name for names in parts_that_see(model).values() for name in names]
    trained = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and any(name.startswith(f"{part}.") for part in seeing)
    }
    if not trained and not sharded:
        return
    with torch.device("cpu"):  # the model may be a mere outline
        made = made_pictures(pictures, 1, 0)
        given = pictures.of_document(made, torch.full((1, made[0].tokens), pictures.image_id))
    look = {name: given[name] for name in pictures.kind.inputs}
    if not next(iter(model.parameters())).is_meta:
        _freeze_unreached(model, look, trained, say)
    _look_without_pictures(model, look)


def _freeze_unreached(
    model: PreTrainedModel, look: Mapping[str, Tensor], trained: Mapping[str, Tensor], say: Say
) -> None:
    reached = set(map(id, _leaves(_features(model, look))))
    left = [name for name, weight in trained.items() if id(weight) not in reached]
    for name in left:
        trained[name].requires_grad_(False)
    if left:
        say(f"frozen: {left[0]} and what else no picture reaches, {counted(len(left), 'weight')}")


def _look_without_pictures(model: PreTrainedModel, look: Mapping[str, Tensor]) -> None:
    inner = cast("PreTrainedModel", model.base_model)
    own_forward: Forward = inner.forward

    def forward(self: PreTrainedModel, **inputs: object) -> ModelOutput:
        outputs = own_forward(**inputs)
        if self.training and inputs.get("pixel_values") is None:
            nothing = 0 * _features(self, look).to(outputs[0])
            outputs["last_hidden_state"] = outputs[0] + nothing
        return outputs

    inner.forward = types.MethodType(forward, inner)


def _features(model: PreTrainedModel, look: Mapping[str, Tensor]) -> Tensor:
    """float32[], the sum of what the language model would get of a picture."""
    given = {name: value.to(model.device) for name, value in look.items()}
    outputs = cast(Any, model).get_image_features(**given)
    found = [part.float().sum() for name in _FEATURES for part in _tensors(getattr(outputs, name, None))]
    return torch.stack(found).sum()


def _tensors(found: object) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    for part in found if isinstance(found, list | tuple) else ():
        yield from _tensors(part)


def _leaves(result: Tensor) -> Iterator[Tensor]:
    """Yield the weights that a result depends on."""
    waiting, seen = [result.grad_fn], set[object]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        weight = getattr(node, "variable", None)
        if weight is not None:
            yield weight
        waiting += [following for following, _ in node.next_functions]
