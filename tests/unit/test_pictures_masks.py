"""Conversations with pictures, from messages to labels: the ids of the family's processor, and no picture ever trained."""

from __future__ import annotations

import random
import shutil
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sftdata.batches import Conversation, RowBatch, Tally, TokenBatch
from sftdata.encode.engine import Encoder, load_encoder
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.masks import Mask, pictures, tokens
from sftdata.masks.texts import Renderer, render_rows
from sftdata.masks.tokens import encode_batch
from sftdata.masks.turns import SpanFinder
from sftdata.pictures.families import PictureProcessor, read_processor
from sftdata.pictures.loaded import Picture
from sftdata.pictures.rows import PicturedConversation, read_picture_row
from sftdata.render.template import ChatTemplate
from tests.encoders import resolved
from tests.oracles.pictures import Own
from tests.processors import BOS, write_processor
from tests.unit.test_pictures_rows import rows_of

Messages = list[dict[str, Any]]
IMAGE = {"type": "image"}

# As the models' own write them, cut down to texts and pictures; the made tokenizer has their tokens.
QWEN = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PARTS = (
    "{%% for message in messages %%}<|im_start|>{{ message['role'] }}\n{%% for content in message['content'] %%}"
    "{%% if content['type'] == 'image' %%}%s{%% else %%}{{ content['text'] | trim }}{%% endif %%}{%% endfor %%}<|im_end|>\n"
    "{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
FIRST = (  # LLaVA-NeXT: pictures before the text, whatever the order of the parts
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "qwen2.5-vl": QWEN, "qwen3-vl": QWEN, "llava-next": FIRST, "idefics3": _PARTS % "<image>",
    "gemma3": _PARTS % "<start_of_image>", "internvl": _PARTS % "<IMG_CONTEXT>\n", "pixtral": _PARTS % "[IMG]",
}  # fmt: skip


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def said(*parts: object, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def answer(words: str) -> dict[str, Any]:
    return said(text(words), role="assistant")


CASES: dict[str, tuple[Messages, list[tuple[int, int]]]] = {
    "one": ([said(IMAGE, text("Who?")), answer("Red")], [(640, 427)]),
    "behind": ([said(text("Who?\n"), IMAGE), answer("Red of course")], [(99, 301)]),
    "alone": ([said(IMAGE), answer("Blue\n")], [(57, 57)]),
    "several": (
        [
            said(IMAGE, text(" and\n\n"), IMAGE), answer("Good day"),
            said(text("And\t"), IMAGE, text("  this?")), answer("Yes\n\n"),
        ],
        [(30, 40), (500, 100), (224, 225)],
    ),
    "none": ([said(text("Who?")), answer("No")], []),
    "accents": ([said(text("日本 caf\u00e9 "), IMAGE, text(" e\u0301")), answer("caf\u00e9 日本")], [(64, 80)]),
    "system": ([said(text("Speak briefly"), role="system"), said(IMAGE, text("?")), answer("ok")], [(3, 3)]),
}  # fmt: skip


@lru_cache(maxsize=2)
def made_tokenizer(*, bos: bool) -> ResolvedTokenizer:
    """Resolve the tokenizer of all families once; it differs only by BOS."""
    data = Path(tempfile.mkdtemp())
    write_processor(data / "tokenizers" / "made", "qwen2.5-vl", bos=bos)
    return resolved(data, "made")


class Prepared:
    """A family: the product from messages to tokens, and the family's own processor."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        template: str = "",
        bos: bool = False,
        train_on: str = "assistant",
        trust: bool = False,
    ) -> None:
        self.processor: PictureProcessor = read_processor(write_processor(folder, name, bos=bos))
        self.tokenizer = made_tokenizer(bos=bos)
        self.encoder: Encoder = load_encoder(self.tokenizer, "tokenizers")
        self.template = template or TEMPLATES[name]
        chat = ChatTemplate(self.template, self.tokenizer.special_tokens)
        finder = SpanFinder(chat, self.tokenizer.stop_tokens, *self.tokenizer.by_mark, trust)
        self.renderer = Renderer(finder, Mask(train_on=train_on), processor=self.processor)  # type: ignore[arg-type]
        self.own = Own(name, folder)

    def id_of(self, token: str) -> int:
        return next(added.id for added in self.tokenizer.added_tokens if added.content == token)

    @property
    def image_id(self) -> int:
        return self.id_of(self.processor.image_token)

    def tokens(self, *rows: Conversation, tally: Tally | None = None) -> TokenBatch | None:
        tally = tally or Tally()
        rendered = render_rows(rows, np.arange(len(rows)), self.renderer, tally)
        return (
            None
            if rendered.conversations is None
            else encode_batch(rendered.conversations, self.encoder, tally, images=rendered.images)
        )

    def theirs(self, messages: Messages, sizes: list[tuple[int, int]]) -> list[int] | None:
        rendered = self.own.processor.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False
        )
        if not sizes:
            return list(self.own.processor.tokenizer(rendered)["input_ids"])
        return self.own.ids(rendered, [Image.new("RGB", (width, height)) for height, width in sizes])

    def trained_text(self, batch: TokenBatch) -> str:
        return self.own.processor.tokenizer.decode(batch.input_ids[batch.trained])


def row(messages: Messages, sizes: list[tuple[int, int]]) -> Conversation:
    return PicturedConversation(
        messages, [None] * len(messages), pictures=tuple(Picture(*size) for size in sizes)
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_the_processor_s_and_only_answers_are_trained(name: str, tmp_path: Path) -> None:
    family = Prepared(name, tmp_path)
    batch = family.tokens(*(row(*case) for case in CASES.values()))
    assert batch is not None
    assert len(batch) == len(CASES)
    for number, (label, (messages, sizes)) in enumerate(CASES.items()):
        one = batch.pick(np.array([number]))
        assert one.input_ids.tolist() == family.theirs(messages, sizes), label
        shown = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]
        trims = "trim" in family.template
        assert family.trained_text(one) == "".join(
            (words.strip() if trims else words) + "<|im_end|>" for words in shown
        ), label
    assert not batch.trained[batch.input_ids == family.image_id].any()


def only(family: Prepared, messages: Messages, sizes: list[tuple[int, int]]) -> TokenBatch:
    tally = Tally(RowBatch([{}], np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)))
    batch = family.tokens(row(messages, sizes), tally=tally)
    assert batch is not None, tally.rejects
    return batch


def refused(family: Prepared, messages: Messages, sizes: list[tuple[int, int]]) -> tuple[str, str]:
    tally = Tally(RowBatch([{}], np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)))
    assert family.tokens(row(messages, sizes), tally=tally) is None
    (reject,) = tally.rejects
    assert reject.fix
    return reject.code, reject.reason


@pytest.mark.parametrize("name", ["qwen2.5-vl", "idefics3", "gemma3"])
def test_a_picture_is_never_trained_whatever_is(name: str, tmp_path: Path) -> None:
    """Nor what is written around it: the ids are the processor's, and all the rest is trained."""
    family = Prepared(name, tmp_path, train_on="all")
    messages, sizes = CASES["several"]
    batch = only(family, messages, sizes)
    assert batch.input_ids.tolist() == family.theirs(messages, sizes)
    never = {family.id_of(token) for _, token in family.processor.tokens}
    assert [not flag for flag in batch.trained] == [token in never for token in batch.input_ids.tolist()]


# ----------------------------------------------------------------------------------- a marker typed into a message


@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava-next", "gemma3"])
def test_a_marker_that_someone_typed_is_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = Prepared(name, tmp_path)
    typed = f"{family.processor.marker} or {family.processor.image_token}?"
    messages = [said(IMAGE, text(typed)), answer(f"The {family.processor.marker} tag")]
    batch = only(family, messages, [(30, 40)])
    assert (batch.input_ids == family.image_id).sum() == sum(family.processor.layout(30, 40).runs)
    shown = family.own.processor.tokenizer.decode(batch.input_ids[batch.input_ids != family.image_id])
    assert typed.replace(family.processor.image_token, "") in shown.replace(family.processor.image_token, "")
    assert family.trained_text(batch) == f"The {family.processor.marker} tag<|im_end|>"
    outside = pictures._find_outside
    monkeypatch.setattr(pictures, "_find_outside", lambda literal, said, token: outside([], said, token))
    assert refused(family, messages, [(30, 40)])[0] == "images-lost", (
        "the guard is taken out, and the count sees it"
    )


def test_a_trusted_image_token_in_the_data_is_refused(tmp_path: Path) -> None:
    family = Prepared("gemma3", tmp_path, trust=True)
    code, reason = refused(family, [said(IMAGE, text("<image_soft_token>")), answer("ok")], [(30, 40)])
    assert code == "images-lost"
    assert "2 times; its pictures have it 1 time." in reason


# --------------------------------------------------------------------------------------- what a template does to them


def test_a_template_that_loses_or_doubles_a_picture_is_refused(tmp_path: Path) -> None:
    lost = QWEN.replace("<|image_pad|>", "")
    messages, sizes = CASES["one"]
    assert refused(Prepared("qwen2.5-vl", tmp_path / "a", template=lost), messages, sizes) == (
        "images-lost", "the chat template writes '<|image_pad|>' 0 times for 1 picture.",
    )  # fmt: skip
    twice = QWEN.replace("<|image_pad|>", "<|image_pad|><|image_pad|>")
    assert (
        "2 times for 1" in refused(Prepared("qwen2.5-vl", tmp_path / "b", template=twice), messages, sizes)[1]
    )


def test_a_size_that_the_processor_cannot_take_and_a_missing_processor_are_refused(tmp_path: Path) -> None:
    family = Prepared("qwen2.5-vl", tmp_path)
    messages, _ = CASES["one"]
    assert refused(family, messages, [(1, 300)])[0] == "image-aspect"
    family.renderer = replace(family.renderer, processor=None)
    assert refused(family, messages, [(30, 40)])[0] == "no-processor"


def test_a_rejected_row_leaves_the_runs_of_the_others_alone(tmp_path: Path) -> None:
    family = Prepared("qwen2.5-vl", tmp_path)
    messages, sizes = CASES["one"]
    places = np.zeros(3, np.int64)
    tally = Tally(RowBatch([{}, {}, {}], places, places, places))
    lone = [said(IMAGE, text("\ud800")), answer("ok")]
    batch = family.tokens(row(messages, sizes), row(lone, [(30, 40)]), row(messages, sizes), tally=tally)
    assert batch is not None
    assert [reject.code for reject in tally.rejects] == ["lone-surrogate"]
    assert [batch.pick(np.array([index])).input_ids.tolist() for index in (0, 1)] == [
        family.theirs(messages, sizes)
    ] * 2


# --------------------------------------------------------------------------------------------------------------- BOS


@pytest.mark.parametrize("writes", [False, True], ids=["the processor writes BOS", "the template writes it"])
def test_bos_stands_once_before_texts_with_and_without_pictures(
    writes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's rows of LLaVA-NeXT have none, and inference has one: the processor writes it where the template does not."""
    family = Prepared(
        "llava-next",
        tmp_path,
        bos=True,
        template=("{{ bos_token }}" if writes else "") + FIRST,
        train_on="all",
    )
    for label in ("one", "none"):
        messages, sizes = CASES[label]
        batch = only(family, messages, sizes)
        theirs = family.theirs(messages, sizes)
        assert theirs is not None
        want = theirs[1:] if writes else theirs  # the tokenizer alone writes it once more
        assert batch.input_ids.tolist() == want, label
        assert batch.input_ids.tolist().count(family.id_of(BOS)) == 1
        assert not batch.trained[0] or writes
    if not writes:
        monkeypatch.setattr(tokens, "_with_bos", lambda batch, resolved: batch)
        messages, sizes = CASES["one"]
        assert only(family, messages, sizes).input_ids.tolist() != family.theirs(messages, sizes), (
            "without its guard"
        )


# ------------------------------------------------------------------------------- real templates, tokenizers and rows


REAL = {"qwen2.5-vl": ("qwen2.5-instruct", "qwen2-vl"), "qwen3-vl": ("qwen3", "qwen3-vl")}
FILES = (
    "lf_mllm_demo.json",
    "lf_v1_multimodal_demo.jsonl",
    "llava_instruct_100.json",
    "llava_tables_252.jsonl",
    "qwen_vl_single_images.json",
)
ROLES = {"human": "user", "gpt": "assistant"}


def as_conversation(data: dict[str, Any]) -> tuple[Messages, list[tuple[int, int]]]:
    """Return the messages of a public row; a picture that is not there gets a size by its name."""
    read = read_picture_row(data)
    assert read is not None
    messages = []
    for message in read.row.get("messages") or read.row["conversations"]:  # type: ignore[union-attr]
        content = message.get("content", message.get("value"))
        spoken = message.get("role", message.get("from"))
        joined = (
            content
            if isinstance(content, str)
            else [
                part if part["type"] == "image" else text(part.get("text", part.get("value")))
                for part in content
            ]
        )
        if isinstance(joined, list) and all(part["type"] == "text" for part in joined):
            joined = "".join(part["text"] for part in joined)
        messages.append({"role": ROLES.get(spoken, spoken), "content": joined})
    draws = [random.Random(picture.path) for picture in read.pictures]
    return messages, [(draw.randint(20, 700), draw.randint(20, 700)) for draw in draws]


@pytest.mark.parametrize("name", REAL)
def test_every_public_row_has_the_ids_of_the_real_tokenizer_and_template(
    name: str, tmp_path: Path, shared_data: Path
) -> None:
    tokenizer, template = REAL[name]
    family = Prepared(
        name,
        tmp_path,
        template=(shared_data / f"templates/plain/{template}.jinja").read_text(encoding="utf-8"),
    )
    for file in (shared_data / "tokenizers" / tokenizer).iterdir():
        shutil.copy(file, tmp_path / file.name)
    family.own = Own(name, tmp_path)
    family.tokenizer = resolved(shared_data, tokenizer)
    family.encoder = load_encoder(family.tokenizer, "gigatoken")
    finder = SpanFinder(
        ChatTemplate(family.template, family.tokenizer.special_tokens),
        family.tokenizer.stop_tokens,
        *family.tokenizer.by_mark,
    )
    family.renderer = replace(family.renderer, finder=finder)
    seen = 0
    for file_name in FILES:
        for data in rows_of(shared_data / "datasets/vision" / file_name):
            messages, sizes = as_conversation(data)
            batch = only(family, messages, sizes)
            assert batch.input_ids.tolist() == family.theirs(messages, sizes), (file_name, seen)
            spoken = [message["content"] for message in messages if message["role"] == "assistant"]
            assert family.trained_text(batch) == "".join(f"{words}<|im_end|>" for words in spoken)
            seen += 1
    assert seen == 385


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_public_row_has_the_ids_of_each_family_s_processor(
    name: str, tmp_path: Path, shared_data: Path
) -> None:
    family, seen = Prepared(name, tmp_path), 0
    for file_name in FILES:
        for data in rows_of(shared_data / "datasets/vision" / file_name):
            messages, sizes = as_conversation(data)
            for message in messages:  # in parts, which some templates ask for
                if isinstance(message["content"], str):
                    message["content"] = [text(message["content"])]
            found = only(family, messages, sizes).input_ids.tolist()
            assert found == family.theirs(messages, sizes), (file_name, seen)
            seen += 1
    assert seen == 385
