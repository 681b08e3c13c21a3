"""The public interface: names and signatures are written down here, so that changing them is a decision."""

from __future__ import annotations

import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sftdata
import sfttrain
from sftdata.choosing import CHOOSING
from sftdata.config import PrepareConfig
from sftdata.keywords import PrepareSettings, ViewSettings
from sftdata.streaming import BUFFER_ROWS, NOT_STREAMED
from sftdata.views.recipe import ViewConfig
from sfttrain.config import TrainConfig
from sfttrain.process import notes_to, say
from tests.waiting import HANGS

ROOT = Path(__file__).resolve().parents[2]
CHATS = ROOT / "examples/conversations.jsonl"
TOKENIZER = ROOT / "examples/tokenizer"

# Settings, as keywords of three functions; a test below holds them against the model.
READ = """format: str | None = None, map: Mapping[str, str] = {}, map_role: Mapping[str, str] = {},\
 kind: Literal['auto', 'conversation', 'completion', 'text'] = 'auto', prompt_template: str | None = None"""
MASKED = """revision: str | None = None, chat_template: str | None = None,\
 template_kwargs: Mapping[str, object] = {}, date: str = '2025-01-01',\
 train_on: Literal['auto', 'assistant', 'last-assistant', 'completion', 'all'] = 'auto',\
 response_template: str | Sequence[int] | None = None,\
 instruction_template: str | Sequence[int] | None = None,\
 mask_mode: Literal['default', 'trl-0.7.10'] = 'default', loss_weights: bool = False,\
 boundary: Literal['split', 'merge'] = 'split', eos_token: str | None = None,\
 trust_control_tokens: bool = False"""
PICTURES = """processor: Path | None = None, max_pixels: int | None = None, min_pixels: int | None = None,\
 images: Path | None = None, embed_images: bool = False, check_pixels: bool = False"""
CUT = "max_length: int | None = None"
ENGINE = """engine: Literal['auto', 'gigatoken', 'tokenizers'] = 'auto'"""
BUILT = f"""like: str | Path | None = None,\
 split: str | None = None, subset: str | None = None, {READ}, registry: AnyRegistry = None, max_line_bytes: int = 67108864,\
 {MASKED}, {PICTURES}, {CUT},\
 overlong: Literal['truncate', 'truncate-left', 'drop', 'split', 'error'] = 'truncate',\
 packing: Literal['bfd', 'wrapped', 'none'] = 'bfd', max_rejects: str | int = '1%',\
 slice_bytes: int = 8388608"""
CHOSEN = """dedup: Literal['row', 'prompt'] | None = None, exclude: Sequence[str | Path] = (),\
 exclude_by: Literal['row', 'prompt'] = 'prompt', cap: Mapping[str, str] = {}, eval: str | float | None = None,\
 mix: Mapping[str, float | str] = {}, mix_by: Literal['rows', 'tokens', 'trained'] = 'trained', passes: float = 1,\
 total: str | None = None, seed: int = 0"""
HOW = f"""workers: int | None = None, {ENGINE}, overwrite: bool = False, **unknown: Never"""

# After 1.0, taking a name away or asking for more is a major version: docs/versioning.md.
SURFACE = {
    "sftdata": f"""
Completion(prompt, completion)
Conversation(messages, trained, tools = None, template_kwargs = <factory>, prompt_messages = 0, counted = ())
DataError(message: str, fix: str = '') -> None
IntegrityError(message: str, fix: str = '') -> None
Progress(done, total, tokens, rejected)
SftError(message: str, fix: str = '') -> None
Text(text)
Tokens(input_ids, labels)
UsageError(message: str, fix: str = '') -> None
audit(folder: str | PathLike[str], *, against: str | PathLike[str] | None = None, every: bool = False,\
 tokenizer: str | None = None,\
 split: str | None = None, map: Mapping[str, str] = {{}}) -> list[Finding]
by_columns(formatter: _Function) -> _Function
diff(a: str | PathLike[str], b: str | PathLike[str], *, limit: int = 3) -> Diff
export(folder: str | PathLike[str], *, to: Target, output: str | Path) -> Exported
open(folder: str | PathLike[str]) -> ShownSet
prepare(inputs: Inputs, *, tokenizer: AnyTokenizer | None = None, output: str | Path, formatter: Formatter = None,\
 on_note: Callable[[str], object] | None = None, on_progress: Callable[[Progress], object] | None = None,\
 {BUILT}, {CHOSEN}, {HOW.replace("int |", "int | Executor |", 1)}) -> Manifest | tuple[Manifest, Manifest]
preview(inputs: Inputs, *, tokenizer: AnyTokenizer | None = None, number: int = 3, formatter: Formatter = None,\
 {BUILT}, {HOW}) -> Preview
push(place: str | PathLike[str], to: str, on_sent: OnSent | None = None) -> Pushed
stream(rows: Iterable[Any], *, tokenizer: AnyTokenizer, formatter: Formatter = None, buffer_rows: int = 1024,\
 infinite: bool = False, shuffle: bool = False, seed: int = 0, {READ}, {MASKED}, {CUT}, {ENGINE}, **unknown: Never) -> Stream
verify(folder: str | PathLike[str], *, sha256: bool = False, quick: bool = False) -> VerifyReport
view(sets: str | PathLike[str] | Sequence[str | PathLike[str]], *, output: str | Path,\
 on_note: Callable[[str], object] | None = None, on_progress: Callable[[Progress], object] | None = None,\
 like: str | Path | None = None, sources: Sequence[str] = (), without: Sequence[str] = (), min_tokens: int | None = None,\
 max_tokens: int | None = None, min_trained: str | None = None, max_trained: str | None = None,\
 drop: Path | None = None, {CHOSEN}, max_length: int | None = None,\
 overlong: Literal['truncate', 'truncate-left', 'drop', 'split', 'error'] | None = None,\
 packing: Literal['bfd', 'wrapped', 'none'] | None = None, pack_over: Literal['auto', 'slice', 'view'] = 'auto',\
 order: Literal['as-is', 'shuffled', 'length', 'trained', 'sources', 'windows'] = 'as-is', bands: int = 8,\
 window: int = 64, steps_for: str | None = None, model: Path | None = None, epochs: int = 1,\
 pad_to_multiple_of: int = 1, write: bool = False,\
 overwrite: bool = False, **unknown: Never) -> Manifest | tuple[Manifest, Manifest]
""",
    "sfttrain": """
Chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None,\
 max_new_tokens: int = 512, temperature: float = 0.0) -> None
IterativeTrainer(model: torch.nn.Module, tokenizer: str | None = None, *, optimizer: torch.optim.Optimizer | None = None,\
 scheduler: LRScheduler | None = None, max_length: int | None = None,\
 truncation_mode: Literal['keep_end', 'keep_start'] = 'keep_end', batch_size: int | None = None) -> None
open_chat(folder: str | Path, *, model: str | None = None, system: str | None = None,\
 max_new_tokens: int = 512, temperature: float = 0.0, on_note: Callable[[str], object] | None = None) -> Chat
train(data: str | Path | ShardSet | Sequence[str | Path | ShardSet] | Iterable[Mapping[str, object]], *,\
 output: str | Path,\
 model: str | Path | torch.nn.Module | None = None, on_note: Callable[[str], object] | None = None,\
 weights: Sequence[float] = (), mix: Mapping[str, float | str] = {},\
 mix_by: Literal['rows', 'tokens', 'trained'] = 'trained', passes: float | None = None, window: int | None = None,\
 new_leg: bool = False,\
 eval: Mapping[str, str | Path] = {},\
 init_from_config: str | Path | None = None, revision: str | None = None,\
 dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto',\
 model_init_kwargs: Mapping[str, object] = {}, lora: str | Mapping[str, object] | None = None,\
 adapter: str | Path | None = None,\
 freeze: Literal['auto', 'none', 'vision', 'vision+projector'] = 'auto', resize_to_multiple_of: int = 1,\
 quantize: Literal['nf4', 'int8', 'torchao-int8'] | None = None, trust_remote_code: bool = False,\
 attention: str = 'auto', loss: Literal['auto', 'chunked', 'torch', 'plain'] = 'auto',\
 kernels: Literal['auto', 'liger', 'none'] = 'auto',\
 compile: Literal['auto', 'layers', 'loss', 'none'] = 'auto',\
 objective: Literal['nll', 'dft'] = 'nll', packing: Literal['auto', 'require', 'unpack'] = 'auto',\
 sequence_parallel: int = 1, prove_again: bool = False, log_documents: bool = False, sample: str | Path | None = None,\
 overwrite: bool = False, push_to_hub: str | None = None,\
 callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,\
 compute_loss_func: Callable[..., torch.Tensor] | None = None,\
 compute_metrics: Callable[..., Mapping[str, object]] | None = None,\
 eval_dataset: object = None,\
 optimizers: tuple[torch.optim.Optimizer | None, LRScheduler | None] | None = None,\
 optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], Mapping[str, object]] | None = None,\
 preprocess_logits_for_metrics: Callable[..., object] | None = None,\
 processing_class: PreTrainedTokenizerBase | None = None, **training: object) -> SftTrainer | None
""",
}


def written(parameter: inspect.Parameter) -> str:
    """Return a parameter as it is written in the source, whatever the version of Python prints."""
    text = "**" * (parameter.kind is parameter.VAR_KEYWORD) + parameter.name
    text += f": {parameter.annotation}" if isinstance(parameter.annotation, str) else ""
    return text if parameter.default is parameter.empty else f"{text} = {parameter.default!r}"


def described(package: Any) -> list[str]:
    """Return name and signature of all that is public."""
    found = []
    for name in filter(lambda name: callable(getattr(package, name)), package.__all__):
        signature = inspect.signature(getattr(package, name))
        parts = [written(parameter) for parameter in signature.parameters.values()]
        named = [place for place, p in enumerate(signature.parameters.values()) if p.kind is p.KEYWORD_ONLY]
        if named:
            parts.insert(named[0], "*")
        found.append(
            f"{name}({', '.join(parts)}) -> {signature.return_annotation}".removesuffix(
                " -> <class 'inspect._empty'>"
            )
        )
    return found


@pytest.mark.parametrize("package", [sftdata, sfttrain], ids=lambda package: package.__name__)
def test_public_names_and_signatures_change_by_decision_only(package: Any) -> None:
    assert described(package) == SURFACE[package.__name__].strip().split("\n")


@pytest.mark.parametrize("package", [sftdata, sfttrain], ids=lambda package: package.__name__)
def test_all_that_is_public_says_what_it_does(package: Any) -> None:
    assert not [name for name in package.__all__ if not inspect.getdoc(getattr(package, name))]


# What a keyword takes beside the kind that the settings hold.
WIDER = {
    "max_rejects": "str | int",
    "like": "str | Path | None",
    "registry": "AnyRegistry",
    "eval": "str | float | None",
    "pathlib.Path | None": "Path | None",
    "exclude": "Sequence[str | Path]",
    "dict[str, float]": "Mapping[str, float | str]",
    "dict[str, str]": "Mapping[str, str]",
    "dict[str, object]": "Mapping[str, object]",
    "str | tuple[int, ...] | None": "str | Sequence[int] | None",
}


@pytest.mark.parametrize("function", [sftdata.prepare, sftdata.preview, sftdata.stream])
def test_the_keywords_are_the_settings_with_their_kinds_and_defaults(function: Any) -> None:
    own = {"inputs", "tokenizer", "output", "formatter"}
    own |= {sftdata.stream: NOT_STREAMED | {"seed"}, sftdata.preview: {*CHOOSING}}.get(function, set())
    fields = {name: field for name, field in PrepareConfig.model_fields.items() if name not in own}
    keywords = {
        name: keyword
        for name, keyword in inspect.signature(function).parameters.items()
        if name in PrepareConfig.model_fields and name not in own
    }
    assert list(keywords) == list(fields)
    for name, field in fields.items():
        kind = keywords[name].annotation.replace("int | Executor", "int")  # of `prepare` alone
        held = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", inspect.formatannotation(field.annotation))
        assert kind == WIDER.get(name, WIDER.get(held, held)), name
        assert keywords[name].default == field.get_default(call_default_factory=True), name


def test_the_keywords_of_view_are_its_settings_with_their_defaults() -> None:
    keywords = inspect.signature(sftdata.view).parameters
    fields = {
        name: field for name, field in ViewConfig.model_fields.items() if name not in ("sets", "output")
    }
    assert [name for name in keywords if name in fields] == list(fields)
    for name, field in fields.items():
        assert keywords[name].default == field.get_default(call_default_factory=True), name


@pytest.mark.parametrize(
    ("function", "settings"),
    [(sftdata.prepare, PrepareSettings), (sftdata.view, ViewSettings)],
    ids=["prepare", "view"],
)
def test_the_keywords_of_type_checkers_are_those_of_the_function(function: Any, settings: Any) -> None:
    keywords = inspect.signature(function).parameters
    own = {"inputs", "sets", "tokenizer", "output", "formatter", "on_note", "on_progress", "eval", "unknown"}
    assert list(settings.__annotations__) == [name for name in keywords if name not in own]
    for name, kind in settings.__annotations__.items():
        assert kind.__forward_arg__.replace('"', "'") == keywords[name].annotation.replace('"', "'"), name


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda: sftdata.prepare(CHATS, tokenizer=TOKENIZER, output="set", max_lenght=64), "'max_length'"),
        (lambda: sftdata.preview(CHATS, tokenizer=TOKENIZER, max_seq_length=64), "here it is max_length"),
        (
            lambda: sftdata.preview(CHATS, tokenizer=TOKENIZER, eval="5%"),
            "eval: .*a preview samples all rows",
        ),
        (lambda: sftdata.stream([], tokenizer=TOKENIZER, packing="bfd"), "leave it out"),
        (lambda: sftdata.view("set", output="view", packin="bfd"), "'packing'"),
    ],
)
def test_a_keyword_that_is_no_setting_is_answered(call: Any, answer: str) -> None:
    with pytest.raises(sftdata.UsageError, match=answer):
        call()


def test_the_keywords_of_train_are_its_settings_and_the_objects_of_transformers() -> None:
    keywords = set(inspect.signature(sfttrain.train).parameters)
    assert keywords - {"data", "on_note", "training"} == (
        set(TrainConfig.model_fields) - {"sets", "training"} | set(sfttrain._OBJECTS)
    )
    for name in keywords & set(TrainConfig.model_fields) - {"output", "training"}:
        default = inspect.signature(sfttrain.train).parameters[name].default
        assert default == TrainConfig.model_fields[name].get_default(call_default_factory=True), name


def test_the_rows_buffered_by_default_are_written_in_the_signature() -> None:
    assert inspect.signature(sftdata.stream).parameters["buffer_rows"].default == BUFFER_ROWS


def test_a_name_that_is_not_public_is_refused() -> None:
    for package in (sftdata, sfttrain):
        with pytest.raises(AttributeError, match="no attribute 'prepair'"):
            package.prepair  # noqa: B018


@pytest.mark.parametrize("program", ["sftdata", "sfttrain"])
def test_the_version_is_one_for_packages_and_programs(program: str) -> None:
    command = [sys.executable, "-m", program, "--version"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True).stdout
    assert printed == f"{program} {sftdata.__version__}\n"
    assert sfttrain.__version__ == sftdata.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", sftdata.__version__)


def test_notes_and_progress_reach_who_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes: list[str] = []
    steps: list[sftdata.Progress] = []
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(CHATS.read_bytes() * 3)
    manifest = sftdata.prepare(
        rows, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=256, workers=1, slice_bytes=4096,
        on_note=notes.append, on_progress=steps.append,
    )  # fmt: skip
    assert any(note.startswith("Engine: ") for note in notes)
    assert len(steps) > 1
    assert [step.done for step in steps] == list(range(1, steps[-1].total + 1))
    assert {step.total for step in steps} == {len(steps)}
    assert steps[-1].tokens == manifest.ledger.tokens
    with caplog.at_level(logging.INFO, logger="sftdata"):
        sftdata.prepare(
            rows, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=256, workers=1, slice_bytes=4096
        )
    assert [record.message for record in caplog.records if "is up to date" in record.message]


def test_notes_of_a_run_reach_who_listens_and_stderr_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    with notes_to(heard.append):
        say("attention: eager")
        with notes_to(None):
            say("aloud")
        say("again")
    assert heard == ["attention: eager", "again"]
    say("after")
    assert capsys.readouterr().err == "aloud\nafter\n"


@pytest.mark.slow
def test_train_gives_its_notes_to_who_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sftdata.prepare(CHATS, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64, workers=1)
    capsys.readouterr()
    heard: list[str] = []
    trainer = sfttrain.train(
        tmp_path / "set", init_from_config=ROOT / "examples/tiny-model/config.json",
        output=tmp_path / "out", max_steps=1, on_note=heard.append,
    )  # fmt: skip
    assert trainer is not None
    assert trainer.state.global_step == 1
    assert any(note.startswith("attention: ") for note in heard)
    assert "attention: " not in capsys.readouterr().err


def test_the_functions_are_those_of_the_commands(tmp_path: Path) -> None:
    seen = sftdata.preview(CHATS, tokenizer=TOKENIZER, number=1, max_length=256)
    assert callable(sftdata.preview)  # no module of that name has taken its place
    manifest = sftdata.prepare(CHATS, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=256, workers=1)
    assert len(seen.examples) == 1
    assert seen.ledger.rows_in == manifest.ledger.rows_in
    report = sftdata.verify(tmp_path / "set", sha256=True)
    assert report.ok
    assert report.digest == manifest.digest
    assert [finding.severity for finding in sftdata.audit(tmp_path / "set")] == [
        finding.severity for finding in sftdata.audit(tmp_path / "set", every=True)
    ]
    assert sum(len(row.input_ids) for row in sftdata.open(tmp_path / "set")) == 256 * len(
        sftdata.open(tmp_path / "set")
    )


def test_rows_of_the_public_types_come_from_a_formatter(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n', encoding="utf-8")
    made = iter([
        sftdata.Conversation(
            [{"role": "user", "content": "Red?"}, {"role": "assistant", "content": "Beet."}], [None, None]
        ),
        sftdata.Completion("Green? ", "Chard."), sftdata.Text("Both grow."),
    ])  # fmt: skip
    manifest = sftdata.prepare(
        rows, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64, formatter=lambda _: next(made)
    )
    assert manifest.ledger.rows_kept == 3
