"""An engine that goes wrong on rows of the data is found out by the samples, and the run is built anew with the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sftdata import parts, pipeline, run
from sftdata.config import PrepareConfig
from sftdata.encode import engine
from sftdata.output import Progress
from sftdata.pipeline import SAMPLE_CHARS
from sftdata.workers import start_workers
from tests.integration.test_prepare import TOKENIZER, folder_digest

pytestmark = pytest.mark.slow

NEEDLE = "the heron that no hard text knows"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three slices of a megabyte; only the second names the heron."""
    path = tmp_path / "chats.jsonl"
    with path.open("w") as lines:
        for row in range(3000):
            question = f"Question {row}: " + "what do you see? " * 60
            said = NEEDLE if 1000 <= row < 2000 else "nothing"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture
def _wrong_about_herons(monkeypatch: pytest.MonkeyPatch) -> None:
    own = engine._load_gigatoken

    def load(resolved: engine.ResolvedTokenizer) -> engine.Encode:
        encode = own(resolved)

        def wrong(texts: Sequence[str]) -> tuple[engine.Int32, engine.Int64]:
            ids, offsets = encode(texts)
            ids = ids.copy()
            for index, text in enumerate(texts):
                if NEEDLE in text:
                    two = slice(
                        offsets[index] + 8, offsets[index] + 10
                    )  # as many bytes: lengths tell nothing
                    ids[two] = ids[two][::-1]
            return ids, offsets

        return wrong

    monkeypatch.setattr(engine, "_load_gigatoken", load)


def settings(data: Path, output: Path, chosen: str) -> PrepareConfig:
    return PrepareConfig(
        inputs=(str(data),),
        tokenizer=TOKENIZER,
        output=output,
        max_length=512,
        workers=1,
        engine=chosen,
        chat_template="chatml",
    )


def prepare(
    config: PrepareConfig, progress: run.OnProgress | None = None, say: Callable[[str], None] = print
) -> None:
    with start_workers(config) as workers:
        parts.prepare(config, workers, progress, say)


def shards(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in folder_digest(folder).items() if name.endswith(".arrow")}


@pytest.mark.usefixtures("_wrong_about_herons")
@pytest.mark.parametrize("stopped", [False, True], ids=["in one go", "after a resume"])
def test_one_wrong_slice_rebuilds_the_set_with_the_oracle(data: Path, tmp_path: Path, stopped: bool) -> None:
    prepare(settings(data, tmp_path / "right", "tokenizers"))
    said: list[str] = []
    if stopped:

        def stop(now: Progress) -> None:
            if now.done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(settings(data, tmp_path / "found", "gigatoken"), stop)
    prepare(settings(data, tmp_path / "found", "gigatoken"), say=said.append)
    assert any(note.startswith("gigatoken gives other ids") for note in said)
    assert stopped == any(note.startswith("Resuming") for note in said)
    assert shards(tmp_path / "right") == shards(tmp_path / "found")


def test_samples_look_at_the_ends_of_long_texts_too() -> None:
    text = "a" * 5000 + "b" * 5000
    assert [pipeline._window(text, where)[:: SAMPLE_CHARS - 1] for where in (0, 0.5, 1)] == ["aa", "ab", "bb"]
    assert pipeline._window("short", 1) == "short"


@pytest.mark.usefixtures("_wrong_about_herons")
def test_the_heron_would_have_been_trained_wrongly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftdata.run.digest_ids", lambda *_: "")
    monkeypatch.setattr("sftdata.pipeline.digest_ids", lambda *_: "")
    prepare(settings(data, tmp_path / "right", "tokenizers"))
    prepare(settings(data, tmp_path / "wrong", "gigatoken"))
    assert shards(tmp_path / "right") != shards(tmp_path / "wrong")
