"""The supervision audit: what a finished set would teach a model that its user did not mean. Findings, never changes.

A *defect* makes the model learn something else than meant; a *note* is harmless here, but worth knowing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sftdata.batches import Bool, Int64
from sftdata.shardset.ledger import Ledger
from sftdata.show.documents import DocumentReader, Documents
from sftdata.show.escape import visible
from sftdata.show.shown import ShownSet, open_shown
from sftdata.show.vocabulary import generation_stops

EXAMPLES = 3
_LONGER = "a larger --max-length, or --overlong drop or split"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the audit found.

    Attributes:
        code: stable kebab-case name.
        severity: defect or note.
        message: what was found, in one sentence.
        fix: the flag that mends it.
        count: how many; `of` says what.
        of: examples, messages, rows or tokens.
        share: count over all of these in the set; None where there is no whole.
        examples: up to three, as file:line.
    """

    code: str
    severity: Literal["defect", "note"]
    message: str
    fix: str
    count: int
    of: str = "examples"
    share: float | None = None
    examples: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self) | {"examples": list(self.examples)}


def audit(folder: str | Path) -> list[Finding]:
    """Look through a set for supervision that its user did not mean: labels, ids, tokenizer and what `prepare` counted.

    Returns:
        findings, defects first; the same set always gives the same ones.

    Raises:
        UsageError: the folder is not a finished set, or has no tokenizer.
        IntegrityError: the set is damaged.
    """
    return audit_set(open_shown(folder))


def audit_set(shards: ShownSet) -> list[Finding]:
    """Audit a set that is open already."""
    reader = DocumentReader(shards.vocabulary, shards.manifest.tokenizer.bos_id)
    parts = [reader.read(batch) for batch in shards.batches()]
    found = []
    if parts:
        documents, stretches = Documents.join(parts).by_example()
        look = _Look(shards, documents, stretches)
        found += [*look.endings(), *look.starts(), *look.contents()]
    found += [*_tokenizer(shards), *_counters(shards.manifest.ledger)]
    return sorted(found, key=lambda finding: finding.severity)


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """The checks that read ids and labels.

    Attributes:
        documents: one per example.
        stretches: int64[E], in how many pieces each example lies in the set.
    """

    shards: ShownSet
    documents: Documents
    stretches: Int64

    def endings(self) -> Iterator[Finding]:
        """Yield answers that do not teach the model to stop."""
        documents, manifest = self.documents, self.shards.manifest
        trained = documents.trained > 0
        yield from self._found("nothing-trained", ~trained, "no token of the example is trained", "--train-on, or leave the rows out")
        open_ended = trained & ~documents.ends
        was_cut = bool(manifest.ledger.tokens_cut) and manifest.max_length is not None
        cut = open_ended & documents.cut & was_cut & (documents.length == manifest.max_length)
        yield from self._found("answer-cut", cut, "the answer is cut by max_length, so that it ends without a stop token", _LONGER)
        control = np.isin(documents.last, list(self.shards.vocabulary.added))
        other = open_ended & ~cut & control
        names = self._most_common(documents.last[other])
        stops = ", ".join(map(self._name, sorted(self.shards.vocabulary.stop_ids))) or "nothing"
        yield from self._found(
            "turn-end-not-a-stop", other, f"the answer ends in {names}, and generation stops at {stops}", f"--eos-token '{names}'"
        )
        bare = open_ended & ~cut & ~control
        message = "the last answer never ends in a stop token, so that the model does not learn to stop"
        yield from self._found("no-trained-end", bare, message, "--eos-token, or a chat template that ends turns")

    def starts(self) -> Iterator[Finding]:
        """Yield examples with too many or too few BOS."""
        bos = self.shards.manifest.tokenizer.bos_id
        if bos is None:
            return
        documents = self.documents
        has = documents.first == bos
        name = self._name(bos)
        doubled = has & (documents.second == bos)
        yield from self._found(
            "double-bos", doubled, f"the example begins with {name} twice", "take it out of the data, or of the chat template"
        )
        left_cut = self.shards.manifest.settings.get("overlong") == "truncate-left"
        whole = (self.stretches == 1) & ~(left_cut & (documents.length == self.shards.manifest.max_length))
        template = self.shards.vocabulary.chat_template or ""
        if has.any() or "bos_token" in template or (name and name in template):
            message = f"the example does not begin with {name}, as the others or the chat template do"
            yield from self._found("missing-bos", whole & ~has, message, "one --chat-template for all rows")

    def contents(self) -> Iterator[Finding]:
        """Yield answers that hold nothing or too much, and prompts that come again."""
        documents, settings = self.documents, self.shards.manifest.settings
        yield from self._found("empty-answer", documents.empty, "an answer holds nothing but its end", "leave the rows out, or `train: false`")
        if settings.get("train_on") != "all" or not self.shards.manifest.ledger.counters.get("turns"):
            message = "an answer holds a stop token or BOS before its end, which came with the data"
            yield from self._found("control-token-in-answer", documents.control, message, "clean the rows; leave out --trust-control-tokens")
        again = self._repeated()
        message = "the prompt was there before, in another example"
        yield from self._found("duplicate-prompt", again, message, "deduplicate the input, if they are not meant", "note")

    def _repeated(self) -> Bool:
        """bool[E]: examples whose prompt, of more than a BOS, an earlier example has too."""
        documents = self.documents
        asked = np.flatnonzero((self.stretches == 1) & (documents.prompt_length > 1) & (documents.trained > 0))
        _, first = np.unique(documents.prompt[asked], return_index=True)
        again = np.zeros(len(documents), np.bool_)
        again[asked] = True
        again[asked[first]] = False
        return again

    def _found(
        self, code: str, where: Bool, message: str, fix: str, severity: Literal["defect", "note"] = "defect"
    ) -> Iterator[Finding]:
        ids = self.documents.example_id[where]
        if len(ids):
            places = tuple(":".join(map(str, self.shards.origin(example))) for example in ids[:EXAMPLES].tolist())
            yield Finding(code, severity, message, fix, len(ids), "examples", len(ids) / len(self.documents), places)

    def _name(self, token_id: int) -> str:
        return visible(self.shards.vocabulary.text_of([token_id]))

    def _most_common(self, ids: Any) -> str:
        values, counts = np.unique(ids, return_counts=True)
        return self._name(int(values[np.argmax(counts)])) if len(values) else ""


def _tokenizer(shards: ShownSet) -> Iterator[Finding]:
    """Yield what tokenizer, chat template and generation config disagree on."""
    tokenizer, vocabulary = shards.manifest.tokenizer, shards.vocabulary
    stops = generation_stops(shards.folder / "tokenizer")
    eos = tokenizer.eos_id
    if stops and eos is not None and eos not in stops:
        names = ", ".join(vocabulary.text_of([stop]) for stop in stops)
        message = f"the tokenizer ends with {vocabulary.text_of([eos])}, generation_config stops at {names}"
        yield Finding("eos-not-in-generation-config", "note", message, "--eos-token, or mend generation_config.json", 1, "tokenizers")
    if tokenizer.pad_id is not None and tokenizer.pad_id == eos:
        message = f"{vocabulary.text_of([eos])} is pad and end token; harmless here, as labels never derive from the pad id"
        yield Finding("pad-is-eos", "note", message, "nothing, unless another trainer masks by pad id", 1, "tokenizers")
    if tokenizer.tokens_added:
        names = visible(", ".join(tokenizer.tokens_added[:EXAMPLES]))
        message = f"tokens were added to the tokenizer ({names}); adapters alone leave their embeddings as they were drawn"
        fix = "train without --lora, add embed_tokens+lm_head to its target, or choose a --chat-template of known tokens"
        yield Finding("tokens-added", "note", message, fix, len(tokenizer.tokens_added), "tokens")


# What `prepare` counted and no shard can tell: counter, whole, code, severity, of, message, fix.
_COUNTED: tuple[tuple[str, str, str, Literal["defect", "note"], str, str, str], ...] = (
    (
        "messages_swallowed", "", "message-swallowed", "defect", "messages",
        "the chat template leaves the text of a message out (a system message, most often)",
        "another --chat-template, or put the text into the first user message",
    ),
    (
        "rows_parted", "rows_in", "prompt-parted", "note", "rows",
        "the generation prompt goes on otherwise than the rendered turn (it opens <think>); answers are trained from where they part",
        "a --chat-template whose turns begin as its generation prompt does",
    ),
    (
        "rows_with_control_tokens", "rows_in", "control-token-in-data", "note", "rows",
        "a message spells a control token; it is encoded as text", "nothing; --trust-control-tokens lets them count",
    ),
    (
        "rows_with_repeated_markers", "rows_in", "repeated-marker", "note", "rows",
        "several response markers without an instruction template: only the last answer is trained", "--instruction-template",
    ),
    (
        "rows_masked_without_warning", "rows_in", "masked-as-trl", "defect", "rows",
        "trl 0.7.10 masks the row otherwise than meant, without a warning", "--mask-mode default",
    ),
)  # fmt: skip


def _counters(ledger: Ledger) -> Iterator[Finding]:
    for counter, whole, code, severity, of, message, fix in _COUNTED:
        count = ledger.counters.get(counter, 0)
        if count:
            share = count / max(getattr(ledger, whole), 1) if whole else None
            yield Finding(code, severity, message, fix, count, of, share)
