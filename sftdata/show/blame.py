"""What `sftdata blame` prints and writes: documents as lines, as JSON, and as a list to leave out."""

from __future__ import annotations

import math
import shlex
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from sftdata.blame.named import Blamed, BlamedStep, LoggedRun
from sftdata.errors import UsageError
from sftdata.output import counted, one_line
from sftdata.set.local import named
from sftdata.set.store import write_atomic
from sftdata.views.bases import open_bases
from sftdata.views.plan import sources_of
from sftdata.views.recipe import drop_line

_SHOWN = 72  # characters of an excerpt on a terminal


def blame_lines(
    run: LoggedRun, documents: Sequence[Blamed], step: BlamedStep | None, spikes: Sequence[BlamedStep]
) -> Iterator[str]:
    """Yield what is printed of a run, or of one of its steps."""
    if step is not None:
        yield f"{one_line(str(run.folder))}, {_headline(step)}: what raised it most"
    else:
        steps, losses = run.steps, run.losses
        yield (
            f"{one_line(str(run.folder))}: {counted(len(losses), 'document')} in steps {steps.step[0]:,} to"
            f" {steps.step[-1]:,}, {len(run.ranking):,} of them different; the worst"
        )
    for number, document in enumerate(documents, start=1):
        yield f"{number:>3}  {one_line(document.place)}  {_figures(document)}"
        if document.excerpt:
            yield f"     {_short(document.excerpt)}"
    if spikes:
        yield f"The loss jumped {counted(len(spikes), 'time')}:"
    for spike in spikes:
        yield f"  {_headline(spike)}"
        for document in spike.documents:
            yield f"       {one_line(document.place)}  {_figures(document)}"
    yield from map(one_line, run.unnamed())


def _headline(step: BlamedStep) -> str:
    return f"step {step.step:,}: loss {step.loss:.3f}, {step.before:.3f} in the steps before"


def _figures(document: Blamed) -> str:
    """Return what is known of a document, in words."""
    if document.raised is not None:
        where = f"raised it by {document.raised:.3f}"
    else:
        steps = f"step {document.first_step:,}"
        if document.seen > 1:
            steps = (
                f"{counted(document.seen, 'time')} in steps {document.first_step:,} to {document.last_step:,}"
            )
        where = f"score {document.score:.2f}; {steps}"
    over = f"{document.over:.2f} over its steps" if math.isfinite(document.over) else "no finite number"
    size = f"{document.trained:,} of {counted(document.tokens, 'token')} trained"
    return f"loss {document.loss:.2f}, {over}, {where}; {size}"


def _short(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def blame_json(
    run: LoggedRun, documents: Sequence[Blamed], step: BlamedStep | None, spikes: Sequence[BlamedStep]
) -> dict[str, object]:
    """Return plain JSON data: the step that was asked for, or the worst of the run and its spikes."""
    if step is not None:
        return {"run": str(run.folder), **step.to_json(), "unnamed": [*run.unnamed()]}
    return {
        "run": str(run.folder),
        "steps": len(run.steps.step),
        "seen": len(run.losses),
        "documents": [document.to_json() for document in documents],
        "spikes": [spike.to_json() for spike in spikes],
        "unnamed": [*run.unnamed()],
    }


def write_list(run: LoggedRun, documents: Sequence[Blamed], path: Path) -> Iterator[str]:
    """Write documents as `sftdata view --drop` reads them; yield what to do with it.

    A source is called what a view of the sets that hold them calls it: those of the run's last leg.

    Raises:
        UsageError: there is nothing to list.
        SftError: these sets make no view together, or the file cannot be written.
    """
    if not documents:
        raise UsageError(f"{run.folder}: nothing was trained there that could be listed.", "leave -o out.")
    held = run.held(documents)
    folders = {
        number: named(run.opened[number].folder)
        for number in sorted({one for part in held for one, _ in part})
    }
    bases = open_bases([*folders.values()])
    sources = sources_of(bases)
    first = {named(base.folder): base.first_id for base in bases}
    lines = []
    for number, own in (place for part in held for place in part):
        example = first[folders[number]] + own
        index = bisect_right(sources, example, key=lambda source: source.first_id) - 1
        while not sources[index].rows:  # an empty file shares its first id with the next one
            index -= 1
        lines.append(drop_line(sources[index].name, example - sources[index].first_id + 1, example))
    text = "".join(f"{line}\n" for line in dict.fromkeys(lines))
    write_atomic(path, lambda sink: sink.write(text.encode()))
    command = ["sftdata", "view", *folders.values(), "-o", "NEW", "--drop", str(path)]
    count = len({*lines})
    yield f"Wrote {path}: {counted(count, 'document')}. Leave them out: {shlex.join(command)}"
    if lost := sum(not part for part in held):
        yield f"{lost} of those named {'is' if lost == 1 else 'are'} in none of these sets, and not listed."
