"""Tokenizers built here, one for each way in which real ones lie on their text: the tests of ids and masks run without any other.

Vocabularies are made of the words below: every word is one token, with and without a space before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TEXT = (
    "Answer one two three onetwothree Hi hello world Human Assistant Question user assistant system tool think Red of course "
    "Good day yes no say or tell me about prompt there and ok test Don't not in is it It you You Yes Text Name colour Green "
    "Blue Speak briefly weather rain Oslo get_weather def return 12345 ## ### \n\n \t\t \n\t .\n a.b e\u0301 caf\u00e9 日本 "
    "ends turn token"
)
WORDS = TEXT.split(" ")
SPACE = "\u2581"  # as SentencePiece writes it
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
CALLS = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}
{%- if m.role == 'assistant' %}{{ '<｜Assistant｜></think>' }}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}
{%- if m.tool_calls %}{{ '<｜calls▁begin｜>' }}{% for c in m.tool_calls %}{{ '<｜call▁begin｜>' + c.function.name }}
{{- '<｜sep｜>' + (c.function.arguments | tojson) + '<｜call▁end｜>' }}{% endfor %}{{ '<｜calls▁end｜>' }}{% endif %}
{{- '<｜end▁of▁sentence｜>' }}{% endif %}
{%- if m.role == 'tool' %}{{ '<｜outputs▁begin｜><｜output▁begin｜>' + m.content }}
{{- '<｜output▁end｜><｜outputs▁end｜>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜></think>' }}{% endif %}"""
# How Llama 3 and Qwen find words: of white space before a letter the last character belongs to the word.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _bytes() -> Tokenizer:
    """Qwen: byte-level, composes marks, `<think>` and `<tool_call>` are added but not special."""
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.NFC()
    _add(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], special=True)
    _add(tokenizer, ["<think>", "</think>", "<tool_call>", "</tool_call>"], special=False)
    return tokenizer


def _turns() -> Tokenizer:
    """DeepSeek: byte-level, writes BOS, the tokens that open turns are not special."""
    tokenizer = _byte_level()
    _add(tokenizer, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], special=True)
    _add(tokenizer, ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"], special=False)
    return _with_bos(tokenizer, "<｜begin▁of▁sentence｜>")


def _calls() -> Tokenizer:
    """DeepSeek V3.1: one token a byte; what opens turns, calls and their answers is not special, and no BOS is written."""
    tokenizer = _byte_level(words=())
    _add(tokenizer, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], special=True)
    names = [
        "User",
        "Assistant",
        "calls▁begin",
        "call▁begin",
        "sep",
        "call▁end",
        "calls▁end",
        "outputs▁begin",
    ]
    names += ["output▁begin", "output▁end", "outputs▁end", "place▁holder▁1"]
    _add(tokenizer, ["<think>", "</think>", *(f"<｜{name}｜>" for name in names)], special=False)
    return tokenizer


def _prepend() -> Tokenizer:
    """Mistral: a space is invented before the text and after every added token; unknown characters fall back to bytes."""
    return _with_bos(_spaces(_prepending()), "<s>")


def _metaspace() -> Tokenizer:
    """A newer Llama: the space is invented at the beginning of the text only."""
    tokenizer = _spaces(None)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    _add(tokenizer, ["<|im_start|>", "<|im_end|>"], special=True)
    return tokenizer


def _strips() -> Tokenizer:
    """Phi-3: tokens that end and open turns swallow the white space around them."""
    tokenizer = _spaces(_prepending())
    _add(tokenizer, ["<|endoftext|>"], special=True)
    _add(tokenizer, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], special=True, rstrip=True)
    _add(tokenizer, ["<mask>"], special=True, lstrip=True)
    _add(tokenizer, ["<both>"], special=False, lstrip=True, rstrip=True)
    return tokenizer


def _unigram() -> Tokenizer:
    """T5: Unigram over words that are split at white space and brought into another normal form; writes EOS."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -3.0)]
    pieces += [(piece, -4.0 - 0.01 * index) for index, piece in enumerate(_spelled()) if piece != SPACE]
    pieces += [(char, -9.0) for char in _characters() if char not in dict(pieces)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    _add(tokenizer, ["<pad>", "</s>", "<unk>", "<extra_id_0>"], special=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


# Name: how to build it, and its tokenizer_config.json.
MADE: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "made-bytes": (_bytes, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}),
    "made-turns": (
        _turns, {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "chat_template": DEEPSEEK},
    ),
    "made-calls": (
        _calls, {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "chat_template": CALLS},
    ),
    "made-prepend": (_prepend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": MISTRAL}),
    "made-metaspace": (_metaspace, {"eos_token": "<|im_end|>", "unk_token": "<unk>", "chat_template": CHATML}),
    "made-strips": (_strips, {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "chat_template": PHI}),
    "made-unigram": (_unigram, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}),
}  # fmt: skip


def write_tokenizers(folder: Path) -> None:
    """Write all of them as tokenizer folders, `folder`/tokenizers/NAME."""
    for name, (build, config) in MADE.items():
        place = folder / "tokenizers" / name
        place.mkdir(parents=True)
        build().save(str(place / "tokenizer.json"))
        config = config | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        (place / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ parts


def _byte_level(words: Sequence[str] = WORDS) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [
        "".join(piece for piece, _ in spell.pre_tokenize_str(text))
        for word in words
        for text in (word, f" {word}")
    ]
    vocabulary, merges = _merged({letter: number for number, letter in enumerate(letters)}, spelled)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spaces(normalizer: normalizers.Normalizer | None) -> Tokenizer:
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *_characters()]
    vocabulary, merges = _merged({piece: number for number, piece in enumerate(start)}, _spelled())
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    _add(tokenizer, ["<unk>", "<s>", "</s>"], special=True)
    return tokenizer


def _prepending() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


def _spelled() -> list[str]:
    return [piece for word in WORDS if word.isprintable() for piece in (word, SPACE + word)]


def _characters() -> list[str]:
    return sorted(
        {char for word in WORDS for char in word if char.isprintable()}
        | {chr(code) for code in range(0x21, 0x7F)}
    )


def _merged(vocabulary: dict[str, int], words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Add merges until every word is one token."""
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = list(word)
        while found := [pair for pair in pairwise(pieces) if pair in merges]:
            at = list(pairwise(pieces)).index(min(found, key=merges.__getitem__))
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
        whole = pieces[0]
        for piece in pieces[1:]:
            merges[whole, piece] = len(merges)
            whole += piece
            vocabulary.setdefault(whole, len(vocabulary))
    return vocabulary, list(merges)


def _add(
    tokenizer: Tokenizer, contents: list[str], *, special: bool, lstrip: bool = False, rstrip: bool = False
) -> None:
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add(
        [
            AddedToken(content, lstrip=lstrip, rstrip=rstrip, normalized=False, special=special)
            for content in contents
        ]
    )


def _with_bos(tokenizer: Tokenizer, token: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    return tokenizer
