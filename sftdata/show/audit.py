"""The audit: tokens that are trained, or left untrained, by accident. It finds, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from sftdata.acting import JOINED_RAW
from sftdata.batches import EXAMPLES, Bool, Int32, Int64
from sftdata.errors import UsageError
from sftdata.output import visible
from sftdata.render.control_tokens import find_stops
from sftdata.render.template import ChatTemplate
from sftdata.set.ledger import read_counted
from sftdata.set.manifest import Manifest
from sftdata.show.documents import DocumentReader, Documents
from sftdata.show.view import ShownSet, open_shown
from sftdata.vocabulary import generation_stops

Severity = Literal["defect", "note"]


class Kind(NamedTuple):
    """A kind of finding. `message` and `fix` may hold {slots}.

    Attributes:
        severity: a defect makes the model learn something else than meant; a note is harmless here, but worth knowing.
        of: what is counted, in the singular.
    """

    severity: Severity
    of: str
    message: str
    fix: str


KINDS: dict[str, Kind] = {
    # ---- seen in labels and ids
    "nothing-trained": Kind(
        "defect", "example", "no token of the example is trained", "another --train-on, or leave the rows out"
    ),
    "answer-cut": Kind(
        "defect", "example", "the answer is cut by max_length, so that it ends without a stop token",
        "a larger --max-length, or --overlong drop or split",
    ),
    "answer-split": Kind(
        "defect", "example", "the example is spread over several rows, and its stop token begins one, where it is not trained",
        "--packing bfd with a --max-length that holds the example",
    ),
    "turn-end-not-a-stop": Kind(
        "defect", "example", "an answer ends in {token}, and generation stops at {stops}", "{fix}"
    ),
    "no-trained-end": Kind(
        "defect", "example", "an answer never ends in a stop token, so that the model does not learn to stop", "{fix}"
    ),
    "double-bos": Kind(
        "defect", "example", "the example begins with {token} twice", "take it out of the data, or of the chat template"
    ),
    "missing-bos": Kind(
        "defect", "example", "the example does not begin with {token}, as the others or the chat template do",
        "begin their text or ids with {token}; chats, with a --chat-template that does so",
    ),
    "empty-answer": Kind(
        "defect", "example", "an answer holds nothing but its end", "leave the rows out, or switch the turn off: \"train\": false"
    ),
    "control-token-in-answer": Kind(
        "defect", "example", "{what} holds a stop token or BOS before its end{origin}", "{fix}"
    ),
    "duplicate-prompt": Kind(
        "note", "example", "the prompt was there before, in another example", "deduplicate the input where it is not meant"
    ),
    "prompt-in-other-set": Kind(
        "defect", "example", "the prompt is also in {other}, so neither is a fair test of a model trained on the other",
        "take it out of one of the two before preparing",
    ),
    # ---- what tokenizer, chat template and generation config disagree on
    "eos-not-in-generation-config": Kind(
        "note", "tokenizer", "the tokenizer ends with {token}, generation_config stops at {stops}",
        "{fix}",
    ),
    "pad-is-eos": Kind(
        "note", "tokenizer", "{token} is both pad and end token; harmless here, as labels never derive from the pad id",
        "nothing, unless another trainer masks by pad id",
    ),
    "tokens-added": Kind(
        "note", "token", "added to the tokenizer ({names}); adapters alone leave their embeddings as they were drawn",
        "train without --lora, add embed_tokens and lm_head to its target, or choose a --chat-template of known tokens",
    ),
    "raw-prompts": Kind(
        "note", "source", "prompts and completions are joined as raw text, and the tokenizer has a chat template",
        "--kind conversation, where the model is to be asked in chats",
    ),
    # ---- what `prepare` counted and no shard can tell
    "message-swallowed": Kind(
        "defect", "message", "the chat template leaves the text of a message out (a system message, most often)",
        "another --chat-template, --map-role developer=system where it is a developer's,"
        " or put the text into the first user message",
    ),
    "reasoning-swallowed": Kind(
        "defect", "message", "the chat template leaves the reasoning of an answer out (of an earlier turn, most often),"
        " so that the answer is trained without it",
        "--train-on last-assistant, one example a turn, or a --chat-template that writes reasoning",
    ),
    "outside-generation": Kind(
        "defect", "message", "the chat template marks with `generation` blocks what is trained, and none holds anything"
        " of an assistant message, so that it is not trained",
        "--chat-template with a copy whose `generation` and `endgeneration` tags are taken out: then the spans are derived",
    ),
    "tools-left-out": Kind(
        "defect", "row", "the chat template does not tell the model which tools it may call",
        "--chat-template of a model that calls tools",
    ),
    "prompt-parted": Kind(
        "note", "row", "the generation prompt continues differently from the rendered turn (it opens <think>, say);"
        " the answer is trained from where they part", "a --chat-template whose turns begin as its generation prompt does",
    ),
    "control-token-in-data": Kind(
        "note", "row", "a message spells a control token; it is encoded as text", "nothing; --trust-control-tokens lets it count"
    ),
    "repeated-marker": Kind(
        "note", "row", "response markers follow each other with no instruction marker between them;"
        " without an instruction template only the last answer is trained",
        "--instruction-template",
    ),
    "masked-as-trl": Kind(
        "defect", "row", "trl 0.7.10 masks the row in an unintended way, without a warning", "--mask-mode default"
    ),
}  # fmt: skip

IN_CHATS = {
    "what": "an answer", "origin": ", which came with the data", "fix": "clean the rows, and leave out --trust-control-tokens"
}  # fmt: skip
IN_TEXTS = {
    "what": "a text", "origin": ", and it is trained there",
    "fix": "clean the rows; give chats that a template has rendered as messages, so that only answers are trained",
}  # fmt: skip
"""What `control-token-in-answer` says of answers of a chat template, and of running text."""

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
    """One thing that the audit found.

    Attributes:
        code: key of `KINDS`.
        severity: defect or note.
        message: what was found, in one sentence.
        fix: how to fix it.
        count: how many.
        of: what is counted, in the singular.
        share: count over all of these in the set; None where there is no whole.
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

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self) | {"examples": list(self.examples)}


def make_finding(
    code: str, count: int, whole: int | None = None, examples: tuple[str, ...] = (), **slots: str
) -> Finding:
    """Fill in the sentences of a kind; `whole` is what `count` is a share of."""
    kind = KINDS[code]
    share = count / whole if whole else None
    return Finding(
        code,
        kind.severity,
        kind.message.format(**slots),
        kind.fix.format(**slots),
        count,
        kind.of,
        share,
        examples,
    )


GLANCE = 2 << 20  # tokens: a twentieth of a second


def audit(folder: str | Path, against: str | Path | None = None, *, every: bool = False) -> list[Finding]:
    """Look through a set for supervision that its user did not mean: labels, ids, tokenizer and what `prepare` counted.

    Args:
        folder: a finished set.
        against: another, for evaluation, whose prompts should not be in the first.
        every: name every place of a finding, instead of the first three.

    Returns:
        findings, defects first; the same set always gives the same ones.

    Raises:
        UsageError: a folder is not a finished set, has no tokenizer, or the two have different ones.
        IntegrityError: a set is damaged.
    """
    return audit_set(open_shown(folder), None if against is None else open_shown(against), every=every)


@dataclass(frozen=True, slots=True)
class Glance:
    """What a bounded look at a set found.

    Attributes:
        findings: of the documents looked at, and of the whole ledger.
        looked, documents: documents looked at, and all there are.
    """

    findings: list[Finding]
    looked: int
    documents: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        findings = [finding.to_json() for finding in self.findings]
        return {"documents": self.documents, "documents_looked_at": self.looked, "findings": findings}


def glance(folder: Path, manifest: Manifest, tokens: int = GLANCE) -> Glance:
    """Audit evenly spaced shards of about `tokens` tokens in all, at least one: the same set always gives the same ones."""
    whole = sum(shard.tokens for shard in manifest.shards)
    chosen = manifest.shards[:: max(1, -(-whole // tokens))]
    looked, documents = (sum(shard.documents for shard in shards) for shards in (chosen, manifest.shards))
    return Glance(
        audit_set(ShownSet(folder, msgspec.structs.replace(manifest, shards=chosen))), looked, documents
    )


def audit_set(shards: ShownSet, against: ShownSet | None = None, *, every: bool = False) -> list[Finding]:
    """Audit a set that is open already."""
    found = [*_disagreements(shards), *_counted(shards, every)]
    if len(shards):
        look = _look_at(shards, every)
        found = [*look.endings(), *look.starts(), *look.contents(), *found]
        if against is not None and len(against):
            found += look.leaks(_look_at(against))
    return sorted(found, key=lambda finding: finding.severity)


def _look_at(shards: ShownSet, every: bool = False) -> _Look:
    reader = DocumentReader(shards.vocabulary, shards.manifest.tokenizer.bos_id)
    return _Look(shards, *Documents.join(map(reader.read, shards.batches())).by_example(), every)


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """The checks that read ids and labels.

    Attributes:
        documents: one per example.
        stretches: int64[E], in how many pieces each example lies in the set.
        every: name every place.
    """

    shards: ShownSet
    documents: Documents
    stretches: Int64
    every: bool

    def endings(self) -> Iterator[Finding]:
        """Yield answers that do not teach the model to stop; each example is told of once."""
        documents = self.documents
        trained = documents.trained > 0
        yield from self._found("nothing-trained", ~trained & (self.stretches == 1))
        open_ended = trained & ~documents.ends
        cut = open_ended & documents.cut & self._at_limit() & bool(self.shards.manifest.ledger.tokens_cut)
        yield from self._found("answer-cut", cut)
        split = ((open_ended & ~cut) | ~trained) & (self.stretches > 1)
        yield from self._found("answer-split", split)
        rest = open_ended & ~cut & ~split
        whole = trained & ~cut & (self.stretches == 1)
        odd = (rest | whole) & (documents.odd >= 0)
        yield from self._found("turn-end-not-a-stop", odd, **self._not_stopping(documents.odd[odd]))
        counted = bool(self.shards.manifest.ledger.counters.get("turns_without_stop"))
        unended = (rest & ~odd) | (whole & documents.unended & counted)
        yield from self._found("no-trained-end", unended, fix=self._end_to_write() if unended.any() else "")

    def _not_stopping(self, odd: Int32) -> dict[str, str]:
        """Return the slots that name turn ends at which generation goes on, and what makes it stop there."""
        tokens = ", ".join(self._name(token_id) for token_id in np.unique(odd).tolist())
        stops = ", ".join(map(self._name, sorted(self.shards.vocabulary.stop_ids))) or "nothing"
        # Another EOS would leave the answers that end in this one without a stop, or be written where another end belongs.
        documents = self.documents
        unended = documents.unended.any() and self.shards.manifest.ledger.counters.get("turns_without_stop")
        several = len(np.unique(odd)) > 1 or bool(documents.ends.any() or unended)
        fix = f"list {tokens} in eos_token_id of the tokenizer's generation_config.json, beside what stands there"
        return {"token": tokens, "stops": stops, "fix": fix if several else f"--eos-token '{tokens}'"}

    def _end_to_write(self) -> str:
        """Return the fix for answers without an end: by name the token that inference waits for, where the template tells."""
        named = self.shards.vocabulary.named.get("eos_token", "TOKEN")
        if not self.shards.manifest.ledger.counters.get(
            "turns"
        ):  # texts are closed; ids are taken as they come
            return f"let the ids of these rows, and their labels, end in that of {visible(named)}"
        return f"--eos-token '{visible((_turn_ends(self.shards) or (named,))[0])}'"

    def starts(self) -> Iterator[Finding]:
        """Yield examples with too many or too few BOS."""
        bos = self.shards.manifest.tokenizer.bos_id
        if bos is None:
            return
        documents, name = self.documents, self._name(bos)
        has = documents.first == bos
        yield from self._found("double-bos", has & (documents.second == bos), token=name)
        template = self.shards.vocabulary.chat_template or ""
        if has.any() or "bos_token" in template or name in template:
            left_cut = self._at_limit() & (self.shards.manifest.settings.get("overlong") == "truncate-left")
            yield from self._found("missing-bos", (self.stretches == 1) & ~left_cut & ~has, token=name)

    def contents(self) -> Iterator[Finding]:
        """Yield answers that hold nothing or too much, and prompts that come again."""
        yield from self._found("empty-answer", self.documents.empty & (self.stretches == 1))
        everything = self.shards.manifest.settings.get("train_on") == "all"
        if not (everything and self.shards.manifest.ledger.counters.get("turns")):
            turns = self.shards.manifest.ledger.counters.get("turns")
            slots = IN_CHATS if turns else IN_TEXTS
            yield from self._found("control-token-in-answer", self.documents.control, **slots)
        yield from self._found("duplicate-prompt", self._repeated())

    def _at_limit(self) -> Bool:
        """bool[E]: examples as long as a row may be."""
        limit = self.shards.manifest.max_length or self.shards.manifest.settings.get("max_length")
        found: Bool = self.documents.length == (limit or -1)
        return found

    def leaks(self, other: _Look) -> Iterator[Finding]:
        """Yield prompts that another set has too.

        Raises:
            UsageError: the sets have different tokenizers, so that their ids cannot be compared.
        """
        if self.shards.manifest.tokenizer.sha256 != other.shards.manifest.tokenizer.sha256:
            found = f"{other.shards.folder}: made with another tokenizer than {self.shards.folder}; ids cannot be compared."
            raise UsageError(found, "prepare both with the same tokenizer.")
        prompts = other.documents.prompt[other._has_prompt()]
        again = self._has_prompt() & np.isin(self.documents.prompt, prompts)
        yield from self._found("prompt-in-other-set", again, other=visible(str(other.shards.folder)))

    def _has_prompt(self) -> Bool:
        """bool[E]: examples that lie whole in one place and have a prompt of more than a BOS."""
        found: Bool = (
            (self.stretches == 1) & (self.documents.prompt_length > 1) & (self.documents.trained > 0)
        )
        return found

    def _repeated(self) -> Bool:
        """bool[E]: examples whose prompt an earlier example has too."""
        documents = self.documents
        asked = np.flatnonzero(self._has_prompt())
        _, first = np.unique(documents.prompt[asked], return_index=True)
        again = np.zeros(len(documents), np.bool_)
        again[asked] = True
        again[asked[first]] = False
        return again

    def _found(self, code: str, where: Bool, **slots: str) -> Iterator[Finding]:
        ids = self.documents.example_id[where]
        if len(ids):
            places = tuple(map(self.shards.place, ids[: None if self.every else EXAMPLES].tolist()))
            yield make_finding(code, len(ids), len(self.documents), places, **slots)

    def _name(self, token_id: int) -> str:
        return visible(self.shards.vocabulary.text_of([token_id]))


def _disagreements(shards: ShownSet) -> Iterator[Finding]:
    """Yield what tokenizer and generation config disagree on."""
    tokenizer = shards.manifest.tokenizer
    eos = "" if tokenizer.eos_id is None else visible(shards.vocabulary.text_of([tokenizer.eos_id]))
    stops = generation_stops(shards.folder / "tokenizer")
    if stops and eos and tokenizer.eos_id not in stops:
        names = [visible(shards.vocabulary.text_of([stop])) for stop in stops]
        ends_turns = shards.vocabulary.named.get("eos_token") in _turn_ends(
            shards
        )  # then another EOS would end no answer
        fix = f"list {eos} in eos_token_id of the tokenizer's generation_config.json, beside what is there"
        fix = fix if ends_turns else f"--eos-token '{names[0]}', or {fix}"
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
    """Return what the chat template ends turns with; nothing for a set without turns."""
    vocabulary, manifest = shards.vocabulary, shards.manifest
    if vocabulary.chat_template is None or not manifest.ledger.counters.get("turns"):
        return ()
    arguments = manifest.settings.get("template_kwargs") or {}
    template = ChatTemplate(vocabulary.chat_template, vocabulary.named, template_kwargs=arguments)
    return find_stops(template, (), vocabulary.added.values())


def _counted(shards: ShownSet, every: bool) -> Iterator[Finding]:
    """Yield what only `prepare` could see."""
    listed = read_counted(shards.folder) if every else {}
    ledger, rows = shards.manifest.ledger, sum(source.rows for source in shards.manifest.sources)
    for counter, code in COUNTED.items():
        count = ledger.counters.get(counter, 0)
        if count:
            examples = listed[counter].tolist() if counter in listed else ledger.examples.get(counter, ())
            known = [example for example in examples if example < rows]
            places = tuple(map(shards.place, known))
            yield make_finding(code, count, ledger.rows_in if KINDS[code].of == "row" else None, places)
