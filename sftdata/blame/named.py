"""The worst documents of a run by name: file and line, loss, and how the answer begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from sftdata.batches import IGNORE_INDEX
from sftdata.blame.log import DocumentLosses, TrainedSet, read_legs, read_log
from sftdata.blame.worst import Excess, Ranking, Steps, find_excess, find_steps, rank_documents, rank_step
from sftdata.errors import SftError, UsageError, place
from sftdata.set.local import beside, named
from sftdata.set.manifest import SourceInfo, in_first_pass, tell_apart
from sftdata.set.opened import ShardSet, open_set
from sftdata.vocabulary import Vocabulary, read_vocabulary

EXCERPT = 200  # characters of an answer
MOST_SPIKES = 10
OF_A_SPIKE = 3  # documents


@dataclass(frozen=True, slots=True)
class Blamed:
    """A document that stands out.

    Attributes:
        place: file and line in words, with the set's name where another set has a file of that name.
        source: as `sftdata stats` names it.
        line: 1-based line, record or row in it.
        set: folder of the set.
        example_id: in this set.
        row: a packed row of it that holds the document.
        seen: how often.
        first_step, last_step: when.
        tokens, trained: of all the times together.
        loss: of a trained token.
        over: above the documents of the steps around, see `sftdata.blame.worst`.
        score: the same; None for those of one step.
        raised: by how much it raised the loss of its step; None for those of a whole run.
        excerpt: how what is trained of it begins.
    """

    place: str
    source: str
    line: int
    set: str
    example_id: int
    row: int
    seen: int
    first_step: int
    last_step: int
    tokens: int
    trained: int
    loss: float
    over: float
    score: float | None
    raised: float | None
    excerpt: str

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data; what is no finite number is None."""
        plain = asdict(self)
        return {
            key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in plain.items()
        }


@dataclass(frozen=True, slots=True)
class BlamedStep:
    """A step and its documents.

    Attributes:
        step: from 1.
        loss: of a trained token.
        before: median of the steps before.
        documents: those that raised it most.
    """

    step: int
    loss: float
    before: float
    documents: tuple[Blamed, ...]

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data; what is no finite number is None."""
        loss = self.loss if np.isfinite(self.loss) else None
        documents = [document.to_json() for document in self.documents]
        return {"step": self.step, "loss": loss, "before": self.before, "documents": documents}


class LoggedRun:
    """The log of a run's documents, and the sets that it trained on.

    Args:
        folder: of the run.
        sets: where its sets lie now, should they have been moved.

    Attributes:
        sets: that it trained on, in all of its legs.
        losses: `set` is an index into these.
        opened: of the sets those that are there, by number.
        gone: why the others cannot be read, by number; their documents count, but have no names.

    Raises:
        UsageError: the run has no such log, none of its sets is there, or it did not train on one of `sets`.
    """

    def __init__(self, folder: Path, sets: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.sets, self.losses = read_log(folder)
        self._given = {opened.manifest.digest: opened for opened in map(open_set, sets)}
        strange = [one for digest, one in self._given.items() if digest not in {s.digest for s in self.sets}]
        if strange:
            digests = ", ".join(one.digest[:12] for one in self.sets)
            raise UsageError(
                f"{strange[0].folder}: digest {strange[0].manifest.digest[:12]};"
                f" {folder} was trained on {digests}.",
                "name the sets of this run.",
            )
        self.opened: dict[int, ShardSet] = {}
        self.gone: dict[int, UsageError] = {}
        for number, trained in enumerate(self.sets):
            try:
                self.opened[number] = self._find(trained)
            except UsageError as error:
                self.gone[number] = error
        if not self.opened:
            raise self.gone[0]
        self._sources = self._told_apart()
        self._vocabularies: dict[int, Vocabulary | None] = {}

    def _told_apart(self) -> dict[tuple[int, int], SourceInfo]:
        """Return the sources under names that tell them from those of other sets, by set and first id."""
        sources = [(opened.folder, opened.manifest.sources) for opened in self.opened.values()]
        return {
            (number, source.first_id): replace(source, name=name)
            for number, names in zip(self.opened, tell_apart(sources), strict=True)
            for source, name in zip(self.opened[number].manifest.sources, names, strict=True)
            if source.rows  # an empty file shares its first id with the next one
        }

    @cached_property
    def excess(self) -> Excess:
        """How far the losses lie above those around them."""
        return find_excess(self.losses)

    @cached_property
    def steps(self) -> Steps:
        """Every step and its loss."""
        return find_steps(self.losses)

    @cached_property
    def ranking(self) -> Ranking:
        """All documents, the worst first; one that a mixture goes through again is one."""
        return rank_documents(self._without_passes(), self.excess)

    def unnamed(self) -> Iterator[str]:
        """Yield which documents have no names since their set is gone, in words."""
        for number, error in self.gone.items():
            count = len(np.unique(self.losses.example_id[self.losses.set == number]))
            lacks = f"document{'s have' if count != 1 else ' has'} no name here"
            yield f"{error.message} {count:,} {lacks}; if the set was moved, `--sets DIR` names them."

    def held(self, documents: Sequence[Blamed]) -> list[list[tuple[int, int]]]:
        """Return for each document the sets, and its ids in them, of the last leg that has any of them.

        Legs have most documents in common: one that this leg lacks has none, and none is there twice.
        """
        numbers = {one.digest: number for number, one in enumerate(self.sets)}
        legs = (
            [numbers[digest] for digest in leg if numbers[digest] in self.opened]
            for leg in read_legs(self.folder)
        )
        found = ([self._places(document, leg) for document in documents] for leg in legs)
        return next(filter(any, found), [])

    def _places(self, document: Blamed, leg: Sequence[int]) -> list[tuple[int, int]]:
        """Return a document in the sets of a leg: in its own, or by the name and the bytes of its source."""
        own = next(number for number, opened in self.opened.items() if named(opened.folder) == document.set)
        if own in leg:
            return [(own, document.example_id)]
        bytes_of = {source.name: source.xxh3 for source in self.opened[own].manifest.sources}
        key = document.source.rpartition("/")[2], bytes_of[document.source]
        return [
            (number, source.first_id + document.line - 1)
            for number in leg
            for source in self.opened[number].manifest.sources
            if (source.name.rpartition("/")[2], source.xxh3) == key
        ]

    def worst(self, count: int) -> tuple[Blamed, ...]:
        """Name the worst documents of the run."""
        return tuple(self._named(self.ranking, index) for index in self._there(self.ranking, count))

    def step(self, step: int, count: int) -> BlamedStep:
        """Name the documents that raised the loss of a step most.

        Raises:
            UsageError: the log has no such step.
        """
        at = int(np.searchsorted(self.steps.step, step))
        if at == len(self.steps.step) or self.steps.step[at] != step:
            first, last = self.steps.step[0], self.steps.step[-1]
            what = f"{self.folder}: no documents of step {step}; it logged those of steps {first} to {last}."
            raise UsageError(what, "--step with one of these.")
        found, raised = rank_step(self.losses, self.excess, step)
        documents = tuple(
            self._named(found, index, float(raised[index])) for index in self._there(found, count)
        )
        return BlamedStep(step, float(self.steps.loss[at]), float(self.steps.before[at]), documents)

    def spikes(self) -> Iterator[BlamedStep]:
        """Yield the steps whose loss jumped most, in order; of jumps in a row the first."""
        steps = self.steps
        begins = steps.spike & ~np.append(False, steps.spike[:-1])
        jump = np.where(np.isfinite(steps.loss), steps.loss - steps.before, np.inf)
        chosen = np.flatnonzero(begins)
        for index in np.sort(chosen[np.argsort(-jump[chosen], kind="stable")][:MOST_SPIKES]):
            yield self.step(int(steps.step[index]), OF_A_SPIKE)

    def _there(self, found: Ranking, count: int) -> list[int]:
        """Return which documents come first, of those whose set is there."""
        there: list[int] = np.flatnonzero(np.isin(found.set, [*self.opened]))[:count].tolist()
        return there

    def _without_passes(self) -> DocumentLosses:
        """Return the losses under the ids of the first pass over each source."""
        ids = self.losses.example_id.copy()
        for number, opened in self.opened.items():
            mine = self.losses.set == number
            if mine.any():
                ids[mine] = in_first_pass(opened.manifest.sources, ids[mine])
        return dataclasses.replace(self.losses, example_id=ids)

    def _named(self, found: Ranking, index: int, raised: float | None = None) -> Blamed:
        number = int(found.set[index])
        opened = self.opened[number]
        example = int(in_first_pass(opened.manifest.sources, found.example_id[index : index + 1])[0])
        row = int(found.row[index])
        source, line = opened.origin(example)
        told = self._sources[number, example - line + 1]
        return Blamed(
            place=place(told.name, line, told.unit),
            source=source,
            line=line,
            set=named(opened.folder),
            example_id=example,
            row=row,
            seen=int(found.seen[index]),
            first_step=int(found.first[index]),
            last_step=int(found.last[index]),
            tokens=int(found.tokens[index]),
            trained=int(found.trained[index]),
            loss=float(found.loss[index]),
            over=float(found.over[index]),
            score=None if raised is not None else float(found.score[index]),
            raised=raised,
            excerpt=self._excerpt(number, example, row),
        )

    def _excerpt(self, number: int, example: int, row: int) -> str:
        """Return how what is trained of a document begins; empty where the set brings no tokenizer."""
        opened = self.opened[number]
        if number not in self._vocabularies:
            self._vocabularies[number] = None
            with suppress(UsageError):
                self._vocabularies[number] = read_vocabulary(opened.folder / "tokenizer")
        vocabulary, manifest = self._vocabularies[number], opened.manifest
        if vocabulary is None:
            return ""
        for document in opened[row].documents():
            if int(in_first_pass(manifest.sources, np.array([document.example_id]))[0]) == example:
                ids = document.input_ids[document.labels != IGNORE_INDEX][:EXCERPT].tolist()
                return " ".join(vocabulary.text_of(ids).split())[:EXCERPT]
        return ""

    def _find(self, trained: TrainedSet) -> ShardSet:
        if trained.digest in self._given:
            return self._given[trained.digest]
        reasons = []
        for folder in dict.fromkeys((trained.path, beside(self.folder, trained.beside))):
            try:
                opened = open_set(folder)
                if opened.manifest.digest == trained.digest:
                    opened[0]  # the sets are there, too, whose rows a view by index holds
                    return opened
                reasons.append(f"{folder}: holds another set, of digest {opened.manifest.digest[:12]}.")
            except SftError as error:
                reasons.append(error.message)
        found = f"{self.folder}: was trained on a set of digest {trained.digest[:12]}, which is not there"
        raise UsageError(f"{found}: {reasons[-1]}", "name the folder where it lies now: `--sets DIR`.")
