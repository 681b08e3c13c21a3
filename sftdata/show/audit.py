"""The audit: tokens that are trained, or left untrained, by accident. It finds, and changes nothing."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import msgspec
import numpy as np

from sftdata.acting import JOINED_RAW
from sftdata.batches import EXAMPLES, Bool, Int32, Int64, offsets_of
from sftdata.errors import UsageError
from sftdata.output import visible
from sftdata.render.control_tokens import find_stops
from sftdata.render.template import ChatTemplate
from sftdata.set.ledger import read_counted
from sftdata.set.local import named
from sftdata.set.manifest import Manifest, in_first_pass
from sftdata.show.documents import DocumentReader, Documents
from sftdata.show.findings import COUNTED, IN_CHATS, IN_TEXTS, KINDS, Finding, make_finding
from sftdata.show.foreign import ForeignSet, choose_rows, open_against, open_either
from sftdata.show.headers import load_tokenizer
from sftdata.show.pictures import prompts_with_pictures
from sftdata.show.supervision import make_judge
from sftdata.show.view import ShownSet
from sftdata.vocabulary import generation_stops

GLANCE = 2 << 20  # tokens: a twentieth of a second


def audit(
    folder: str | PathLike[str], against: str | PathLike[str] | None = None, *, every: bool = False,
    tokenizer: str | None = None, split: str | None = None, columns: Mapping[str, str] = {},
) -> list[Finding]:  # fmt: skip
    """Look for unintended supervision in the labels, ids and tokenizer of a set, and in its ledger.

    Args:
        folder: a finished set; with `tokenizer`, token rows that another tool prepared.
        against: an evaluation set, which should share no prompts with the first.
        every: name every place of a finding, instead of the first three.
        tokenizer, split, columns: as for `choose_rows`.

    Returns:
        Findings, defects first; the same set always gives the same ones.

    Raises:
        UsageError: a folder is not a finished set, has no tokenizer, or the two have different ones.
        IntegrityError: a set is damaged.
    """
    rows = choose_rows(tokenizer, split, columns)
    other = None if against is None else open_against(against, rows)
    return audit_set(open_either(folder, rows), other, every=every)


@dataclass(frozen=True, slots=True)
class Glance:
    """The results of a quick audit of part of a set.

    Attributes:
        findings: in the documents looked at, and in the whole ledger.
        looked, documents: how many documents were looked at, and how many there are.
    """

    findings: list[Finding]
    looked: int
    documents: int

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        findings = [finding.to_json() for finding in self.findings]
        return {"documents": self.documents, "documents_looked_at": self.looked, "findings": findings}


def glance(folder: Path, manifest: Manifest, tokens: int = GLANCE) -> Glance:
    """Audit evenly spaced shards of about `tokens` tokens in all, at least one; always the same for a set."""
    stride = max(1, -(-sum(shard.tokens for shard in manifest.shards) // tokens))
    chosen = manifest.shards[::stride]
    looked, documents = (sum(shard.documents for shard in shards) for shards in (chosen, manifest.shards))
    part = ShownSet(folder, msgspec.structs.replace(manifest, shards=chosen))
    return Glance(audit_set(part), looked, documents)


def audit_set(shards: ShownSet, against: ShownSet | None = None, *, every: bool = False) -> list[Finding]:
    """Audit a set that is open already."""
    findings = [*_disagreements(shards), *_counted(shards, every)]
    if isinstance(shards, ForeignSet):
        findings += _unusable(shards, every)
    if len(shards):
        checks = _checks_of(shards, every)
        if isinstance(shards, ForeignSet) and shards.of_another_tokenizer:
            return [*checks.marked("other-tokenizer"), *_unusable(shards, every)]
        findings = [*checks.endings(), *checks.starts(), *checks.contents(), *checks.marked(), *findings]
        if against is not None and len(against):
            findings += checks.leaks(_checks_of(against))
    return sorted(findings, key=lambda finding: finding.severity)


def _checks_of(shards: ShownSet, every: bool = False) -> _Checks:
    reader = DocumentReader(shards.vocabulary, shards.manifest.tokenizer.bos_id)
    vision = shards.manifest.vision
    parts, row = [], 0
    for batch in shards.batches():
        parts.append(reader.read(batch))
        stored = shards.stored_pictures(row)
        if vision is not None and stored is not None:
            prompts = prompts_with_pictures(parts[-1].prompt, batch, stored, vision.image_id)
            parts[-1] = replace(parts[-1], prompt=prompts)
        row += len(batch)
    documents, stretches = Documents.join(parts).by_example()
    marks = _marks_of(shards)
    return _Checks(shards, _settled(documents, marks), stretches, marks, every)


def _marks_of(shards: ShownSet) -> Mapping[str, Collection[int]]:
    """Return by code the examples whose masks, made by another tool, have a defect that ours cannot have."""
    manifest, marks = shards.manifest, defaultdict[str, set[int]](set)
    formats = manifest.settings.get("formats", ())
    if isinstance(shards, ForeignSet):
        return shards.marks
    if "tokens" not in formats or "view" in manifest.settings:
        return {}
    tokenizer = load_tokenizer(shards.tokenizer_folder)
    judge = make_judge(shards.vocabulary, tokenizer, manifest.tokenizer.bos_id, manifest.tokenizer.eos_id)
    firsts = [source.first_id for source in manifest.sources]
    for batch in shards.batches():
        edges = offsets_of(batch.seq_lengths)
        found = judge.find(batch) | {"packed-unmarked": judge.joined(batch.input_ids, edges)}
        for code, places in found.items():
            for example_id in batch.example_ids[np.searchsorted(edges, places, side="right") - 1].tolist():
                if example_id >= 0 and formats[bisect_right(firsts, example_id) - 1] == "tokens":
                    marks[code].add(example_id)
    return marks


def _settled(documents: Documents, marks: Mapping[str, Collection[int]]) -> Documents:
    """Leave out of the checks what has a finding of its own: a mask that is shifted, a prompt in it."""
    shifted = np.isin(documents.example_id, list(marks.get("mask-shifted", ())))
    prompt = np.isin(documents.example_id, list(marks.get("prompt-trained", ())))
    return replace(
        documents,
        ends=documents.ends | shifted,
        unended=documents.unended & ~shifted,
        wrong_end=np.where(shifted, np.int32(-1), documents.wrong_end),
        control=documents.control & ~prompt,
    )


def _unusable(shards: ForeignSet, every: bool) -> Iterator[Finding]:
    """Yield the rows that cannot be read, by the codes under which `prepare` rejects them."""
    rows = shards.manifest.ledger.rows_in
    for code in sorted({reject.code for reject in shards.rejects}):
        found = [reject for reject in shards.rejects if reject.code == code]
        places = tuple(reject.place for reject in found[: None if every else EXAMPLES])
        message, fix, share = found[0].reason.rstrip("."), found[0].fix.rstrip("."), len(found) / rows
        yield Finding(code, "defect", message, fix, len(found), "row", share, places)


@dataclass(frozen=True, slots=True, eq=False)
class _Checks:
    """The checks that read ids and labels.

    Attributes:
        documents: one per example.
        stretches: int64[E], the number of pieces of each example in the set.
        marks: by code, the examples that have a finding of masks of another tool.
        every: name every place.
    """

    shards: ShownSet
    documents: Documents
    stretches: Int64
    marks: Mapping[str, Collection[int]]
    every: bool

    @property
    def foreign(self) -> ForeignSet | None:
        """The set, where another tool prepared it."""
        return self.shards if isinstance(self.shards, ForeignSet) else None

    def endings(self) -> Iterator[Finding]:
        """Yield answers that do not teach the model to stop; each example is in one finding at most."""
        documents = self.documents
        trained = documents.trained > 0
        yield from self._find("nothing-trained", ~trained & (self.stretches == 1))
        open_ended = trained & ~documents.ends
        cut = open_ended & documents.cut & self._at_limit() & bool(self.shards.manifest.ledger.tokens_cut)
        yield from self._find("answer-cut", cut)
        split = ((open_ended & ~cut) | ~trained) & (self.stretches > 1)
        split |= open_ended & documents.cut & self._at_limit() & self._lost_pieces()
        yield from self._find("answer-split", split)
        rest = open_ended & ~cut & ~split
        whole = trained & ~cut & (self.stretches == 1)
        wrong = (rest | whole) & (documents.wrong_end >= 0)
        yield from self._find("turn-end-not-a-stop", wrong, **self._wrong_ends(documents.wrong_end[wrong]))
        unended = (rest & ~wrong) | (whole & documents.unended & self._every_turn())
        yield from self._find("no-trained-end", unended, fix=self._end_to_write() if unended.any() else "")

    def _wrong_ends(self, token_ids: Int32) -> dict[str, str]:
        """Return the slots that name turn ends at which generation goes on, and what makes it stop there."""
        tokens = ", ".join(self._name(token_id) for token_id in np.unique(token_ids).tolist())
        stops = ", ".join(map(self._name, sorted(self.shards.vocabulary.stop_ids))) or "nothing"
        # With --eos-token, answers that end in the present EOS would lose their stop,
        # and answers without any end would get this one where another belongs.
        documents = self.documents
        unended = documents.unended.any() and self._every_turn()
        several = len(np.unique(token_ids)) > 1 or bool(documents.ends.any() or unended)
        fix = f"list {tokens} in eos_token_id of the tokenizer's generation_config.json, beside what is there"
        several |= self.foreign is not None
        return {"token": tokens, "stops": stops, "fix": fix if several else f"--eos-token '{tokens}'"}

    def _end_to_write(self) -> str:
        """Return the fix for answers without an end; it names the token, where the chat template shows it."""
        eos = self.shards.vocabulary.named.get("eos_token", "TOKEN")
        if self.foreign is not None and self.foreign.ends_left_out:
            masked = "train the end token, which stands there and is masked"
            return f"{masked}: mask padding by attention_mask, not by the id of the pad token"
        if self.foreign is not None or not self._in_turns():  # after texts an end is written: these are ids
            return f"let the ids of these rows, and their labels, end in that of {visible(eos)}"
        return f"--eos-token '{visible((_turn_ends(self.shards) or (eos,))[0])}'"

    def starts(self) -> Iterator[Finding]:
        """Yield examples with too many or too few BOS."""
        bos = self.shards.manifest.tokenizer.bos_id
        if bos is None:
            return
        documents, name = self.documents, self._name(bos)
        has_bos = documents.first == bos
        yield from self._find("double-bos", has_bos & (documents.second == bos), token=name)
        template = self.shards.vocabulary.chat_template or ""
        if has_bos.any() or "bos_token" in template or name in template:
            left_cut = self._at_limit() & (self.shards.manifest.settings.get("overlong") == "truncate-left")
            yield from self._find("missing-bos", (self.stretches == 1) & ~left_cut & ~has_bos, token=name)

    def contents(self) -> Iterator[Finding]:
        """Yield answers that hold nothing or too much, and repeated prompts."""
        yield from self._find("empty-answer", self.documents.empty & (self.stretches == 1))
        in_turns = self._in_turns()
        if not (in_turns and self.shards.manifest.settings.get("train_on") == "all"):
            slots = IN_CHATS if in_turns else IN_TEXTS
            yield from self._find("control-token-in-answer", self.documents.control, **slots)
        yield from self._find("duplicate-prompt", self._repeated())

    def _every_turn(self) -> bool:
        """Whether turns before the last may lack an end; where masks are proven, `prepare` counts them."""
        counted = self.shards.manifest.ledger.counters.get("turns_without_stop")
        return bool(counted) or (self.foreign is not None and self._in_turns())

    def _in_turns(self) -> bool:
        """Whether the set holds conversations."""
        return bool(self.shards.manifest.ledger.counters.get("turns"))

    def _lost_pieces(self) -> bool:
        """Whether last pieces are left out: of one that the stop token begins, nothing is trained."""
        manifest = self.shards.manifest
        unended = manifest.ledger.counters.get("rows_without_ending")
        return manifest.settings.get("overlong") == "split" and bool(unended)

    def _at_limit(self) -> Bool:
        """bool[E]: examples as long as a row may be."""
        limit = self.shards.manifest.max_length or self.shards.manifest.settings.get("max_length")
        at_limit: Bool = self.documents.length == (limit or -1)
        return at_limit

    def leaks(self, other: _Checks) -> Iterator[Finding]:
        """Yield prompts that are in another set too.

        Raises:
            UsageError: the sets have different tokenizers, so that their ids cannot be compared.
        """
        if self.shards.manifest.tokenizer.sha256 != other.shards.manifest.tokenizer.sha256:
            raise UsageError(
                f"{named(other.shards.folder)}: made with another tokenizer than {named(self.shards.folder)};"
                " ids cannot be compared.",
                "prepare both with the same tokenizer.",
            )
        prompts = other.documents.prompt[other._has_prompt()]
        shared = self._has_prompt() & np.isin(self.documents.prompt, prompts)
        yield from self._find("prompt-in-other-set", shared, other=visible(named(other.shards.folder)))

    def _has_prompt(self) -> Bool:
        """bool[E]: examples that are in one piece and have a prompt of more than a BOS."""
        documents = self.documents
        with_prompt: Bool = (self.stretches == 1) & (documents.prompt_length > 1) & (documents.trained > 0)
        return with_prompt

    def _repeated(self) -> Bool:
        """bool[E]: examples with the prompt of an earlier example; further passes of a mixture are wanted."""
        repeated = self._has_prompt()
        lines = in_first_pass(self.shards.manifest.sources, self.documents.example_id)
        repeated[np.setdiff1d(np.arange(len(lines)), np.unique(lines, return_index=True)[1])] = False
        examples = np.flatnonzero(repeated)
        _, first = np.unique(self.documents.prompt[examples], return_index=True)
        repeated[examples[first]] = False
        return repeated

    def marked(self, *codes: str) -> Iterator[Finding]:
        """Yield what was found in the masks of another tool: all, or what has one of these codes."""
        for code in codes or self.marks:
            yield from self._find(code, np.isin(self.documents.example_id, list(self.marks[code])))
        if not codes and self.foreign is not None and self.foreign.manifest.settings["train_on"] == "all":
            yield make_finding("everything-trained", 1)

    def _find(self, code: str, examples: Bool, **slots: str) -> Iterator[Finding]:
        """Yield a finding if any of the examples, bool[E], has it."""
        ids = self.documents.example_id[examples]
        if len(ids):
            shown = ids[: None if self.every else EXAMPLES].tolist()
            places = tuple(self.shards.found_at(code, example_id) for example_id in shown)
            elsewhere = self.foreign is not None
            found = make_finding(code, len(ids), len(self.documents), places, elsewhere=elsewhere, **slots)
            yield replace(found, ids=ids)

    def _name(self, token_id: int) -> str:
        return visible(self.shards.vocabulary.text_of([token_id]))


def _disagreements(shards: ShownSet) -> Iterator[Finding]:
    """Yield disagreements of tokenizer and generation config, and decisions that `prepare` noted."""
    tokenizer, foreign = shards.manifest.tokenizer, isinstance(shards, ForeignSet)
    eos = "" if tokenizer.eos_id is None else visible(shards.vocabulary.text_of([tokenizer.eos_id]))
    stops = generation_stops(shards.tokenizer_folder)
    if stops and eos and tokenizer.eos_id not in stops:
        names = [visible(shards.vocabulary.text_of([stop])) for stop in stops]
        fix = f"list {eos} in eos_token_id of the tokenizer's generation_config.json, beside what is there"
        ends = _turn_ends(shards)
        if shards.vocabulary.named.get("eos_token") not in ends and not foreign:  # else it must stay the EOS
            fix = f"--eos-token '{names[0]}', or {fix}"
        yield make_finding("eos-not-in-generation-config", 1, token=eos, stops=", ".join(names), fix=fix)
    if eos and tokenizer.pad_id == tokenizer.eos_id:
        yield make_finding("pad-is-eos", 1, token=eos, elsewhere=foreign)
    if tokenizer.tokens_added:
        names = [visible(token) for token in tokenizer.tokens_added]
        more = ", …" if len(names) > EXAMPLES else ""
        yield make_finding("tokens-added", len(names), names=", ".join(names[:EXAMPLES]) + more)
    if raw := sum(JOINED_RAW in note for note in shards.manifest.notes):
        yield make_finding("raw-prompts", raw)


def _turn_ends(shards: ShownSet) -> tuple[str, ...]:
    """Return the tokens with which the chat template ends turns; none for a set without turns."""
    vocabulary, manifest = shards.vocabulary, shards.manifest
    if vocabulary.chat_template is None or not manifest.ledger.counters.get("turns"):
        return ()
    arguments = manifest.settings.get("template_kwargs") or {}
    template = ChatTemplate(vocabulary.chat_template, vocabulary.named, template_kwargs=arguments)
    return find_stops(template, (), vocabulary.added.values())


def _counted(shards: ShownSet, every: bool) -> Iterator[Finding]:
    """Yield findings that `prepare` counted."""
    listed = read_counted(shards.folder) if every else {}
    ledger, rows = shards.manifest.ledger, sum(source.rows for source in shards.manifest.sources)
    for counter, code in COUNTED.items():
        count = ledger.counters.get(counter, 0)
        if count:
            examples = listed[counter].tolist() if counter in listed else ledger.examples.get(counter, ())
            known = [example for example in examples if example < rows]
            places = tuple(map(shards.place, known))
            total = ledger.rows_in if KINDS[code].of == "row" else None
            yield replace(make_finding(code, count, total, places), ids=np.array(known, np.int64))
