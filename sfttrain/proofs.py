"""Prove, on the user's architecture at tiny size, packing's isolation and the chunked loss's exactness.

The proof runs the same model class on the same device, with random weights large enough for a leak to show.
Documents lie on both sides of every length at which the model changes. In float32 a packed row must give
every document the logits that the plain model gives it alone, and a change in one document must leave the
others untouched; kernels that compute in 16 bit only have a stand-in there. Then the attention asked for runs
in the dtype of training, forward and backward, and must be as near to the float32 logits as plain attention
is in that dtype.

The same model, versions and device are proven once. A file of the user's cache holds one proof; its name is
a hash of the model's config, of the versions of the packages and of this one's source, of the device and of
what was asked. A damaged file is no proof, and a folder that cannot be written keeps none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeVar, cast

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from sftdata.batches import IGNORE_INDEX
from sfttrain.attention import FLATTENED, FORCED, STAND_IN
from sfttrain.data import Batch, Collator, Row
from sfttrain.forward import depends_on_row_length, text_config
from sfttrain.loss import fuse_loss
from sfttrain.masks import keep_apart
from sfttrain.pictures import PictureInputs, RowPicture
from sfttrain.tiny import VOCABULARY, fixed_seed, full_float32, smallest_that_runs, tiny_model, unreached
from sfttrain.tiny_pictures import made_pictures, shrink_tower
from sfttrain.towers import tower_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FOLDER = "SFTTRAIN_CACHE"  # environment variable: where proofs are kept; empty: none are
# Whatever computes a step. Their releases change kernels and modelling code.
_PACKAGES = (
    "torch", "transformers", "triton", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4",
    "kernels", "causal-conv1d", "mamba-ssm", "flash-linear-attention",
)  # fmt: skip
_NAMES = ("_name_or_path", "name_or_path", "transformers_version")  # fields of a config that compute nothing
T = TypeVar("T")
Rows: TypeAlias = "list[list[Document]]"
# Documents of two rows, around `tiny.LIMIT`; the second row ends in padding.
_LENGTHS = ((11, 7, 14), (5, 13))
_PICTURES = ((1, 0, 2), (0, 1))  # in each of them, in a set with pictures
# Of the spread of the logits, in float32: what is exact stays below 4e-5, what leaks is above 1e-3.
DIFFERENCE = 2e-4
_TEXT = VOCABULARY - 4  # the last tokens stand for pictures, in a set that has some
_ANOTHER = 99  # seed of the pictures that take the place of others
_TOLERANCE = 2e-5  # of what is computed in the same shapes, where rounding is the same too, and of losses
_ROUNDING = 3.0  # how much more than plain attention a kernel may round, in the median over positions


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where and with what a run trains.

    Attributes:
        device: device type, "cuda" or "cpu".
        compute: dtype of the matrix products.
        rows: rows of the largest batch on one device.
        reach: the longest row, None where only the data knows.
        pictures: those of the sets; None where they are of text.
    """

    device: str
    compute: torch.dtype
    rows: int = 2
    reach: int | None = None
    pictures: PictureInputs | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A document of the proof: int64[L] ids, and its pictures."""

    ids: Tensor
    pictures: Sequence[RowPicture] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Proof:
    """What the tiny model showed. Differences of logits are parts of their spread.

    Attributes:
        difference: largest |packed - alone| over the logits of every document, in float32.
        leak: largest change of a document's logits when the documents before it change, in float32.
        padded: largest |padded - alone| when each document has a row and shorter ones are padded, in float32.
        loss_difference: |chunked loss - the model's own loss|, relative; None where the loss could not be
            taken apart.
        rounding: error of the kernel in the compute dtype, in errors of plain attention; None where float32
            is the dtype.
        terms: whether the model's own loss has terms beside the cross entropy.
        causal: whether no token sees those behind it.
        boundaries: whether batches hold `seq_idx` and cumulative lengths.
        unreached: names of modules outside the language model that text gives no gradient.
        tolerance: what rounding allows of a leak and of losses.
    """

    difference: float
    leak: float
    loss_difference: float | None
    padded: float = 0.0
    rounding: float | None = None
    terms: bool = False
    causal: bool = True
    boundaries: bool = True
    unreached: tuple[str, ...] = ()
    tolerance: float = field(default=_TOLERANCE)

    @property
    def apart(self) -> bool:
        """Whether packed documents stay apart in float32."""
        return self.difference <= DIFFERENCE and self.leak <= self.tolerance

    @property
    def isolated(self) -> bool:
        """Whether they also do in the kernels and the dtype of training."""
        return self.apart and (self.rounding is None or self.rounding <= _ROUNDING)

    @property
    def pads(self) -> bool:
        """Whether rows of several lengths may share a batch, each with one document."""
        return self.padded <= DIFFERENCE

    @property
    def fuses(self) -> bool:
        """Whether the chunked loss is this model's loss."""
        return self.loss_difference is not None and self.loss_difference <= self.tolerance


def prove(
    config: PreTrainedConfig, attention: str, where: Surroundings, trusted: bool = False, packed: bool = True
) -> Proof:
    """Build the architecture at tiny size and try it.

    Args:
        config: transformers config of the model to be trained.
        attention: implementation to try.
        trusted: whether code from the model's repository may run.
        packed: several documents share a row; otherwise only rows of one document and the loss are tried.

    Raises:
        Exception: whatever the family raises where it cannot be made, or cannot take the batch.
    """
    flatten = attention in FLATTENED
    exact = STAND_IN if flatten else attention
    if attention in FORCED and where.compute != torch.float32:
        exact = "sdpa"  # the kernel may know 16 bit only
    with fixed_seed(), full_float32():
        trial = _Trial(config, where, trusted)
        proof = trial.in_float32(exact, flatten, packed)
        if where.compute != torch.float32 and (proof.isolated or not packed):
            collate = trial.collator(flatten, proof.boundaries)
            proof = replace(proof, rounding=trial.in_compute_dtype(attention, collate, packed))
    return proof


class _Trial:
    """The tiny model, documents for it, and the logits that it gives each of them alone."""

    def __init__(self, config: PreTrainedConfig, where: Surroundings, trusted: bool) -> None:
        self._device, self._compute, self._trusted = where.device, where.compute, trusted
        self._apart = depends_on_row_length(config, where.reach)
        self._config = smallest_that_runs(config, trusted, where.reach, where.pictures)
        self._pictures = where.pictures and shrink_tower(config.to_dict(), where.pictures, VOCABULARY)
        self._composite = text_config(config) is not config
        self._plain = self._model("eager")
        self._rows = [
            [self._document(*shape, seed) for seed, shape in enumerate(zip(*row, strict=True))]
            for row in list(zip(_LENGTHS, _PICTURES, strict=True))[: where.rows]
        ]
        with torch.no_grad():
            self._alone = self._each_alone(self._plain)
        self._spread = float(torch.cat([logits.flatten() for logits in self._alone]).std())

    def _document(self, length: int, count: int, seed: int) -> Document:
        """Draw a document of so much text, and in a set with pictures so many of them in it."""
        if self._pictures is None:
            return Document(torch.randint(3, VOCABULARY, (length,)))
        made = made_pictures(self._pictures, count, seed)
        parts = list(torch.randint(3, _TEXT, (length,)).tensor_split(count + 1))
        for place, picture in enumerate(made):
            parts.insert(2 * place + 1, torch.full((picture.tokens,), self._pictures.image_id))
        return Document(torch.cat(parts), made)

    def _another(self, document: Document) -> Document:
        """Draw another document of the same shape."""
        if self._pictures is None:
            return Document(torch.randint(3, VOCABULARY, document.ids.shape))
        text = torch.randint(3, _TEXT, document.ids.shape)
        ids = torch.where(document.ids == self._pictures.image_id, document.ids, text)
        return Document(ids, made_pictures(self._pictures, len(document.pictures), _ANOTHER))

    def collator(self, flatten: bool, boundaries: bool) -> Collator:
        """Return what makes batches as training does."""
        return Collator(flatten, boundaries, self._apart, self._pictures)

    def in_float32(self, attention: str, flatten: bool, packed: bool) -> Proof:
        """Try all that does not depend on rounding."""
        model = self._plain if attention == "eager" else self._model(attention)
        with torch.no_grad():
            padded = 0.0 if flatten else self._padded(model)
        proof = Proof(0.0, 0.0, None, padded, causal=self._causal(), boundaries=False)
        if packed:
            proof = self._packed(proof, model, flatten, self._rows)
        collate = self.collator(flatten, proof.boundaries)
        with torch.no_grad():
            proof = self._losses(proof, model, collate, self._rows if packed else self._singles())
        if not self._composite:
            return proof
        names = unreached(model, self._batch(collate, self._singles()[:1]))
        if self._pictures is not None:  # the model itself shows what a tower reaches: it has more layers
            inside, _ = tower_of(model)
            names = tuple(name for name in names if not f"{name}.".startswith(f"{inside}."))
        return replace(proof, unreached=names)

    def _padded(self, model: PreTrainedModel) -> float:
        """Give each document a row: all rows in a batch, or a batch for each where training has no others."""
        collate, alone = self.collator(False, False), self._singles()
        if len(self._rows) > 1:
            return self._difference(model, collate, alone)
        return max(self._difference(model, collate, [row], first) for first, row in enumerate(alone))

    def _packed(self, proof: Proof, model: PreTrainedModel, flatten: bool, rows: Rows) -> Proof:
        """Try with boundaries in the batch, then without: some models take none, or lack a package."""
        changed = [[self._another(row[0]), *row[1:]] for row in rows]
        best, failure = None, None
        for boundaries in (True, False):
            collate = self.collator(flatten, boundaries)
            try:
                with torch.no_grad():
                    difference = self._difference(model, collate, rows)
                    before, after = self._logits(model, collate, rows), self._logits(model, collate, changed)
            except (TypeError, ValueError, RuntimeError) as error:
                failure = failure or error
                continue
            moved = [
                (new - old).abs().max()
                for new, old in zip(_behind(after, rows), _behind(before, rows), strict=True)
            ]
            tried = replace(
                proof, difference=difference, leak=float(max(moved)) / self._spread, boundaries=boundaries
            )
            if tried.isolated:
                return tried
            best = best or tried
        if best is None and failure is not None:
            raise failure
        return cast(Proof, best)

    def in_compute_dtype(self, attention: str, collate: Collator, packed: bool) -> float:
        """Return the error of an attention, in errors of plain attention; both in the dtype of training."""
        model = self._plain if attention == "eager" else self._model(attention)
        rows = self._rows if packed else self._singles()
        changed = [[self._another(row[0]), *row[1:]] for row in rows]
        with torch.autocast(self._device, dtype=self._compute), torch.no_grad():
            usual = self._errors(self._each_alone(self._plain), self._alone)
            logits = self._logits(model, collate, rows)
            noise = self._errors(self._logits(model, collate, rows), logits)
            moved = (
                self._errors(_behind(self._logits(model, collate, changed), rows), _behind(logits, rows))
                if packed
                else 0.0
            )
        with torch.autocast(self._device, dtype=self._compute):
            loss = model(**self._batch(collate, rows)).loss
        loss.backward()
        if not all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None):
            raise RuntimeError(f"its gradient in {self._compute} is no number")
        model.zero_grad(set_to_none=True)
        return max(self._errors(logits, self._alone), moved) / max(usual + noise, 1e-9)

    def _losses(self, proof: Proof, model: PreTrainedModel, collate: Collator, rows: Rows) -> Proof:
        """Compare the model's own loss with plain cross entropy, and with ours."""
        batch = self._batch(collate, rows)
        outputs = model(**batch)
        own, plain = float(outputs.loss), float(_cross_entropy(outputs.logits, cast(Tensor, batch["labels"])))
        terms = abs(own - plain) > proof.tolerance * max(plain, 1e-6)
        fuse_loss(model, terms=terms)
        model.training = True  # of the outermost module only: the terms are for training, dropout is not
        try:
            chunked = float(model(**batch, skip_logits=True).loss)
        except (AttributeError, TypeError, RuntimeError, KeyError, ValueError):
            return replace(proof, terms=terms)
        finally:
            model.training = False
        return replace(proof, terms=terms, loss_difference=abs(own - chunked) / max(abs(own), 1e-6))

    def _model(self, attention: str) -> PreTrainedModel:
        """Make the same weights again, with another attention."""
        model = tiny_model(self._config, attention, self._trusted, self._pictures is not None)
        cast(nn.Module, model).to(self._device)
        keep_apart(model, self._apart, self._pictures)
        return model

    def _causal(self) -> bool:
        """Say whether the logits of a document stay the same when its last token is another.

        It keeps its length, which rotary factors may follow.
        """
        document = self._rows[0][0]
        ids = document.ids.clone()
        ids[-1] = 3 + (ids[-1] - 2) % (_TEXT - 3)
        with torch.no_grad():
            other = self._one(self._plain, replace(document, ids=ids))
        return float((other - self._alone[0])[:-1].abs().max()) <= DIFFERENCE * self._spread

    def _singles(self) -> Rows:
        return [[document] for row in self._rows for document in row]

    def _each_alone(self, model: PreTrainedModel) -> list[Tensor]:
        """Return the logits of each document alone, from ids only, as inference computes them."""
        return [self._one(model, row[0]) for row in self._singles()]

    def _one(self, model: PreTrainedModel, document: Document) -> Tensor:
        """float32[L, V] of a document by itself."""
        inputs = {"input_ids": document.ids[None]}
        if self._pictures is not None:
            inputs |= self._pictures.of_document(document.pictures, inputs["input_ids"])
        on_device = {name: value.to(self._device) for name, value in inputs.items()}
        return cast(Tensor, model(**on_device).logits[0].float())

    def _batch(self, collate: Collator, rows: Rows) -> Batch:
        batch = collate([_row(documents) for documents in rows])
        return {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _logits(self, model: PreTrainedModel, collate: Collator, rows: Rows) -> list[Tensor]:
        """float32[L, V] of every document."""
        batch = self._batch(collate, rows)
        batch.pop("labels")
        logits = model(**batch).logits.float()
        lengths = [[len(document) for document in row] for row in rows]
        if collate.flatten:
            return list(logits[0].split([length for row in lengths for length in row]))
        return [part for one, row in zip(logits, lengths, strict=True) for part in one[: sum(row)].split(row)]

    def _difference(self, model: PreTrainedModel, collate: Collator, rows: Rows, first: int = 0) -> float:
        pairs = zip(self._logits(model, collate, rows), self._alone[first:], strict=False)
        return float(max((actual - expected).abs().max() for actual, expected in pairs)) / self._spread

    def _errors(self, actual: list[Tensor], expected: list[Tensor]) -> float:
        """Median over positions: a router that flips at a few of them is no leak."""
        errors = [(one - other).square().mean(-1).sqrt() for one, other in zip(actual, expected, strict=True)]
        return float(torch.cat(errors).median()) / self._spread


def _behind(logits: list[Tensor], rows: Rows) -> list[Tensor]:
    """Leave out the first document of every row."""
    firsts = set(np.cumsum([0, *map(len, rows)])[:-1].tolist())
    return [part for index, part in enumerate(logits) if index not in firsts]


def _row(documents: list[Document]) -> Row:
    ids = torch.cat([document.ids for document in documents]).numpy().astype(np.int32)
    lengths = np.array([len(document) for document in documents], np.int32)
    labels = ids.copy()
    labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX
    pictures = [picture for document in documents for picture in document.pictures]
    counts = np.array([len(document.pictures) for document in documents], np.int32)
    return Row(ids, labels, lengths, pictures=pictures, picture_counts=counts)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class Remembered(NamedTuple, Generic[T]):
    """A proof, and whether an earlier run made it."""

    proof: T
    before: bool


def remembered(
    config: PreTrainedConfig, about: Mapping[str, object], kind: type[T], prove: Callable[[], T], again: bool
) -> Remembered[T]:
    """Return the proof that an earlier run made of the same, or make it and keep it.

    Args:
        config: of the model; code that transformers does not have can change, so nothing of it is kept.
        about: what else the proof depends on, as plain values.
        kind: of the proof: a number, or a dataclass of plain values.
        prove: makes it.
        again: make it in any case.

    Raises:
        Exception: whatever `prove` raises; that is not kept.
    """
    folder = cache_folder()
    if folder is None or not type(config).__module__.startswith("transformers."):
        return Remembered(prove(), False)
    path = folder / "proofs" / f"{_name(config, about)}.json"
    if not again:
        with suppress(OSError, ValueError, msgspec.MsgspecError):
            return Remembered(_read(path, kind), True)
    proof = prove()
    with suppress(OSError):
        _keep(path, msgspec.json.encode(proof))
    return Remembered(proof, False)


def cache_folder() -> Path | None:
    """Return the folder for what may be kept between runs, None for none."""
    given = os.environ.get(FOLDER)
    if given is not None:
        return Path(given).expanduser() if given else None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sfttrain"


def _keep(path: Path, content: bytes) -> None:
    """Write a proof whole or not at all, whoever else writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        file.write(_digest(content).encode() + b"\n" + content)
    os.replace(file.name, path)


def _read(path: Path, kind: type[T]) -> T:
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest != _digest(content).encode():
        raise ValueError(f"{path}: damaged")
    return msgspec.json.decode(content, type=kind)


def _name(config: PreTrainedConfig, about: Mapping[str, object]) -> str:
    fields = {key: value for key, value in config.to_dict().items() if key not in _NAMES}
    whole = [type(config).__qualname__, fields, dict(about), _machine(), _source()]
    return _digest(json.dumps(whole, sort_keys=True, default=str).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _machine() -> list[object]:
    """Return what computes: packages, and the device."""
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device: list[object] = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    if torch.cuda.is_available():
        device += [torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.version.cuda]
    return [versions, device]


@cache
def _source() -> str:
    """Return the digest of this package's own code."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _digest(b"".join(file.read_bytes() for file in files))
