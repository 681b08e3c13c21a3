"""Hashes of documents and of their prompts: what makes two of them the same.

Two documents with equal ids and other pictures are not the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xxhash

from sftdata.batches import Int32, Int64, TokenBatch, offsets_of

UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class PictureHashes:
    """The pictures of documents, as the hashes of these cover them.

    Attributes:
        whole: sha256 of each picture of a document, end to end; one entry a document.
        prompt: of those before its first label.
    """

    whole: Sequence[bytes]
    prompt: Sequence[bytes]


def picture_hashes(
    documents: TokenBatch,
    image_id: int,
    pictures: Sequence[bytes],
    tokens: Int32,
    images: Int32,
    counts: Int64,
) -> PictureHashes:
    """Return what tells documents apart by their pictures.

    Args:
        image_id: of the token that stands for pieces of pictures.
        pictures: sha256 of each.
        tokens: int32[P], how many image tokens stand for each.
        images: int32[K], pictures of the documents, end to end, as numbers in `pictures`.
        counts: int64[N], how many each document has.
    """
    trained, places = np.flatnonzero(documents.trained), np.flatnonzero(documents.input_ids == image_id)
    ends = np.append(trained, len(documents.trained))[np.searchsorted(trained, documents.offsets[:-1])]
    ends = np.minimum(ends, documents.offsets[1:])
    before = np.searchsorted(places, ends) - np.searchsorted(places, documents.offsets[:-1])
    edges = offsets_of(counts)
    whole, prompt = [b""] * len(documents), [b""] * len(documents)
    for index in np.flatnonzero(counts).tolist():
        own = images[edges[index] : edges[index + 1]]
        asked = int(np.searchsorted(np.cumsum(tokens[own]), before[index], side="right"))
        whole[index] = b"".join(pictures[number] for number in own.tolist())
        prompt[index] = b"".join(pictures[number] for number in own[:asked].tolist())
    return PictureHashes(whole, prompt)


def hash_documents(documents: TokenBatch, weighted: bool, pictures: PictureHashes | None = None) -> UInt64:
    """Hash ids and labels, and weights in a set that has them: xxh3-128, uint64[N, 2].

    The bytes that are hashed are, token by token, `2 * id + (1 if trained else 0)` as a little-endian uint32,
    followed in a set with weights by the weight as a float32; behind all tokens the sha256 of each picture.
    """
    codes = documents.input_ids.astype("<u4") << 1
    codes |= documents.trained
    if weighted:
        codes = np.stack([codes, documents.weights().astype("<f4").view("<u4")], axis=1)
    view, size = codes.reshape(-1).view(np.uint8).data, 8 if weighted else 4
    digest, ends = xxhash.xxh3_128_digest, (documents.offsets * size).tolist()
    if pictures is None:
        joined = b"".join([digest(view[start:stop]) for start, stop in pairwise(ends)])
    else:
        spans = zip(pairwise(ends), pictures.whole, strict=True)
        joined = b"".join([digest(bytes(view[start:stop]) + more) for (start, stop), more in spans])
    return np.frombuffer(joined, "<u8").reshape(-1, 2).astype(np.uint64)


def hash_prompts(documents: TokenBatch, bos_id: int | None, pictures: PictureHashes | None = None) -> UInt64:
    """Hash the ids before the first label of each document, little-endian int32: xxh3-64, uint64[N].

    The sha256 of each picture there follows them. A document that begins with a label, or has no more than a
    BOS before it, has no prompt: 0.
    """
    places = np.flatnonzero(documents.trained)
    start, end = documents.offsets[:-1], documents.offsets[1:]
    following = np.append(places, len(documents.trained))
    stop = np.minimum(following[np.searchsorted(places, start)], end)
    begins = np.append(documents.input_ids, -1)[start] == (-1 if bos_id is None else bos_id)
    none = stop - start <= begins
    view, digest = documents.input_ids.astype("<i4").view(np.uint8).data, xxhash.xxh3_64_intdigest
    pairs = list(zip((start * 4).tolist(), (stop * 4).tolist(), strict=True))
    if pictures is None:
        found = [digest(view[first:last]) for first, last in pairs]
    else:
        spans = zip(pairs, pictures.prompt, strict=True)
        found = [digest(bytes(view[first:last]) + more) for (first, last), more in spans]
    hashes = np.array(found, np.uint64)
    hashes[none] = 0
    return hashes
