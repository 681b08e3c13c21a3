"""A slice of a view by index: where its tokens lie in the bases; only documents that are cut are read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sftdata.batches import Bool, Float32, Int32, Int64, PackPlan, count_between, offsets_of, positions_of
from sftdata.pack import lay_out
from sftdata.set.extents import (
    AS_STORED,
    GIVEN,
    PADDING_FILE,
    TAKEN,
    Extents,
    Packs,
    RestExtents,
    packs_name,
    write_packs,
    write_rest_extents,
)
from sftdata.set.images import IMAGES, SlicePictures, write_images_by_index
from sftdata.set.index import INDEX, REST, Segments, beside_name, write_index
from sftdata.set.ledger import Ledger
from sftdata.set.making import ShardResult
from sftdata.set.store import SetFile
from sftdata.set.stores import Store
from sftdata.views.documents import Runs
from sftdata.views.order import Stretches, ViewSlice
from sftdata.views.plan import ViewPlan


def index_slice(plan: ViewPlan, part: ViewSlice, folder: Store) -> ShardResult:
    """Write where the rows of a slice lie, and its rest; the index is that of a written slice."""
    kept, rest = plan.kept.take(part.packs.example), plan.rest.take(part.rest)
    packed = PackPlan(
        part.packs.offsets, np.arange(len(kept)), kept.start + part.packs.start, kept.start + part.packs.stop
    )
    placed = Stretches(
        document=np.append(kept.document, rest.document),
        id=np.append(kept.id, rest.id),
        start=np.append(packed.start, rest.start),
        stop=np.append(packed.stop, rest.stop),
        reason=np.append(kept.reason, rest.reason),
    )
    index = _index(plan, placed, packed)
    runs = plan.choice.documents.runs(placed.document, placed.start, placed.stop)
    layout = lay_out(packed, kept.id, plan.row_length, plan.config.pad_to_multiple_of)
    document, lengths, ids, segment_offsets = layout
    packs = Packs(lengths.astype(np.int32), ids, segment_offsets, _packed_extents(plan, runs, layout))
    pictures = _pictures(plan, placed)
    if pictures is not None:
        packs = replace(packs, **pictures.stored.columns(ids >= 0, pictures.number[document[ids >= 0]]))
    trained = np.append(index.trained[: len(kept)], 0)[document]
    ledger = Ledger()
    if part is plan.slices[0]:
        ledger.merge(plan.ledger)
    sources = {source.name: source.first_id for source in plan.sources}
    ledger.count_segments(packs, trained, int(lengths.sum()), plan.row_length, sources)
    ledger.count_stored(() if pictures is None else pictures.stored.stored)
    shards = (write_packs(folder / packs_name(part.index), packs, int(trained.sum())),) if len(packs) else ()
    files: list[SetFile] = []
    if len(rest):
        extents = _rest_extents(plan, runs, len(kept))
        stretches = RestExtents(rest.id, rest.start.astype(np.int32), rest.reason.tolist(), extents)
        if pictures is not None:
            whole = rest.start == 0
            own = pictures.stored.columns(whole, pictures.number[len(kept) :][whole])
            stretches = replace(stretches, **own)
        files.append(write_rest_extents(folder / beside_name(REST, part.index), stretches))
    if len(placed):
        files.append(write_index(folder / beside_name(INDEX, part.index), index))
    if pictures is not None and pictures.stored.stored:
        sidecar = folder / beside_name(IMAGES, part.index)
        files.append(write_images_by_index(sidecar, pictures.stored, *pictures.places))
    return ShardResult(index=part.index, shards=shards, files=tuple(files), ledger=ledger)


@dataclass(frozen=True, slots=True, eq=False)
class _Pictures:
    """The pictures of a slice.

    Attributes:
        stored: as a written slice has them.
        places: int32[P] twice: the sidecar of the bases that holds each, and its row there.
        number: int64[K], the document there of each stretch.
    """

    stored: SlicePictures
    places: tuple[Int32, Int32]
    number: Int64


def _pictures(plan: ViewPlan, placed: Stretches) -> _Pictures | None:
    own = plan.choice.documents.pictures
    if own is None:
        return None
    ids, first, number = np.unique(placed.id, return_index=True, return_inverse=True)
    stored, numbers = own.of_slice(placed.document[first], ids)
    file, row = own.gallery.places
    return _Pictures(stored, (file[numbers], row[numbers]), number)


# -------------------------------------------------------------------------------------------- extents


def _packed_extents(plan: ViewPlan, runs: Runs, layout: tuple[Int64, Int64, Int64, Int64]) -> Extents:
    """Return the extents of the rows: the runs of each document, and one more where a row is padded."""
    document, lengths, _, segment_offsets = layout
    count = np.append(runs.count, 1)[document]
    which = positions_of(np.append(offsets_of(runs.count)[:-1], len(runs.block))[document], count)
    begins = np.zeros(len(runs.block) + 1, np.bool_)
    begins[offsets_of(runs.count)[:-1]] = True
    first = begins[which]  # of its document in the row; these have no label
    doubtful = np.append(runs.inside | runs.first_label, False)[which]
    extents = _extents(plan, runs, which, offsets_of(count)[segment_offsets], lengths[document < 0])
    extents.first_label[first & doubtful] = TAKEN
    extents.first_label[first & ~doubtful] = AS_STORED
    return extents


def _rest_extents(plan: ViewPlan, runs: Runs, kept: int) -> Extents:
    """Return the extents of the stretches from number `kept` on."""
    which = np.arange(runs.count[:kept].sum(), len(runs.block))
    return _extents(plan, runs, which, offsets_of(runs.count[kept:]), np.zeros(0, np.int64))


def _extents(plan: ViewPlan, runs: Runs, which: Int64, row_offsets: Int64, padding: Int64) -> Extents:
    """Return runs by their numbers, int64[E], as extents; the number behind the last one is padding."""
    places, before = plan.store.files.places()
    pads = which == len(runs.block)
    file = np.append(places[runs.block], PADDING_FILE)[which].astype(np.int32)
    start = np.append(before[runs.block] + runs.start, 0)[which]
    length = np.append(runs.length, 0)[which].astype(np.int32)
    length[pads] = padding
    labelled = np.append(runs.first_label, False)[which]
    weights = np.append(runs.first_weight, np.float32(0))[which] * labelled if _weighted(plan) else None
    return Extents(
        row_offsets, file, start, length, np.where(labelled, GIVEN, AS_STORED).astype(np.uint8), weights
    )


def _weighted(plan: ViewPlan) -> bool:
    return bool(plan.settings["loss_weights"])


# ---------------------------------------------------------------------------------------------- index


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """The labels of stretches, as the index of a slice counts them; see `Segments`."""

    trained: Int32
    first: Bool
    first_weights: Float32


def _index(plan: ViewPlan, placed: Stretches, packed: PackPlan) -> Segments:
    """Return the index of a slice: its rows' stretches come first, then those of its rest."""
    count = len(packed.example)
    rows = np.repeat(np.arange(len(packed)), np.diff(packed.offsets)), np.arange(len(placed) - count)
    length, documents = placed.stop - placed.start, plan.choice.documents
    labels = _labels(plan, placed)
    return Segments(
        example_ids=placed.id,
        row=np.concatenate(rows).astype(np.int32),
        offset=placed.start.astype(np.int32),
        length=length.astype(np.int32),
        trained=labels.trained,
        first_trained=labels.first,
        rest=np.arange(len(placed)) >= count,
        whole=length == documents.lengths[placed.document],
        document_hash=documents.document[placed.document],
        prompt_hash=documents.prompt[placed.document],
        first_weights=labels.first_weights if _weighted(plan) else None,
    )


def _labels(plan: ViewPlan, placed: Stretches) -> _Labels:
    """Look up the labels of whole documents, and count those of others."""
    documents = plan.choice.documents
    lengths = documents.lengths[placed.document]
    segment = np.searchsorted(documents.starts, documents.offsets[placed.document], side="right") - 1
    segment = np.minimum(segment, len(documents.block) - 1)
    trained = documents.trained[placed.document]
    first = documents.first_label[segment] & (lengths > 0)
    weights = documents.first_weight[segment] * first
    cut = np.flatnonzero(placed.stop - placed.start < lengths)
    if len(cut):
        tokens = documents.read(placed.document[cut], placed.start[cut], placed.stop[cut])
        begins, ends = tokens.offsets[:-1], tokens.offsets[1:]
        trained[cut] = count_between(np.flatnonzero(tokens.trained), begins + 1, ends)
        first[cut] = tokens.trained[begins]
        weights[cut] = tokens.weights()[begins] * first[cut]
    return _Labels(trained, first, weights)
