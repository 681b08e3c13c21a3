"""A run, from its settings to a finished set, and its preview on a sample.

pipeline.py processes the rows. This module does the rest: it recognizes a finished or unfinished set, checks
the fast engine, enforces the limits of loss, and writes the manifest last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np

from sftdata.batches import IGNORE_INDEX, Int32
from sftdata.config import PrepareConfig
from sftdata.encode.engine import digest_ids, load_encoder
from sftdata.errors import Unit, UsageError, no_rows, place
from sftdata.output import Progress, StoreUrl, behind_links, counted, without_folders
from sftdata.pack import plan_packs
from sftdata.pictures.loaded import Picture
from sftdata.pipeline import (
    PreparedChunk,
    finish_shard,
    keep_unchanged,
    load_engine,
    load_shared,
    load_stages,
    pictures_changed,
    prepare_chunk,
    scanned,
)
from sftdata.plan import MOVING, Plan, ReusedTask, inputs_of, make_plan
from sftdata.set.build import Build, made_otherwise, making_at, refuse_choice, refuse_foreign
from sftdata.set.ledger import REJECTS_NAME, Ledger, decode_rejects
from sftdata.set.losses import refuse_losses
from sftdata.set.making import Making, ShardResult
from sftdata.set.manifest import Manifest, SourceInfo, TokenizerInfo, format_version
from sftdata.set.shared import finished_at
from sftdata.set.slices import SliceRecord
from sftdata.set.stores import files_of
from sftdata.sources.chunks import Chunk
from sftdata.sources.planning import Scanned
from sftdata.sources.source import close_sources, read_chunk
from sftdata.tasks import ShardTask
from sftdata.version import __version__
from sftdata.vision import Vision
from sftdata.workers import Workers, usable_cores

TOKEN_BYTES = 8  # an id and a label
SEGMENT_BYTES = 48  # of the index, for each document that is whole
PADDING_NOTED = 1 << 23  # tokens
WORTH_WORKERS = 16 << 20  # bytes to prepare; for less, other processes take longer to start than they save

OnProgress = Callable[[Progress], object]
OnNote = Callable[[str], object]

# ----------------------------------------------------------------------------------------- prepare


def planned(
    config: PrepareConfig, workers: Workers, note: OnNote, scan: Scanned | None = None
) -> tuple[PrepareConfig, Manifest | None, Plan]:
    """Return the settings with the folder behind the output, the manifest of what is there, and the plan."""
    if isinstance(config.output, Path):
        config = config.model_copy(update={"output": behind_links(config.output)})
    old = finished_at(config.output, overwrite=config.overwrite)
    if old is None and not config.overwrite and isinstance(config.output, Path):
        refuse_choice(config.output)
    plan = make_plan(
        config,
        lambda tokenizer: workers.begin(load_engine, (tokenizer, config.engine)),
        note,
        scan or Scanned(partial(scanned, workers)),
    )
    for sentence in plan.notes:
        note(sentence)
    note_padding(plan, note)
    return config, old, plan


def note_padding(plan: Plan, note: OnNote) -> None:
    """Note the size of rows that will be mostly padding, before they are built."""
    length, rows = plan.job.row_length or 0, len(plan.tasks)
    if length * rows > max(4 * plan.size, PADDING_NOTED):
        size = f"{length * rows * TOKEN_BYTES / 1e9:.1f} GB of rows that are padding for the most part"
        note(f"max_length is {length:,} tokens, and all the input is {counted(plan.size, 'byte')}: {size}.")


def build_set(
    config: PrepareConfig,
    plan: Plan,
    old: Manifest | None,
    workers: Workers,
    progress: OnProgress | None,
    note: OnNote,
) -> Manifest:
    """Build the set of a plan, unless it exists already or only has to be moved to its place."""
    changed = differences(plan, config.output, old)
    if old is not None and not changed:
        Build(config.folder).sweep()
        note(f"{config.output} is up to date: same data, same settings.")
        return old
    grown = old is not None and plan.continues(old)
    if changed and not grown and not config.overwrite:
        raise made_otherwise(config.output, changed)
    if grown:
        refuse_foreign(config.output)
    with Build(config.folder).locked() as build:
        sealed = build.sealed()
        if sealed is not None and differences(plan, build.folder, sealed) == ["pictures"]:
            build.clear()  # its manifest says what is so no more
        elif sealed is not None and not plan.difference(sealed):
            build.put_in_place()
            note(f"Resuming: all {counted(len(plan.tasks), 'slice')} complete; settings match.")
            return sealed
        note(f"Engine: {plan.job.engine}, {plan.engine_reason}.")
        moving = MOVING if grown else frozenset[str]()
        done = build.start(plan.begun(), overwrite=config.overwrite, moving=moving)
        done = keep_unchanged(plan.job, build, done)
        if done:
            note(f"Resuming: {len(done)}/{len(plan.tasks)} slices complete; settings match.")
        with build.refusable():
            old = old if grown and not config.overwrite else None
            results, exact = run_tasks(plan, done, old, workers, progress)
            if not exact:
                note(
                    f"{plan.job.engine} gives other ids than tokenizers on this data;"
                    " starting over with tokenizers."
                )
                build.clear()
                plan, old = plan.by_reference(), None  # what the engine made before is in doubt, too
                build.start(plan.begun(), overwrite=True)
                results, _ = run_tasks(plan, {}, old, workers, progress)
            if old is not None:
                note(tell_reuse(config.folder, results))
            processor = {} if plan.job.vision is None else plan.job.vision.files()
            return build.finish(conclude(plan, results, build), plan.job.tokenizer.folder, processor)


def differences(plan: Plan, output: Path | StoreUrl, manifest: Manifest | None) -> list[str]:
    """Return what a finished set was made with otherwise, or whose pictures are others by now."""
    changed = plan.difference(manifest) if manifest is not None else []
    if manifest is None or changed or not other_pictures(plan, output, manifest):
        return changed
    return ["pictures"]


def other_pictures(plan: Plan, output: Path | StoreUrl, manifest: Manifest) -> bool:
    """Say whether the pictures of a finished set are others by now."""
    if plan.job.vision is None:
        return False
    store = files_of(output)
    rejects = (line for lines in store.get([REJECTS_NAME]) for line in lines.splitlines())
    return pictures_changed(plan.job, store, manifest.files, decode_rejects(rejects))


def tell_reuse(output: Path, results: list[ShardResult]) -> str:
    """Say how much of an old set was taken over."""
    reused = sum(result.reused for result in results)
    return (
        f"{output}: the inputs changed; {reused} of {counted(len(results), 'slice')} reused,"
        f" {len(results) - reused} made anew."
    )


def run_tasks(
    plan: Plan,
    done: dict[int, ShardResult],
    old: Manifest | None,
    workers: Workers,
    progress: OnProgress | None,
) -> tuple[list[ShardResult], bool]:
    """Prepare the unfinished tasks; return all results in order, and whether the engine is exact.

    Args:
        old: of the set that is replaced, whose slices are reused.
    """
    reused = plan.reuse(plan.job.config.folder, old) if old is not None else {}
    tasks = plan.tasks.without(done).longest_first()
    todo: Sequence[ShardTask | ReusedTask]
    todo = [reused.get(task.index, task) for task in tasks] if reused else tasks
    crew = workers if old is None or plan.effort(todo) >= WORTH_WORKERS else Workers(1)
    job = plan.job
    if crew.elsewhere and todo:
        folder = making_at(job.config.output).lend(job.tokenizer.folder)
        job = replace(job, tokenizer=replace(job.tokenizer, folder=folder))
    coming = crew.map(finish_shard, job, todo, load_shared)
    reference = cache(partial(load_encoder, plan.job.tokenizer, "tokenizers"))
    if plan.job.engine != "tokenizers" and any(isinstance(task, ShardTask) for task in todo):
        reference()  # while the workers start up: it checks the samples of all tasks
    results, exact, now = {}, True, Progress(0, len(todo), 0, 0)
    for result in chain(done.values(), coming):
        if result.sample:
            exact &= digest_ids(reference(), result.sample) == result.sample_xxh3
        results[result.index] = msgspec.structs.replace(result, sample=(), sample_xxh3="")
        if progress and result.index not in done:
            tokens, rejected = now.tokens + result.ledger.tokens, now.rejected + result.rejects
            now = Progress(now.done + 1, now.total, tokens, rejected)
            progress(now)
    close_sources()
    return [results[number] for number in plan.tasks.numbers.tolist()], exact


def conclude(plan: Plan, results: list[ShardResult], build: Making) -> Manifest:
    """Merge the ledgers of the tasks, check them against the limits, and return the manifest.

    Raises:
        DataError: too many rejected rows, or nothing to train on.
        IntegrityError: rows or tokens are unaccounted for.
    """
    ledger = Ledger()
    for result in results:
        ledger.merge(result.ledger)
    ledger.check("prepare")
    blank = sum(source.records for source in plan.sources) - ledger.rows_in
    build.write_lists(records_of(plan, results), results)
    refuse_losses(plan.job.config, ledger, build)
    tokenizer = plan.job.tokenizer
    notes = (*plan.notes, *(load_stages(plan.job).token_notes() if ledger.counters.get("turns") else ()))
    inputs, name = inputs_of(plan.job.config), without_folders(tokenizer.name)
    files = tuple(file for result in results for file in result.files)
    vision = None if plan.job.vision is None else plan.job.vision.info(plan.job.config.output, files)
    return Manifest(
        format_version=format_version(vision is not None),
        settings=msgspec.to_builtins(plan.identity()) | {"inputs": inputs, "tokenizer": name},
        tokenizer=TokenizerInfo(
            name=name,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.filler_id,
            bos_id=tokenizer.bos_id,
            tokens_added=tuple(token for token, _ in tokenizer.tokens_added),
        ),
        chat_template_sha256=tokenizer.chat_template_sha256,
        sources=tuple(
            SourceInfo(
                name=short_name,
                bytes=source.raw_bytes,
                xxh3=source.xxh3_128,
                rows=source.records,
                first_id=source.base_id,
                licence=licence,
                unit=source.source.unit,
            )
            for short_name, source, licence in zip(plan.job.sources, plan.sources, plan.licences, strict=True)
        ),
        ledger=ledger,
        shards=tuple(shard for result in results for shard in result.shards),
        files=files,
        vision=vision,
        notes=tuple(map(without_folders, notes)),
        blank_lines=blank,
        software={"sftdata": __version__} | {name: version(name) for name in ("tokenizers", "pyarrow")},
    )


def records_of(plan: Plan, results: list[ShardResult]) -> list[SliceRecord]:
    """Return what each slice was made from."""
    return [
        SliceRecord(
            number=task.index,
            made_with=plan.made_with(task),
            sources=plan.stretches(task),
            files=tuple(file.name for file in (*result.shards, *result.files)),
            lists=result.lists,
            ledger=result.ledger.to_json(),
        )
        for task, result in zip(plan.tasks, results, strict=True)
    ]


# ----------------------------------------------------------------------------------------- preview

PART = 0.25  # of each sampled chunk of a large input
IN_BYTES = ("jsonl", "text", "json", "csv")  # containers whose chunks are counted in bytes, not in rows


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One example as it would be trained.

    Attributes:
        file: of its row.
        record: 1-based number of the row in the file.
        unit: of that number.
        input_ids, labels: int32[T].
        pictures: of its row, in order.
    """

    file: str
    record: int
    unit: Unit
    input_ids: Int32
    labels: Int32
    pictures: Sequence[Picture] = ()

    @property
    def place(self) -> str:
        """The place of its row, in words."""
        return place(self.file, self.record, self.unit)


@dataclass(frozen=True, slots=True)
class Preview:
    """The result of a run, estimated from a sample.

    Attributes:
        examples: some of the sample.
        ledger: of the sampled rows.
        rejects: reasons of the sampled rows that would be rejected.
        share: sampled bytes over all bytes.
        records: rows of the whole input.
        seconds: to prepare the sample with the reference engine in one process.
        workers: processes that `prepare` would use.
        fill: share of tokens in the packed rows of the sample.
        max_length: tokens per packed row.
        notes: decisions made for the user.
        tokenizer_folder: for decoding.
        vision: what pictures are read with; None where there are none.
    """

    examples: list[Example]
    ledger: Ledger
    rejects: list[str]
    share: float
    records: int
    seconds: float
    workers: int
    fill: float
    max_length: int
    notes: tuple[str, ...]
    tokenizer_folder: Path
    vision: Vision | None = None

    def projected(self, batch_size: int) -> dict[str, int]:
        """Return estimates for the whole input; exact if all of it was sampled."""
        tokens = round(self.ledger_tokens / self.share)
        packs = -(-round(tokens / max(self.fill, 1e-9)) // self.max_length)
        rest, documents = self.ledger.tokens_in - self.ledger_tokens, sum(self.ledger.lengths.values())
        beside = rest * TOKEN_BYTES + documents * SEGMENT_BYTES
        return {
            "rows": self.ledger.rows_in if self.share == 1 else self.records,
            "tokens": tokens,
            "packed_rows": packs,
            "bytes_on_disk": packs * self.max_length * TOKEN_BYTES + round(beside / self.share),
            "steps_per_epoch": -(-packs // batch_size),
            "seconds_at_most": math.ceil(self.seconds / self.share / self.workers),
        }

    @property
    def ledger_tokens(self) -> int:
        """Tokens of the sampled examples, after the over-long policy."""
        ledger = self.ledger
        return ledger.tokens_in - sum(ledger.tokens_cut.values()) - ledger.tokens_in_dropped_rows

    def lines(self, batch_size: int) -> list[str]:
        """Return what to show above the examples."""
        projected = self.projected(batch_size)
        about = "" if self.share == 1 else "about "
        return [
            *self.notes,
            f"{counted(projected['rows'], 'row')}, {about}{counted(projected['tokens'], 'token')},"
            f" {counted(projected['packed_rows'], 'packed row')} of {self.max_length} ({self.fill:.1%} full),"
            f" {projected['bytes_on_disk'] / 1e6:,.1f} MB,"
            f" {counted(projected['steps_per_epoch'], 'step')} an epoch at batch size {batch_size},"
            f" prepared in at most {projected['seconds_at_most']:,} s",
            *(f"would be rejected: {reason}" for reason in self.rejects[:3]),
        ]

    def to_json(self, batch_size: int) -> dict[str, object]:
        """Return plain JSON data."""
        examples = [
            {
                "file": example.file,
                "line": example.record if example.unit == "line" else None,
                "record": example.record,
                "input_ids": example.input_ids.tolist(),
                "labels": example.labels.tolist(),
            }
            for example in self.examples
        ]
        return {
            "notes": list(self.notes),
            "projected": self.projected(batch_size),
            "ledger": self.ledger.to_json(),
            "rejects": self.rejects,
            "examples": examples,
        }


def preview(config: PrepareConfig, number: int) -> Preview:
    """Prepare a sample of the rows and return the results; nothing is written.

    Args:
        number: examples to keep.

    Raises:
        SftError: what would stop `prepare` from starting, or there are no rows.
    """
    if number < 1:
        raise UsageError(f"number: found {number}; expected 1 or more.", "leave it out.")
    plan = make_plan(config.model_copy(update={"engine": "tokenizers"}))
    load_shared(plan.job)  # takes the same time for any input, so it is not part of the seconds
    stages, sample = load_stages(plan.job), sample_chunks(plan)
    began = time.monotonic()
    chunks = [prepare_chunk(stages, chunk) for chunk in sample]
    seconds = time.monotonic() - began
    ledger = Ledger()
    for chunk in chunks:
        ledger.merge(chunk.ledger)
    if not ledger.rows_in:
        raise no_rows(config.inputs)
    lengths = np.concatenate([np.zeros(0, np.int64), *(chunk.pieces.kept().lengths for chunk in chunks)])
    packs = len(plan_packs(lengths, plan.job.max_length, plan.job.config.packing))
    slots = packs * plan.job.row_length if plan.job.row_length else int(lengths.sum())
    examples = [example for chunk in chunks for example in _examples(plan, chunk)]
    stride = max(1, len(examples) // number)
    return Preview(
        examples=examples[::stride][:number],
        ledger=ledger,
        rejects=[f"{reject.place}: {reject.reason}" for chunk in chunks for reject in chunk.tally.rejects],
        share=_share(plan, sample),
        records=sum(source.records for source in plan.sources),
        seconds=seconds,
        workers=config.workers or usable_cores(),
        fill=float(lengths.sum()) / max(slots, 1),
        max_length=plan.job.max_length,
        notes=(
            *plan.notes,
            *(stages.token_notes() if ledger.counters.get("turns") else ()),
            *(["All rows are sampled, before any is chosen or left out."] if config.chooses else []),
        ),
        tokenizer_folder=plan.job.tokenizer.folder,
        vision=plan.job.vision,
    )


def sample_chunks(plan: Plan) -> list[Chunk]:
    """Return evenly spaced chunks of every source: a small input whole, of a large one a part of each."""
    chunks = [chunk for source in plan.sources for chunk in source.samples]
    if _share(plan, chunks) == 1:
        return chunks
    return [_beginning(chunk, plan.job.config.max_line_bytes) for chunk in chunks]


def _beginning(chunk: Chunk, max_line_bytes: int) -> Chunk:
    """Return the first part of a chunk, cut between rows: neighbouring rows are much alike.

    It is the same share of each chunk, so that all parts of the input weigh the same.
    """
    stop = chunk.start + max(1, round((chunk.stop - chunk.start) * PART))
    if chunk.source.container in IN_BYTES:
        starts = read_chunk(chunk, max_line_bytes)[0].byte_offsets
        stop = next((start for start in starts.tolist() if start >= stop), chunk.stop)
    return replace(chunk, stop=stop, records=None)


def _share(plan: Plan, sample: list[Chunk]) -> float:
    whole = sum(int(source.chunks.sizes.sum()) for source in plan.sources)
    return min(1.0, sum(chunk.stop - chunk.start for chunk in sample) / whole) if whole else 1.0


def _examples(plan: Plan, chunk: PreparedChunk) -> Iterator[Example]:
    documents, kept = chunk.documents, chunk.pieces.kept()
    first = documents.offsets[kept.example]
    ids = chunk.example_ids[kept.example].tolist()
    for example_id, start, stop in zip(ids, first + kept.start, first + kept.stop, strict=True):
        input_ids = documents.input_ids[start:stop]
        labels = np.where(documents.trained[start:stop], input_ids, IGNORE_INDEX).astype(np.int32)
        labels[:1] = IGNORE_INDEX
        yield Example(*plan.locate(example_id), input_ids, labels, chunk.pictures.get(example_id, ()))
