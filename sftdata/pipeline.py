"""From files to a verified set. Read me first.

    make_plan:      inputs -> sources -> format of each, chat template, tokenizer, slices by input size alone   (plan.py)
    prepare_slice:  slice -> rows -> canonical rows -> texts + spans -> tokens + trained -> packs -> shard
    prepare:        plan, map prepare_slice over the slices on any engine, then the manifest, last

A slice is one pure function of the plan, so workers, engines, kills and resumes cannot change a byte.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import msgspec
import numpy as np

from sftdata.batches import Int64, RowBatch, TokenBatch, Tokens
from sftdata.config import PrepareConfig
from sftdata.encode.engine import choose_engine
from sftdata.encode.length import LengthCounts, OverlongError, limit_length
from sftdata.encode.tokens import encode_batch, encode_tokens_rows
from sftdata.engine.local import Workers, usable_cores
from sftdata.errors import DataError, Fault, UsageError
from sftdata.pack import gather, plan_packs
from sftdata.plan import Job, Piece, Plan, Task, input_bytes, make_plan
from sftdata.read.convert import Converted, convert_rows
from sftdata.read.source import Unreadable, read_slice
from sftdata.render.rows import render_rows
from sftdata.shardset.build import Build, SliceResult, finished_set
from sftdata.shardset.ledger import Ledger
from sftdata.shardset.manifest import Manifest, SourceInfo, TokenizerInfo
from sftdata.shardset.rejects import REJECTS_NAME, Reject, encode_reject
from sftdata.shardset.shards import shard_name, write_shard
from sftdata.stages import Stages, load_stages

WORTH_A_FAST_ENGINE = 4 << 20  # bytes of input

# What mends a set that has lost all rows for one reason.
UNTRAINED_FIXES = {
    "nothing-trained": "--train-on all, or switch turns on in the data (weight, train).",
    "over-long": "--overlong truncate, or a larger --max-length.",
    "no-trained-tokens": "a larger --max-length, or --overlong truncate-left, which keeps the ends.",
}

Progress = Callable[[SliceResult, int], None]


def prepare(config: PrepareConfig, progress: Progress | None = None, say: Callable[[str], None] = lambda _: None) -> Manifest:
    """Build a set: plan, prepare every slice that is not done, write the manifest, put the set in its place.

    Args:
        config: the settings.
        progress: called after each slice with its result and the number of slices.
        say: told, in one sentence each, what was decided for the user.

    Raises:
        SftError: whatever stops the run; finished slices are kept, and the same command goes on from there.
    """
    old = finished_set(config.output)
    ready = None if old is not None or input_bytes(config) < WORTH_A_FAST_ENGINE else __name__
    with Workers(config.workers or usable_cores(), warm=ready) as workers:
        plan = make_plan(config)
        for note in plan.notes:
            say(note)
        return build_set(config, plan, old, workers, progress, say)


def build_set(
    config: PrepareConfig,
    plan: Plan,
    old: Manifest | None,
    workers: Workers,
    progress: Progress | None,
    say: Callable[[str], None],
) -> Manifest:
    """Build what was planned, unless it stands already or only waits to be put in its place."""
    changed = plan.difference(old) if old is not None else []
    if old is not None and not changed:
        Build(config.output).sweep()
        say(f"{config.output} is up to date: same data, same settings.")
        return old
    if changed and not config.overwrite:
        found = f"{config.output}: holds a finished set made otherwise ({', '.join(changed)} differ)."
        raise UsageError(found, "choose another -o, or replace the set with --overwrite.")
    with Build(config.output).locked() as build:
        sealed = build.sealed()
        if sealed is not None and not plan.difference(sealed):
            build.put_in_place()
            say(f"Resuming: all {len(plan.tasks)} slices complete; settings match.")
            return sealed
        plan, why = with_engine(plan)
        say(f"Engine: {plan.job.engine}, {why}.")
        done = build.start(plan.identity(), overwrite=config.overwrite)
        if done:
            say(f"Resuming: {len(done)}/{len(plan.tasks)} slices complete; settings match.")
        results = run_slices(plan, done, workers, progress)
        if any(result.engine_mismatch for result in results):
            say(f"{plan.job.engine} gives other ids than tokenizers on this data; starting over with tokenizers.")
            build.clear()
            plan = replace(plan, job=replace(plan.job, engine="tokenizers"))
            build.start(plan.identity(), overwrite=True)
            results = run_slices(plan, {}, workers, progress)
        return build.finish(conclude(plan, results, build), plan.job.tokenizer.folder)


def with_engine(plan: Plan) -> tuple[Plan, str]:
    """Choose the tokenizer engine; return the plan with it, and why. Each slice checks it again on its own texts."""
    engine, why = choose_engine(plan.job.tokenizer, plan.job.config.engine, worth_it=plan.size >= WORTH_A_FAST_ENGINE)
    return replace(plan, job=replace(plan.job, engine=engine)), why


def run_slices(plan: Plan, done: dict[int, SliceResult], workers: Workers, progress: Progress | None) -> list[SliceResult]:
    """Prepare the slices that are not done; return all results in order."""
    results = dict(done)
    todo = [task for task in plan.tasks if task.index not in done]
    for result in workers.map(prepare_slice, plan.job, todo):
        results[result.index] = result
        if progress:
            progress(result, len(plan.tasks))
    return [results[task.index] for task in plan.tasks]


def prepare_slice(job: Job, task: Task) -> SliceResult:
    """Turn one slice of the input into one shard, and commit it."""
    stages = load_stages(job)
    build = Build(job.config.output)
    ledger, rejects, examples, ids, equal = Ledger(), [], [], [], True
    for number, piece in enumerate(task.pieces):
        done = prepare_piece(stages, piece, gate=number == 0)
        ledger.merge(done.ledger)
        rejects += done.rejects
        examples.append(done.tokens)
        ids.append(done.example_ids)
        equal &= done.engine_equal
    tokens, example_ids = TokenBatch.join(examples), np.concatenate(ids)
    packs = plan_packs(tokens.lengths, job.max_length, job.config.packing)
    rows = gather(tokens, example_ids, packs, job.max_length, job.pad_id, constant=job.packed)
    length = job.max_length if job.packed else None
    ledger.count_packed(rows, length, job.sources)
    shards = (write_shard(build.folder / shard_name(task.index), rows, length),) if len(rows) else ()
    result = SliceResult(index=task.index, shards=shards, ledger=ledger, rejects=len(rejects), engine_mismatch=not equal)
    build.commit(result, b"".join(map(encode_reject, rejects)))
    return result


@dataclass(frozen=True, slots=True)
class PreparedPiece:
    """The examples of a piece, ready to pack.

    Attributes:
        tokens: within `max_length`, each with something to train.
        example_ids: int64[N], global number of each example's row.
        ledger: what became of its rows and tokens, packing aside.
        rejects: in order of their rows.
        engine_equal: the tokenizer engine equals the oracle on a sample.
    """

    tokens: TokenBatch
    example_ids: Int64
    ledger: Ledger
    rejects: list[Reject]
    engine_equal: bool


def prepare_piece(stages: Stages, piece: Piece, *, gate: bool = False) -> PreparedPiece:
    """Read, convert, render, encode, mask and cut the rows of one piece.

    Args:
        gate: hold the engine against the oracle on a sample of the texts.
    """
    job, config = stages.job, stages.job.config
    rows, unreadable = read_slice(piece.slice, config.max_line_bytes)
    converted = convert_rows(rows, job.formats[piece.source], job.options)
    tokens, faults, counts, equal = tokenize(stages, converted, gate=gate)
    tokens, marker_faults, warned = stages.mask(tokens)
    faults = [*converted.faults, *faults, *marker_faults]
    kept, cut = cut_length(job, piece, rows, tokens)

    ledger = Ledger(
        rows_in=len(rows) + len(unreadable),
        rows_kept=len(np.unique(kept.row)),
        rows_rejected=dict(Counter(fault.code for _, fault in faults) + Counter(row.fault.code for row in unreadable)),
        rows_filtered={"formatter": len(converted.filtered)} if len(converted.filtered) else {},
        rows_dropped=cut.rows_dropped,
        tokens_in=len(tokens.input_ids),
        tokens_cut={config.overlong: cut.tokens_cut} if cut.tokens_cut else {},
        tokens_in_dropped_rows=sum(cut.tokens_in_dropped_rows.values()),
        counters=dict(counts + Counter(warned) + Counter(cut.counters)),
    )
    ledger.count_lengths(tokens.lengths)
    ledger.counters |= {f"column_unused:{name}": len(rows) for name in converted.unused}
    rejects = make_rejects(list(job.sources)[piece.source], rows, unreadable, faults)
    return PreparedPiece(kept, rows.example_ids[kept.row], ledger, rejects, equal)


def cut_length(job: Job, piece: Piece, rows: RowBatch, tokens: TokenBatch) -> tuple[TokenBatch, LengthCounts]:
    """Apply the over-long policy; the one cut stream of `wrapped` has room for any example.

    Raises:
        DataError: an example is over-long and the policy is "error".
    """
    limit = None if job.config.packing == "wrapped" else job.max_length
    try:
        return limit_length(tokens, limit, job.config.overlong, packed=job.packed)
    except OverlongError as error:
        where = f"{piece.slice.source.path}:{rows.lines[error.row]}"
        raise DataError(f"{where}: {error.message}", error.fix) from None


def tokenize(
    stages: Stages, converted: Converted, *, gate: bool
) -> tuple[TokenBatch, list[tuple[int, Fault]], Counter[str], bool]:
    """Render and encode canonical rows.

    Returns:
        the tokens in the order of their rows, faults, counts, and whether the engine equals the oracle on a sample.
    """
    given = np.array([isinstance(row, Tokens) for row in converted.rows], np.bool_)
    texts = [row for row in converted.rows if not isinstance(row, Tokens)]
    rendered = render_rows(texts, converted.row[~given], stages.renderer)
    batch, faults = encode_tokens_rows(
        [row for row in converted.rows if isinstance(row, Tokens)], converted.row[given], stages.job.tokenizer
    )
    parts, counts = [batch], Counter(rendered.counts)
    for part in (rendered.conversations, rendered.raw):
        if part is not None:
            batch, encoded = encode_batch(part, stages.encoder, boundary=stages.job.config.boundary)
            parts.append(batch)
            counts.update(asdict(encoded))
    equal = not gate or (stages.gate(rendered.conversations) and stages.gate(rendered.raw))
    return TokenBatch.join(parts).in_row_order(), [*rendered.faults, *faults], counts, equal


def make_rejects(name: str, rows: RowBatch, unreadable: list[Unreadable], faults: list[tuple[int, Fault]]) -> list[Reject]:
    """Return the rejects of a piece in the order of their lines; a formatter's rows come as they were read."""
    rejects = [(row.line, row.byte_offset, row.fault, row.raw) for row in unreadable] + [
        (int(rows.lines[index]), int(rows.byte_offsets[index]), fault, rows.rows[index]) for index, fault in faults
    ]
    return [
        Reject(file=name, line=line, byte_offset=offset, code=fault.code, reason=fault.reason, fix=fault.fix, row=row)
        for line, offset, fault, row in sorted(rejects, key=lambda reject: reject[:2])
    ]


def conclude(plan: Plan, results: list[SliceResult], build: Build) -> Manifest:
    """Merge what the slices counted, hold it against the limits, and say what the set is.

    Raises:
        DataError: too many rejected rows, or nothing to train on.
        IntegrityError: rows or tokens are unaccounted for.
    """
    ledger = Ledger()
    for result in results:
        ledger.merge(result.ledger)
    ledger.check("prepare")
    build.write_rejects(result.index for result in results)
    refuse_losses(plan.job.config, ledger, build)
    tokenizer, template = plan.job.tokenizer, plan.job.tokenizer.chat_template
    return Manifest(
        settings=msgspec.to_builtins(plan.identity()) | {"inputs": list(plan.job.config.inputs), "tokenizer": tokenizer.name},
        tokenizer=TokenizerInfo(
            name=tokenizer.name,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            pad_id=plan.job.pad_id,
            bos_id=tokenizer.bos_id,
            tokens_added=tuple(token for token, _ in tokenizer.tokens_added),
        ),
        chat_template_sha256=hashlib.sha256(template.encode()).hexdigest() if template is not None else None,
        sources=tuple(
            SourceInfo(name=name, bytes=source.raw_bytes, xxh3=source.xxh3_128, rows=source.records, first_id=source.base_id)
            for name, source in zip(plan.job.sources, plan.sources, strict=True)
        ),
        ledger=ledger,
        shards=tuple(shard for result in results for shard in result.shards),
        notes=plan.notes,
        software={name: version(name) for name in ("sftdata", "tokenizers", "pyarrow")},
    )


def refuse_losses(config: PrepareConfig, ledger: Ledger, build: Build) -> None:
    """Fail a run that lost too much; what was done stays for a resume.

    Raises:
        DataError: more rows rejected than `max_rejects` allows, or no trained token at all.
    """
    rejected, worst = sum(ledger.rows_rejected.values()), Counter(ledger.rows_rejected).most_common(3)
    share = config.max_rejects.removesuffix("%")
    allowed = float(share) / 100 * ledger.rows_in if share != config.max_rejects else float(share)
    said = ", ".join(f"{count} {code}" for code, count in worst)
    if rejected > allowed:
        example = build.first_reject(worst[0][0])
        without = f", or go on without them: --max-rejects {rejected}" if rejected < ledger.rows_in else ""
        raise DataError(
            f"{rejected} of {ledger.rows_in} rows rejected ({said}); --max-rejects allows {config.max_rejects}."
            f" {example.file}:{example.line}: {example.reason.rstrip('.')}.",
            f"{example.fix.rstrip('.')}{without}. All are in {build.folder / REJECTS_NAME}.",
        )
    if not ledger.tokens_trained:
        dropped = Counter(ledger.rows_dropped).most_common(3)
        lost = ", ".join(f"{count} {reason}" for reason, count in dropped) or said
        raise DataError(
            f"No token to train on: {ledger.rows_in} rows in, {lost or 'none of them kept'}.",
            UNTRAINED_FIXES[dropped[0][0]] if dropped else "see `sftdata preview`.",
        )
