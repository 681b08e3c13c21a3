"""Decide everything before the first row is prepared: formats, template, tokenizer, mask, engine, tasks.

A `Job` says how rows become tokens, a `ShardTask` names the rows of one shard. Both are small and travel to
worker processes; nothing in them depends on how many there are.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from sftdata.acting import Look, format_options, look_at, refuse_conflicts, refuse_without_effect
from sftdata.config import DEFAULT_MAX_LENGTH, FAST_ENGINE_MIN_BYTES, PrepareConfig
from sftdata.encode.engine import Engine, choose_engine
from sftdata.encode.tokenizer import ResolvedTokenizer, resolve_tokenizer
from sftdata.errors import Unit, UsageError, without_secrets
from sftdata.formats.fields import FormatOptions
from sftdata.inputs import named_in, plan_inputs
from sftdata.masks import Mask, choose_mask
from sftdata.output import StoreUrl, without_folders, written
from sftdata.pictures.loaded import PictureFolder
from sftdata.render.control_tokens import find_unknown_tokens
from sftdata.render.template import ChatTemplate, TemplateChoice, choose_template
from sftdata.set.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, by_name, read_manifest
from sftdata.set.reuse import OldSlice, key_of, moves, old_slices
from sftdata.set.slices import SliceSource
from sftdata.sources.chunks import Chunk, SourcePlan
from sftdata.sources.planning import IN_TURN, Say, Scanned, grouped, source_names, with_progress
from sftdata.sources.ranges import plain_hash
from sftdata.tasks import ShardTask, Tasks, by_source, cut_tasks
from sftdata.version import __version__
from sftdata.vision import Vision, choose_vision, find_pictures, refuse_unseen

MOVED_FASTER = 16  # times as fast as preparing a slice is writing it again with other ids


@dataclass(frozen=True, slots=True)
class Job:
    """What all shard tasks share.

    Attributes:
        config: the settings, `max_length` filled in.
        tokenizer: as used, tokens added and chat template included.
        formats: the row format of each source.
        options: how rows are read.
        own_options: the same for sources of the registry that say it themselves, by number.
        sources: the first example id of each source, by its name relative to their common folder.
        engine: which tokenizer engine encodes.
        mask: what is trained.
        vision: what pictures are read with; None in a set without pictures.
    """

    config: PrepareConfig
    tokenizer: ResolvedTokenizer
    formats: tuple[str, ...]
    options: FormatOptions
    sources: dict[str, int]
    engine: Engine
    mask: Mask
    vision: Vision | None = None
    own_options: dict[int, FormatOptions] = field(default_factory=dict)

    def options_of(self, number: int) -> FormatOptions:
        """Return how the rows of a source are read."""
        return self.own_options.get(number, self.options)

    @property
    def max_length(self) -> int:
        """Tokens per packed row."""
        assert self.config.max_length is not None
        return self.config.max_length

    @property
    def row_length(self) -> int | None:
        """Tokens of every row; None where rows keep their own length."""
        return None if self.config.packing == "none" else self.max_length


@dataclass(frozen=True, slots=True)
class ReusedTask:
    """A task whose shard an old set has.

    Attributes:
        sources: the stretches that it is made from.
    """

    task: ShardTask
    old: OldSlice
    sources: tuple[SliceSource, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A job, its tasks, and the decisions made for the user.

    Attributes:
        sources: the inputs, read through once, with their hashes.
        engine_reason: why the job has its tokenizer engine.
        notes: what was defaulted, guessed or left out, one sentence each.
    """

    job: Job
    tasks: Tasks
    sources: tuple[SourcePlan, ...]
    engine_reason: str
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of the input, decompressed."""
        return int(self.tasks.sizes.sum())

    def at(self, output: Path | StoreUrl) -> Plan:
        """Return the plan with another output."""
        return replace(
            self, job=replace(self.job, config=self.job.config.model_copy(update={"output": output}))
        )

    def by_reference(self) -> Plan:
        """Return the plan with the reference engine, for input on which the fast one differs."""
        reason = f"{self.job.engine} gives other ids on this data"
        return replace(self, job=replace(self.job, engine="tokenizers"), engine_reason=reason)

    def locate(self, example_id: int) -> tuple[str, int, Unit]:
        """Return the path, the 1-based number of an example's row in it, and the unit of that number."""
        source = self.sources[bisect_right(self.sources, example_id, key=lambda source: source.base_id) - 1]
        return *source.locate(example_id), source.source.unit

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the bytes of the set, the names of its sources aside."""
        return self._manner() | {
            "sources": [[source.raw_bytes, source.xxh3_128] for source in self.sources],
            "formats": list(self.job.formats),
            **({"readings": own} if (own := {str(n): self._own(n) for n in self.job.own_options}) else {}),
        }

    def _own(self, number: int) -> dict[str, Any]:
        """Return what a source of the registry says of its rows itself."""
        options, entry = self.job.own_options.get(number), self.job.config.entry(self.sources[number].entry)
        if options is None or entry is None:
            return {}
        by_content = {"prompt_template": options.template.text, "formatter": options.formatter_sha256}
        return {name: by_content.get(name) or value for name, value in entry.own().items()}

    @property
    def licences(self) -> list[str | None]:
        """The licence of each source, where the registry says one."""
        return [getattr(self.job.config.entry(source.entry), "licence", None) for source in self.sources]

    def begun(self) -> dict[str, Any]:
        """Return the identity with the names of the sources: a resume with another one is refused."""
        return self.identity() | {"names": list(self.job.sources)}

    def _manner(self) -> dict[str, Any]:
        """Return what decides the bytes of every slice."""
        settings = {key: value for key, value in self.job.config.content().items() if key not in _HASHED}
        return settings | {
            "tokenizer_sha256": self.job.tokenizer.sha256,
            "chat_template_text": self.job.tokenizer.chat_template,
            "prompt_template_text": self.job.options.template.text,
            **({"formatter_sha256": code} if (code := self.job.options.formatter_sha256) else {}),
            **({} if (vision := self.job.vision) is None else {"vision": vision.identity(self.job.config)}),
        }

    def made_with(self, task: ShardTask) -> str:
        """Return the sha256 of all that decides the bytes of a task's shard but its place and its input.

        The engine does not: it gives the ids of the reference, or the reference takes its place.
        """
        rows = [self._reading(chunks) for chunks in by_source(task)]
        content = self._manner() | {"rows": rows, "software": software()}
        return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()

    def _reading(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """Return how the bytes of a stretch become rows."""
        source = chunks[0].source
        return {
            "format": self.job.formats[chunks[0].number],
            "container": source.container,
            "delimiter": source.delimiter,
            "columns": source.columns,
            "only": [chunk.part() for chunk in chunks],
            **self._own(chunks[0].number),
        }

    def stretches(self, task: ShardTask) -> tuple[SliceSource, ...]:
        """Return what a task is made from, source by source."""
        return tuple(_stretch(self.sources[chunks[0].number], chunks) for chunks in by_source(task))

    def difference(self, manifest: Manifest) -> list[str]:
        """Return what a finished set was made with otherwise; empty when it is this plan's own."""
        mine = by_name(msgspec.to_builtins(self.identity()), "vision")
        its = by_name(manifest.settings, "vision")
        changed = [key for key, value in mine.items() if its.get(key, _HASHED) != value]
        if "sources" in changed and self._reads(manifest.settings["sources"]):
            changed.remove("sources")
        names = [source.name for source in manifest.sources][: len(self.job.sources)]  # passes come behind
        changed += ["names"] if names != list(self.job.sources) else []
        changed += ["readings"] if "readings" in manifest.settings and "readings" not in mine else []
        licences = [source.licence for source in manifest.sources][: len(self.job.sources)]
        changed += ["licences"] if licences != self.licences else []
        if self.job.vision is not None and manifest.vision is not None:
            here = self.job.vision.images_from(self.job.config.output)
            changed += ["pictures"] if manifest.vision.images != here else []
        changed += ["view"] if "view" in manifest.settings else []  # it holds some of the documents
        return sorted([*changed, *(["format_version"] if manifest.format_version < FORMAT_VERSION else [])])

    def _reads(self, sources: Sequence[tuple[int, str]]) -> bool:
        """Say whether these are the sources; sets made before ranges have one hash of a large file."""
        return [size for size, _ in sources] == [source.raw_bytes for source in self.sources] and all(
            known in (source.xxh3_128, plain_hash(source.source) if "-" in source.xxh3_128 else "")
            for (_, known), source in zip(sources, self.sources, strict=True)
        )

    def continues(self, manifest: Manifest) -> bool:
        """Say whether a finished set was made by this command, and at most its inputs have changed since."""
        named = manifest.settings.get("inputs", ())
        return MOVING.issuperset(self.difference(manifest)) and {*named} <= set(inputs_of(self.job.config))

    def reuse(self, folder: Path, manifest: Manifest) -> dict[int, ReusedTask]:
        """Return the tasks whose shard a finished set has, by number."""
        old = old_slices(folder, manifest)
        found = {}
        for task in self.tasks if old else ():
            sources = self.stretches(task)
            if (slice_ := old.get(key_of(self.made_with(task), sources))) is not None:
                found[task.index] = ReusedTask(task, slice_, sources)
        return found

    def effort(self, tasks: Sequence[ShardTask | ReusedTask]) -> int:
        """Return how many bytes of input take as long to prepare as these tasks to finish, about."""
        moved = sum(
            self.tasks.size_of(task.task.index)
            for task in tasks
            if isinstance(task, ReusedTask) and moves(task.old, task.sources)
        )
        anew = sum(self.tasks.size_of(task.index) for task in tasks if isinstance(task, ShardTask))
        return anew + moved // MOVED_FASTER


# Names of things that are compared by their content.
_HASHED = ("inputs", "tokenizer", "revision", "chat_template", "prompt_template")

MOVING = frozenset({"sources", "formats", "names", "pictures", "readings", "licences"})
"""Keys of a plan's identity that follow the inputs: a set on which no others differ is brought up to date."""


def inputs_of(config: PrepareConfig) -> list[str]:
    """Return the inputs as a manifest names them."""
    return list(map(without_folders, config.inputs))


@lru_cache
def software() -> dict[str, str]:
    """Return the versions of what turns rows into tokens and files."""
    return {"sftdata": __version__} | {name: version(name) for name in ("jinja2", "pyarrow", "tokenizers")}


def make_plan(
    config: PrepareConfig,
    on_tokenizer: Callable[[ResolvedTokenizer], object] = lambda _: None,
    note: Say = lambda _: None,
    scanned: Scanned = IN_TURN,
) -> Plan:
    """Read the inputs through once and decide everything.

    Args:
        on_tokenizer: called with the tokenizer before the inputs are read, to load its engine meanwhile.
        note: called with the progress, if there are very many files.
        scanned: who scans the inputs.

    Raises:
        UsageError: an input, the tokenizer or a setting cannot be used, or the format is not clear.
    """
    for name in ("", *named_in(config)):
        refuse_conflicts(config.reading(name))
    tokenizer, notes = choose_tokenizer(config)
    on_tokenizer(tokenizer)
    sources, left_out = plan_inputs(config, note, scanned)
    formats: list[str] = []
    notes_of: list[tuple[str, list[str]]] = []
    looks: list[Look] = []
    pictures = find_pictures(config, sources)
    for source in with_progress(sources, note, "Looked at the rows of"):
        name, look, remarks = look_at(config.reading(source.entry), source, tokenizer, pictures)
        formats.append(name)
        looks += [look] if look is not None else []
        notes_of.append((source.source.path, [*source.notes, *remarks]))
    notes += [*grouped(notes_of), *refuse_without_effect(config, looks, tokenizer)]
    vision = _choose_vision(config, tokenizer, sources, looks, pictures)
    if config.max_length is None:
        length = min(tokenizer.model_max_length, DEFAULT_MAX_LENGTH)
        config = config.model_copy(update={"max_length": length})
        notes.append(f"max_length is {length} tokens, the default; --max-length changes it.")
    names = source_names(sources, [without_secrets(source.source.path) for source in sources])
    sources = [
        source.placed(number, source.base_id, name)
        for number, (name, source) in enumerate(zip(names, sources, strict=True))
    ]
    tasks = cut_tasks(sources, config.slice_bytes)
    large = tasks.sizes.sum() >= FAST_ENGINE_MIN_BYTES
    engine, engine_reason = choose_engine(tokenizer, config.engine, worth_it=bool(large))
    options = _options(config, tokenizer, vision)
    job = Job(
        config=config,
        tokenizer=tokenizer,
        formats=tuple(formats),
        options=options[""],
        own_options={
            n: own for n, source in enumerate(sources) if (own := options[source.entry]) != options[""]
        },
        sources=dict(zip(names, (source.base_id for source in sources), strict=True)),
        engine=engine,
        mask=choose_mask(config, tokenizer, () if vision is None else vision.never),
        vision=vision,
    )
    return Plan(job, tasks, tuple(sources), engine_reason, tuple(map(without_secrets, (*left_out, *notes))))


def _choose_vision(
    config: PrepareConfig,
    tokenizer: ResolvedTokenizer,
    sources: Sequence[SourcePlan],
    looks: Sequence[Look],
    pictures: PictureFolder | None,
) -> Vision | None:
    """Return what pictures are read with, where rows have any; a formatter's, if a processor is named."""
    refuse_unseen(config)
    unseen = config.formatter is not None and config.processor is not None
    if pictures is None or not (unseen or any(look.pictured for look in looks)):
        return None
    folders = {Path(source.source.path).parent for source in sources}
    by_path = unseen or any(look.by_path for look in looks)
    return choose_vision(config, tokenizer, pictures, by_path, len(folders))


def _options(
    config: PrepareConfig, tokenizer: ResolvedTokenizer, vision: Vision | None
) -> dict[str, FormatOptions]:
    """Return how rows are read, by the source of the registry; an empty name stands for others."""
    return {
        name: format_options(
            config.reading(name),
            chat=tokenizer.chat_template is not None,
            pictures=None if vision is None else vision.pictures,
            parts_only=vision is not None and vision.parts_only,
        )
        for name in ("", *named_in(config))
    }


def choose_tokenizer(config: PrepareConfig) -> tuple[ResolvedTokenizer, list[str]]:
    """Resolve the tokenizer with the chat template in use; return it, and notes on what was decided."""
    if written(config.tokenizer) != config.tokenizer:
        raise UsageError(
            f"-t {written(config.tokenizer)}: the name is not UTF-8.",
            "rename the folder, or reach it by a link.",
        )
    base = _with_added(resolve_tokenizer(config.tokenizer, revision=config.revision))
    template = choose_template(config.chat_template, base.chat_template, _clone)
    if template is not None and config.chat_template is not None:
        compiled = ChatTemplate(template.text, base.special_tokens, config.date, config.template_kwargs)
        known = [*(token.content for token in base.added_tokens), *base.stop_tokens, *template.tokens]
        template = replace(template, tokens=(*template.tokens, *find_unknown_tokens(compiled, known)))
    eos_token = config.eos_token or (template.eos_token if template else None)
    if config.chat_template is None and eos_token in (None, base.eos_token):
        return base, list(base.notes)
    tokenizer = resolve_tokenizer(
        config.tokenizer,
        revision=config.revision,
        chat_template=template.text if template else None,
        add_tokens=_missing(base, template, eos_token),
        eos_token=eos_token,
    )
    tokenizer = replace(tokenizer, tokens_added=(*base.tokens_added, *tokenizer.tokens_added))
    notes = list(tokenizer.notes)
    if template is not None and config.chat_template is not None:
        notes.append(f"Chat template: {template.origin}.")
    if tokenizer.tokens_added:
        names = ", ".join(token for token, _ in tokenizer.tokens_added)
        rows = f"the model's embeddings must grow to {tokenizer.vocab_size} rows"
        notes.append(f"Added to the tokenizer: {names}; {rows}.")
    return tokenizer, notes


def _with_added(tokenizer: ResolvedTokenizer) -> ResolvedTokenizer:
    """Return the tokenizer of a finished set with the tokens added for it, which the model still lacks."""
    folder = Path(tokenizer.name)
    if not (folder.parent / MANIFEST_NAME).is_file() or folder.name != "tokenizer":
        return tokenizer
    known = read_manifest(folder.parent).tokenizer
    ids = {token.content: token.id for token in tokenizer.added_tokens}
    if known.sha256 != tokenizer.sha256 or not ids.keys() >= {*known.tokens_added}:
        return tokenizer
    return replace(tokenizer, tokens_added=tuple((name, ids[name]) for name in known.tokens_added))


def _missing(base: ResolvedTokenizer, template: TemplateChoice | None, eos_token: str | None) -> list[str]:
    needed = [*(template.tokens if template else ()), *([eos_token] if eos_token else [])]
    known = {token.content for token in base.added_tokens}
    return list(dict.fromkeys(token for token in needed if token not in known))


def _clone(name: str) -> tuple[str | None, Sequence[str], str | None]:
    other = resolve_tokenizer(name)
    return other.chat_template, [token.content for token in other.added_tokens], other.eos_token


def _stretch(source: SourcePlan, chunks: Sequence[Chunk]) -> SliceSource:
    """Return the stretch of a source that chunks are which follow each other."""
    first, last = chunks[0], chunks[-1]
    counts = [chunk.records for chunk in chunks]
    blocks, seen = xxhash.xxh3_128(), 0
    for seal in (chunk.seal for chunk in chunks if chunk.seal is not None):
        # Neighbours share the block that their border lies in.
        blocks.update(seal.since(seen))
        seen = seal.stop
    return SliceSource(
        name=first.name,
        start=first.start,
        stop=last.stop,
        first_record=first.first_record,
        records=None if None in counts else sum(count or 0 for count in counts),
        first_id=first.first_id,
        first_line=first.line_of(first.first_line or first.first_record + 1) or 0,
        content=xxhash.xxh3_128_hexdigest(b"".join(chunk.content for chunk in chunks)),
        xxh3=blocks.hexdigest() if first.seal is not None else source.xxh3_128,
    )
