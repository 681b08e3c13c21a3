"""A run, from its settings to a finished set: plan, map `prepare_shard` over the tasks, the manifest last.

What happens to the rows is in pipeline.py. Here is what happens around them: an old set, an unfinished
one, a choice of engine, the limits of loss, and the manifest.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from itertools import chain

import msgspec

from sftdata.config import PrepareConfig
from sftdata.encode.engine import digest_ids, load_encoder
from sftdata.engine.local import Workers
from sftdata.errors import DataError, UsageError
from sftdata.meter import Progress
from sftdata.paths import behind_links, without_folders
from sftdata.pipeline import prepare_shard
from sftdata.plan import Plan, make_plan
from sftdata.shardset.build import Build, ShardResult, finished_set
from sftdata.shardset.ledger import Ledger
from sftdata.shardset.lists import DROPPED_NAME, REJECTS_NAME, first_reject
from sftdata.shardset.manifest import Manifest, SourceInfo, TokenizerInfo
from sftdata.stages import load_engine, load_shared, load_stages
from sftdata.version import __version__

# The fix for a set that has lost all rows for one reason.
UNTRAINED_FIXES = {
    "formatter": "let the --formatter function return more rows; None leaves one out.",
    "nothing-trained": "switch turns on in the data (weight, train); where none is switched off, --train-on all.",
    "over-long": "--overlong truncate, or a larger --max-length.",
    "no-trained-tokens": "a larger --max-length, or --overlong truncate-left, which keeps the ends.",
}

ROW_BYTES = 8  # an id and a label for each token of a row
PADDING_NOTED = 1 << 23  # tokens

OnProgress = Callable[[Progress], object]


def prepare(
    config: PrepareConfig,
    workers: Workers,
    progress: OnProgress | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Manifest:
    """Build a set: plan, prepare every task that is not done, write the manifest, put the set in its place.

    Args:
        config: the settings.
        workers: of `launch.start_workers`.
        progress: called after each task.
        say: told, in one sentence each, what was decided for the user.

    Raises:
        SftError: whatever stops the run; finished tasks are kept, and the same command goes on from there.
    """
    config = config.model_copy(update={"output": behind_links(config.output)})
    old = finished_set(config.output, overwrite=config.overwrite)
    plan = make_plan(config, lambda tokenizer: workers.begin(load_engine, (tokenizer, config.engine)), say)
    for note in plan.notes:
        say(note)
    note_padding(plan, say)
    return build_set(config, plan, old, workers, progress, say)


def note_padding(plan: Plan, say: Callable[[str], object]) -> None:
    """Say what rows cost that will be padding for the most part, before they are built."""
    length, rows = plan.job.row_length or 0, len(plan.tasks)
    if length * rows > max(4 * plan.size, PADDING_NOTED):
        cost = f"{length * rows * ROW_BYTES / 1e9:.1f} GB of rows that are padding for the most part"
        say(f"max_length is {length:,} tokens, and all the input is {plan.size:,} bytes: {cost}.")


def build_set(
    config: PrepareConfig,
    plan: Plan,
    old: Manifest | None,
    workers: Workers,
    progress: OnProgress | None,
    say: Callable[[str], object],
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
        say(f"Engine: {plan.job.engine}, {plan.engine_reason}.")
        done = build.start(plan.identity(), overwrite=config.overwrite)
        if done:
            say(f"Resuming: {len(done)}/{len(plan.tasks)} slices complete; settings match.")
        with build.refusable():
            results, agreed = run_tasks(plan, done, workers, progress)
            if not agreed:
                say(
                    f"{plan.job.engine} gives other ids than tokenizers on this data; starting over with tokenizers."
                )
                build.clear()
                plan = plan.by_reference()
                build.start(plan.identity(), overwrite=True)
                results, _ = run_tasks(plan, {}, workers, progress)
            return build.finish(conclude(plan, results, build), plan.job.tokenizer.folder)


def run_tasks(
    plan: Plan, done: dict[int, ShardResult], workers: Workers, progress: OnProgress | None
) -> tuple[list[ShardResult], bool]:
    """Prepare what is not done; return all results in order, and whether the engine equals the reference."""
    todo = [task for task in plan.tasks if task.index not in done]
    coming = workers.map(prepare_shard, plan.job, todo, load_shared)
    # Loaded here and now, while the workers get ready: one oracle serves all tasks.
    oracle = None if plan.job.engine == "tokenizers" else load_encoder(plan.job.tokenizer, "tokenizers")
    results, agreed, now = {}, True, Progress(0, len(todo), 0, 0)
    for result in chain(done.values(), coming):
        if oracle is not None and result.sample:
            agreed &= digest_ids(oracle, result.sample) == result.sample_xxh3
        results[result.index] = msgspec.structs.replace(result, sample=(), sample_xxh3="")
        if progress and result.index not in done:
            now = Progress(
                now.done + 1, now.total, now.tokens + result.ledger.tokens, now.rejected + result.rejects
            )
            progress(now)
    return [results[task.index] for task in plan.tasks], agreed


def conclude(plan: Plan, results: list[ShardResult], build: Build) -> Manifest:
    """Merge what the tasks counted, hold it against the limits, and say what the set is.

    Raises:
        DataError: too many rejected rows, or nothing to train on.
        IntegrityError: rows or tokens are unaccounted for.
    """
    ledger = Ledger()
    for result in results:
        ledger.merge(result.ledger)
    ledger.check("prepare")
    blank = sum(source.records for source in plan.sources) - ledger.rows_in
    build.write_lists([result.index for result in results])
    refuse_losses(plan.job.config, ledger, build)
    tokenizer, template = plan.job.tokenizer, plan.job.tokenizer.chat_template
    notes = (*plan.notes, *(load_stages(plan.job).token_notes() if ledger.counters.get("turns") else ()))
    return Manifest(
        settings=msgspec.to_builtins(plan.identity())
        | {
            "inputs": list(map(without_folders, plan.job.config.inputs)),
            "tokenizer": without_folders(tokenizer.name),
        },
        tokenizer=TokenizerInfo(
            name=without_folders(tokenizer.name),
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.filler_id,
            bos_id=tokenizer.bos_id,
            tokens_added=tuple(token for token, _ in tokenizer.tokens_added),
        ),
        chat_template_sha256=hashlib.sha256(template.encode()).hexdigest() if template is not None else None,
        sources=tuple(
            SourceInfo(
                name=name,
                bytes=source.raw_bytes,
                xxh3=source.xxh3_128,
                rows=source.records,
                first_id=source.base_id,
                unit=source.source.unit,
            )
            for name, source in zip(plan.job.sources, plan.sources, strict=True)
        ),
        ledger=ledger,
        shards=tuple(shard for result in results for shard in result.shards),
        notes=tuple(map(without_folders, notes)),
        blank_lines=blank,
        software={"sftdata": __version__} | {name: version(name) for name in ("tokenizers", "pyarrow")},
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
        example = first_reject(build.folder, worst[0][0])
        without = f", or go on without them: --max-rejects {rejected}" if rejected < ledger.rows_in else ""
        raise DataError(
            f"{rejected} of {ledger.rows_in} rows rejected ({said}); --max-rejects allows {config.max_rejects}."
            f" {example.place}: {example.reason.rstrip('.')}.",
            f"{example.fix.rstrip('.')}{without}. All are in {build.folder / REJECTS_NAME}.",
        )
    if not ledger.rows_in:
        raise DataError(f"{', '.join(config.inputs)}: no rows.", "give a file that holds rows.")
    if not ledger.tokens_trained:
        dropped = Counter(ledger.rows_dropped | ledger.rows_filtered).most_common(3)
        lost = ", ".join(f"{count} {reason}" for reason, count in dropped) or said
        raise DataError(
            f"No token to train on: {ledger.rows_in} rows in, {lost or 'none of them kept'}.",
            f"{UNTRAINED_FIXES[dropped[0][0]]} All are in {build.folder / DROPPED_NAME}."
            if dropped
            else f"see {build.folder / REJECTS_NAME}.",
        )
