from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sftdata.batches import Ragged, TextBatch, TokenBatch, Tokens
from sftdata.encode.tokens import EncodeCounts, encode_batch, encode_tokens_rows
from sftdata.errors import UsageError
from tests.encoders import NO_GIGATOKEN, TOKENIZERS, encoder, reference, resolved

Marked = tuple[str, list[tuple[int, int]], list[tuple[int, int]]]


def marked(text: str) -> Marked:
    """Read ⟦trained⟧ and ⟪literal⟫ marks out of a text; ranges in bytes."""
    plain, trained, literal = "", [], []
    opened = {}
    for char in text:
        at = len(plain.encode())
        if char in "⟦⟪":
            opened[char] = at
        elif char == "⟧":
            trained.append((opened["⟦"], at))
        elif char == "⟫":
            literal.append((opened["⟪"], at))
        else:
            plain += char
    return plain, trained, literal


def batch_of(*texts: str, raw: bool = False, closed: bool = True) -> TextBatch:
    rows = [marked(text) for text in texts]
    return TextBatch(
        [row[0] for row in rows],
        Ragged.from_lists([row[1] for row in rows]),
        Ragged.from_lists([row[2] for row in rows]),
        np.arange(len(rows)),
        raw,
        np.full(len(rows), closed),
    )


class Result:
    """Tokens of a batch as (piece, trained) pairs."""

    def __init__(
        self, shared_data: Path, name: str, *texts: str, boundary: str = "split", raw: bool = False, closed: bool = True
    ) -> None:
        self.reference = reference(shared_data, name)
        batch, self.counts = encode_batch(batch_of(*texts, raw=raw, closed=closed), encoder(shared_data, name), boundary=boundary)  # type: ignore[arg-type]
        bounds = batch.offsets.tolist()
        self.ids = [batch.input_ids[a:b].tolist() for a, b in pairwise(bounds)]
        self.trained = [batch.trained[a:b].tolist() for a, b in pairwise(bounds)]

    def trained_pieces(self, row: int = 0) -> list[str | None]:
        return [self.reference.id_to_token(i) for i, t in zip(self.ids[row], self.trained[row], strict=True) if t]

    def pieces(self, row: int = 0) -> list[str | None]:
        return [self.reference.id_to_token(i) for i in self.ids[row]]


def test_exactly_the_answer_and_its_end_are_trained(shared_data: Path) -> None:
    done = Result(
        shared_data, "qwen2.5-instruct", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Good day<|im_end|>⟧\n"
    )
    assert done.trained_pieces() == ["Good", "Ġday", "<|im_end|>"]
    assert done.counts == EncodeCounts()
    assert done.ids[0] == done.reference.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nGood day<|im_end|>\n").ids


def test_a_token_over_the_edge_is_cut_there_and_counted(shared_data: Path) -> None:
    done = Result(shared_data, "gpt2", "Answer: ⟦yes⟧", "Answer:⟦ yes⟧", "one⟦two⟧three")
    assert done.pieces(0) == ["Answer", ":", "Ġ", "yes"]
    assert done.trained_pieces(0) == ["yes"]
    assert done.pieces(1) == ["Answer", ":", "Ġyes"]
    assert done.pieces(2) == ["one", "two", "three"]
    assert done.trained_pieces(2) == ["two"]
    assert (done.counts.boundary_splits, done.counts.boundary_rows) == (3, 2)


def test_merge_keeps_the_joint_ids_and_trains_every_token_that_overlaps(shared_data: Path) -> None:
    done = Result(shared_data, "gpt2", "Answer: ⟦yes⟧", boundary="merge")
    assert done.pieces() == ["Answer", ":", "Ġyes"]
    assert done.trained_pieces() == ["Ġyes"]
    assert done.counts.boundary_splits == 1


def test_words_that_look_ahead_are_cut_although_no_token_lies_across(shared_data: Path) -> None:
    name = "llama-3.2-instruct"
    text = "x\n\t\t⟦xyzzy⟧"
    ids = Result(shared_data, name, text).ids[0]
    prefix = reference(shared_data, name).encode("x\n\t\t", add_special_tokens=False).ids
    assert ids[: len(prefix)] == prefix
    joint = reference(shared_data, name).encode("x\n\t\txyzzy", add_special_tokens=False).ids
    assert joint[: len(prefix)] != prefix, "this text no longer shows the case"


@pytest.mark.parametrize("name", ["mistral-7b-instruct", "phi-3-mini", "minicpm3-4b"])
def test_no_space_is_invented_where_a_text_was_cut(shared_data: Path, name: str) -> None:
    done = Result(shared_data, name, "Answer: ⟦yes 日本⟧ and no")
    assert done.reference.decode(done.ids[0], skip_special_tokens=False) == "Answer: yes 日本 and no"
    assert done.reference.decode([i for i, t in zip(done.ids[0], done.trained[0], strict=True) if t]) == "yes 日本"


def test_an_invented_space_belongs_to_the_text_after_it(shared_data: Path) -> None:
    done = Result(shared_data, "mistral-7b-instruct", "<s>⟦日本⟧</s>日", "<s>⟦日本</s>⟧日")
    assert done.pieces(0) == ["<s>", "▁", "日", "本", "</s>", "▁", "日"]
    assert done.trained_pieces(0) == ["▁", "日", "本"]
    assert done.trained_pieces(1) == ["▁", "日", "本", "</s>"]


def test_whitespace_that_phi_swallows_is_context_after_a_turn_and_kept_before_an_answer(shared_data: Path) -> None:
    plain = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    done = Result(shared_data, "phi-3-mini", plain + "⟦ok<|end|>⟧\n<|endoftext|>", plain + "⟦\n ok<|end|>⟧\n")
    assert done.ids[0] == done.reference.encode(plain + "ok<|end|>\n<|endoftext|>", add_special_tokens=False).ids
    assert done.trained_pieces(0) == ["ok", "<|end|>"]
    assert done.trained_pieces(1) == ["<0x0A>", "▁ok", "<|end|>"]
    assert done.counts.boundary_splits == 1
    assert done.counts.slow_rows == 0


def test_normalized_text_is_placed_exactly_and_counted_as_slow(shared_data: Path) -> None:
    done = Result(shared_data, "qwen3", "cafe\u0301 ⟦cafe\u0301 x⟧ y")
    assert done.reference.decode([i for i, t in zip(done.ids[0], done.trained[0], strict=True) if t]).strip() == "café x"
    assert done.counts.slow_rows == 1


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "torchtitan-test"])
def test_control_tokens_in_data_are_text_and_the_templates_own_are_not(shared_data: Path, name: str) -> None:
    tokenizer = reference(shared_data, name)
    control = [token for token in resolved(shared_data, name).added_tokens if token.content.strip()]
    end = next(token for token in control if token.special and token.content not in ("<unk>", "<pad>"))
    text = f"{end.content}tell me about ⟪{end.content}⟫ or⟪{end.content}⟫{end.content}⟦ok {end.content}⟧"
    done = Result(shared_data, name, text)
    assert done.counts.literal_rows == 1
    assert done.ids[0].count(end.id) == 3
    assert done.trained_pieces()[-1] == end.content
    plain = marked(text)[0]
    spelled = tokenizer.decode(done.ids[0], skip_special_tokens=False)
    if name != "t5-small":
        assert "".join(spelled.split()) == "".join(plain.split())
    tokenizer.encode_special_tokens = True  # the tokenizer's own way of not matching special tokens
    inside = f"tell me about {end.content} or{end.content}"
    try:
        alone = tokenizer.encode(inside, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = False
    if resolved(shared_data, name).layout.prefix in ("none", "always") and end.id not in alone:
        assert done.ids[0][1 : 1 + len(alone)] == alone


def test_control_tokens_in_data_end_where_a_trained_span_does(shared_data: Path) -> None:
    done = Result(shared_data, "qwen2.5-instruct", "<|im_start|>assistant\n⟦say ⟪<|im_end|>⟫<|im_end|>⟧\n")
    assert done.trained_pieces().count("<|im_end|>") == 1
    assert done.trained_pieces()[-1] == "<|im_end|>"
    assert "".join(str(piece) for piece in done.trained_pieces()[:-1]) == "sayĠ<|im_end|>"


def test_raw_text_begins_and_ends_as_the_reference_says_and_never_twice(shared_data: Path) -> None:
    done = Result(shared_data, "llama-3.2-instruct", "⟦Hi⟧", "⟦<|begin_of_text|>Hi<|eot_id|>⟧", "⟦Hi⟧ there", "", raw=True)
    bos, eos = "<|begin_of_text|>", "<|eot_id|>"
    assert [done.pieces(row) for row in range(4)] == [[bos, "Hi", eos], [bos, "Hi", eos], [bos, "Hi", "Ġthere", eos], [bos, eos]]
    assert done.trained == [[False, True, True], [True, True, True], [False, True, False, False], [False, False]]
    assert (done.counts.bos_found, done.counts.eos_found, done.counts.eos_added) == (1, 1, 3)


def test_an_empty_completion_trains_its_end(shared_data: Path) -> None:
    done = Result(shared_data, "gpt2", "prompt⟦⟧", "prompt⟦<|endoftext|>⟧", raw=True)
    assert [done.trained_pieces(row) for row in range(2)] == [["<|endoftext|>"], ["<|endoftext|>"]]


def test_a_text_left_open_gets_no_end_and_a_rendered_chat_no_ends_at_all(shared_data: Path) -> None:
    assert Result(shared_data, "t5-small", "⟦Hi⟧", raw=True).pieces() == ["▁Hi", "</s>"]
    assert Result(shared_data, "t5-small", "⟦Hi⟧", raw=True, closed=False).pieces() == ["▁Hi"]
    assert Result(shared_data, "llama-3.2-instruct", "⟦Hi⟧").pieces() == ["Hi"]


def test_a_tokenizer_without_an_end_token_cannot_close_texts(shared_data: Path) -> None:
    from dataclasses import replace

    from sftdata.encode.engine import Encoder

    whole = encoder(shared_data, "minimind")
    bare = Encoder(replace(whole.resolved, eos_id=None, suffix_ids=()), whole.engine, whole.encode)
    with pytest.raises(UsageError, match="names no end token.*--eos-token"):
        encode_batch(batch_of("x", raw=True), bare)


def test_an_empty_batch_is_encoded_to_nothing(shared_data: Path) -> None:
    for raw in (False, True):
        for boundary in ("split", "merge"):
            batch, counts = encode_batch(batch_of(raw=raw), encoder(shared_data, "minimind"), boundary=boundary)  # type: ignore[arg-type]
            assert (len(batch), batch.offsets.tolist(), counts) == (0, [0], EncodeCounts())


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in NO_GIGATOKEN])
def test_engines_give_the_same_batch(shared_data: Path, name: str) -> None:
    texts = ["Q: a \n⟦e\u0301 b⟧ c", "⟦▁x⟧", "Answer: ⟦yes ⟪<s>⟫</s>⟧ <|end|> \n⟦<|im_end|>⟧", "", "日⟦本⟧👩‍👩‍👧"]
    batches = [
        encode_batch(batch_of(*texts, raw=True), encoder(shared_data, name, engine)) for engine in ("gigatoken", "tokenizers")
    ]
    (fast, fast_counts), (slow, slow_counts) = batches
    assert fast_counts == slow_counts
    for column in ("input_ids", "trained", "offsets"):
        assert getattr(fast, column).tolist() == getattr(slow, column).tolist()


def given_rows(shared_data: Path, *rows: tuple[list, list]) -> tuple[TokenBatch, dict[int, str]]:
    batch, faults = encode_tokens_rows(
        [Tokens(*row) for row in rows], np.arange(len(rows)) + 5, resolved(shared_data, "minimind")
    )
    return batch, {index: fault.code for index, fault in faults}


def test_pretokenized_rows_pass_through_untouched(shared_data: Path) -> None:
    batch, faults = given_rows(shared_data, ([5, 6, 7], [-100, 6, 7]), ([], []))
    assert (batch.input_ids.tolist(), batch.trained.tolist()) == ([5, 6, 7], [False, True, True])
    assert (batch.offsets.tolist(), batch.row.tolist(), faults) == ([0, 3, 3], [5, 6], {})


def test_bad_pretokenized_rows_are_faults_and_the_others_stay(shared_data: Path) -> None:
    batch, faults = given_rows(
        shared_data,
        ([1, 2], [1]),
        ([1, 2], [1, 2]),
        ([1, 6400], [1, 6400]),
        ([1, -1], [1, -100]),
        ([1, 2.5], [1, 2]),
        ([1, "2"], [1, 2]),
        ([1, 2], [2, -100]),
        ([1, 2**70], [1, 2]),
    )
    assert (batch.input_ids.tolist(), batch.row.tolist()) == ([1, 2], [6])
    assert faults == {
        5: "lengths-differ", 7: "id-outside-vocabulary", 8: "id-outside-vocabulary", 9: "not-token-ids", 10: "not-token-ids",
        11: "label-not-the-id", 12: "not-token-ids",
    }  # fmt: skip
