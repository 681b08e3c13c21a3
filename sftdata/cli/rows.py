"""Commands on input rows: settings files, format detection, preview, and building a set."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel

from sftdata.choosing import CHOOSING, folders_of
from sftdata.cli.carrying import init_from, registry_from
from sftdata.cli.flags import Json, Sets, load_config, with_settings
from sftdata.config import OF_PICTURES, PrepareConfig
from sftdata.errors import UsageError
from sftdata.output import Meter, Progress, StoreUrl, counted, local_output, output_at, print_json, print_line
from sftdata.reading import REGISTRY_NAME
from sftdata.settings import read_settings_file
from sftdata.views.recipe import ViewConfig

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from sftdata.set.manifest import Manifest
    from sftdata.show.findings import Finding
    from sftdata.workers import Workers

SETTINGS = (
    "tokenizer", "output", "like", "max_length", "packing", "overlong", "chat_template", "train_on", "format",
    "map", "map_role", "formatter", "kind", "prompt_template", "response_template", "instruction_template",
    "mask_mode", "loss_weights", "boundary", "eos_token", "trust_control_tokens", "date", *OF_PICTURES,
    "split", "subset", "registry", "revision", "max_rejects", *CHOOSING, "workers", "engine", "overwrite",
)  # fmt: skip
_GROUPS = {
    "inputs": "what is read",
    "tokenizer": "what is rendered and trained",
    "processor": "how pictures are read",
    "output": "how it is cut, packed and stored",
    "dedup": "which of the documents the set holds",
    "workers": "how the work is done; never changes a byte of the set",
}


@with_settings(*(name for name in SETTINGS if name not in ("output", "overwrite")))
def init(
    config: PrepareConfig | None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the set, as written to the file.")
    ] = Path("shards"),
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Settings of TRL, axolotl or LLaMA-Factory to carry over, or its dataset_info.json.",
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", help="File to write: sft.yaml, or datasets.yaml; - for stdout."),
    ] = None,
) -> None:
    """Write a commented settings file for an input, to run with `sftdata prepare`.

    With `--from` the settings of another tool become two files, of which the second is for `sfttrain run`;
    datasets that are each read in their own way, or a dataset_info.json, become a registry.

    Example: sftdata init chats.jsonl -t Qwen/Qwen2.5-0.5B-Instruct -f sft.yaml
    Example: sftdata init --from axolotl.yml -f sft.yaml
    """
    file = file or (REGISTRY_NAME if source is not None and source.suffix == ".json" else "sft.yaml")
    if file != "-":
        local_output(file, "-f")
    place = output_at(output)
    if file != "-" and Path(file).exists():
        raise UsageError(f"{file}: exists already.", "name another file with -f, or - to print.")
    if config is None:
        assert source is not None
        if source.suffix == ".json":
            registry_from(source, file)
        else:
            init_from(source, file, place)
        return
    text = _settings_yaml(config.model_copy(update={"output": place}))
    if file == "-":
        typer.echo(text, nl=False)
    else:
        Path(file).write_text(text, "utf-8")
        print_line(f"Wrote {file}. Look at it, then: sftdata prepare {file}", err=True)


def _settings_yaml(config: PrepareConfig) -> str:
    """Return every setting with its description; those left at their default are comments.

    The decisions of planning (format, length, chat template) are listed at the top. Nothing is written.

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
    return text + commented(config, _GROUPS)


def commented(config: BaseModel, groups: Mapping[str, str]) -> str:
    """Return every setting as YAML, with its description; those left at their default are comments.

    Args:
        groups: the first setting of each group, and the group's title.
    """
    config = config.model_copy(update={"like": None})  # what it says is in the settings themselves
    text, values = "", config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        if name in groups:
            text += f"\n# ---- {groups[name]}\n"
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        chosen = field.is_required() or getattr(config, name) != default
        text += f"\n# {field.description}\n" + _entry(name, values[name], comment="" if chosen else "# ")
    return text


def _entry(name: str, value: object, comment: str) -> str:
    import yaml

    lines = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=1000).splitlines()
    return "".join(f"{comment}{line}\n" for line in lines)


@with_settings(*SETTINGS)
def prepare(
    config: PrepareConfig,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest and the audit as JSON.")
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            metavar="I/N|auto",
            help="Make one of N parts on shared storage; auto: as the scheduler of an array numbers it."
            " The last part finishes the set.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Prepare on a Ray cluster: auto, HOST:PORT or local."),
    ] = None,
) -> None:
    """Build a set of shards.

    Example: sftdata prepare chats.jsonl -t Qwen/Qwen2.5-0.5B-Instruct -o shards --max-length 2048
    Example: sftdata prepare chats.jsonl -t tokenizer -o /shared/shards --part 1/8
    """
    from sftdata.workers import start_workers

    with start_workers(config, _on_ray(config, ray)) as workers:
        with RunLog() as log:
            manifests = _prepare_sets(config, workers, log, part)
        if not manifests:
            if as_json:
                print_json({"part": part, "finished": False})
            return
        made = dict(zip(folders_of(config.output, config.eval), manifests, strict=True))
        if as_json:
            found = {str(place): _with_audit(place, manifest) for place, manifest in made.items()}
            print_json(found if config.eval is not None else found[str(config.output)])
            return
        for place, manifest in made.items():
            log.summary(manifest, place)


def _on_ray(config: PrepareConfig, address: str | None) -> Executor | None:
    if address is None:
        return None
    from sftdata.on_ray import RayExecutor

    if config.workers is not None:
        raise UsageError(f"--workers {config.workers}: Ray itself says how many.", "leave --workers out.")
    return RayExecutor(address)


def _prepare_sets(
    config: PrepareConfig, workers: Workers, log: RunLog, part: str | None
) -> tuple[Manifest, ...]:
    """Return the manifest of each set; of none where other parts are missing."""
    # Imported here, and only what is needed: the leader of the workers starts up meanwhile.
    from sftdata.parts import prepare as run
    from sftdata.parts import read_part

    one = read_part(part) if part is not None else None
    if config.chooses:
        from sftdata.selected import prepare as choose

        return choose(config, workers, log.progress, log.note, one)
    made = run(config, workers, log.progress, log.note, one)
    return (made,) if made is not None else ()


def _with_audit(folder: Path | StoreUrl, manifest: Manifest) -> dict[str, object]:
    if not isinstance(folder, Path):  # nothing is fetched
        return manifest.to_json()
    from sftdata.show.audit import glance

    return manifest.to_json() | {"audit": glance(folder, manifest).to_json()}


@with_settings("format", "map", "split", "subset", "registry")
def detect(
    config: PrepareConfig,
    as_json: Json = False,
) -> None:
    """Detect the row format of an input, and show the evidence.

    Example: sftdata detect chats.jsonl
    """
    from sftdata.formats.detect import detect as run
    from sftdata.inputs import plan_inputs

    sources, left_out = plan_inputs(config)
    (name, *others) = {source.entry: None for source in sources}
    if others:
        raise UsageError(f"{name or 'files'} and {others[0]}: are looked at apart.", "name one source.")
    reading = config.reading(name)
    detection = run(sources, format=reading.format, columns=reading.map)
    if as_json:
        print_json(detection.to_json() | {"left_out": left_out})
        return
    print_line(detection.format)
    for line in (*detection.evidence, *left_out):
        print_line(f"  {line}")


@with_settings(
    *(name for name in SETTINGS if name not in ("output", "overwrite", "workers", "max_rejects", *CHOOSING))
)
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
    from sftdata.run import preview as run
    from sftdata.show.pictures import ShownPicture
    from sftdata.show.terminal import print_view
    from sftdata.show.view import View, view_example
    from sftdata.vocabulary import read_vocabulary

    sample = run(config, number)
    if as_json:
        print_json(sample.to_json(batch_size))
        return
    for line in sample.lines(batch_size):
        print_line(line)
    vocabulary, vision = read_vocabulary(sample.tokenizer_folder), sample.vision
    print_view(View("", tuple(
        view_example(
            example.input_ids, example.labels, vocabulary, example.place,
            pictures=[] if vision is None else [
                ShownPicture.of(one, vision.tokens_of(one), vision.pictures.folder)
                for one in example.pictures
            ],
            image_id=-1 if vision is None else vision.image_id,
        )
        for example in sample.examples
    )))  # fmt: skip


@with_settings(
    "tokenizer", "response_template", "instruction_template", "format", "map", "map_role", "formatter",
    "kind", "prompt_template", "chat_template", "split", "subset", "registry", "revision",
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

    from sftdata.resolve import resolve_markers

    resolutions = resolve_markers(config, rows)
    if as_json:
        print_json([asdict(resolution) for resolution in resolutions])
        return
    for resolution in resolutions:
        print_line(
            f"{resolution.marker!r}: in {resolution.texts_with_marker:,} of"
            f" {counted(resolution.texts, 'row')}, {counted(resolution.occurrences, 'time')}"
        )
        print_line(
            f"  encoded alone: {list(resolution.alone)}, found {counted(resolution.alone_count, 'time')}"
        )
        for sequence in resolution.sequences:
            shared = sequence.starts_inside or sequence.ends_inside
            print_line(
                f"  {list(sequence.ids)}: {counted(sequence.count, 'time')}"
                f"{' (shares a token with its neighbour)' if shared else ''},"
                f" as in {sequence.before!r} _ {sequence.after!r}"
            )


def schema(
    of_view: Annotated[bool, typer.Option("--view", help="Of a file for `view`, not `prepare`.")] = False,
) -> None:
    """Print the JSON Schema of a settings file, for editors.

    Example: sftdata config schema > sftdata.schema.json
    """
    print_json((ViewConfig if of_view else PrepareConfig).model_json_schema())


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file with settings.")],
    sets: Sets = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the settings as JSON.")] = False,
) -> None:
    """Check a settings file, and print every setting as `prepare`, or `view`, would use it.

    Example: sftdata config check sft.yaml --set max_length=4096
    """
    model = ViewConfig if "sets" in read_settings_file(file)[0] else PrepareConfig
    settings = load_config([], file, sets or [], {}, model).model_dump(mode="json")
    if as_json:
        print_json(settings)
    else:
        import yaml

        typer.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), nl=False)


class RunLog:
    """The messages of `prepare` on stderr: notes, progress and the summary."""

    def __init__(self) -> None:
        self._meter = Meter("{done}/{total} slices")
        self._built = False

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._meter.close()

    def note(self, sentence: str) -> None:
        """Print one sentence."""
        self._meter.write(sentence)

    def progress(self, now: Progress) -> None:
        """Show the progress of the run."""
        self._built = True
        speed = now.tokens / self._meter.seconds
        figures = (
            f"{counted(now.tokens, 'token')}, {speed:,.0f} a second, {counted(now.rejected, 'row')} rejected"
        )
        self._meter.show(now.done, now.total, figures)

    def summary(self, manifest: Manifest, folder: Path | StoreUrl) -> None:
        """Print the ledger in words and, for a set just made in a folder, the findings of a quick audit."""
        for line in summary_lines(manifest, folder):
            self.note(line)
        if not isinstance(folder, Path):
            return
        if not self._built:
            self.note(f"  audit   `sftdata audit {folder}` looks for unintended supervision")
            return
        from sftdata.show.audit import glance
        from sftdata.show.terminal import make_console, print_findings

        audit = glance(folder, manifest)
        line = "; ".join(count_findings(audit.findings)) or "nothing found"
        if audit.looked < audit.documents:
            documents = counted(audit.documents, "document")
            line += f" in {audit.looked:,} of {documents}; `sftdata audit {folder}` reads all"
        line += f"; sftdata explain {audit.findings[0].code}" if audit.findings else ""
        self.note(f"  audit   {line}")
        print_findings(audit.findings, make_console(sys.stderr), indent="    ")


def count_findings(findings: list[Finding]) -> Iterator[str]:
    """Yield the number of kinds of defects, and of notes, in words."""
    for severity in ("defect", "note"):
        kinds = sum(finding.severity == severity for finding in findings)
        if kinds:
            yield f"{counted(kinds, 'kind')} of {severity}s"


def _where(manifest: Manifest) -> str:
    if manifest.by_index:
        return f"by index into {counted(len(manifest.bases), 'set')}"
    return f"in {counted(len(manifest.shards), 'shard')}"


def summary_lines(manifest: Manifest, folder: Path | StoreUrl) -> list[str]:
    """Return the ledger of a set in words, and the shares of its sources."""
    from sftdata.show.choice import counters_of, tell_shares

    ledger = manifest.ledger
    slots = ledger.tokens + ledger.tokens_padding
    left_out = {f"left out by {step}": count for step, count in ledger.documents_left_out.items()}
    lost = {**ledger.rows_rejected, **ledger.rows_filtered, **ledger.rows_dropped, **left_out}
    cut = sum(ledger.tokens_cut.values())
    lines = [
        f"{folder}: {counted(ledger.rows_packed, 'row')} of {manifest.max_length or 'their own'} tokens"
        f" {_where(manifest)} ({ledger.tokens / max(slots, 1):.1%} full),"
        f" digest {manifest.digest[:12]}",
        f"  rows    {ledger.rows_in:,} in = {ledger.rows_kept:,} kept"
        + "".join(f" + {count:,} {name}" for name, count in sorted(lost.items()))
        + f"; {ledger.documents_repeated:,} of them again" * bool(ledger.documents_repeated),
        f"  tokens  {ledger.tokens_in:,} in = {ledger.tokens_trained:,} trained"
        f" + {ledger.tokens_context:,} context + {cut:,} cut"
        f" + {ledger.tokens_in_dropped_rows:,} in dropped rows"
        + f" + {ledger.tokens_left_out:,} left out"
        * bool(ledger.tokens_left_out),
    ]
    counters = [f"{name.replace('_', ' ')} {count:,}" for name, count in counters_of(manifest).items()]
    heads = iter(("  shares  ",))
    lines += [next(heads, " " * 10) + share for share in tell_shares(manifest)]
    if counters:
        lines.append(f"  counted {', '.join(counters)}")
    if sum(ledger.rows_rejected.values()):
        from sftdata.set.stores import files_of

        code = max(ledger.rows_rejected, key=lambda name: ledger.rows_rejected[name])
        lines.append(
            f"  rejects {files_of(folder)}/rejects.jsonl: fix the rows there and prepare that file too;"
            f" sftdata explain {code}"
        )
    return lines
