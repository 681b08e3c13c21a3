"""Cross entropy on supervised positions only, a chunk of positions at a time: full logits never exist.

hidden states ── supervised positions ── chunk ── head ── loss and gradient ── sum / num_items_in_batch
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from sftdata.batches import IGNORE_INDEX
from sfttrain.device import room
from sfttrain.forward import Forward, hidden_and_terms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of logits alive at once, less where little memory is free; products of few rows are slow. On a GPU the peak
# of a step is the end of the backward pass, when all gradients are there, so the loss may take what they will
# need. In GB, for a 0.5B model with Adam in fp32 (V = 151,936, D = 896, 24 layers, 16,384 tokens, activation
# checkpoints), in all 8.8 each time, and 9.0 as measured:
#   at the loss: weights, moments 5.9, layer inputs 1.4, head gradient 0.5, bf16 head 0.3, chunk 0.5, rows 0.2
#   at the end:  weights, moments, gradients 7.9, what the backward pass of one layer holds 0.9
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}


@dataclass(frozen=True, slots=True)
class Head:
    """What lies between the last hidden state and the logits: `cap * tanh(scale * (W h + b) / cap)`."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """What training minimises; evaluation always reports the plain negative log likelihood.

    Attributes:
        dft: weigh each token's loss by the probability the model gives it, as a constant (dynamic
            fine-tuning).
        smoothing: share of the target spread evenly over the vocabulary.

    Source: Wu et al. 2025, "On the Generalization of SFT", https://arxiv.org/abs/2508.05629.
    """

    dft: bool = False
    smoothing: float = 0.0


PLAIN = Objective()
CrossEntropy: TypeAlias = "Callable[..., tuple[Tensor, Tensor, Tensor]]"


class Targets(NamedTuple):
    """What each position predicts: int64[N] ids, and float32[N] weights of their losses; None for 1 each."""

    ids: Tensor
    weights: Tensor | None = None

    def at(self, rows: slice) -> Targets:
        """Return a stretch of the positions."""
        return Targets(self.ids[rows], None if self.weights is None else self.weights[rows])


@dataclass
class LossOutput(ModelOutput):
    """Loss of a batch, without logits.

    Attributes:
        loss: float32[], weighted sum over supervised positions divided by `num_items_in_batch`, the sum of
            the weights.
        correct: int64[], supervised positions whose most likely token is the label.
        supervised: int64[], supervised positions.
        token_losses: float32[N], negative log likelihood of each supervised position; None where the engine
            has none.
    """

    loss: Tensor | None = None
    correct: Tensor | None = None
    supervised: Tensor | None = None
    token_losses: Tensor | None = None


class Way(NamedTuple):
    """How it is computed: in which dtype, and whether the arithmetic between the products is compiled."""

    dtype: torch.dtype
    compiled: bool = False


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of token losses; gradients are computed with the loss, while a chunk's logits still exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets, head: Head,
        objective: Objective, way: Way,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (dtype, compiled), (want_hidden, want_weight, want_bias) = way, ctx.needs_input_grad[:3]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        count = len(targets.ids)
        token_losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        # Summed in fp32 even under bf16: one rounding at the end instead of one a chunk.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        grad_bias = torch.zeros_like(cast(Tensor, bias), dtype=torch.float32) if want_bias else None
        want_slope = want_hidden or want_weight or want_bias
        weight_cast = weight.to(dtype)
        chunk_of = _compiled_chunk() if compiled else _chunk
        width, beside = dtype.itemsize if compiled else 4, 0 if grad_weight is None else grad_weight.nbytes
        step = chunk_rows(hidden.device.type, weight.shape[0], count, width, beside)
        # Reused for every chunk: allocating costs more than the arithmetic.
        buffer = torch.empty(step, weight.shape[0], dtype=dtype, device=hidden.device)
        for start in range(0, count, max(step, 1)):
            rows = slice(start, start + step)
            inputs = hidden[rows].to(dtype)
            product = torch.mm(inputs, weight_cast.T, out=buffer[: len(inputs)])
            aims = targets.at(rows)
            if compiled:  # the number of positions changes from batch to batch
                for part in filter(torch.is_tensor, (product, *aims)):
                    torch._dynamo.maybe_mark_dynamic(part, 0)
            chunk = chunk_of(product, bias, aims, head.scale, head.softcap, objective, want_slope)
            loss += chunk.loss
            correct += chunk.correct
            token_losses[rows] = chunk.token_losses
            if chunk.slope is None:
                continue
            slope = chunk.slope
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight_cast
            if grad_weight is not None:
                _add_product(grad_weight, slope, inputs)
            if grad_bias is not None:
                grad_bias += slope.sum(0, dtype=torch.float32)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        ctx.mark_non_differentiable(correct, token_losses)
        return loss, correct, token_losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        scaled = [
            None if gradient is None else gradient.mul_(grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return (*scaled, None, None, None, None)


def chunk_rows(device: str, vocabulary: int, positions: int, width: int = 4, beside: int = 0) -> int:
    """Return how many positions share a chunk of logits; chunks are about equally large.

    Args:
        width: bytes of a logit.
        beside: bytes of the gradient of the head, which every chunk is added to.
    """
    most = max(1, _chunk_bytes(device, beside) // (width * vocabulary))
    chunks = max(1, -(-positions // most))
    return -(-positions // chunks)


def _chunk_bytes(device: str, beside: int) -> int:
    """Return what a chunk may take: a quarter of the free memory, a power of two so that steps are alike.

    As much as the gradient of the head costs no peak: the embeddings' comes at the end, when no chunk is
    there.
    """
    most = CHUNK_BYTES.get(device, 64 << 20)
    if device != "cuda":
        return most
    free = room() - torch.cuda.memory_allocated()
    return min(max(most, beside), max(most >> 4, 1 << max(0, (free // 4).bit_length() - 1)))


class _Chunk(NamedTuple):
    """loss float32[], correct int64[], token_losses float32[N], slope d loss / d (W h + b) float32[N, V]."""

    loss: Tensor
    correct: Tensor
    token_losses: Tensor
    slope: Tensor | None


def _chunk(
    product: Tensor, bias: Tensor | None, targets: Targets, scale: float, softcap: float | None,
    objective: Objective, want_slope: bool,
) -> _Chunk:  # fmt: skip
    """Compute one chunk from `W h`, [N, V], in whose place the slope is written; in float32 in between."""
    logits = product.float()
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    damping = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        damping = 1 - logits**2 if want_slope else None
        logits *= softcap
    at_target = logits.gather(1, targets.ids[:, None])
    mean = logits.mean(1, keepdim=True) if objective.smoothing else at_target
    top = logits.amax(1, keepdim=True)
    weights = logits.sub_(top).exp_()
    total = weights.sum(1, keepdim=True)
    log_total = total.log() + top
    token_losses = log_total - at_target
    losses = log_total - (1 - objective.smoothing) * at_target - objective.smoothing * mean
    share = token_losses.neg().exp() if objective.dft else None
    if targets.weights is not None:
        share = targets.weights[:, None] if share is None else share * targets.weights[:, None]
    loss = (losses if share is None else losses * share).sum()
    correct = (at_target >= top).sum()
    if not want_slope:
        return _Chunk(loss, correct, token_losses[:, 0], None)
    slope = _less_at(weights.div_(total), targets.ids, 1 - objective.smoothing)
    if objective.smoothing:
        slope -= objective.smoothing / logits.shape[1]
    for factor in (share, damping):
        if factor is not None:
            slope *= factor
    if scale != 1.0:
        slope *= scale
    return _Chunk(loss, correct, token_losses[:, 0], product.copy_(slope))


def _less_at(slope: Tensor, ids: Tensor, amount: float) -> Tensor:
    """Subtract an amount at one column of each row; compiled without indices, which would not fuse."""
    if torch.compiler.is_compiling():
        columns = torch.arange(slope.shape[1], device=slope.device)
        return torch.where(columns == ids[:, None], slope - amount, slope)
    slope[torch.arange(len(slope), device=slope.device), ids] -= amount
    return slope


@lru_cache(maxsize=1)
def _compiled_chunk() -> Callable[..., _Chunk]:
    """Compile the arithmetic of a chunk: logits are read three times and written once, instead of a dozen."""
    return torch.compile(_chunk)


def _add_product(total: Tensor, slope: Tensor, inputs: Tensor) -> None:
    """Add `slope.T @ inputs` to a float32 total."""
    if slope.dtype == torch.float32:
        total.addmm_(slope.T, inputs)
    elif _adds_in_float32(slope.device.type, slope.dtype):
        torch.addmm(total, slope.T, inputs, out_dtype=torch.float32, out=total)
    else:
        total += slope.T @ inputs


@lru_cache(maxsize=4)
def _adds_in_float32(device: str, dtype: torch.dtype) -> bool:
    """Say whether a product of 16-bit matrices can be added to a float32 one where it lies."""
    total, one = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, one.T, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17).all())


def head_of(model: PreTrainedModel) -> Head:
    """Describe the output head of a causal language model.

    Scales and caps are known by the names that transformers' own configs give them; preflight proves the
    description against the model's own loss, so an unknown one cannot pass unseen.
    """
    module = model.get_output_embeddings()
    bias = getattr(module, "bias", None)
    if bias is None:  # an adapter around the head shows its weight, merged, but not always its bias
        bias = getattr(getattr(module, "original_module", None), "bias", None)
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    return Head(module.weight, bias, scale, getattr(config, "final_logit_softcapping", None))


def supervised_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    engine: str = "chunked",
    objective: Objective = PLAIN,
    loss_weights: Tensor | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (summed loss float32[], correct int64[], supervised int64[], token losses float32[N] or None).

    Args:
        hidden: float[B, L, D], last hidden states.
        labels: int64[B, L], unshifted: position i is trained to predict label i + 1; one more where the row
            goes on elsewhere.
        engine: "chunked", or "torch" for `torch.nn.functional.linear_cross_entropy` (which reports no
            accuracy: -1).
        objective: what is minimised; the losses of single tokens stay the plain ones.
        loss_weights: float32[B, L], what the loss of each label weighs in the sum; None for 1 each.
        compiled: compile the arithmetic of a chunk, which costs seconds once.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORE_INDEX
    rows, targets = hidden[:, : targets.shape[1]][chosen], targets[chosen]
    supervised = torch.tensor(len(targets), device=hidden.device)
    dtype = (
        torch.get_autocast_dtype(hidden.device.type)
        if torch.is_autocast_enabled(hidden.device.type)
        else head.weight.dtype
    )
    plain = head.scale == 1.0 and head.softcap is None and objective == PLAIN and loss_weights is None
    if engine == "torch" and len(targets) and plain and torch.is_grad_enabled():
        options = nn.LinearCrossEntropyOptions()
        bias = None if head.bias is None else head.bias.to(dtype)
        loss = nn.functional.linear_cross_entropy(
            rows.to(dtype), head.weight.to(dtype), targets, linear_bias=bias, reduction="sum", options=options
        )
        return loss.float(), torch.tensor(-1, device=hidden.device), supervised, None
    cross_entropy = cast("CrossEntropy", _ChunkedCrossEntropy.apply)
    inputs = (rows, head.weight, head.bias)
    if not torch.is_grad_enabled():  # inside the function this can no longer be asked
        inputs = (rows.detach(), head.weight.detach(), None if head.bias is None else head.bias.detach())
    weights = None if loss_weights is None else loss_weights[:, 1:][chosen]
    way = Way(dtype, compiled)
    loss, correct, token_losses = cross_entropy(*inputs, Targets(targets, weights), head, objective, way)
    return loss, correct, supervised, token_losses


def items_of(labels: Tensor, loss_weights: Tensor | None) -> Tensor:
    """Return the divisor of a batch's losses, float64[]: the sum of their weights, or their count."""
    trained = labels[:, 1:] != IGNORE_INDEX
    if loss_weights is None:
        return trained.sum().double()
    return loss_weights[:, 1:][trained].double().sum()


def fuse_loss(
    model: PreTrainedModel, engine: str = "chunked", objective: Objective = PLAIN, terms: bool = False
) -> None:
    """Let `model(labels=..., skip_logits=True)` return a `LossOutput`; other calls are unchanged.

    The loss stays inside `forward`, where DDP and FSDP expect every use of a parameter.

    Args:
        terms: the model adds terms of its own to the cross entropy, such as a router loss, which training
            keeps; a call says by `term_share` how much of them counts.
    """
    own_forward: Forward = model.forward

    def forward(
        self: PreTrainedModel, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool = False, loss_weights: Tensor | None = None, term_share: float | Tensor = 1.0,
        **inputs: object,
    ) -> ModelOutput:  # fmt: skip
        if labels is None or not skip_logits:
            extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            return own_forward(labels=labels, **extra, **inputs)
        own_terms = None
        if terms and self.training:
            hidden, own_terms = hidden_and_terms(self, own_forward, labels, inputs)
        else:
            hidden = self.base_model(**inputs)[0]
        aim = objective if self.training else PLAIN
        loss, correct, supervised, token_losses = supervised_loss(
            hidden,
            labels,
            head_of(self),
            engine,
            aim,
            loss_weights,
            self.training and bool(self.compiles_loss),
        )
        items = num_items_in_batch
        if items is None:
            items = supervised if loss_weights is None else items_of(labels, loss_weights)
        items = torch.as_tensor(items, device=loss.device)
        mean = loss / torch.where(items > 0, items, 1).to(loss.dtype)
        if own_terms is not None:
            mean = mean + own_terms.to(mean) * term_share
        return LossOutput(mean, correct, supervised, token_losses)

    model.forward = types.MethodType(forward, model)
    model.compiles_loss = False  # type: ignore[assignment]  # `compiling.speed_up` decides
    model.accepts_loss_kwargs = True  # type: ignore[assignment]  # so num_items_in_batch is given
