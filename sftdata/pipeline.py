"""From chunks of the input to a shard. Read me first.

    make_plan:      inputs -> sources -> format of each, chat template, tokenizer, shard tasks by input size     (plan.py)
    prepare_shard:  chunks -> rows -> canonical rows -> texts + spans -> tokens + trained -> packs -> shard
    prepare:        plan, map prepare_shard over the tasks on any engine, then the manifest, last              (run.py)

A shard is a pure function of the plan and its task, so workers, engines, kills and resumes cannot change a byte.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from sftdata.batches import EXAMPLES, Int64, RowBatch, Tally, TokenBatch, Tokens
from sftdata.encode.length import LengthCounts, OverlongError, limit_length
from sftdata.errors import DataError, Fault
from sftdata.masks.texts import render_rows
from sftdata.masks.tokens import encode_batch, read_given
from sftdata.pack import gather, plan_packs
from sftdata.plan import Job, ShardTask
from sftdata.read.convert import Converted, convert_rows
from sftdata.read.source import Chunk, Unreadable, read_chunk
from sftdata.shardset.build import Build, ShardResult
from sftdata.shardset.ledger import Ledger
from sftdata.shardset.lists import COUNTED_NAME, DROPPED_NAME, LISTS, Dropped, counted_rows, encode_lines
from sftdata.shardset.rejects import REJECTS_NAME, Reject, encode_reject
from sftdata.shardset.shards import shard_name, write_shard
from sftdata.stages import Stages, load_stages


def prepare_shard(job: Job, task: ShardTask) -> ShardResult:
    """Turn the chunks of one task into one shard, and commit it."""
    stages = load_stages(job)
    build = Build(job.config.output)
    ledger, examples, ids = Ledger(), [], []
    texts: list[str] = []
    lists = dict.fromkeys(LISTS, b"")
    for chunk in task.chunks:
        done = prepare_chunk(stages, chunk)
        texts = texts or done.texts
        ledger.merge(done.ledger)
        for name, lines in done.lists().items():
            lists[name] += lines
        examples.append(done.tokens)
        ids.append(done.example_ids)
    tokens, example_ids = TokenBatch.join(examples), np.concatenate(ids)
    examples.clear()  # free the inputs: memory peaks below
    packs = plan_packs(tokens.lengths, job.max_length, job.config.packing)
    rows = gather(
        tokens,
        example_ids,
        packs,
        job.row_length,
        job.tokenizer.filler_id,
        weighted=job.config.loss_weights,
    )
    ledger.count_packed(rows, job.row_length, job.sources)
    shards = (write_shard(build.folder / shard_name(task.index), rows, job.row_length),) if len(rows) else ()
    sample, digest = stages.sample(texts)
    rejects = sum(ledger.rows_rejected.values())
    result = ShardResult(
        index=task.index, shards=shards, ledger=ledger, rejects=rejects, sample=sample, sample_xxh3=digest
    )
    build.commit(result, lists)
    return result


@dataclass(frozen=True, slots=True)
class PreparedChunk:
    """The examples of a chunk, ready to pack.

    Attributes:
        tokens: within `max_length`, each with something to train.
        example_ids: int64[N], global number of each example's row.
        ledger: what became of its rows and tokens, packing aside.
        rejects, dropped: in order of their rows.
        counted: int64[M], ids of the rows behind each counter.
        texts: as rendered.
    """

    tokens: TokenBatch
    example_ids: Int64
    ledger: Ledger
    rejects: list[Reject]
    dropped: list[Dropped]
    counted: dict[str, Int64]
    texts: list[str]

    def lists(self) -> dict[str, bytes]:
        """Return its lines of each list of the set."""
        rejects = b"".join(map(encode_reject, self.rejects))
        counted = encode_lines(counted_rows(self.counted))
        return {REJECTS_NAME: rejects, DROPPED_NAME: encode_lines(self.dropped), COUNTED_NAME: counted}


def prepare_chunk(stages: Stages, chunk: Chunk) -> PreparedChunk:
    """Read, convert, render, encode, mask and cut the rows of one chunk."""
    job, config = stages.job, stages.job.config
    rows, unreadable = read_chunk(chunk, config.max_line_bytes)
    converted = convert_rows(rows, job.formats[chunk.number], job.options)
    tokens, faults, tally, texts = tokenize(stages, converted)
    tokens, marker_faults = job.mask.flags(tokens, tally)
    faults = [*converted.faults, *faults, *marker_faults]
    kept, cut = cut_length(job, chunk, rows, tokens)

    counted = {name: rows.example_ids[np.unique(indices)] for name, indices in tally.rows.items() if indices}

    ledger = Ledger(
        rows_in=len(rows) + len(unreadable),
        rows_kept=len(np.unique(kept.row)),
        rows_rejected=dict(
            Counter(fault.code for _, fault in faults) + Counter(row.fault.code for row in unreadable)
        ),
        rows_filtered={"formatter": len(converted.filtered)} if len(converted.filtered) else {},
        rows_dropped=cut.rows_dropped,
        tokens_in=len(tokens.input_ids),
        tokens_cut={config.overlong: cut.tokens_cut} if cut.tokens_cut else {},
        tokens_in_dropped_rows=sum(cut.tokens_in_dropped_rows.values()),
        counters=dict(tally.counts + Counter(cut.counters)),
        examples={
            name: rows.example_ids[found[:EXAMPLES]].tolist() for name, found in tally.rows.items() if found
        },
    )
    ledger.count_lengths(tokens.lengths)
    ledger.counters |= {f"column_unused:{name}": count for name, count in converted.unused.items()}
    rejects = make_rejects(stages.names[chunk.number], chunk, rows, unreadable, faults)
    gone = [*((index, "formatter", None) for index in converted.filtered.tolist()), *cut.dropped]
    dropped = make_dropped(stages.names[chunk.number], chunk, rows, gone)
    return PreparedChunk(kept, rows.example_ids[kept.row], ledger, rejects, dropped, counted, texts)


def cut_length(job: Job, chunk: Chunk, rows: RowBatch, tokens: TokenBatch) -> tuple[TokenBatch, LengthCounts]:
    """Apply the over-long policy; the one cut stream of `wrapped` has room for any example.

    Raises:
        DataError: an example is over-long and the policy is "error".
    """
    limit = None if job.config.packing == "wrapped" else job.max_length
    try:
        return limit_length(tokens, limit, job.config.overlong)
    except OverlongError as error:
        where = chunk.place(int(rows.example_ids[error.row]), int(rows.lines[error.row]))
        raise DataError(f"{where}: {error.message}", error.fix) from None


def tokenize(
    stages: Stages, converted: Converted
) -> tuple[TokenBatch, list[tuple[int, Fault]], Tally, list[str]]:
    """Render and encode canonical rows.

    Returns:
        the tokens in the order of their rows, faults, what was counted, and the rendered texts.
    """
    given = np.array([isinstance(row, Tokens) for row in converted.rows], np.bool_)
    texts = [row for row in converted.rows if not isinstance(row, Tokens)]
    rendered = render_rows(texts, converted.row[~given], stages.renderer)
    batch, faults = read_given(
        [row for row in converted.rows if isinstance(row, Tokens)], converted.row[given], stages.job.tokenizer
    )
    parts, tally, encoded_texts = [batch], rendered.tally, list[str]()
    for part in (rendered.conversations, rendered.raw):
        if part is not None:
            batch, encoded = encode_batch(part, stages.encoder, boundary=stages.job.config.boundary)
            parts.append(batch)
            tally.counts.update(asdict(encoded))
            encoded_texts += part.texts
    return TokenBatch.join(parts).in_row_order(), [*rendered.faults, *faults], tally, encoded_texts


def make_dropped(
    name: str, chunk: Chunk, rows: RowBatch, gone: list[tuple[int, str, int | None]]
) -> list[Dropped]:
    """Return what is listed of rows that are left out: index in the batch, reason and tokens of each."""
    return [
        Dropped(
            file=name,
            line=chunk.line_of(int(rows.lines[index])),
            record=chunk.record_of(int(rows.example_ids[index])),
            reason=reason,
            tokens=tokens,
        )
        for index, reason, tokens in sorted(gone, key=lambda row: row[0])
    ]


def make_rejects(
    name: str, chunk: Chunk, rows: RowBatch, unreadable: list[Unreadable], faults: list[tuple[int, Fault]]
) -> list[Reject]:
    """Return the rejects of a chunk in the order of their rows; a formatter's rows come as they were read."""
    rejects = [(row.example_id, row.line, row.byte_offset, row.fault, row.raw) for row in unreadable] + [
        (
            int(rows.example_ids[index]),
            int(rows.lines[index]),
            int(rows.byte_offsets[index]),
            fault,
            rows.rows[index],
        )
        for index, fault in faults
    ]
    return [
        Reject(
            file=name,
            line=chunk.line_of(line),
            record=chunk.record_of(example_id),
            byte_offset=offset,
            code=fault.code,
            reason=fault.reason,
            fix=fault.fix,
            row=row,
        )
        for example_id, line, offset, fault, row in sorted(rejects, key=lambda reject: reject[0])
    ]
