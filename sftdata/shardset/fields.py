"""Types of the fields of a manifest. It may come from anywhere, so each says all that it may hold."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**53)]
"""A number of things; 2**53 is the largest that every JSON reader keeps exact."""

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
RowLength = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Xxh3 = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
ShardName = Annotated[str, Meta(pattern=r"^shard-[0-9]{5,9}\.arrow\Z")]

PlainPath = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\Z", max_length=1024)
]
"""A path inside the folder of the set: no part is hidden, `.` or `..`, and none holds anything that a shell or a disk minds."""
