"""The sets of a run, opened and checked without torch: their bytes, their tokenizers, their vocabulary."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from sftdata.errors import DataError, IntegrityError, UsageError
from sftdata.set.ledger import REJECTS_NAME
from sftdata.set.opened import ShardSet, open_set
from sftdata.set.verify import damaged_bases, damaged_files, foreign_shards
from sftdata.vocabulary import read_added_tokens
from sfttrain.config import TrainConfig
from sfttrain.process import rank


def open_sets(config: TrainConfig) -> tuple[list[ShardSet], dict[str, ShardSet], Reading]:
    """Open the sets to train and to evaluate on; the main process begins to read every byte of them once.

    Raises:
        SftError: a set is missing or empty, or does not fit the others or the model.
    """
    sets = [open_set(folder) for folder in config.sets]
    evaluation = {name: open_set(folder) for name, folder in config.eval.items()}
    everything = [*sets, *evaluation.values()]
    refuse_mixed_tokenizers(everything)
    known = _known_vocabulary(config)
    if known is not None:
        missing_embeddings(sets, known)
    for opened in everything:
        if not opened.manifest.ledger.tokens_trained:
            raise DataError(
                f"{opened.folder}: holds no trained token.", "prepare it with a mask that trains something."
            )
    return sets, evaluation, Reading(everything if rank() == 0 else [])


class Reading:
    """The verification of sets, in a thread beside the import of torch and the loading of the model.

    Args:
        sets: to be read.
    """

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self._sets, self._error = sets, list[Exception]()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Refuse what has been found so far.

        Raises:
            SftError: a set is damaged.
        """
        if self._error:
            raise self._error[0]

    @contextmanager
    def first(self) -> Iterator[None]:
        """Refuse damaged bytes before what they made someone say who looked into a set beside the reading.

        Raises:
            SftError: a set is damaged.
        """
        try:
            yield
        except IntegrityError:
            self.finish()
            raise

    def finish(self) -> None:
        """Wait until every byte is read.

        Raises:
            SftError: a set is damaged.
        """
        self._thread.join()
        self.check()

    def _read(self) -> None:
        try:
            verify_sets(self._sets)
        except Exception as error:  # raised again in the thread that waits
            self._error.append(error)


def verify_sets(sets: Sequence[ShardSet]) -> None:
    """Read every file that training uses, hold it against its manifest and the laws, and keep it mapped.

    rejects.jsonl may be under repair. What is put in the place of a set later does not reach the run.

    Raises:
        IntegrityError: a file is missing, its bytes differ or break a law, or the folder holds a shard that
            is none of the set's.
    """
    for opened in sets:
        checked = damaged_files(opened.folder, opened.manifest)
        damage = (problem for info, problem in checked if problem and info.name != REJECTS_NAME)
        beneath = (problem for _, problem in damaged_bases(opened.folder, opened.manifest) if problem)
        for problem in chain(damage, beneath, foreign_shards(opened.folder, opened.manifest)):
            raise IntegrityError(problem)
        opened.hold()


def refuse_mixed_tokenizers(sets: Sequence[ShardSet]) -> None:
    """Refuse sets whose ids mean different tokens.

    Raises:
        UsageError: naming two of them.
    """
    for opened in sets[1:]:
        one, other = sets[0].manifest.tokenizer, opened.manifest.tokenizer
        added = sorted((one.tokens_added, other.tokens_added), key=len)
        grown = (
            added[0] != added[1] and added[1][: len(added[0])] == added[0]
        )  # one gained tokens for its template
        alike = grown and one.vocab_size - len(one.tokens_added) == other.vocab_size - len(other.tokens_added)
        if one.sha256 != other.sha256 and not alike:
            found = f"{sets[0].folder} was prepared with the tokenizer {one.name}, "
            found += f"{opened.folder} with {other.name}"
            raise UsageError(
                f"{found}, whose ids are others.", "prepare both with the tokenizer of the model."
            )


def missing_embeddings(sets: Sequence[ShardSet], rows: int) -> int:
    """Return to how many rows the embeddings must grow; 0 if they are enough.

    They grow only for tokens that the tokenizer gained after its training: a set made with another model's
    tokenizer is an error.

    Raises:
        UsageError: the vocabulary of a set is not this model's.
    """
    needed = 0
    for opened in sets:
        tokenizer = opened.manifest.tokenizer
        if tokenizer.vocab_size <= rows:
            continue
        if tokenizer.vocab_size - rows > len(_added_ids(opened, rows)):
            found = f"its tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids"
            raise UsageError(
                f"{opened.folder}: {found}; the model has embeddings for {rows}.",
                "train the model that the tokenizer belongs to, "
                "or prepare the set with this model's tokenizer.",
            )
        needed = max(needed, tokenizer.vocab_size)
    return needed


def _added_ids(opened: ShardSet, rows: int) -> set[int]:
    """Ids from `rows` on that are known to be added tokens."""
    tokenizer = opened.manifest.tokenizer
    new = set(range(tokenizer.vocab_size - len(tokenizer.tokens_added), tokenizer.vocab_size))
    return {token for token in new | read_added_tokens(opened.folder / "tokenizer").keys() if token >= rows}


def _known_vocabulary(config: TrainConfig) -> int | None:
    """Return the vocabulary size in a local model's config; None where only loading it can show."""
    place = config.init_from_config or Path(config.model or "")
    try:
        fields: dict[str, Any] = json.loads(
            (place / "config.json" if place.is_dir() else place).read_text("utf-8")
        )
        size = fields.get("vocab_size", fields.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None
