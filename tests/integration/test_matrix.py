"""Every real chat template x every shape of row: text, spans and ids are right, or the row is rejected by name. Never wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sftdata.batches import Conversation
from sftdata.masks.texts import Renderer
from sftdata.masks.turns import RenderedConversation, SpanFinder
from sftdata.render.template import ChatTemplate, control_tokens
from tests.encoders import encoder, reference, resolved
from tests.matrix import SHAPES, judge, read_shapes
from tests.one_stage import encode_batch, render_rows
from tests.oracles.char_masks import Format
from tests.unit.test_spans import GENERATION, SPECIAL, STOPS, TEMPLATES

pytestmark = pytest.mark.slow

NAMES = [*(f"plain/{name}" for name in TEMPLATES), *(f"generation/{name}" for name in GENERATION)]
TOKENIZER = "qwen3"  # its <think> and <tool_call> are added tokens marked `special: false`
ACCEPTED = 2145  # of 2,898 on 2026-11-27; before that day 1,960 were right and 65 accepted rows wrong
STEP = 7


class Outcome:
    """What became of some shapes with one template."""

    def __init__(self, shared_data: Path, name: str, shapes: dict[str, Conversation | str]) -> None:
        facts = resolved(shared_data, TOKENIZER)
        source = (shared_data / f"templates/{name}.jinja").read_text(encoding="utf-8")
        more = {"functions": "[]", "datetime": "today"} if name.endswith("firefunction-v2") else {}
        form = Format(source, STOPS.get(name.partition("/")[2], "</s>").split(), SPECIAL | more)
        special, plain = facts.by_mark
        control = [*special, *control_tokens(source), *SPECIAL.values()]
        self.finder = SpanFinder(
            ChatTemplate(source, SPECIAL, template_kwargs=more), ("</s>",), control, plain
        )
        self.backend = reference(shared_data, TOKENIZER)
        self.encoder = encoder(shared_data, TOKENIZER, "tokenizers")
        self.verdicts: Counter[str] = Counter()
        for title, row in shapes.items():
            verdict, rendered = judge(form, self.finder, title, row)
            assert not verdict.startswith("wrong"), f"{title}: {verdict}"
            self.verdicts[verdict] += 1
            if rendered is not None and isinstance(row, Conversation):
                self._check_ids(title, row, rendered)

    @property
    def accepted(self) -> int:
        return sum(count for verdict, count in self.verdicts.items() if not verdict.startswith("rejected"))

    def _check_ids(self, title: str, row: Conversation, rendered: RenderedConversation) -> None:
        """Hold the ids of a row against its text encoded in one piece, and its labels against where the tokens lie there."""
        texts = render_rows([row], np.zeros(1, np.int64), Renderer(self.finder)).conversations
        assert texts is not None
        assert texts.texts == [rendered.text]
        if rendered.literal:
            return  # typed control tokens stay text; tests/integration/test_typed_tokens.py
        tokens, _ = encode_batch(texts, self.encoder, boundary="merge")
        joint = self.backend.encode(rendered.text, add_special_tokens=False)
        spans = [(turn.start, turn.stop) for turn in rendered.turns if turn.start < turn.stop]
        trained = [any(start < b and a < stop for start, stop in spans) for a, b in joint.offsets]
        assert (tokens.input_ids.tolist(), tokens.trained.tolist()) == (joint.ids, trained), title
        # Cut at the edges, the ids before an answer are those of the text before it.
        tokens, _ = encode_batch(texts, self.encoder)
        first = int(np.argmax(tokens.trained))
        if tokens.trained.any():
            prompt = rendered.text[: min(spans)[0]]
            assert (
                tokens.input_ids[:first].tolist() == self.backend.encode(prompt, add_special_tokens=False).ids
            ), title


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_rows_are_right_or_rejected_by_name(number: int, shared_data: Path, tmp_path: Path) -> None:
    titles = list(SHAPES)[number % STEP :: STEP]
    rows = read_shapes(tmp_path)
    Outcome(shared_data, NAMES[number], {title: rows[title] for title in titles})


@pytest.mark.torture
def test_the_whole_matrix_is_right_and_no_row_is_lost_again(shared_data: Path, tmp_path: Path) -> None:
    rows = read_shapes(tmp_path)
    accepted = {name: Outcome(shared_data, name, rows).accepted for name in NAMES}
    assert sum(accepted.values()) >= ACCEPTED, accepted
