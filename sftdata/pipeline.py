"""From chunks of the input to a shard. Read me first.

    make_plan:      inputs -> sources -> formats, tokenizer, mask, engine, shard tasks by input size (plan.py)
    prepare_shard:  chunks -> rows -> canonical -> texts, spans -> tokens, trained -> packs, rest -> files
    build_set:      plan, map prepare_shard over the tasks on any engine, then the manifest, last (run.py)

A shard is a pure function of the plan and its task, so workers, engines, kills and resumes cannot change a
byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np

from sftdata.batches import Int64, Reject, RowBatch, Tally, TokenBatch, Tokens
from sftdata.encode.engine import Encoder, Engine, choose_engine, digest_ids, load_encoder
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import DataError, IntegrityError
from sftdata.formats.convert import Converted, convert_rows
from sftdata.limit import OverlongError, Pieces, choose_pieces, count_pieces, left_over
from sftdata.masks.texts import Renderer, render_rows
from sftdata.masks.tokens import encode_batch, read_given
from sftdata.masks.turns import SpanFinder
from sftdata.pack import gather, plan_packs
from sftdata.pictures.loaded import Picture
from sftdata.pictures.rows import PicturedConversation
from sftdata.plan import Job, ReusedTask
from sftdata.render.control_tokens import describe_tokens
from sftdata.render.template import ChatTemplate
from sftdata.set.build import Build, making_at
from sftdata.set.images import IMAGES, SlicePictures, unchanged
from sftdata.set.index import Placed, write_slice
from sftdata.set.ledger import (
    COUNTED_NAME,
    DROPPED_NAME,
    LISTS,
    REJECTS_NAME,
    Ledger,
    counted_rows,
    encode_lines,
    encode_reject,
)
from sftdata.set.making import Making, ShardResult
from sftdata.set.reuse import take_over
from sftdata.set.store import SetFile
from sftdata.set.stores import Store
from sftdata.sources.chunks import Chunk
from sftdata.sources.marks import Marks
from sftdata.sources.planning import in_turn
from sftdata.sources.ranges import Sizes, Stretch, scan
from sftdata.sources.source import read_chunk
from sftdata.tasks import ShardTask
from sftdata.workers import Workers

WORTH_RANGES = 512 << 20  # bytes to read; for less, other processes take longer to start than they save


def scanned(workers: Workers, sizes: Sizes, stretches: Sequence[Stretch]) -> Iterator[Marks]:
    """Return the marks of what is to be read, in order: scanned by the workers, where there is much of it."""
    here = workers.elsewhere and any(stretch.source.copy for stretch in stretches)
    if here or sum(stretch.stop - stretch.start for stretch in stretches) < WORTH_RANGES:
        yield from in_turn(sizes, stretches)
        return
    waiting = dict[int, Marks]()
    found = workers.map(_scan, sizes, list(enumerate(stretches)), load_nothing)
    for number in range(len(stretches)):
        while number not in waiting:
            waiting.update([next(found)])
        yield waiting.pop(number)


def load_nothing(_: object) -> None:
    """Load what a scan needs."""


def _scan(sizes: Sizes, stretch: tuple[int, Stretch]) -> tuple[int, Marks]:
    return stretch[0], scan(sizes, stretch[1])


def prepare_shard(job: Job, task: ShardTask) -> ShardResult:
    """Turn the chunks of one task into one shard, and commit it."""
    build = making_at(job.config.output)
    job = replace(job, tokenizer=replace(job.tokenizer, folder=build.borrow(job.tokenizer.folder)))
    stages = load_stages(job)
    ledger, documents, ids, pieces = Ledger(), [], [], []
    texts: list[str] = []
    pictures: dict[int, Sequence[Picture]] = {}
    lists = dict.fromkeys(LISTS, b"")
    for chunk in task.chunks:
        done = prepare_chunk(stages, chunk)
        texts = texts or done.texts
        ledger.merge(done.ledger)
        for name, lines in done.lists().items():
            lists[name] += lines
        documents.append(done.documents)
        ids.append(done.example_ids)
        pieces.append(done.pieces)
        pictures |= done.pictures
    placed = place_documents(job, documents, np.concatenate(ids), pieces, pictures)
    documents.clear()  # free the inputs: memory peaks below
    rows = gather(
        placed.documents,
        placed.example_ids,
        placed.packs,
        job.row_length,
        job.tokenizer.filler_id,
        weighted=job.config.loss_weights,
    )
    ledger.count_packed(rows, job.row_length, job.sources)
    ledger.count_stored(() if placed.pictures is None else placed.pictures.stored)
    bos_id = job.tokenizer.bos_id
    embed = job.vision.pictures if job.vision is not None and job.vision.embed else None
    shards, files = write_slice(build.store, task.index, placed, rows, job.row_length, bos_id, embed)
    sample, digest = stages.sample(texts)
    result = ShardResult(
        index=task.index,
        shards=shards,
        files=files,
        ledger=ledger,
        rejects=sum(ledger.rows_rejected.values()),
        sample=sample,
        sample_xxh3=digest,
    )
    return build.commit(result, lists)


def finish_shard(job: Job, work: ShardTask | ReusedTask) -> ShardResult:
    """Take the shard of a task over from the old set, where that has it, or prepare and commit it."""
    if isinstance(work, ShardTask):
        return prepare_shard(job, work)
    build = Build(job.config.folder)
    changed = partial(pictures_changed, job)
    taken = take_over(work.old, work.task.index, work.sources, build.folder, changed)
    if taken is None:
        return prepare_shard(job, work.task)
    result = ShardResult(
        index=work.task.index,
        shards=taken.shards,
        files=taken.files,
        ledger=taken.ledger,
        rejects=sum(taken.ledger.rows_rejected.values()),
        reused=True,
    )
    return build.keep(result, taken.lists)


def pictures_changed(job: Job, store: Store, files: Sequence[SetFile], rejects: Iterable[Reject]) -> bool:
    """Say whether the pictures of files of a set are others by now: each that is named by path is read.

    Args:
        store: where the files are.
        rejects: rows that were rejected; a picture of one may be there, or whole, by now.
    """
    if job.vision is None:
        return False
    sidecars = (file.name for file in files if file.name.startswith(f"{IMAGES}-"))
    if not unchanged(store, sidecars, job.vision.pictures.folder):
        return True
    numbers = {name: number for number, name in enumerate(job.sources)}
    return not all(_rejected_again(job, numbers[row.file], row) for row in rejects)


def keep_unchanged(job: Job, build: Making, done: dict[int, ShardResult]) -> dict[int, ShardResult]:
    """Return the finished tasks, by number, whose pictures are those they were made with."""
    return {number: result for number, result in done.items() if not _stale(job, build, result)}


def _stale(job: Job, build: Making, result: ShardResult) -> bool:
    try:
        return pictures_changed(job, build.store, result.files, build.rejects_of(result))
    except IntegrityError:  # damaged, or written by another version
        return True


def _rejected_again(job: Job, number: int, reject: Reject) -> bool:
    """Say whether a row that was rejected, if for a picture, would be again, for the same reason."""
    if not reject.code.startswith("image-"):
        return True
    none = np.zeros(1, np.int64)
    tally = Tally(RowBatch([reject.row], none, none, none))
    converted = convert_rows(tally.batch, job.formats[number], job.options_of(number), tally)
    render_rows(converted.rows, converted.row, load_stages(job).renderer, tally)
    return [(again.code, again.reason) for again in tally.rejects] == [(reject.code, reject.reason)]


def place_documents(
    job: Job,
    parts: list[TokenBatch],
    example_ids: Int64,
    pieces: list[Pieces],
    pictures: Mapping[int, Sequence[Picture]],
) -> Placed:
    """Decide where each token of a slice goes: into a packed row, or into the rest.

    Args:
        parts: the documents of each chunk, whole.
        example_ids: int64[N], of all of them.
        pieces: what stays of each chunk's.
        pictures: of the documents, by example id.
    """
    documents, chosen = TokenBatch.join(parts), Pieces.of_batches(pieces, [len(part) for part in parts])
    kept = chosen.kept()
    packs = plan_packs(kept.lengths, job.max_length, job.config.packing).within(kept.example, kept.start)
    rest, reasons = left_over(documents.lengths, chosen, job.config.overlong)
    vision, own = job.vision, None
    if vision is not None:
        own = SlicePictures.of(pictures, example_ids, vision.tokens_of, vision.image_id)
    return Placed(documents, example_ids, packs, rest, reasons, own)


@dataclass(frozen=True, slots=True)
class PreparedChunk:
    """The documents of a chunk, whole, and what of them is to be packed.

    Attributes:
        documents: one for each row that is neither rejected nor filtered.
        example_ids: int64[N], global number of each document's row.
        pieces: what may stay of them; kept ones are within `max_length` and have something to train.
        tally: what the stages counted; rejected and dropped rows in order.
        ledger: what became of its rows and tokens, packing aside.
        texts: as rendered.
        pictures: of the documents that have any, by example id.
    """

    documents: TokenBatch
    example_ids: Int64
    pieces: Pieces
    tally: Tally
    ledger: Ledger
    texts: list[str]
    pictures: dict[int, Sequence[Picture]]

    def lists(self) -> dict[str, bytes]:
        """Return its lines of each list of the set."""
        tally = self.tally
        ids = tally.batch.example_ids
        counted = {name: ids[np.unique(rows)] for name, rows in tally.rows.items()}
        return {
            REJECTS_NAME: b"".join(map(encode_reject, tally.rejects)),
            DROPPED_NAME: encode_lines(tally.dropped),
            COUNTED_NAME: encode_lines(counted_rows(counted)),
        }


def prepare_chunk(stages: Stages, chunk: Chunk) -> PreparedChunk:
    """Read, convert, render, encode, mask and cut the rows of one chunk."""
    job = stages.job
    rows, unreadable = read_chunk(chunk, job.config.max_line_bytes)
    tally = Tally(rows, unreadable)
    converted = convert_rows(rows, job.formats[chunk.number], job.options_of(chunk.number), tally)
    tokens, texts = tokenize(stages, converted, tally)
    tokens = job.mask.flags(tokens, tally)
    pieces = choose_length(job, chunk, tokens, tally)
    count_pieces(tokens, pieces, tally)
    example_ids = rows.example_ids[tokens.row]
    pictures = pictures_of(converted, dict(zip(tokens.row.tolist(), example_ids.tolist(), strict=True)))
    for gone in (tally.rejects, tally.dropped):
        gone.sort(key=lambda row: row.record)
    ledger = Ledger(
        rows_in=len(rows) + len(unreadable),
        rows_kept=len(np.unique(pieces.kept().example)),
        tokens_in=len(tokens.input_ids),
    )
    ledger.count_tally(tally, job.config.overlong)
    ledger.count_lengths(tokens.lengths)
    kept = {*tokens.row[pieces.kept().example].tolist()}
    ledger.count_pictures(converted.pictures, {*tokens.row.tolist()}, kept)
    return PreparedChunk(tokens, example_ids, pieces, tally, ledger, texts, pictures)


def pictures_of(converted: Converted, examples: Mapping[int, int]) -> dict[int, Sequence[Picture]]:
    """Return the pictures of documents by example id; `examples` are these ids by row."""
    return {
        examples[row]: canonical.pictures
        for row, canonical in zip(converted.row.tolist(), converted.rows, strict=True)
        if isinstance(canonical, PicturedConversation) and row in examples
    }


def choose_length(job: Job, chunk: Chunk, tokens: TokenBatch, tally: Tally) -> Pieces:
    """Apply the over-long policy; the one cut stream of `wrapped` has room for any example.

    Raises:
        DataError: an example is over-long and the policy is "error".
    """
    limit = None if job.config.packing == "wrapped" else job.max_length
    try:
        pictured = None if job.vision is None else job.vision.ends(tokens)
        return choose_pieces(tokens, limit, job.config.overlong, pictured)
    except OverlongError as error:
        rows = tally.batch
        where = chunk.place(int(rows.example_ids[error.row]), int(rows.lines[error.row]))
        raise DataError(f"{where}: {error.found}", error.fix) from None


def tokenize(stages: Stages, converted: Converted, tally: Tally) -> tuple[TokenBatch, list[str]]:
    """Render and encode canonical rows; return their tokens in order, and the rendered texts."""
    given = np.array([isinstance(row, Tokens) for row in converted.rows], np.bool_)
    texts = [row for row in converted.rows if not isinstance(row, Tokens)]
    rendered = render_rows(texts, converted.row[~given], stages.renderer, tally)
    rows = [row for row in converted.rows if isinstance(row, Tokens)]
    boundary, vision = stages.job.config.boundary, stages.job.vision
    parts = [read_given(rows, converted.row[given], stages.job.tokenizer, tally)]
    if vision is not None:
        parts = [vision.refuse_stray(parts[0], tally)]
    encoded: list[str] = []
    for part, images in ((rendered.conversations, rendered.images), (rendered.raw, None)):
        if part is not None:
            parts.append(encode_batch(part, stages.encoder, tally, boundary=boundary, images=images))
            encoded += part.texts
            if vision is not None and images is None:
                parts[-1] = vision.refuse_stray(parts[-1], tally)
    return TokenBatch.join(parts).in_row_order(), encoded


SAMPLE_TEXTS = 16
SAMPLE_CHARS = (
    1 << 11
)  # of each text; the window moves from the beginning of the first to the end of the last


@dataclass(frozen=True)
class Stages:
    """Renderer and encoder of one job."""

    job: Job

    @cached_property
    def renderer(self) -> Renderer:
        """What turns canonical rows into texts."""
        config, tokenizer = self.job.config, self.job.tokenizer
        finder = None
        if tokenizer.chat_template is not None:
            template = ChatTemplate(
                tokenizer.chat_template, tokenizer.special_tokens, config.date, config.template_kwargs
            )
            finder = SpanFinder(
                template, tokenizer.stop_tokens, *tokenizer.by_mark, config.trust_control_tokens
            )
        processor = None if self.job.vision is None else self.job.vision.processor
        return Renderer(finder, self.job.mask, config.eos_token or "", processor)

    @cached_property
    def names(self) -> list[str]:
        """Names of the sources, in the order of their numbers."""
        return list(self.job.sources)

    @cached_property
    def encoder(self) -> Encoder:
        """What turns texts into ids."""
        return _encoder(self.job.tokenizer, self.job.engine)

    def token_notes(self) -> list[str]:
        """Say which added tokens stay text when a message spells them; nothing without a chat template."""
        finder = self.renderer.finder
        added = [token.content for token in self.job.tokenizer.added_tokens]
        return [] if finder is None else describe_tokens(finder.guarded, added)

    def sample(self, texts: Sequence[str]) -> tuple[tuple[str, ...], str]:
        """Return windows of some of these texts, and a digest of a fast engine's ids for them.

        The parent process compares them with the reference tokenizer, which then need not be loaded here.
        """
        if not texts or self.encoder.engine == "tokenizers":
            return (), ""
        chosen = np.unique(np.linspace(0, len(texts) - 1, SAMPLE_TEXTS).astype(np.int64)).tolist()
        windows = np.linspace(0, 1, len(chosen)).tolist()
        sample = tuple(_window(texts[index], where) for index, where in zip(chosen, windows, strict=True))
        return sample, digest_ids(self.encoder, sample)


def _window(text: str, where: float) -> str:
    """Return `SAMPLE_CHARS` characters of a text; `where` is 0 for the first, 1 for the last of them."""
    start = int(where * max(len(text) - SAMPLE_CHARS, 0))
    return text[start : start + SAMPLE_CHARS]


_loaded: Stages | None = None


def load_stages(job: Job) -> Stages:
    """Return the stages of a job, built once in each process."""
    global _loaded
    if _loaded is None or _loaded.job != job:
        _loaded = Stages(job)
    return _loaded


def load_shared(job: Job) -> None:
    """Load the stages that every task of a job needs."""
    stages = load_stages(job)
    _ = stages.renderer, stages.encoder.strips_right
    if job.tokenizer.layout.kind != "none":
        _ = stages.encoder.byte_lengths


def load_engine(chosen: tuple[ResolvedTokenizer, Literal["auto", "gigatoken", "tokenizers"]]) -> None:
    """Load the engine that a plan with this tokenizer and setting will most likely choose, ahead of it."""
    tokenizer, requested = chosen
    _encoder(tokenizer, choose_engine(tokenizer, requested)[0])


_encoders: dict[Engine, Encoder] = {}


def _encoder(tokenizer: ResolvedTokenizer, engine: Engine) -> Encoder:
    """Return an encoder, loaded once; of each engine the last is kept."""
    if engine not in _encoders or _encoders[engine].resolved != tokenizer:
        _encoders[engine] = load_encoder(tokenizer, engine)
    return _encoders[engine]
