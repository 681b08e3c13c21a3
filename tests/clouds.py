"""Google Cloud Storage and Azure on 127.0.0.1: a bucket of each, behind a gate that can throttle, and seen from outside."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from sftdata.set.manifest import MANIFEST_NAME
from tests.gcs_server import Gcs, gcs_server
from tests.remote_stores import Gate, need_packages
from tests.waiting import HANGS

AZURITE = "SFTDATA_AZURITE"  # the path of azurite-blob, where it is not on PATH
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # public
)


@contextmanager
def azure_server(log: Path) -> Iterator[int]:
    """Run Azurite, of npm, in a process of its own; yield its port. Skip aloud where it is missing."""
    program = os.environ.get(AZURITE) or shutil.which("azurite-blob")
    if program is None:
        pytest.skip(f"azurite-blob is not on PATH: npm install -g azurite, or name it by {AZURITE}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*command, "--skipApiVersionCheck", "--disableTelemetry"], stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + HANGS
        while b"successfully listens" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(HANGS)


HOST, CONNECTION = "STORAGE_EMULATOR_HOST", "AZURE_STORAGE_CONNECTION_STRING"


class Cloud(NamedTuple):
    """A bucket named `bucket`.

    Attributes:
        objects: what is below a name, as another client than the product's sees it.
        replace: put an object by such a client.
        place: names a port of the server in the environment.
    """

    scheme: str
    gate: Gate
    objects: Callable[[str], dict[str, bytes]]
    replace: Callable[[str, bytes], object]
    place: Callable[[int], tuple[str, str]]
    gcs: Gcs | None = None

    def url(self, name: str) -> str:
        return f"{self.scheme}://bucket/{name}"

    def files(self, name: str) -> dict[str, bytes]:
        """Return the files of the set at a name; nothing where there is none."""
        found = self.objects(name)
        if MANIFEST_NAME not in found:
            return {}
        folder = json.loads(found[MANIFEST_NAME])["folder"]
        return {key.removeprefix(f"{folder}/"): data for key, data in found.items() if key.startswith(folder)}


def google() -> Iterator[Cloud]:
    need_packages("obstore", "gcsfs")
    with gcs_server() as gcs:

        def objects(name: str) -> dict[str, bytes]:
            kept = gcs.buckets["bucket"].items()
            return {key.removeprefix(f"{name}/"): one.data for key, one in kept if key.startswith(f"{name}/")}

        gate = Gate(int(gcs.url.rpartition(":")[2]))
        gate.slowly = "429 Too Many Requests"

        def replace(name: str, data: bytes) -> object:
            return gcs.put("bucket", name, data, {}, None)

        yield Cloud("gs", gate, objects, replace, lambda port: (HOST, f"127.0.0.1:{port}"), gcs)
        gate.close()


def connection(port: int) -> str:
    at = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
    return f"AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};BlobEndpoint={at};"


def azure(folder: Path) -> Iterator[Cloud]:
    need_packages("obstore", "adlfs")
    with azure_server(folder / "log") as port:
        from azure.storage.blob import ContainerClient

        client = ContainerClient.from_connection_string(connection(port), "bucket")
        client.create_container()

        def objects(name: str) -> dict[str, bytes]:
            keys = [*client.list_blob_names(name_starts_with=f"{name}/")]
            return {key.removeprefix(f"{name}/"): client.download_blob(key).readall() for key in keys}

        gate = Gate(port)

        def replace(name: str, data: bytes) -> object:
            return client.upload_blob(name, data, overwrite=True)

        yield Cloud("az", gate, objects, replace, lambda port: (CONNECTION, connection(port)))
        gate.close()
        client.close()
