"""Break the product in one line at a time: the quick suite must notice each fault, with nothing at hand but this project.

    python -m tests.mutants [WORD ...]      all faults, or those whose sentence holds one of the words

A fault replaces a text that occurs once in the product; one whose text is gone, or no longer alone, stops the run. It is
made in a copy of the tree, and the tests of the quick suite that are named beside it must fail there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sftdata", "sfttrain")
TESTS_FAILED = 1  # the exit code of pytest; others mean that no test could speak


@dataclass(frozen=True)
class Fault:
    """One wrong line: what it does, the text it replaces, what stands there instead, and the tests that should notice it."""

    what: str
    text: str
    instead: str
    tests: str

    def place(self, root: Path) -> tuple[Path, str]:
        """Return the file that holds the text, and all of that file.

        Raises:
            LookupError: no file holds it, or it occurs more than once.
        """
        files = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
        found = [
            (path, source) for path in files if self.text in (source := path.read_text(encoding="utf-8"))
        ]
        if len(found) != 1 or found[0][1].count(self.text) != 1:
            places = ", ".join(str(path.relative_to(root)) for path, _ in found) or "nowhere"
            raise LookupError(f"{self.what}: {self.text!r} should occur once; found in {places}")
        return found[0]


# fmt: off
FAULTS = [
    # ------------------------------------------------------------------------- masks: turns of a conversation
    Fault("--train-on last-assistant trains every answer",
          'if self.train_on == "last-assistant":', "if False:", "unit/test_trained_parts.py"),
    Fault("--train-on last-assistant takes the short way of rows that train every answer",
          'return self.train_on not in ("all", "last-assistant")',
          'return self.train_on != "all"', "unit/test_trained_parts.py"),
    Fault("answers inside a prompt are trained",
          'first = 0 if self.train_on == "assistant" else row.prompt_messages',
          "first = 0", "unit/test_trained_parts.py"),
    Fault("a message that is switched off is trained",
          "if switches[index] or (switches[index] is None and index >= first)",
          "if index >= first", "unit/test_trained_parts.py"),
    Fault("the prompt of a completion is trained",
          '(0 if self.train_on == "all" else len(row.prompt), len(text))',
          "(0, len(text))", "unit/test_masks.py"),
    Fault("the end of a turn is not trained",
          "stop = found.end() if found else region.limit",
          "stop = found.start() if found else region.limit", "unit/test_spans.py"),
    Fault("a stop token that data brought ends the turn",
          "if not any(literal[0] <= found.start() < literal[1] for literal in traced.literal):",
          "if True:", "unit/test_spans.py"),
    Fault("the generation prompt is trained",
          "return origin + len(prompt), False", "return origin, False", "unit/test_spans.py"),
    Fault("control tokens that data spells count as such",
          "() if trust_control_tokens else guarded_tokens(",
          "() if True else guarded_tokens(", "unit/test_spans.py"),
    # --------------------------------------------------------------------- masks: markers, ids that are given
    Fault("without an instruction marker every answer is trained",
          "answers = answers[-1:]", "pass", "unit/test_markers.py"),
    Fault("a text that ends in a question earns an end token",
          "if span[0] < span[1]], markers[-1][2], repeated)",
          "if span[0] < span[1]], True, repeated)", "unit/test_markers.py"),
    Fault("control tokens that data spells make a marker",
          "find_spans(_blanked(rendered.text, rendered.literal), ",
          "find_spans(rendered.text, ", "unit/test_masks.py"),
    Fault("an empty answer at the end earns no end token",
          "[(size, size)] * open_end", "[(size, size)] * False", "unit/test_masks.py"),
    Fault("the old collator's mask lets the pad id be trained",
          "self.instruction, self.pad_id", "self.instruction, None", "unit/test_masks.py"),
    Fault("a token is trained although its label is another",
          "& (labels != ids)", "& (labels != labels)", "unit/test_tokens.py"),
    # ------------------------------------------------------------------------------------------- texts to ids
    Fault("code that a tokenizer brings is run",
          "AutoTokenizer.from_pretrained(source, trust_remote_code=False)",
          "AutoTokenizer.from_pretrained(source, trust_remote_code=True)", "unit/test_tokenizer.py"),
    Fault("white space that the token before an answer swallows is lost",
          "by_last = (before >= first) & encoder.strips_right[ids[before]]",
          "by_last = np.zeros(len(token), np.bool_)", "unit/test_tokens.py"),
    Fault("white space that the answer's first token swallows is lost",
          "by_next = (token < stop) & encoder.strips_left[ids[token]]",
          "by_next = np.zeros(len(token), np.bool_)", "unit/test_tokens.py"),
    Fault("a token over the edge of an answer is not cut",
          "bad: Bool = start < edges.position", "bad: Bool = start < 0", "unit/test_tokens.py"),
    Fault("words that look ahead are not cut",
          "if encoder.resolved.layout.looks_ahead:", "if False:", "unit/test_tokens.py"),
    Fault("EOS is trained where no span ends",
          "ids[tails], flags[tails] = value, trained[closes]",
          "ids[tails], flags[tails] = value, True", "unit/test_tokens.py"),
    Fault("BOS is written twice",
          "return _between(tokens, prefix, ~opened, suffix, closes, runs_to_end)",
          "return _between(tokens, prefix, opened | True, suffix, closes, runs_to_end)", "unit/test_tokens.py"),
    Fault("EOS is written twice",
          "closes = closed & ~ended & (len(suffix) > 0)",
          "closes = closed & (len(suffix) > 0)", "unit/test_tokens.py"),
    Fault("white space behind the end is trained",
          "tokens.trained[stop - blank[index] : stop] = False", "pass", "unit/test_tokens.py"),
    # ------------------------------------------------------------------------------------- length and packing
    Fault("a row that lost its answer stays",
          "into[example], trained == 0]", "into[example], trained < 0]", "unit/test_length.py"),
    Fault("the end that was cut is not kept",
          "stop = np.concatenate([kept.start, lengths[kept.example[last]], lengths[gone]])",
          "stop = np.concatenate([kept.start, kept.stop[last], lengths[gone]])", "unit/test_nothing_lost.py"),
    Fault("a dropped document loses its first label",
          "labels=np.where(documents.trained[tokens], ids, np.int32(IGNORE_INDEX)),",
          "labels=np.where(documents.trained[tokens] & (tokens != tokens[0]), ids, np.int32(IGNORE_INDEX)),",
          "unit/test_nothing_lost.py"),
    Fault("verify does not hash the documents again",
          "& (index.document_hash == hashes).all(axis=1)", "", "unit/test_nothing_lost.py"),
    Fault("a set may name no rest for what was cut",
          "if missing and not rest:", "if False:", "unit/test_nothing_lost.py"),
    Fault("a resume takes a slice without its index",
          "for file in (*result.shards, *result.files)}",
          "for file in result.shards}", "unit/test_nothing_lost.py"),
    Fault("padding is trained",
          "input_ids[padding], labels[padding] = ", "input_ids[padding], labels[:0] = ", "unit/test_pack.py"),
    Fault("the first token of a document is trained",
          "labels[target[:-1]] = ", "labels[:0] = ", "unit/test_pack.py"),
    Fault("a wrapped row begins one token late",
          "row_starts = np.arange(0, total, max_length)",
          "row_starts = np.arange(0, total, max_length + 1)", "unit/test_pack.py property/test_pack.py"),
    # ----------------------------------------------------------------------------------------------- views
    Fault("the label that a piece lost with its first token is not given back",
          "trained[target[:-1][runs.first_label]] = True", "pass", "unit/test_views_documents.py"),
    Fault("equal documents are taken for different ones where only half of their hash is",
          "~(same if hashes.ndim == 1 else same.all(axis=1))", "~(same if hashes.ndim == 1 else same[:, 0])",
          "unit/test_views_choose.py"),
    Fault("a cap is passed by the document that does not fit",
          "np.cumsum(amounts[order]) <= cap", "np.cumsum(amounts[order]) < cap + 20", "unit/test_views_choose.py"),
    Fault("a split is drawn by the document, not by its prompt",
          "drawn_share(choice.documents.prompt_keys,", "drawn_share(choice.documents.document[:, 0],",
          "integration/test_views_choice.py"),
    Fault("a set that took the place of a base is mixed into the view",
          "if found != manifest.digest:", "if False:", "integration/test_views_choice.py"),
    Fault("the first token of a document read by index is trained",
          "labels[at] = np.where(given, ids[at], IGNORE_INDEX)", "labels[at] = ids[at]",
          "integration/test_views_by_index.py"),
    Fault("a mark that closes a picture is cut off it",
          "opened = opened[np.isin(tokens.input_ids[ends[opened]], closing)]", "opened = opened[:0]",
          "integration/test_pictures.py"),
    Fault("the same question about another picture is the same prompt",
          "prompt[index] = b\"\".join(pictures[number] for number in own[:asked].tolist())", "pass",
          "integration/test_pictures_views.py"),
    Fault("a view names the pictures of another base",
          "self.numbers.append(images.astype(np.int64) + first)", "self.numbers.append(images.astype(np.int64))",
          "integration/test_pictures_views.py"),
    Fault("a view by index reads another set that took the place of its base",
          "if (found.digest, rest_digest(found)) != (base.digest, base.rest):", "if False:",
          "integration/test_views_by_index.py"),
    # ----------------------------------------------------------------------------------------- verify, resume
    Fault("rows that were lost uncounted break no law",
          "self.rows_kept + rejected + filtered + dropped + left_out,", "self.rows_in,", "unit/test_ledger.py"),
    Fault("a manifest that was changed is taken",
          "if written != found:", "if False:", "unit/test_manifest.py"),
    Fault("verify does not compare digests",
          "if found.xxh3 != info.xxh3:", "if False:", "unit/test_verify.py"),
    Fault("verify does not count tokens again",
          "report.problems += count.compare()", "pass", "unit/test_verify.py"),
    Fault("verify takes a label that is not its token's id",
          "& (rows.labels != rows.input_ids)", "& (rows.labels != rows.labels)", "unit/test_verify.py"),
    Fault("a resume takes a shard of any size",
          "return path.is_file() and path.stat().st_size == file.bytes",
          "return path.is_file()", "unit/test_build.py"),
    Fault("a resume goes on with other settings",
          "if not moving.issuperset(changed) and not overwrite and not self._refused.exists():", "if False:",
          "unit/test_build.py"),
    # ------------------------------------------------------------------------------------------------ trainer
    Fault("a checkpoint is sealed before it is on disk",
          "os.fsync(file.fileno())", "pass", "unit/test_train_checkpoint.py"),
    Fault("a damaged checkpoint is resumed",
          "return digest_file(path, sha256=False).xxh3 == file.xxh3",
          "return True", "unit/test_train_checkpoint.py"),
    Fault("positions run on through a packed row",
          "np.repeat(ends - lengths, lengths)",
          "np.repeat(ends[:1] - lengths[:1], ends[-1])", "unit/test_train_data.py"),
    Fault("a batch asks a document of the one before",
          "labels[offsets_of(lengths)[:-1]] = ", "labels[:0] = ", "unit/test_train_data.py"),
    Fault("documents are one for variable-length attention",
          "ends = torch.from_numpy(np.concatenate([[0], np.cumsum(flat)])",
          "ends = torch.from_numpy(np.array([0, flat.sum()])", "unit/test_train_data.py"),
    Fault("a label trains the position of its own token",
          "rows, targets = hidden[:, : targets.shape[1]][chosen], targets[chosen]",
          "rows, targets = hidden[:, 1:][chosen], targets[chosen]", "unit/test_train_loss.py"),
    Fault("the gradient of the loss lacks its target",
          "targets.ids, 1 - objective.smoothing)",
          "targets.ids, objective.smoothing)", "unit/test_train_loss.py"),
    Fault("a leak between documents is taken for none",
          "self.difference <= DIFFERENCE and self.leak <= self.tolerance",
          "self.difference <= DIFFERENCE", "integration/test_train_isolation.py"),
    Fault("the last token of a slice predicts nothing",
          "longer[:, first : first + width + 1]", "longer[:, first : first + width]", "unit/test_train_sequence.py"),
    Fault("heads of keys that are repeated for more ranks go to other queries",
          "states.repeat_interleave(copies, 1)", "states.repeat(1, copies, 1, 1)", "unit/test_train_sequence.py"),
    Fault("ranks train the same rows",
          "return iter(rows.reshape(-1, self.ranks, self.batch_size)[:, self.rank].tolist())",
          "return iter(rows.reshape(-1, self.ranks, self.batch_size)[:, 0].tolist())", "unit/test_train_order.py"),
    Fault("steps of equal work go to the ranks otherwise than they were made",
          "rows.reshape(stop - first, -1, ranks, each).swapaxes(1, 2).reshape(-1)",
          "rows.reshape(stop - first, -1, ranks, each).reshape(-1)", "unit/test_train_stored.py"),
    Fault("steps that are uneven stay as they were drawn",
          "uneven = _ratios(dealt, costs) > EVEN",
          "uneven = _ratios(dealt, costs) > 9", "unit/test_views_order.py"),
    Fault("documents of a padded row are looked for where they would be without padding",
          "index.starts(base.manifest.pad_to_multiple_of)",
          "index.starts()", "integration/test_views_order.py"),
    Fault(
        "a difference pairs what is at another place before what is at the same one",
        "        here, there = self._same_place()\n        same = a[here] == b[there]",
        "        here, there = self._same_place()\n        same = (a[here] == b[there]) & False",
        "unit/test_diff.py",
    ),
    Fault(
        "a difference takes a document that is only beside the rows for one of theirs",
        "held: Bool = self.tokens > 0",
        "held: Bool = self.lengths > 0",
        "unit/test_diff.py",
    ),
    Fault(
        "a difference does not see where a document is cut",
        "        pieces=offset[kept].astype(np.int64) << 32 | length[kept],",
        "        pieces=length[kept].astype(np.int64),",
        "unit/test_diff.py",
    ),
    Fault(
        "a difference takes another prompt with the same answer for another text",
        "        ways = [same_ids & same_pictures, same_ids, same_prompt, same_answer]",
        "        ways = [same_ids & same_pictures, same_ids, same_prompt, same_answer & False]",
        "unit/test_diff.py",
    ),
    Fault(
        "shares of a mixture need not be all of the set",
        "(rows, tokens) if manifest.shares else ()",
        "(rows, tokens) if manifest.notes and not manifest.notes else ()",
        "unit/test_choice.py",
    ),
    Fault(
        "a view says what its sets counted of documents that it left out",
        "if count and (name in known or not chosen)",
        "if count",
        "unit/test_choice.py",
    ),
    # ------------------------------------------------------------------------------- pictures in training
    Fault("the cache of the text inside a model of pictures lets packed documents see each other",
          'for part in model.modules():\n        config = getattr(part, "config", None)',
          'for part in [model]:\n        config = getattr(part, "config", None)', "unit/test_train_pictures.py"),
    Fault("packed documents with pictures have ordinary positions",
          'found["position_ids"] = torch.from_numpy(positions).view(4, *input_ids.shape)', "pass",
          "unit/test_train_pictures.py"),
    Fault("the time of pictures tells documents apart",
          "found[0] = plain", "found[0] = found[1]", "unit/test_train_pictures.py"),
    Fault("tokens of pictures are looked up where they are in their documents",
          "attention_mask = {name: _added(mask, dtype) for name, mask in masks.items()}", "pass",
          "unit/test_train_pictures.py"),
    Fault("a worker takes pictures of which the set knows other tokens",
          "if tokens != picture.tokens:", "if tokens != tokens:", "unit/test_train_pictures.py"),
    Fault("a worker takes pictures that are others by now",
          "if hashlib.sha256(data).digest() != self.sha256:", "if data != data:", "unit/test_train_pictures.py"),
    Fault("pictures are not turned before their pixels are made",
          'turned(pillow.open(io.BytesIO(picture.read()), formats=_FORMATS)).convert("RGB")',
          'pillow.open(io.BytesIO(picture.read()), formats=_FORMATS).convert("RGB")', "unit/test_train_pictures.py"),
    # ------------------------------------------------------------------------- blame: losses of documents
    Fault("a run that goes on keeps what it logged behind its checkpoint in a file of its own",
          "if _begins(path) >= step:", "if _begins(path) > step:", "unit/test_document_log.py"),
    Fault("a log is cut a step too early",
          'step, side="right"))', 'step, side="left"))', "unit/test_document_log.py"),
    Fault("documents are logged again with the next ones",
          "self._pending.clear()", "pass", "unit/test_document_log.py"),
    Fault("weights of tokens are not in the losses of documents",
          "_by_document(values * weights, documents.trained)", "_by_document(values, documents.trained)",
          "unit/test_document_log.py"),
    Fault("an answer of a word counts like one of a page",
          "certain = trained / (trained + _USUAL_TOKENS * seen)", "certain = trained / trained", "unit/test_worst.py"),
    Fault("text that falls into single bytes stands out by token alone",
          "np.where(spelled, np.maximum(over, by_byte), over)", "over", "unit/test_worst.py"),
    Fault("a set that lies in the place of another is taken for it",
          "if opened.manifest.digest == trained.digest:", "if opened.manifest.digest:", "integration/test_blame.py"),
    Fault("a line that a mixture goes through again is left out once",
          "found += [again for again, first in passes if any(first is source for source in found)]", "pass",
          "integration/test_blame.py"),
]
# fmt: on


def copy_tree(root: Path) -> None:
    """Copy what git tracks, or would, to a new repository at `root`."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )  # fmt: skip
    for name in filter(None, listing.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)


def fails(root: Path, tests: str = "") -> bool:
    """Run some of the quick tests of a copy, all by default; say whether one fails.

    Raises:
        RuntimeError: they could not run at all.
    """
    environment = {name: value for name, value in os.environ.items() if name != "SFTDATA_TEST_DATA"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-qx",
        "-p",
        "no:cacheprovider",
        *(f"tests/{name}" for name in tests.split()),
    ]
    done = subprocess.run(
        command,
        cwd=root,
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, TESTS_FAILED):
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.returncode == TESTS_FAILED


def main(words: list[str]) -> int:
    """Try every fault; return how many were not noticed."""
    faults = [fault for fault in FAULTS if not words or any(word in fault.what for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder)
        copy_tree(root)
        places = [fault.place(root) for fault in faults]
        if fails(root, " ".join(sorted({fault.tests for fault in faults}))):
            raise RuntimeError("tests fail before anything is broken: run make test")
        for fault, (path, source) in zip(faults, places, strict=True):
            path.write_text(source.replace(fault.text, fault.instead), encoding="utf-8")
            noticed = fails(root, fault.tests)
            path.write_text(source, encoding="utf-8")
            print(f"{'noticed' if noticed else 'SURVIVES'}  {fault.what} ({fault.tests})", flush=True)
            survivors += not noticed
    print(f"{len(faults) - survivors} of {len(faults)} faults turn the quick suite red")
    return survivors


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
