"""The audit: tokens that are trained, or left untrained, by accident. It finds, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from sftdata.acting import JOINED_RAW
from sftdata.batches import EXAMPLES, Bool, Int32, Int64
from sftdata.errors import UsageError
from sftdata.output import visible
from sftdata.render.control_tokens import find_stops
from sftdata.render.template import ChatTemplate
from sftdata.set.ledger import read_counted
from sftdata.set.local import named
from sftdata.set.manifest import Manifest, in_first_pass
from sftdata.show.documents import DocumentReader, Documents
from sftdata.show.pictures import prompts_with_pictures
from sftdata.show.view import ShownSet, open_shown
from sftdata.vocabulary import generation_stops

GLANCE = 2 << 20  # tokens: a twentieth of a second

Severity = Literal["defect", "note"]


class Kind(NamedTuple):
    """A kind of finding. `message` and `fix` may hold {slots}.

    Attributes:
        severity: a defect teaches the model something unintended; a note is harmless here, but worth knowing.
        of: what is counted, in the singular.
    """

    severity: Severity
    of: str
    message: str
    fix: str


KINDS: dict[str, Kind] = {
    # ---- seen in labels and ids
    "nothing-trained": Kind(
        "defect", "example", "no token of the example is trained",
        "another --train-on, or leave the rows out",
    ),
    "answer-cut": Kind(
        "defect", "example", "the answer is cut by max_length, so that it ends without a stop token",
        "a larger --max-length, or --overlong drop or split",
    ),
    "answer-split": Kind(
        "defect", "example",
        "the example is spread over several rows, and its stop token begins one, where it is not trained",
        "--packing bfd with a --max-length that holds the example",
    ),
    "turn-end-not-a-stop": Kind(
        "defect", "example", "an answer ends in {token}, and generation stops at {stops}", "{fix}",
    ),
    "no-trained-end": Kind(
        "defect", "example",
        "an answer never ends in a stop token, so that the model does not learn to stop", "{fix}",
    ),
    "double-bos": Kind(
        "defect", "example", "the example begins with {token} twice",
        "take it out of the data, or of the chat template",
    ),
    "missing-bos": Kind(
        "defect", "example", "the example does not begin with {token}, as the others or the chat template do",
        "begin their text or ids with {token}; chats, with a --chat-template that does so",
    ),
    "empty-answer": Kind(
        "defect", "example", "an answer holds nothing but its end",
        'leave the rows out, or switch the turn off: "train": false',
    ),
    "control-token-in-answer": Kind(
        "defect", "example", "{what} holds a stop token or BOS before its end{origin}", "{fix}",
    ),
    "duplicate-prompt": Kind(
        "note", "example", "an earlier example has the same prompt",
        "deduplicate the input, unless the repetition is intended",
    ),
    "prompt-in-other-set": Kind(
        "defect", "example",
        "the prompt is also in {other}, so neither is a fair test of a model trained on the other",
        "take it out of one of the two before preparing",
    ),
    # ---- what tokenizer, chat template and generation config disagree on
    "eos-not-in-generation-config": Kind(
        "note", "tokenizer", "the tokenizer ends with {token}, generation_config stops at {stops}", "{fix}",
    ),
    "pad-is-eos": Kind(
        "note", "tokenizer",
        "{token} is both pad and end token; harmless here, as labels never derive from the pad id",
        "nothing, unless another trainer masks by pad id",
    ),
    "tokens-added": Kind(
        "note", "token",
        "added to the tokenizer ({names}); adapters alone leave their embeddings as they were drawn",
        "train without --lora, add embed_tokens and lm_head to its target,"
        " or choose a --chat-template of known tokens",
    ),
    "raw-prompts": Kind(
        "note", "source",
        "prompts and completions are joined as raw text, and the tokenizer has a chat template",
        "--kind conversation, where the model is to be asked in chats",
    ),
    # ---- counted by `prepare`, and not visible in the shards
    "message-swallowed": Kind(
        "defect", "message",
        "the chat template leaves the text of a message out (a system message, most often)",
        "another --chat-template, --map-role developer=system where it is a developer's,"
        " or put the text into the first user message",
    ),
    "reasoning-swallowed": Kind(
        "defect", "message",
        "the chat template leaves the reasoning of an answer out (of an earlier turn, most often),"
        " so that the answer is trained without it",
        "--train-on last-assistant, one example a turn, or a --chat-template that writes reasoning",
    ),
    "outside-generation": Kind(
        "defect", "message",
        "the chat template marks with `generation` blocks what is trained, and none holds anything"
        " of an assistant message, so that it is not trained",
        "--chat-template with a copy whose `generation` and `endgeneration` tags are taken out:"
        " then the spans are derived",
    ),
    "tools-left-out": Kind(
        "defect", "row", "the chat template does not tell the model which tools it may call",
        "--chat-template of a model that calls tools",
    ),
    "prompt-parted": Kind(
        "note", "row",
        "the generation prompt continues differently from the rendered turn (it opens <think>, say);"
        " the answer is trained from where they diverge",
        "a --chat-template whose turns begin as its generation prompt does",
    ),
    "control-token-in-data": Kind(
        "note", "row", "a message spells a control token; it is encoded as text",
        "nothing; --trust-control-tokens lets it count",
    ),
    "repeated-marker": Kind(
        "note", "row",
        "response markers follow each other with no instruction marker between them;"
        " without an instruction template only the last answer is trained",
        "--instruction-template",
    ),
    "masked-as-trl": Kind(
        "defect", "row", "trl 0.7.10 masks the row in an unintended way, without a warning",
        "--mask-mode default",
    ),
}  # fmt: skip

# The slots of `control-token-in-answer`: for answers of a chat template, and for running text.
IN_CHATS = {
    "what": "an answer",
    "origin": ", which came with the data",
    "fix": "clean the rows, and leave out --trust-control-tokens",
}
IN_TEXTS = {
    "what": "a text",
    "origin": ", and it is trained there",
    "fix": "clean the rows; give chats that a template has rendered as messages,"
    " so that only answers are trained",
}

COUNTED = {
    "messages_swallowed": "message-swallowed",
    "reasoning_swallowed": "reasoning-swallowed",
    "messages_outside_generation": "outside-generation",
    "rows_without_their_tools": "tools-left-out",
    "rows_parted": "prompt-parted",
    "rows_with_control_tokens": "control-token-in-data",
    "rows_with_repeated_markers": "repeated-marker",
    "rows_masked_without_warning": "masked-as-trl",
}
"""Counters of the ledger that are findings."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of the audit.

    Attributes:
        code: key of `KINDS`.
        severity: defect or note.
        message: one sentence.
        fix: how to fix it.
        count: number of occurrences.
        of: what is counted, in the singular.
        share: `count` over all of these in the set; None where there is no total.
        examples: up to three, as file:line.
    """

    code: str
    severity: Severity
    message: str
    fix: str
    count: int
    of: str
    share: float | None = None
    examples: tuple[str, ...] = ()

    @property
    def amount(self) -> str:
        """How many, in words."""
        share = f" ({self.share:.1%})" if self.share is not None else ""
        return f"{self.count:,} {self.of}{'' if self.count == 1 else 's'}{share}"

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        return asdict(self) | {"examples": list(self.examples)}


def make_finding(
    code: str, count: int, total: int | None = None, examples: tuple[str, ...] = (), **slots: str
) -> Finding:
    """Fill in the sentences of a kind; `count` is a share of `total`."""
    kind = KINDS[code]
    message, fix = kind.message.format(**slots), kind.fix.format(**slots)
    share = count / total if total else None
    return Finding(code, kind.severity, message, fix, count, kind.of, share, examples)


def audit(folder: str | Path, against: str | Path | None = None, *, every: bool = False) -> list[Finding]:
    """Look for unintended supervision in the labels, ids and tokenizer of a set, and in its ledger.

    Args:
        folder: a finished set.
        against: an evaluation set, which should share no prompts with the first.
        every: name every place of a finding, instead of the first three.

    Returns:
        Findings, defects first; the same set always gives the same ones.

    Raises:
        UsageError: a folder is not a finished set, has no tokenizer, or the two have different ones.
        IntegrityError: a set is damaged.
    """
    return audit_set(open_shown(folder), None if against is None else open_shown(against), every=every)


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
    if len(shards):
        checks = _checks_of(shards, every)
        findings = [*checks.endings(), *checks.starts(), *checks.contents(), *findings]
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
    return _Checks(shards, *Documents.join(parts).by_example(), every)


@dataclass(frozen=True, slots=True, eq=False)
class _Checks:
    """The checks that read ids and labels.

    Attributes:
        documents: one per example.
        stretches: int64[E], the number of pieces of each example in the set.
        every: name every place.
    """

    shards: ShownSet
    documents: Documents
    stretches: Int64
    every: bool

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
        counted = bool(self.shards.manifest.ledger.counters.get("turns_without_stop"))
        unended = (rest & ~wrong) | (whole & documents.unended & counted)
        yield from self._find("no-trained-end", unended, fix=self._end_to_write() if unended.any() else "")

    def _wrong_ends(self, token_ids: Int32) -> dict[str, str]:
        """Return the slots that name turn ends at which generation goes on, and what makes it stop there."""
        tokens = ", ".join(self._name(token_id) for token_id in np.unique(token_ids).tolist())
        stops = ", ".join(map(self._name, sorted(self.shards.vocabulary.stop_ids))) or "nothing"
        # With --eos-token, answers that end in the present EOS would lose their stop,
        # and answers without any end would get this one where another belongs.
        documents = self.documents
        unended = documents.unended.any() and self.shards.manifest.ledger.counters.get("turns_without_stop")
        several = len(np.unique(token_ids)) > 1 or bool(documents.ends.any() or unended)
        fix = f"list {tokens} in eos_token_id of the tokenizer's generation_config.json, beside what is there"
        return {"token": tokens, "stops": stops, "fix": fix if several else f"--eos-token '{tokens}'"}

    def _end_to_write(self) -> str:
        """Return the fix for answers without an end; it names the token, where the chat template shows it."""
        eos = self.shards.vocabulary.named.get("eos_token", "TOKEN")
        if not self._in_turns():  # an end is written after texts, so these are rows of ids
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

    def _find(self, code: str, examples: Bool, **slots: str) -> Iterator[Finding]:
        """Yield a finding if any of the examples, bool[E], has it."""
        ids = self.documents.example_id[examples]
        if len(ids):
            places = tuple(map(self.shards.place, ids[: None if self.every else EXAMPLES].tolist()))
            yield make_finding(code, len(ids), len(self.documents), places, **slots)

    def _name(self, token_id: int) -> str:
        return visible(self.shards.vocabulary.text_of([token_id]))


def _disagreements(shards: ShownSet) -> Iterator[Finding]:
    """Yield disagreements of tokenizer and generation config, and decisions that `prepare` noted."""
    tokenizer = shards.manifest.tokenizer
    eos = "" if tokenizer.eos_id is None else visible(shards.vocabulary.text_of([tokenizer.eos_id]))
    stops = generation_stops(shards.folder / "tokenizer")
    if stops and eos and tokenizer.eos_id not in stops:
        names = [visible(shards.vocabulary.text_of([stop])) for stop in stops]
        fix = f"list {eos} in eos_token_id of the tokenizer's generation_config.json, beside what is there"
        if shards.vocabulary.named.get("eos_token") not in _turn_ends(shards):  # else it must stay the EOS
            fix = f"--eos-token '{names[0]}', or {fix}"
        yield make_finding("eos-not-in-generation-config", 1, token=eos, stops=", ".join(names), fix=fix)
    if eos and tokenizer.pad_id == tokenizer.eos_id:
        yield make_finding("pad-is-eos", 1, token=eos)
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
            yield make_finding(code, count, ledger.rows_in if KINDS[code].of == "row" else None, places)
