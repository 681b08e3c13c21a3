"""Our labels and TRL's, for every pair of chat template and training template in the installed trl.

With the training template and `boundary="merge"` both must be the same, id for id and label for label: TRL's come out of
`SFTTrainer`'s own dataset preparation. With the plain template, which TRL refuses, ours must train what the oracle says.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest
import trl
from datasets import IterableDataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from docs.masks_table import PAGE, page
from sftdata.batches import Conversation
from sftdata.encode.engine import Encoder, load_encoder
from sftdata.encode.tokenizer import resolve_tokenizer
from sftdata.masks.texts import Renderer
from sftdata.masks.turns import SpanFinder
from sftdata.render.template import ChatTemplate, control_tokens
from tests.chats import CHATS, Chat
from tests.encoders import CACHE
from tests.one_stage import encode_batch, render_rows
from tests.oracles.char_masks import Format, fixed_clock, trained_spans

FOLDER = Path(trl.__file__).parent / "chat_templates"
PAIRS = sorted(path.stem.removesuffix("_training") for path in FOLDER.glob("*_training.jinja"))
TOKENIZERS = ["qwen2.5-instruct", "llama-3.2-instruct", "gpt2"]
MADE = ["made-bytes", "made-turns"]
# What the model's own configuration tells beyond the template.
TOLD = {"cohere2": ["<|END_OF_TURN_TOKEN|>"], "diffusion_gemma": ["<turn|>", "<|tool_response>"]}
STOPS = {
    "idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>",
    "cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>", "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>", "diffusion_gemma": "<turn|> <|tool_response>", "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>", "glm4moe": "<|user|> <|observation|>", "gptoss": "<|return|> <|end|> <|call|>",
    "llama3": "<|eot_id|>", "muse_glimmer": "<|eot|>", "phi3": "<|end|>", "phi3_5": "<|end|>",
}  # fmt: skip
# transformers ends a block at the first token of its last character; where that takes several, the others are left untrained.
SHORT_IN_TRL = {
    ("diffusion_gemma", "edges", "real"): "👦",
    ("diffusion_gemma", "edges", "made"): "²\ufffd\ufffd\ufffd",
}
IMAGE_MODELS = {"idefics3", "llava_next", "smolvlm"}  # these templates take lists of parts only

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]  # of trl and accelerate


def _source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def _encoder(folder: Path) -> Encoder:
    """Load a tokenizer that knows the control tokens of all templates."""
    tokens = dict.fromkeys(
        token for path in sorted(FOLDER.glob("*.jinja")) for token in control_tokens(path.read_text("utf-8"))
    )
    eos_token = "<|endoftext|>" if folder.name == "gpt2" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFTDATA_CACHE", str(CACHE))
        return load_encoder(
            resolve_tokenizer(str(folder), add_tokens=list(tokens), eos_token=eos_token), "tokenizers"
        )


@cache
def _reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(_encoder(folder).resolved.folder)


def _folder(home: Path, pair: str) -> Path:
    """Choose a tokenizer: one that has a BOS token where the template asks for it, else by turns."""
    made = (home / "tokenizers" / MADE[0]).is_dir()
    with_bos, names = ("made-turns", MADE) if made else ("llama-3.2-instruct", TOKENIZERS)
    return (
        home
        / "tokenizers"
        / (with_bos if "bos_token" in _source(pair) else names[PAIRS.index(pair) % len(names)])
    )


def _rows(chats: dict[str, Chat]) -> list[Conversation]:
    return [
        Conversation(chat["messages"], [None] * len(chat["messages"]), chat.get("tools"))
        for chat in chats.values()
    ]


def _finder(
    source: str, encoder: Encoder, told: list[str] | None = None, *, trust: bool = False
) -> SpanFinder:
    resolved = encoder.resolved
    template = ChatTemplate(source, resolved.special_tokens)
    return SpanFinder(template, told or resolved.stop_tokens, *resolved.by_mark, trust_control_tokens=trust)


def _ours(
    finder: SpanFinder, encoder: Encoder, chats: dict[str, Chat], boundary: Any
) -> dict[str, tuple[list[int], list[int]]]:
    rendered = render_rows(_rows(chats), np.arange(len(chats)), Renderer(finder))
    if rendered.conversations is None:
        return {}
    tokens, _ = encode_batch(rendered.conversations, encoder, boundary=boundary)
    titles, labelled = list(chats), {}
    for place, row in enumerate(tokens.row.tolist()):
        stretch = slice(tokens.offsets[place], tokens.offsets[place + 1])
        ids, trained = tokens.input_ids[stretch], tokens.trained[stretch]
        labelled[titles[row]] = (ids.tolist(), np.where(trained, ids, -100).tolist())
    return labelled


def _theirs(
    source: str, tokenizer: Any, chats: dict[str, Chat], folder: Path
) -> dict[str, tuple[list[int], list[int]]]:
    """Run the rows through `SFTTrainer._prepare_dataset`, one by one: one row without assistant tokens ends TRL's run."""
    arguments = SFTConfig(
        output_dir=str(folder),
        assistant_only_loss=True,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=source, completion_only_loss=False)
    labelled = {}
    for title, chat in chats.items():
        rows = [{"messages": chat["messages"], "tools": chat.get("tools")}]
        dataset = IterableDataset.from_generator(lambda rows=rows: iter(rows))
        with fixed_clock():
            try:
                prepared = next(
                    iter(
                        SFTTrainer._prepare_dataset(
                            trainer, dataset, tokenizer, arguments, False, None, "train"
                        )
                    )
                )
            except (
                jinja2.TemplateError,
                TypeError,
                RuntimeError,
            ):  # the template refuses the row, or TRL one without answers
                continue
        labelled[title] = (prepared["input_ids"], prepared["labels"])
    return labelled


def _as_taken(pair: str) -> dict[str, Chat]:
    """Return the conversations as the templates of a pair take them: in parts, or as text."""
    form = Format("", parts=pair in IMAGE_MODELS)
    return {title: chat | {"messages": form.spell(chat["messages"])} for title, chat in CHATS.items()}


@pytest.mark.parametrize("name", ["made", "real"])
@pytest.mark.parametrize("pair", PAIRS)
def test_training_templates_give_the_ids_and_labels_of_trl(
    pair: str, name: str, home: Path, tmp_path: Path
) -> None:
    folder = _folder(home, pair)
    encoder = _encoder(folder)
    ours = _ours(_finder(_source(f"{pair}_training"), encoder), encoder, CHATS, "merge")
    theirs = _theirs(_source(f"{pair}_training"), _reference(folder), _as_taken(pair), tmp_path)
    for title, (ids, labels) in ours.items():
        if (pair, title, name) in SHORT_IN_TRL:
            assert theirs[title][0] == ids
            missed = [
                at
                for at, (label, other) in enumerate(zip(labels, theirs[title][1], strict=True))
                if label != other
            ]
            short = _reference(folder).decode([ids[missed[0] - 1], *(labels[at] for at in missed)])
            assert short == SHORT_IN_TRL[pair, title, name]
        elif title in theirs:
            assert (ids, labels) == theirs[title], title
        else:  # nothing to train, which TRL does not survive
            assert set(labels) == {-100}, title
    assert len(ours.keys() & theirs.keys()) >= 10


@pytest.mark.parametrize("name", ["made", "real"])
@pytest.mark.parametrize("pair", PAIRS)
def test_plain_templates_train_what_the_oracle_says(pair: str, name: str, home: Path) -> None:
    folder = _folder(home, pair)
    encoder, tokenizer = _encoder(folder), _reference(folder)
    special, as_text = (
        encoder.resolved.special_tokens,
        pair == "deepseekv3",
    )  # it joins tool arguments as text
    form = Format(
        _source(pair), STOPS.get(pair, "<|im_end|>").split(), special, pair in IMAGE_MODELS, as_text
    )
    labelled = _ours(_finder(form.source, encoder, TOLD.get(pair)), encoder, CHATS, "split")
    for title, (ids, labels) in labelled.items():
        chat = CHATS[title]
        text, spans = (
            form.render(chat["messages"], chat.get("tools")),
            trained_spans(form, chat["messages"], chat.get("tools")),
        )
        assert tokenizer.decode(ids) == text, title
        trained = tokenizer.decode([label for label in labels if label >= 0])
        assert trained == "".join(text[slice(*span)] for span in spans.values()), title
    assert len(labelled) >= 10


def test_the_page_that_compares_us_with_trl_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
