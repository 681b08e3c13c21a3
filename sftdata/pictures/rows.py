"""Rows with pictures of every spelling -> messages with a part where each stands, and a reference for each.

| spelling | who writes it |
|---|---|
| parts `image`, `image_url`, `input_image` that hold the picture | OpenAI, Qwen-VL, LLaMA-Factory v1 |
| parts `image` without one, and a column `images` | Hugging Face, TRL |
| `<image>` in the text, and a column `image` or `images` | LLaVA, LLaMA-Factory, Qwen2.5-VL, ShareGPT |
| `<img>path</img>` in the text | Qwen-VL |

A column without a marker is refused, not put before the first question: where a picture stands is part of the
prompt. An answer holds no picture, and `<image>` in an answer is text: a model that writes text cannot draw.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sftdata.batches import Conversation
from sftdata.errors import RowError
from sftdata.output import counted
from sftdata.pictures.loaded import Picture
from sftdata.pictures.references import Reference, looks_like_picture, read_reference
from sftdata.sources.jsonrows import JsonObject, from_json
from sftdata.wording import shell_quote

MARKER = "<image>"
COLUMNS = ("images", "image")
CONVERSATIONS = ("messages", "conversations", "conversation", "prompt", "completion")
PARTS = frozenset({"image", "image_url", "input_image"})
PLACE: JsonObject = {"type": "image"}
"""The part that stands for a picture taken out of its row; told from parts of the data by identity."""
_VIDEO_PARTS, _AUDIO_PARTS = (
    frozenset({"video", "video_url"}),
    frozenset({"audio", "audio_url", "input_audio"}),
)
_VIDEO_COLUMNS, _AUDIO_COLUMNS = ("videos", "video"), ("audios", "audio")
_IN_MESSAGES = frozenset(COLUMNS)
_MEDIA_COLUMNS = frozenset({*COLUMNS, *_VIDEO_COLUMNS, *_AUDIO_COLUMNS})
_ANSWERS = frozenset({"assistant", "gpt", "chatgpt", "function_call", "tool_call"})
_TEXTS = frozenset({"text", "input_text", "output_text"})
_IN_TEXT = re.compile(r"<img>([^<>\n]+\.(?:jpe?g|png|webp|gif))</img>", re.IGNORECASE)
_BEGINS = re.compile("<(?:img|image)>", re.IGNORECASE)
_INSIDE = ("image", "image_url", "url", "path", "source", "bytes", "base64", "data", "value")


@dataclass(frozen=True, slots=True)
class PictureRow:
    """A row with its pictures taken out.

    Attributes:
        row: without columns of pictures; a message with pictures has parts for content, `PLACE` where each
            stands.
        pictures: one for each of these parts, in order.
        way: how the row writes its pictures, in words.
        unused: what parts say of their pictures that nothing reads -> parts.
    """

    row: JsonObject
    pictures: tuple[Reference, ...]
    way: str
    unused: Mapping[str, int]


class PicturedConversation(Conversation, frozen=True):
    """Messages whose contents are lists of parts wherever a picture stands, as `{"type": "image"}`.

    Attributes:
        pictures: one for each of these parts, in order.
    """

    pictures: tuple[Picture, ...] = ()


def is_answer(role: object) -> bool:
    """Return whether a role, in any usual spelling, is that of the model."""
    return isinstance(role, str) and role.strip().lower() in _ANSWERS


def read_picture_row(row: JsonObject, is_answer: Callable[[object], bool] = is_answer) -> PictureRow | None:
    """Return a row with its pictures taken out; None for a row of text alone.

    Args:
        is_answer: whether a role is the model's.

    Raises:
        RowError: pictures without a place, places without a picture, a value that is no reference, a picture
            in an answer, or a film or sound.
    """
    if not may_hold_media(row):
        return None
    _refuse_other_media(row)
    filled = [name for name in COLUMNS if row.get(name) not in (None, [], "")]
    if len(filled) > 1:
        what = "the columns 'images' and 'image' both hold pictures; expected one of them."
        raise RowError("images-unplaced", what, "put all into 'images', in the order of their places.")
    name = filled[0] if filled else None
    column = _Column(name, [] if name is None else _several(from_json(row[name])))
    talks = {key: from_json(row[key]) for key in CONVERSATIONS if row.get(key) is not None}
    talks = {key: talk for key, talk in talks.items() if _is_talk(talk)}
    if not talks:
        if name is None:
            return None
        what = f"the column {name!r} holds pictures, and the row has no messages to put them in."
        raise RowError(
            "images-not-in-messages", what, 'write the row as {"messages": [...], "images": [...]}.'
        )
    reader = _Reader(column, is_answer)
    read = reader.read(talks, any(key in row for key in COLUMNS))
    if read is None:
        if reader.marked(talks):
            _refuse_unread_column(row)
        return None
    messages, way = read
    rest = {key: value for key, value in row.items() if key not in COLUMNS}
    return PictureRow(rest | messages, tuple(reader.pictures), way, reader.unused)


def marks_pictures(row: JsonObject, is_answer: Callable[[object], bool] = is_answer) -> bool:
    """Return whether a question of a row of text spells the marker of a picture."""
    talks = {key: from_json(row[key]) for key in CONVERSATIONS if row.get(key) is not None}
    return _Reader(_Column(None, []), is_answer).marked(talks)


def may_hold_media(row: JsonObject) -> bool:
    """Tell most rows of text by a glance: every sampled row of text passes here."""
    if not _MEDIA_COLUMNS.isdisjoint(row):
        return True
    for name in CONVERSATIONS:
        talk = row.get(name)
        if isinstance(talk, str) and talk.lstrip()[:1] == "[":  # messages as JSON text
            return True
        for message in talk if isinstance(talk, list) else ():
            content = _content(message) if isinstance(message, dict) else None
            if isinstance(content, list) or (content is not None and not _IN_MESSAGES.isdisjoint(message)):
                return True
            if isinstance(content, str) and "<" in content and _BEGINS.search(content):
                return True
    return False


def without_pictures(row: JsonObject) -> JsonObject:
    """Return a row without its pictures, as far as they can be taken out of it."""
    try:
        read = read_picture_row(row)
    except RowError:
        return row
    return row if read is None else read.row


def _several(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _is_talk(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _refuse_other_media(row: JsonObject) -> None:
    for name in _VIDEO_COLUMNS:
        if row.get(name):
            what = f"the column {name!r} holds a film; pictures and text can be prepared."
            raise RowError("video-row", what, "leave out rows with films.")
    for name in _AUDIO_COLUMNS:
        if row.get(name):
            what = f"the column {name!r} holds sound; pictures and text can be prepared."
            raise RowError("audio-row", what, "leave out rows with sound.")


def _refuse_unread_column(row: JsonObject) -> None:
    """Refuse a row that marks pictures, and has one in a column that nothing reads."""
    others = (key for key, value in row.items() if key not in CONVERSATIONS and looks_like_picture(value))
    if (name := next(others, None)) is not None:
        what = f"the messages have {MARKER}, and the pictures are in the column {name!r}; expected 'images'."
        raise RowError("images-missing", what, f"--map images={shell_quote(name)}")


def _refuse_in_message(where: str, message: JsonObject) -> None:
    """Refuse a message that has pictures beside its content, as those of Ollama: no place is said."""
    if (name := next((name for name in COLUMNS if message.get(name)), None)) is not None:
        what = f"{where} holds pictures under {name!r}, beside its content; expected a column of the row."
        fix = f'write {{"messages": [...], "images": [...]}}, with {MARKER} where each of them stands.'
        raise RowError("images-unplaced", what, fix)


@dataclass(slots=True)
class _Column:
    """The column of pictures, and which of them were placed."""

    name: str | None
    values: list[object]
    used: set[int] = field(default_factory=set)
    following: int = 0

    def take(self, where: str) -> Reference:
        """Return the next picture.

        Raises:
            RowError: there is none left.
        """
        self.following += 1
        return self.at(self.following - 1, where)

    def at(self, index: int, where: str) -> Reference:
        """Return a picture by its number."""
        if not 0 <= index < len(self.values):
            found = f"{self.name} holds {len(self.values)}" if self.name else "no column holds one"
            what = f"{where} is the place of picture {index + 1}, and {found}."
            raise RowError("images-missing", what, "give one picture for each place.")
        self.used.add(index)
        single = len(self.values) == 1 and self.name == "image"
        return read_reference(self.values[index], f"{self.name}" if single else f"{self.name}[{index}]")

    def require_all(self, place: str) -> None:
        """Refuse to go on with a picture that has no place.

        Args:
            place: how the messages write one.
        """
        if len(self.used) < len(self.values):
            raise self.unplaced(place)

    def unplaced(self, place: str = MARKER) -> RowError:
        """Return the error for a picture that has no place."""
        placed = f"the messages place {len(self.used)} of them"
        what = f"{self.name} holds {counted(len(self.values), 'picture')}; {placed}."
        return RowError("images-unplaced", what, f"write {place} where each of them stands.")


Talks = dict[str, object]
Part = JsonObject


@dataclass(slots=True)
class _Reader:
    """Reads the messages of one row."""

    column: _Column
    is_answer: Callable[[object], bool]
    pictures: list[Reference] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)

    def read(self, talks: Talks, has_column: bool) -> tuple[Talks, str] | None:
        """Return the messages with parts for pictures, and how they were written."""
        messages = [message for _, message in _messages(talks)]
        for where, message in _messages(talks):
            _refuse_other_parts(where, _parts(message))
            _refuse_in_message(where, message)
        place = MARKER
        if any(part.get("type") in PARTS for message in messages for part in _parts(message)):
            place = '{"type": "image"}'
            made, way = self._each(talks, self._from_parts), "parts of the messages"
        elif (self.column.values or has_column) and self.marked(talks):
            made, way = self._each(talks, self._from_markers), f"{MARKER} in the messages"
        elif self.column.values:
            raise self.column.unplaced()
        elif any(_IN_TEXT.search(text) for message in messages for text in self._asked(message)):
            made, way = self._each(talks, self._from_paths), "<img>path</img> in the messages"
        else:
            return None
        self.column.require_all(place)
        return made, way

    def _each(self, talks: Talks, read: Callable[[JsonObject, str], JsonObject]) -> Talks:
        made: dict[str, list[JsonObject]] = {}
        for where, message in _messages(talks):
            made.setdefault(where.partition("[")[0], []).append(read(message, where))
        return {**made}

    def _asked(self, message: JsonObject) -> list[str]:
        """Return the texts of a message that may mark a picture: those of the model do not."""
        if self.is_answer(_role(message)):
            return []
        content = _content(message)
        if isinstance(content, str):
            return [content]
        return [text for part in _parts(message) if (text := _text(part)) is not None]

    def marked(self, talks: Talks) -> bool:
        """Return whether a question spells the marker of a picture."""
        return any(MARKER in text for _, message in _messages(talks) for text in self._asked(message))

    # ------------------------------------------------------------------------------------------ the ways

    def _from_parts(self, message: JsonObject, where: str) -> JsonObject:
        content = _content(message)
        if not isinstance(content, list) or not any(part.get("type") in PARTS for part in _parts(message)):
            return message
        if self.is_answer(_role(message)):
            what = f"{where} is an answer with a picture; a model that writes text cannot give one."
            raise RowError("image-in-answer", what, "leave the picture out of the answer.")
        made: list[object] = []
        for index, part in enumerate(content):
            place = f"{where}.content[{index}]"
            if isinstance(part, dict) and part.get("type") in PARTS:
                self.pictures.append(self._of_part(part, place))
                made.append(PLACE)
            else:
                text = part if isinstance(part, str) else _text(part) if isinstance(part, dict) else None
                made.append(part if text is None else {"type": "text", "text": text})
        return _with_content(message, made)

    def _of_part(self, part: Part, where: str) -> Reference:
        key = next((key for key in _INSIDE if part.get(key) is not None), None)
        others = part.keys() - {"type", "index", key}
        self.unused.update(f"image.{name}" for name in others if part[name] not in (None, ""))
        if key is not None:
            return read_reference(part[key], f"{where}.{key}")
        index = part.get("index")
        return self.column.at(index, where) if isinstance(index, int) else self.column.take(where)

    def _from_markers(self, message: JsonObject, where: str) -> JsonObject:
        return self._split(message, where, re.compile(re.escape(MARKER)))

    def _from_paths(self, message: JsonObject, where: str) -> JsonObject:
        return self._split(message, where, _IN_TEXT)

    def _split(self, message: JsonObject, where: str, marker: re.Pattern[str]) -> JsonObject:
        if not any(map(marker.search, self._asked(message))):
            return message
        made: list[object] = []
        for part in _several(_content(message)):
            text = part if isinstance(part, str) else _text(part) if isinstance(part, dict) else None
            if text is None:
                made.append(part)
                continue
            last = 0
            for match in marker.finditer(text):
                made += [*_as_parts(text[last : match.start()]), PLACE]
                path = match[1] if match.lastindex else None
                self.pictures.append(self.column.take(where) if path is None else read_reference(path, where))
                last = match.end()
            made += _as_parts(text[last:])
        return _with_content(message, made)


def _refuse_other_parts(where: str, parts: Iterable[Part]) -> None:
    for part in parts:
        kind = part.get("type")
        if kind in _VIDEO_PARTS:
            what = f"{where} has a part of type {kind!r}; pictures and text can be prepared."
            raise RowError("video-part", what, "leave out rows with films.")
        if kind in _AUDIO_PARTS:
            what = f"{where} has a part of type {kind!r}; pictures and text can be prepared."
            raise RowError("audio-part", what, "leave out rows with sound.")


def _messages(talks: Talks) -> Iterator[tuple[str, JsonObject]]:
    """Yield each message with its place, `messages[0]`."""
    for name, talk in talks.items():
        for index, message in enumerate(_several(talk)):
            if isinstance(message, dict):
                yield f"{name}[{index}]", message


def _role(message: JsonObject) -> object:
    return message.get("from") if message.get("role") is None else message["role"]


def _content(message: JsonObject) -> object:
    return message.get("value") if message.get("content") is None else message["content"]


def _with_content(message: JsonObject, parts: list[object]) -> JsonObject:
    key = "value" if message.get("content") is None else "content"
    return message | {key: parts}


def _parts(message: JsonObject) -> list[Part]:
    content = _content(message)
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _text(part: Part) -> str | None:
    """Return the text of a part of text."""
    if part.get("type") not in _TEXTS:
        return None
    found = next((part[key] for key in ("text", "value") if part.get(key) is not None), None)
    return found if isinstance(found, str) else None


def _as_parts(text: str) -> list[object]:
    return [{"type": "text", "text": text}] if text else []


# --------------------------------------------------------------------------------------------------- evidence


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a sample of rows says about their pictures.

    Attributes:
        rows: how many were looked at.
        ways: how pictures are written -> rows.
        sources: "path" or "bytes" -> pictures.
        faults: code -> rows that would be rejected.
        first: the first path, for the reader to recognise.
    """

    rows: int
    ways: Counter[str]
    sources: Counter[str]
    faults: Counter[str]
    first: str | None

    @property
    def pictured(self) -> int:
        """How many rows have pictures."""
        return self.ways.total()

    def to_json(self) -> JsonObject:
        """Return plain JSON data."""
        return {"rows": self.rows, "ways": {**self.ways}, "sources": {**self.sources}, "first": self.first}

    @property
    def lines(self) -> list[str]:
        """The same in words, most frequent first."""
        found = [
            f"{count:,} of {counted(self.rows, 'row')}: pictures as {way}"
            for way, count in self.ways.most_common()
        ]
        found += [f"{counted(count, 'picture')} by {source}" for source, count in self.sources.most_common()]
        found += [
            f"{count:,} of {counted(self.rows, 'row')} rejected: {code}"
            for code, count in self.faults.most_common()
        ]
        return found


def gather_evidence(rows: Iterable[JsonObject]) -> Evidence:
    """Return how these rows write their pictures; no file is opened."""
    number, first = 0, None
    ways: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for row in rows:
        number += 1
        try:
            read = read_picture_row(row)
        except RowError as error:
            faults[error.fault.code] += 1
            continue
        if read is not None:
            ways[read.way] += 1
            sources.update("bytes" if one.path is None else "path" for one in read.pictures)
            first = first or next((one.path for one in read.pictures if one.path), None)
    return Evidence(number, ways, sources, faults, first)
