from __future__ import annotations

import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sftdata.batches import Ragged, TextBatch, TokenBatch, Tokens
from sftdata.errors import UsageError
from tests.encoders import EVERY, NO_GIGATOKEN, encoder, reference, resolved
from tests.made_tokenizers import MADE
from tests.one_stage import Counts, encode_batch, read_given

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
        self,
        data: Path,
        name: str,
        *texts: str,
        boundary: str = "split",
        raw: bool = False,
        closed: bool = True,
    ) -> None:
        self.reference = reference(data, name)
        batch, self.counts = encode_batch(
            batch_of(*texts, raw=raw, closed=closed), encoder(data, name), boundary=boundary
        )  # type: ignore[arg-type]
        bounds = batch.offsets.tolist()
        self.ids = [batch.input_ids[a:b].tolist() for a, b in pairwise(bounds)]
        self.trained = [batch.trained[a:b].tolist() for a, b in pairwise(bounds)]

    def trained_pieces(self, row: int = 0) -> list[str | None]:
        return [
            self.reference.id_to_token(i) for i, t in zip(self.ids[row], self.trained[row], strict=True) if t
        ]

    def pieces(self, row: int = 0) -> list[str | None]:
        return [self.reference.id_to_token(i) for i in self.ids[row]]


@pytest.mark.parametrize("name", ["qwen2.5-instruct", "made-bytes"])
def test_exactly_the_answer_and_its_end_are_trained(home: Path, name: str) -> None:
    done = Result(home, name, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Good day<|im_end|>⟧\n")
    assert done.trained_pieces() == ["Good", "Ġday", "<|im_end|>"]
    assert done.counts == Counts()
    assert (
        done.ids[0]
        == done.reference.encode(
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nGood day<|im_end|>\n"
        ).ids
    )


@pytest.mark.parametrize("name", ["gpt2", "made-bytes"])
def test_a_token_over_the_edge_is_cut_there_and_counted(home: Path, name: str) -> None:
    done = Result(home, name, "Answer: ⟦yes⟧", "Answer:⟦ yes⟧", "one⟦two⟧three")
    assert done.pieces(0) == ["Answer", ":", "Ġ", "yes"]
    assert done.trained_pieces(0) == ["yes"]
    assert done.pieces(1) == ["Answer", ":", "Ġyes"]
    assert done.pieces(2) == ["one", "two", "three"]
    assert done.trained_pieces(2) == ["two"]
    assert (done.counts.boundary_splits, done.counts.boundary_rows) == (3, 2)


@pytest.mark.parametrize("name", ["gpt2", "made-bytes"])
def test_merge_keeps_the_joint_ids_and_trains_every_token_that_overlaps(home: Path, name: str) -> None:
    done = Result(home, name, "Answer: ⟦yes⟧", boundary="merge")
    assert done.pieces() == ["Answer", ":", "Ġyes"]
    assert done.trained_pieces() == ["Ġyes"]
    assert done.counts.boundary_splits == 1


@pytest.mark.parametrize("name", ["llama-3.2-instruct", "made-bytes"])
def test_words_that_look_ahead_are_cut_although_no_token_lies_across(home: Path, name: str) -> None:
    text = "x\n\t\t⟦xyzzy⟧"
    ids = Result(home, name, text).ids[0]
    prefix = reference(home, name).encode("x\n\t\t", add_special_tokens=False).ids
    assert ids[: len(prefix)] == prefix
    joint = reference(home, name).encode("x\n\t\txyzzy", add_special_tokens=False).ids
    assert joint[: len(prefix)] != prefix, "this text no longer shows the case"


@pytest.mark.parametrize(
    "name",
    ["mistral-7b-instruct", "phi-3-mini", "minicpm3-4b", "made-prepend", "made-metaspace", "made-strips"],
)
def test_no_space_is_invented_where_a_text_was_cut(home: Path, name: str) -> None:
    done = Result(home, name, "Answer: ⟦yes 日本⟧ and no")
    assert done.reference.decode(done.ids[0], skip_special_tokens=False) == "Answer: yes 日本 and no"
    assert (
        done.reference.decode([i for i, t in zip(done.ids[0], done.trained[0], strict=True) if t])
        == "yes 日本"
    )


@pytest.mark.parametrize("name", ["mistral-7b-instruct", "made-prepend", "made-strips"])
def test_an_invented_space_belongs_to_the_text_after_it(home: Path, name: str) -> None:
    done = Result(home, name, "<s>⟦本日⟧</s>日", "<s>⟦本日</s>⟧日")
    assert done.pieces(0) == ["<s>", "▁", "本", "日", "</s>", "▁", "日"]
    assert done.trained_pieces(0) == ["▁", "本", "日"]
    assert done.trained_pieces(1) == ["▁", "本", "日", "</s>"]


@pytest.mark.parametrize(("name", "word"), [("phi-3-mini", "ok"), ("made-strips", "▁ok")])
def test_whitespace_that_phi_swallows_is_context_after_a_turn_and_kept_before_an_answer(
    home: Path, name: str, word: str
) -> None:
    plain = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    done = Result(home, name, plain + "⟦ok<|end|>⟧\n<|endoftext|>", plain + "⟦\n ok<|end|>⟧\n")
    assert (
        done.ids[0] == done.reference.encode(plain + "ok<|end|>\n<|endoftext|>", add_special_tokens=False).ids
    )
    assert done.trained_pieces(0) == [word, "<|end|>"]
    assert done.trained_pieces(1) == ["<0x0A>", "▁ok", "<|end|>"]
    assert done.counts.boundary_splits == 1
    assert done.counts.slow_rows == 0


def test_whitespace_that_the_next_token_would_swallow_is_kept_before_an_answer(made_data: Path) -> None:
    texts = ["ok ⟦<mask>⟧", "ok \n⟦ <mask>⟧ yes", "⟦ok ⟧ <mask>", "ok⟦ <mask>⟧", "ok<|end|> ⟦<mask>⟧"]
    done = Result(made_data, "made-strips", *texts)
    inference = [done.reference.encode(text.partition("⟦")[0]).ids for text in texts]
    assert [ids[: len(prompt)] for ids, prompt in zip(done.ids, inference, strict=True)] == inference
    assert [done.trained_pieces(row) for row in range(5)] == [
        ["<mask>"],
        ["<mask>"],
        ["▁ok"],
        ["<mask>"],
        ["<mask>"],
    ]
    assert (done.counts.boundary_splits, done.counts.slow_rows) == (2, 0)


@pytest.mark.parametrize("name", ["qwen3", "made-bytes"])
def test_normalized_text_is_placed_exactly_and_counted_as_slow(home: Path, name: str) -> None:
    done = Result(home, name, "cafe\u0301 ⟦cafe\u0301 x⟧ y")
    assert (
        done.reference.decode([i for i, t in zip(done.ids[0], done.trained[0], strict=True) if t]).strip()
        == "café x"
    )
    assert done.counts.slow_rows == 1


@pytest.mark.parametrize("name", [name for name in EVERY if name != "torchtitan-test"])
def test_control_tokens_in_data_are_text_and_the_templates_own_are_not(home: Path, name: str) -> None:
    tokenizer = reference(home, name)
    control = [token for token in resolved(home, name).added_tokens if token.content.strip()]
    end = next(token for token in control if token.special and token.content not in ("<unk>", "<pad>"))
    text = f"{end.content}tell me about ⟪{end.content}⟫ or⟪{end.content}⟫{end.content}⟦ok {end.content}⟧"
    done = Result(home, name, text)
    assert done.counts.literal_rows == 1
    assert done.ids[0].count(end.id) == 3
    assert done.trained_pieces()[-1] == end.content
    plain = marked(text)[0]
    spelled = tokenizer.decode(done.ids[0], skip_special_tokens=False)
    if name not in ("t5-small", "made-unigram"):
        assert "".join(spelled.split()) == "".join(plain.split())
    tokenizer.encode_special_tokens = True  # the tokenizer's own way of not matching special tokens
    inside = f"tell me about {end.content} or{end.content}"
    try:
        alone = tokenizer.encode(inside, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = False
    if resolved(home, name).layout.prefix in ("none", "always") and end.id not in alone:
        assert done.ids[0][1 : 1 + len(alone)] == alone


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("</s>a⟪</s>⟫⟦b⟧", "</s> ▁ a < / s > b"),
        ("👩‍one ⟪</s>⟫ two⟦ three⟧", "▁ <unk> one ▁ < / s > ▁two ▁three"),
        ("日👩one⟦two no⟧", "▁ 日 <unk> one two ▁no"),
        ("<unk>one⟦two⟧", "<unk> ▁one two"),
    ],
)
def test_what_a_tokenizer_does_not_know_is_not_taken_for_the_token_that_stands_for_it(
    text: str, pieces: str, made_data: Path
) -> None:
    assert Result(made_data, "made-unigram", text).pieces() == pieces.split()


@pytest.mark.parametrize("name", [name for name in MADE if name != "made-unigram"])
def test_ordinary_text_is_placed_by_lengths_alone(made_data: Path, name: str) -> None:
    texts = [
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n⟦Good day<|im_end|>⟧\n",
        "<s>⟦Hi⟧</s> there</s>and⟦ you⟧",
        "<|end|>\n⟦Hi  you⟧<|end|> \n",
        "  two  spaces\n\n\t⟦x⟧\r\n日本 é",
    ]
    assert Result(made_data, name, *texts).counts.slow_rows == 0


def test_marks_that_are_composed_move_no_span(made_data: Path) -> None:
    # Three marks are composed and one letter is taken apart: all in all as many bytes as before.
    text = "e\u0301e\u0301e\u0301⟦ x⟧ \u0958"
    assert len(unicodedata.normalize("NFC", text).encode()) == len(text.encode())
    for boundary in ("split", "merge"):
        assert Result(made_data, "made-bytes", text, boundary=boundary).trained_pieces() == ["Ġ", "x"]


def test_a_span_that_begins_at_a_mark_is_cut_there(made_data: Path) -> None:
    done = Result(made_data, "made-bytes", "caf e⟦\u0301 x⟧")
    assert done.ids[0][: len(done.ids[0]) - 4] == done.reference.encode("caf e").ids
    assert done.trained_pieces() == ["Ì", "ģ", "Ġ", "x"]
    joint = Result(made_data, "made-bytes", "caf⟦e\u0301⟧", "cafe⟦\u0301 x⟧", boundary="merge")
    assert [joint.trained_pieces(row) for row in range(2)] == [["cafÃ©"], ["cafÃ©", "Ġ", "x"]]
    words = Result(made_data, "made-unigram", "cafe⟦\u0301 x⟧")
    prompt = words.reference.encode("cafe", add_special_tokens=False).ids
    assert words.ids[0][: len(prompt)] == prompt


def test_a_cut_word_goes_on_without_a_space_and_the_next_has_its_own(made_data: Path) -> None:
    assert Result(made_data, "made-unigram", "on⟦e two⟧").trained_pieces() == ["e", "▁two"]


def test_white_space_in_data_that_spells_a_token_is_still_swallowed(made_data: Path) -> None:
    done = Result(made_data, "made-strips", "<|end|>⟪ \n⟫ok⟦ yes⟧")
    assert done.ids[0] == done.reference.encode("<|end|> \nok yes").ids


def test_openings_are_cut_once_and_only_where_they_must_be(made_data: Path) -> None:
    texts = [
        "x\n\t\t⟦xyzzy⟧ y\n⟦z⟧",
        "x\n\t\t⟦xyzzy⟧\n\t\t⟦z⟧",
        "say ⟪<|im_end|>⟫\n⟦ok⟧",
        "⟪<|im_end|>⟫\n\t\t⟦ok⟧",
    ]
    splits = [Result(made_data, "made-bytes", text).counts.boundary_splits for text in texts]
    assert splits == [1, 2, 0, 1]


@pytest.mark.parametrize("name", ["qwen2.5-instruct", "made-bytes"])
def test_control_tokens_in_data_end_where_a_trained_span_does(home: Path, name: str) -> None:
    done = Result(home, name, "<|im_start|>assistant\n⟦say ⟪<|im_end|>⟫<|im_end|>⟧\n")
    assert done.trained_pieces().count("<|im_end|>") == 1
    assert done.trained_pieces()[-1] == "<|im_end|>"
    assert "".join(str(piece) for piece in done.trained_pieces()[:-1]) == "sayĠ<|im_end|>"


@pytest.mark.parametrize(
    ("name", "bos", "eos"),
    [
        ("llama-3.2-instruct", "<|begin_of_text|>", "<|eot_id|>"),
        ("made-turns", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    ],
)
def test_raw_text_begins_and_ends_as_the_reference_says_and_never_twice(
    home: Path, name: str, bos: str, eos: str
) -> None:
    done = Result(home, name, "⟦Hi⟧", f"⟦{bos}Hi{eos}⟧", "⟦Hi⟧ there", "", raw=True)
    assert [done.pieces(row) for row in range(4)] == [
        [bos, "Hi", eos],
        [bos, "Hi", eos],
        [bos, "Hi", "Ġthere", eos],
        [bos, eos],
    ]
    assert done.trained == [
        [False, True, True],
        [True, True, True],
        [False, True, False, False],
        [False, False],
    ]
    assert (done.counts.bos_found, done.counts.eos_found, done.counts.eos_added) == (1, 1, 3)


@pytest.mark.parametrize(
    ("name", "end"), [("gpt2", "<|endoftext|>"), ("made-bytes", "<|im_end|>"), ("made-unigram", "</s>")]
)
def test_an_empty_completion_trains_its_end(home: Path, name: str, end: str) -> None:
    done = Result(home, name, "prompt⟦⟧", f"prompt⟦{end}⟧", raw=True)
    assert [done.trained_pieces(row) for row in range(2)] == [[end], [end]]


@pytest.mark.parametrize(
    ("name", "end"),
    [("gpt2", "<|endoftext|>"), ("made-turns", "<｜end▁of▁sentence｜>"), ("made-unigram", "</s>")],
)
def test_an_end_is_trained_only_where_a_span_reaches_it(home: Path, name: str, end: str) -> None:
    done = Result(
        home, name, "⟦Hi⟧", "⟦Hi⟧ there", "Hi there", "⟦Hi⟧ there⟦⟧", f"⟦Hi⟧{end}", "⟦⟧Hi", raw=True
    )
    assert [pieces[-1] for pieces in (done.pieces(row) for row in range(6))] == [end] * 6
    assert [trained[-1] for trained in done.trained] == [True, False, False, True, False, False]


@pytest.mark.parametrize("blank", ["\n", " ", "\n\n", " \t\n"])
@pytest.mark.parametrize(
    ("name", "end"),
    [("gpt2", "<|endoftext|>"), ("qwen2.5-instruct", "<|im_end|>"), ("mistral-7b-instruct", "</s>"), ("t5-small", "</s>"),
     ("made-bytes", "<|im_end|>"), ("made-unigram", "</s>")],
)  # fmt: skip
def test_a_text_that_a_template_closed_gets_no_second_end_and_trains_nothing_behind_it(
    home: Path, name: str, end: str, blank: str
) -> None:
    texts = [
        f"Hi ⟦ hello{end}{blank}⟧",
        f"⟦Hi{end}{blank}hello{end}{blank}⟧",
        f"⟦Hi{end}{blank}hello{blank}⟧",
    ]
    result = Result(home, name, *texts, raw=True)
    number = result.reference.token_to_id(end)
    assert (result.counts.eos_found, result.counts.eos_added) == (2, 1)
    for row, times in enumerate((1, 2, 2)):
        assert result.ids[row].count(number) == times
        assert result.trained_pieces(row)[-1] == end


@pytest.mark.parametrize("name", ["t5-small", "made-unigram"])
def test_a_text_left_open_gets_no_end(home: Path, name: str) -> None:
    assert Result(home, name, "⟦Hi⟧", raw=True).pieces() == ["▁Hi", "</s>"]
    assert Result(home, name, "⟦Hi⟧", raw=True, closed=False).pieces() == ["▁Hi"]


@pytest.mark.parametrize("name", ["llama-3.2-instruct", "made-turns"])
def test_a_rendered_chat_gets_no_ends_at_all(home: Path, name: str) -> None:
    assert Result(home, name, "⟦Hi⟧").pieces() == ["Hi"]


def test_a_tokenizer_without_an_end_token_cannot_close_texts(made_data: Path) -> None:
    from dataclasses import replace

    from sftdata.encode.engine import Encoder

    whole = encoder(made_data, "made-bytes")
    bare = Encoder(replace(whole.resolved, eos_id=None, suffix_ids=()), whole.engine, whole.encode)
    with pytest.raises(UsageError, match="names no end token.*eos_token"):
        encode_batch(batch_of("x", raw=True), bare)


@pytest.mark.parametrize("name", ["minimind", *MADE])
def test_an_empty_batch_is_encoded_to_nothing(home: Path, name: str) -> None:
    for raw in (False, True):
        for boundary in ("split", "merge"):
            batch, counts = encode_batch(batch_of(raw=raw), encoder(home, name), boundary=boundary)  # type: ignore[arg-type]
            assert (len(batch), batch.offsets.tolist(), counts) == (0, [0], Counts())


@pytest.mark.parametrize("name", [name for name in EVERY if name not in NO_GIGATOKEN])
def test_engines_give_the_same_batch(home: Path, name: str) -> None:
    texts = [
        "Q: a \n⟦e\u0301 b⟧ c",
        "⟦▁x⟧",
        "Answer: ⟦yes ⟪<s>⟫</s>⟧ <|end|> \n⟦<|im_end|>⟧",
        "",
        "日⟦本⟧👩‍👩‍👧",
    ]
    batches = [
        encode_batch(batch_of(*texts, raw=True), encoder(home, name, engine))
        for engine in ("gigatoken", "tokenizers")
    ]
    (fast, fast_counts), (slow, slow_counts) = batches
    assert fast_counts == slow_counts
    for column in ("input_ids", "trained", "offsets"):
        assert getattr(fast, column).tolist() == getattr(slow, column).tolist()


def given_rows(data: Path, *rows: tuple[list, list]) -> tuple[TokenBatch, dict[int, str]]:
    batch, faults = read_given(
        [Tokens(*row) for row in rows], np.arange(len(rows)) + 5, resolved(data, "made-bytes")
    )
    return batch, {index: fault.code for index, fault in faults}


def test_pretokenized_rows_pass_through_untouched(made_data: Path) -> None:
    batch, faults = given_rows(made_data, ([5, 6, 7], [-100, 6, 7]), ([], []))
    assert (batch.input_ids.tolist(), batch.trained.tolist()) == ([5, 6, 7], [False, True, True])
    assert (batch.offsets.tolist(), batch.row.tolist(), faults) == ([0, 3, 3], [5, 6], {})


def test_bad_pretokenized_rows_are_faults_and_the_others_stay(made_data: Path) -> None:
    outside = resolved(made_data, "made-bytes").vocab_size
    batch, faults = given_rows(
        made_data,
        ([1, 2], [1]),
        ([1, 2], [1, 2]),
        ([1, outside], [1, outside]),
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
