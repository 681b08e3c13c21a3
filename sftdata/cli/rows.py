"""Commands on input rows: settings, format detection, preview, and the set itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sftdata.cli.flags import Json, Sets, load_config, with_settings
from sftdata.config import PrepareConfig

SETTINGS = (
    "tokenizer", "output", "max_length", "packing", "overlong", "chat_template", "train_on", "format", "map", "map_role",
    "formatter", "kind", "prompt_template", "response_template", "instruction_template", "mask_mode", "loss_weights", "boundary",
    "eos_token", "trust_control_tokens", "date", "split", "subset", "revision", "max_rejects", "workers", "engine", "overwrite",
)  # fmt: skip
_GROUPS = {
    "inputs": "what is read",
    "tokenizer": "what is rendered and trained",
    "output": "how it is cut, packed and stored",
    "workers": "how the work is done; never changes a byte of the set",
}


@with_settings(*(name for name in SETTINGS if name not in ("output", "overwrite")))
def init(
    config: PrepareConfig,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the set, as written to the file.")
    ] = Path("shards"),
    file: Annotated[str, typer.Option("--file", "-f", help="File to write; - for stdout.")] = "sft.yaml",
) -> None:
    """Write a commented settings file for an input, to run with `sftdata prepare`.

    Example: sftdata init chats.jsonl -t Qwen/Qwen2.5-0.5B-Instruct -f sft.yaml
    """
    from sftdata.cli.talk import print_line
    from sftdata.errors import UsageError
    from sftdata.paths import local_output

    local_output(file, "-f")
    local_output(output)
    if file != "-" and Path(file).exists():
        raise UsageError(f"{file}: is there already.", "name another file with -f, or - to print.")
    text = _settings_yaml(config.model_copy(update={"output": output}))
    if file == "-":
        typer.echo(text, nl=False)
    else:
        Path(file).write_text(text, "utf-8")
        print_line(f"Wrote {file}. Look at it, then: sftdata prepare {file}", err=True)


def _settings_yaml(config: PrepareConfig) -> str:
    """Return every setting with its description; those that do not apply here are comments with their defaults.

    What planning decides (format, length, chat template) is listed at the top. Nothing is written.

    Raises:
        SftError: the run cannot be planned.
    """
    from sftdata.plan import make_plan

    plan = make_plan(config)
    config = config.model_copy(update={"max_length": plan.job.max_length})
    lines = [
        "Settings of a set. Look: sftdata preview THIS_FILE; build: sftdata prepare THIS_FILE.",
        *plan.notes,
    ]
    text = "".join(f"# {line}\n" for line in lines)
    values = config.model_dump(mode="json")
    for name, field in PrepareConfig.model_fields.items():
        if name in _GROUPS:
            text += f"\n# ---- {_GROUPS[name]}\n"
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        chosen = field.is_required() or getattr(config, name) != default
        text += f"\n# {field.description}\n" + _entry(name, values[name], comment="" if chosen else "# ")
    return text


def _entry(name: str, value: Any, comment: str) -> str:
    import yaml

    lines = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=1000).splitlines()
    return "".join(f"{comment}{line}\n" for line in lines)


@with_settings(*SETTINGS)
def prepare(
    config: PrepareConfig,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest and the audit as JSON.")
    ] = False,
) -> None:
    """Build a set of shards.

    Example: sftdata prepare chats.jsonl -t Qwen/Qwen2.5-0.5B-Instruct -o shards --max-length 2048
    """
    from sftdata.launch import start_workers

    with start_workers(config) as workers:
        # Even what only the summary needs: the leader of the workers takes longer to get ready.
        from sftdata.cli.talk import Talk, print_json
        from sftdata.run import prepare as run
        from sftdata.show.audit import glance

        with Talk() as talk:
            manifest = run(config, workers, talk.progress, talk.say)
        if as_json:
            print_json(manifest.to_json() | {"audit": glance(config.output, manifest).to_json()})
        else:
            talk.summary(manifest, config.output)


@with_settings("format", "map", "split", "subset")
def detect(
    config: PrepareConfig,
    as_json: Json = False,
) -> None:
    """Detect the row format of an input, and show the evidence.

    Example: sftdata detect chats.jsonl
    """
    from sftdata.cli.talk import print_json, print_line
    from sftdata.formats.detect import detect as run
    from sftdata.plan import plan_inputs

    sources, left_out = plan_inputs(config)
    found = run(sources, format=config.format, columns=config.map)
    if as_json:
        print_json(found.to_json() | {"left_out": left_out})
        return
    print_line(found.format)
    for line in (*found.evidence, *left_out):
        print_line(f"  {line}")


@with_settings(*(name for name in SETTINGS if name not in ("output", "overwrite", "workers", "max_rejects")))
def preview(
    config: PrepareConfig,
    number: Annotated[int, typer.Option("-n", min=1, help="Examples to show.")] = 3,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Packed rows per step, to estimate steps.")
    ] = 8,
    as_json: Json = False,
) -> None:
    """Show rendered, tokenized and masked examples, and estimates for the whole input. Nothing is written.

    Example: sftdata preview chats.jsonl -t Qwen/Qwen2.5-0.5B-Instruct -n 3
    """
    from sftdata.cli.talk import print_json, print_line
    from sftdata.previewing import preview as run
    from sftdata.show.terminal import print_examples
    from sftdata.show.view import view_example
    from sftdata.vocabulary import read_vocabulary

    seen = run(config, number)
    if as_json:
        print_json(seen.to_json(batch_size))
        return
    for line in seen.lines(batch_size):
        print_line(line)
    vocabulary = read_vocabulary(seen.tokenizer_folder)
    print_examples(
        [
            view_example(example.input_ids, example.labels, vocabulary, example.place)
            for example in seen.examples
        ]
    )


@with_settings(
    "tokenizer", "response_template", "instruction_template", "format", "map", "map_role", "formatter", "kind", "prompt_template",
    "chat_template", "split", "subset", "revision",
)  # fmt: skip
def resolve(
    config: PrepareConfig,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to sample, evenly spaced.")] = 10_000,
    as_json: Json = False,
) -> None:
    """Show every token id sequence of a response template in the texts, with an example of each.

    Example: sftdata resolve chats.txt -t TOKENIZER --response-template "### Assistant:"
    """
    from dataclasses import asdict

    from sftdata.cli.talk import print_json, print_line
    from sftdata.resolve import resolve_markers

    found = resolve_markers(config, rows)
    if as_json:
        print_json([asdict(resolution) for resolution in found])
        return
    for resolution in found:
        print_line(
            f"{resolution.marker!r}: in {resolution.texts_with_marker:,} of {resolution.texts:,} rows,"
            f" {resolution.occurrences:,} times"
        )
        print_line(f"  encoded alone: {list(resolution.alone)}, found {resolution.alone_count:,} times")
        for sequence in resolution.sequences:
            inside = (
                " (shares a token with its neighbour)"
                if sequence.starts_inside or sequence.ends_inside
                else ""
            )
            print_line(
                f"  {list(sequence.ids)}: {sequence.count:,} times{inside}, as in {sequence.before!r} _ {sequence.after!r}"
            )


def schema() -> None:
    """Print the JSON Schema of a settings file, for editors.

    Example: sftdata config schema > sftdata.schema.json
    """
    from sftdata.cli.talk import print_json

    print_json(PrepareConfig.model_json_schema())


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file with settings.")],
    sets: Sets = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the settings as JSON.")] = False,
) -> None:
    """Check a settings file, and print every setting as `prepare` would use it.

    Example: sftdata config check sft.yaml --set max_length=4096
    """
    from sftdata.cli.talk import print_json

    settings = load_config([], file, sets or [], {}).model_dump(mode="json")
    if as_json:
        print_json(settings)
    else:
        import yaml

        typer.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), nl=False)
