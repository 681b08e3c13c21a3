"""`sfttrain run` and `sfttrain config`: parse, call one function, print."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sftdata.errors import UsageError
from sftdata.frame import global_options, run_app
from sfttrain.process import rank

if TYPE_CHECKING:
    from sfttrain.config import TrainConfig

app = typer.Typer(
    help="Train on sets that `sftdata prepare` made.", no_args_is_help=True, add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)  # fmt: skip

app.callback()(global_options)

Sets = Annotated[
    list[Path] | None,
    typer.Argument(help="Folders or URLs of finished sets, or one YAML settings file.", show_default=False),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Folder or Hub id of the model.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run.")]
File = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings.")]
Override = Annotated[
    list[str] | None, typer.Option("--set", help="key=value; also every field of TrainingArguments.")
]
InitFromConfig = Annotated[Path | None, typer.Option(help="config.json of a model to train from scratch.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after this many steps.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data.")]
Lora = Annotated[str | None, typer.Option(help="Low-rank adapters, as r=16,alpha=32,target=all-linear.")]
Adapter = Annotated[Path | None, typer.Option(help="Folder of adapters to continue training.")]
Neftune = Annotated[float | None, typer.Option(help="Noise on the embeddings during training; 5 is typical.")]
Liger = Annotated[bool, typer.Option("--liger", help="Liger's kernels (GPU).")]
ReportTo = Annotated[
    str | None, typer.Option(help="Trackers, comma-separated: tensorboard,wandb,mlflow,trackio.")
]
PushToHub = Annotated[str | None, typer.Option(help="Hub repository for the finished model, as user/model.")]
Freeze = Annotated[
    str | None, typer.Option(help="Not trained in a model of pictures: vision, vision+projector, or none.")
]
Quantize = Annotated[
    str | None, typer.Option(help="nf4, int8 or torchao-int8, for the frozen base under --lora.")
]
Eval = Annotated[list[str] | None, typer.Option("--eval", help="Evaluation set, as NAME=FOLDER or FOLDER.")]
Attention = Annotated[
    str | None, typer.Option(help="Attention implementation; auto: the fastest; sdpa:flash forces a kernel.")
]
Mix = Annotated[
    list[str] | None, typer.Option("--mix", help="Share of a set, as NAME=SHARE, by the name of its folder.")
]
MixBy = Annotated[str | None, typer.Option(help="What shares count: rows, tokens or trained.")]
MostPasses = Annotated[float | None, typer.Option("--passes", help="How often to go through a set, at most.")]
NewLeg = Annotated[
    bool, typer.Option("--new-leg", help="Let a run go on with other sets or shares than it had so far.")
]
LogDocuments = Annotated[
    bool, typer.Option("--log-documents", help="Log the loss of each document, for `sftdata blame`.")
]
Sample = Annotated[
    Path | None,
    typer.Option(help="File of a few held rows, answered in log and report."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start over in a folder that holds a run.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]  # read by run_app

_OWN = (
    "model",
    "output",
    "init_from_config",
    "lora",
    "adapter",
    "freeze",
    "quantize",
    "push_to_hub",
    "attention",
    "mix_by",
    "passes",
    "sample",
)


def _settings(
    sets: Sets = None, model: Model = None, output: Output = None, config: File = None,
    override: Override = None, init_from_config: InitFromConfig = None, max_steps: MaxSteps = None,
    epochs: Epochs = None, lora: Lora = None, adapter: Adapter = None, freeze: Freeze = None,
    quantize: Quantize = None,
    evaluate: Eval = None, neftune_alpha: Neftune = None, liger: Liger = False,
    mix: Mix = None, mix_by: MixBy = None, passes: MostPasses = None, new_leg: NewLeg = False,
    report_to: ReportTo = None, push_to_hub: PushToHub = None, attention: Attention = None,
    log_documents: LogDocuments = False, sample: Sample = None, overwrite: Overwrite = False,
    trust_remote_code: Trust = False, debug: Debug = False,
) -> Any:  # fmt: skip  # evaluated by `_with_settings`, before `config` is imported
    flags = locals()
    if config is None and sets and len(sets) == 1 and sets[0].suffix in (".yaml", ".yml"):
        config, sets = sets[0], None
    from sfttrain.config import read_settings

    training = {
        "max_steps": max_steps, "num_train_epochs": epochs, "neftune_noise_alpha": neftune_alpha,
        "report_to": report_to.split(",") if report_to else None,
    }  # fmt: skip
    return read_settings(
        config,
        override or [],
        {
            "sets": tuple(sets) if sets else None,
            "eval": _named(evaluate),
            "mix": _shares(mix),
            "new_leg": new_leg or None,
            "log_documents": log_documents or None,
            "overwrite": overwrite or None,
            "trust_remote_code": trust_remote_code or None,
            "training": {key: value for key, value in training.items() if value is not None},
            "kernels": "liger" if liger else None,
            **{name: flags[name] for name in _OWN},
        },
    )


def _with_settings(command: Callable[[TrainConfig], None]) -> Callable[..., None]:
    """Give a command the flags of `_settings`; it receives the resulting settings."""

    @functools.wraps(command)
    def run(**flags: Any) -> None:
        command(_settings(**flags))

    parameters = inspect.signature(_settings, eval_str=True)
    run.__signature__ = parameters  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.parameters.items()}
    return run


@app.command()
@_with_settings
def run(settings: TrainConfig) -> None:
    """Train a model: `sfttrain run shards/ --model Qwen/Qwen2.5-0.5B -o out/`.

    The same command resumes an interrupted run.
    """
    from sfttrain.run import train

    train(settings)


@app.command()
@_with_settings
def config(settings: TrainConfig) -> None:
    """Print every setting as `run` would use it, as YAML that `--config` reads back."""
    import yaml

    from sfttrain.arguments import Run, effective_settings, refuse_inert, training_arguments

    evaluated = bool(settings.eval)
    run = Run(settings, training_arguments(settings, evaluated=evaluated), {}, evaluated=evaluated)
    refuse_inert(run)
    print(yaml.safe_dump(effective_settings(run), sort_keys=False), end="")


@app.command()
@_with_settings
def plan(settings: TrainConfig) -> None:
    """Print what a run of these settings takes of each set, its memory and time; train nothing.

    It is the plan of a fresh run on so many processes as `plan` itself is started on; no weights are loaded.
    """
    from sfttrain.process import rank
    from sfttrain.refusals import open_sets

    open_sets(settings)  # what is wrong with them is said before torch is imported, which takes seconds
    from sfttrain.training import plan_run

    lines = plan_run(settings)
    if rank() == 0:
        print("\n".join(lines))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, finished or not.")],
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Output file; default: report.html in the folder."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the log of a run as an HTML page: loss, gradients, learning rate, speed, evaluation, settings."""
    from sfttrain.report import write_report

    print(write_report(folder, html))


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of adapters.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the merged model.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model; default: the one the adapters name.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Merge adapters into their base, and compare logits before and after."""
    from sfttrain.adapters import merge as run_merge

    run_merge(adapter, output, model, lambda text: print(text, file=sys.stderr))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id; or folder of adapters.")],
    data: Annotated[Path, typer.Argument(metavar="SET", help="Folder of a finished set.")],
    base: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model; default: the one the adapters name.")
    ] = None,
    worst: Annotated[int, typer.Option("--worst", min=0, help="How many documents to name.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Measure the loss of a model on a set, by source, and name the documents that it finds hardest.

    The figures are those of an evaluation during a run: `sfttrain eval out/ held/`.
    """
    import json

    from sfttrain.evaluate import evaluate as run_evaluation

    found = run_evaluation(model, data, base, batch_size, worst)
    print(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(found.lines()))


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model, or of adapters.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model; default: the one the adapters name.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Message to answer, again for the next; none: ask for them."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    debug: Debug = False,
) -> None:
    """Talk to a trained model: `sfttrain chat out/`, with the chat template and stop tokens of its data."""
    from sfttrain.chat import open_chat, talk

    if not all(text.strip() for text in prompt or ()):
        raise UsageError("--prompt: found nothing; expected a message.", "leave --prompt out, and type it.")

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    opened = open_chat(
        folder, model, say, system=system, max_new_tokens=max_new_tokens, temperature=temperature
    )
    talk(opened, say, prompt)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Folder of a finished model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of what is written.")],
    calibration: Annotated[
        Path | None, typer.Option("--set", help="Set whose rows are used for calibration by GPTQ.")
    ] = None,
    gptq: Annotated[
        str | None, typer.Option(help="Bits, and weights per scale: bits=4,group_size=128.")
    ] = None,
    gguf: Annotated[
        str | None, typer.Option(metavar="TYPE", help="f16, bf16, f32, q8_0 or auto: for llama.cpp, Ollama.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a finished model for other programs: as GGUF, or quantized with GPTQ.

    GGUF needs llama.cpp's converter from PyPI, and brings a Modelfile for Ollama. GPTQ needs GPTQModel.
    """

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    if gguf is not None and (gptq is not None or calibration is not None):
        raise UsageError("--gguf beside --gptq or --set: these are of GPTQ.", "leave one of them out.")
    if gguf is not None:
        from sfttrain.gguf import write_gguf

        write_gguf(model, output, gguf, say)
        return
    if calibration is None:
        what = "sfttrain export: says neither --gguf nor --set."
        raise UsageError(what, "--gguf f16, or --set SHARDS for GPTQ.")
    _quantize(model, calibration, output, gptq or "bits=4", say)


def _quantize(model: Path, calibration: Path, output: Path, gptq: str, say: Callable[[str], None]) -> None:
    from sfttrain.export import quantize

    try:
        settings = {"bits": 4, "group_size": 128} | {
            key: int(value) for key, _, value in (p.partition("=") for p in gptq.split(","))
        }
        bits, group_size = settings.pop("bits"), settings.pop("group_size")
    except ValueError:
        settings = {gptq: 0}
    if settings:
        raise UsageError(f"--gptq {gptq!r}: expected bits=4,group_size=128.")
    quantize(model, calibration, output, bits, group_size, say)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if "--debug" not in given:
        _quieten_libraries()
    number = rank()
    return run_app(app, "sfttrain", given, f"rank {number}: " if number else "")


def _quieten_libraries() -> None:
    """Leave the terminal to what a run says itself, unless the user asked libraries to speak."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)  # loggers that have no handler, as bitsandbytes'
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _named(texts: list[str] | None) -> dict[str, str] | None:
    if not texts:
        return None
    named: dict[str, str] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        name, folder = (name, folder) if folder else (Path(name).name, name)
        if name in named:
            what = f"--eval {text}: there is one named {name} already."
            raise UsageError(what, "give each set a name of its own, as --eval held=FOLDER.")
        named[name] = folder
    return named


def _shares(texts: list[str] | None) -> dict[str, str] | None:
    """Return the share of each set as text, by its name; a path may hold an equals sign."""
    if not texts:
        return None
    shares = {}
    for text in texts:
        name, equals, share = text.rpartition("=")
        if not equals or name in shares:
            found = "is given twice" if equals else "expected NAME=SHARE"
            raise UsageError(f"--mix {text}: {found}.", "give each set one share, as --mix chats=70.")
        shares[name] = share
    return shares
