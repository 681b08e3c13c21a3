"""What a set with pictures is made with, decided once in the plan: processor, folder of pictures, gate.

A set has pictures if rows of the sample do, and a processor is at hand; then it keeps them. Any other set is
made as if there were no pictures in the world, and the few rows that hold one are rejected by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sftdata.batches import Int64, Tally, TokenBatch
from sftdata.config import OF_PICTURES, PrepareConfig
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import UsageError
from sftdata.limit import refuse_cutting
from sftdata.output import SPOOLED, StoreUrl, cache_folder
from sftdata.pictures.families import PROCESSOR_FILES, PictureProcessor, read_processor
from sftdata.pictures.gate import require_parity
from sftdata.pictures.loaded import Picture, PictureFolder
from sftdata.pictures.stretch import refuse_stray
from sftdata.render.template import ChatTemplate, TemplateRefusal
from sftdata.set.images import IN_THE_SET, PROCESSOR, VisionInfo, hash_sidecars, picture_ends
from sftdata.set.store import SetFile
from sftdata.settings import flag_of
from sftdata.sources.chunks import SourcePlan
from sftdata.sources.remote import is_url


@dataclass(frozen=True, slots=True)
class Vision:
    """What all shard tasks of a set with pictures share; small and picklable.

    Attributes:
        processor: lays out pictures; the gate has held it against the family's own.
        folder: of its files.
        pictures: where pictures are.
        embed: store the files of pictures, not their paths alone.
        image_id: id of the token that stands for pieces of pictures.
        never: ids of all tokens that are written for pictures; never trained.
        closing: ids of tokens that, behind a picture, belong to it.
        parts_only: the chat template takes contents as lists of parts alone.
    """

    processor: PictureProcessor
    folder: Path
    pictures: PictureFolder
    embed: bool
    image_id: int
    never: tuple[int, ...]
    closing: tuple[int, ...]
    parts_only: bool

    def tokens_of(self, picture: Picture) -> int:
        """Return how many image tokens stand for a picture."""
        return sum(self.processor.layout(*picture.size).runs)

    def refuse_stray(self, tokens: TokenBatch, tally: Tally) -> TokenBatch:
        """Reject rows without pictures that hold the image token, in raw text or among given ids."""
        none = np.zeros(len(tokens), np.int64)
        return refuse_stray(tokens, self.image_id, none, self.processor.image_token, tally)

    def ends(self, tokens: TokenBatch) -> Int64:
        """int64[N]: tokens of each example up to the end of its last picture; 0 where it has none."""
        return picture_ends(tokens, self.image_id, self.closing)

    def files(self) -> dict[str, Path]:
        """Return the files that the processor is read from, by their names in the set."""
        found = {f"{PROCESSOR}/{name}": self.folder / name for name in PROCESSOR_FILES}
        return {name: path for name, path in found.items() if path.is_file()}

    def images_from(self, output: Path | StoreUrl) -> str:
        """Return the folder of pictures from that of the set."""
        if self.embed or not isinstance(output, Path):
            return IN_THE_SET
        return os.path.relpath(self.pictures.folder, output.absolute())

    def info(self, output: Path | StoreUrl, files: Sequence[SetFile]) -> VisionInfo:
        """Return what the manifest says of the pictures.

        Args:
            output: the folder of the set, or its URL.
            files: of its slices.
        """
        processor = self.processor
        return VisionInfo(
            family=processor.family,
            image_id=self.image_id,
            closing=self.closing,
            processor_sha256=processor.sha256,
            image_settings=json.loads(processor.image_settings),
            processor_settings=json.loads(processor.processor_settings),
            images=self.images_from(output),
            sidecars=hash_sidecars(files),
        )

    def identity(self, config: PrepareConfig) -> dict[str, object]:
        """Return what decides the bytes of the set, as plain JSON data."""
        return {
            "processor_sha256": self.processor.sha256,
            "parts_only": self.parts_only,
            **config.model_dump(include={"max_pixels", "min_pixels", "embed_images", "check_pixels"}),
        }


def find_processor(config: PrepareConfig) -> Path | None:
    """Return the folder of the processor, given or the tokenizer's; None where neither is one."""
    if config.processor is not None:
        return config.processor
    folder = Path(config.tokenizer)
    return folder if any((folder / name).is_file() for name in PROCESSOR_FILES[:2]) else None


def find_pictures(config: PrepareConfig, sources: Sequence[SourcePlan]) -> PictureFolder | None:
    """Return where the paths of pictures start from; None where no processor is at hand.

    Raises:
        UsageError: there is no such folder.
    """
    if find_processor(config) is None:
        return None
    if config.images is not None and not config.images.is_dir():
        raise UsageError(f"--images {config.images}: no such folder.", "name the folder of the pictures.")
    spool = cache_folder(SPOOLED)  # objects have no folder: paths in them start from the current one
    own = {Path(source.source.path).parent for source in sources if not is_url(source.source.path)}
    own = {Path() if folder.is_relative_to(spool) else folder for folder in own}
    folder = config.images or (own.pop() if len(own) == 1 else Path())
    return PictureFolder(folder.absolute(), config.check_pixels)


def choose_vision(
    config: PrepareConfig, tokenizer: ResolvedTokenizer, pictures: PictureFolder, by_path: bool, folders: int
) -> Vision:
    """Read the processor, refuse what cannot be done to pictures, and hold the rule against the family's own.

    Args:
        pictures: of `find_pictures`.
        by_path: whether rows name pictures by path.
        folders: in how many folders the inputs lie.

    Raises:
        UsageError: no processor that is known and equal here, or a setting that would cut or lose a picture.
    """
    refuse_cutting(config.packing, config.overlong)
    if by_path and config.images is None and folders > 1:
        what = f"The rows name pictures by path, and the inputs lie in {folders} folders"
        raise UsageError(f"{what}: it is not clear where these paths start.", "--images DIR")
    if by_path and not (config.embed_images or isinstance(config.output, Path)):
        what = f"-o {config.output}: the set would name pictures in {pictures.folder}, of this machine."
        raise UsageError(what, "--embed-images")
    folder = find_processor(config)
    assert folder is not None
    processor = read_processor(folder, max_pixels=config.max_pixels, min_pixels=config.min_pixels)
    ids = {token.content: token.id for token in tokenizer.added_tokens}
    if processor.image_token not in ids:
        found = f"Tokenizer {tokenizer.name!r} has no token {processor.image_token!r}"
        raise UsageError(f"{found}, which stands for pictures.", "use the tokenizer of the model.")
    require_parity(processor, tokenizer.folder)
    return Vision(
        processor=processor,
        folder=folder.absolute(),
        pictures=pictures,
        embed=config.embed_images or not by_path,  # a path that no sampled row has is not left dangling
        image_id=ids[processor.image_token],
        never=tuple(sorted(ids[token] for _, token in processor.tokens if token in ids)),
        closing=tuple(sorted({ids[token] for token in processor.closing if token in ids})),
        parts_only=not _takes_strings(config, tokenizer),
    )


def refuse_unseen(config: PrepareConfig) -> None:
    """Refuse settings on pictures beside a formatter: its rows hold pictures if a processor is named.

    Raises:
        UsageError: naming the first.
    """
    for name in OF_PICTURES:
        if config.formatter is not None and config.processor is None and getattr(config, name):
            what = f"{flag_of(name)} acts on pictures; rows of a --formatter with a processor may hold some."
            raise UsageError(what, "--processor FOLDER")


_PROBE = "Xyzzy"


def _takes_strings(config: PrepareConfig, tokenizer: ResolvedTokenizer) -> bool:
    """Return whether the chat template writes a content that is a string."""
    if tokenizer.chat_template is None:
        return True
    arguments = config.date, config.template_kwargs
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, *arguments)
    try:
        return _PROBE in template.render([{"role": "user", "content": _PROBE}])
    except TemplateRefusal:
        return False
