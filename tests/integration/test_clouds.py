"""Google Cloud Storage and Azure: inputs and sets there, as in a folder, each against a server on 127.0.0.1.

Azure is Azurite, of npm. What can be installed for Google keeps no conditions of puts and lists nothing to obstore: there it
is `tests/gcs_server.py`, beside an emulator of others for what gcsfs reads.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import SftError, UsageError
from sftdata.set import clients, local, push, stores
from sftdata.set.manifest import MANIFEST_NAME
from sftdata.sources import remote
from tests.clouds import AZURE_ACCOUNT, AZURE_KEY, CONNECTION, HOST, Cloud, azure, connection, google
from tests.gcs_server import gcs_server
from tests.remote_stores import need_packages
from tests.torture.runs import content, settings, write_chats
from tests.waiting import HANGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_sync"),
    # The clients of fsspec keep their connections for the life of the process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", params=["gs", "az"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    yield from google() if request.param == "gs" else azure(tmp_path_factory.mktemp("azurite"))


def forget() -> None:
    """Let this process connect anew."""
    stores.connect.cache_clear()
    for package, name in (("gcsfs", "GCSFileSystem"), ("adlfs", "AzureBlobFileSystem")):
        if package in sys.modules:
            getattr(sys.modules[package], name).clear_instance_cache()


async def at_once(*_: object) -> None:
    """Sleep no second between attempts."""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
    )  # asks Google of what kind each bucket is
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0))
    quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=10), "base": 2}
    retries = {"max_retries": 3, "backoff": quick, "retry_timeout": timedelta(minutes=1)}
    monkeypatch.setattr(clients, "_RETRIES", retries)
    if "gcsfs" in sys.modules:
        monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": at_once}))
    if "adlfs" in sys.modules:
        policy = "azure.storage.blob._shared.policies_async.AsyncStorageRetryPolicy.sleep"
        monkeypatch.setattr(policy, at_once)
    local.stored_sizes.cache_clear()
    local.stored_hashes.cache_clear()
    yield
    forget()


@pytest.fixture
def cloud(server: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setenv(*server.place(server.gate.port))
    forget()
    yield server
    server.gate.requests, server.gate.slow = 0, lambda number: False


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "in.jsonl", 20)


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "set"
    sftdata.prepare(**settings(data, output))
    return output


def put(url: str, data: bytes) -> None:
    place, _, name = url.rpartition("/")
    stores.put_bytes(stores.Objects(place), name, data)


# ------------------------------------------------------------------------------------------------ what works


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_from_a_cloud_make_the_set_of_a_folder_there(
    cloud: Cloud, data: Path, made: Path, workers: int
) -> None:
    name = f"rows-{workers}"
    put(cloud.url(f"{name}/in/in.jsonl"), data.read_bytes())
    put(cloud.url(f"{name}/in/README.md"), b"no data")
    sftdata.prepare(**settings(cloud.url(f"{name}/in"), cloud.url(f"{name}/set"), workers=workers))
    found, whole = cloud.files(f"{name}/set"), content(made)
    assert found.keys() == whole.keys()
    assert {key for key in whole if found[key] != whole[key]} <= {MANIFEST_NAME}, "names where the rows lie"
    assert len(cloud.objects(f"{name}/set")) == len(whole) + 1
    manifest = sftdata.open(cloud.url(f"{name}/set")).manifest
    assert manifest.digest == sftdata.open(made).manifest.digest
    assert sftdata.prepare(**settings(data, cloud.url(f"{name}/set"))).digest == manifest.digest
    sftdata.prepare(**settings(data, cloud.url(f"{name}/set"), max_length=32, overwrite=True))
    assert sftdata.open(cloud.url(f"{name}/set")).manifest.max_length == 32
    assert len({key.split("/")[1] for key in cloud.objects(f"{name}/set") if "/" in key}) == 1, (
        "the old one stays"
    )


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_a_pattern_of_files_that_are_read_otherwise(
    cloud: Cloud, data: Path, made: Path, tmp_path: Path, kind: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=5)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data.read_bytes(), mtime=0))
    put(cloud.url(f"kinds/{kind}/a.{kind}"), (tmp_path / f"a.{kind}").read_bytes())
    there = sftdata.prepare(**settings(cloud.url(f"kinds/{kind}/*.{kind}"), tmp_path / "set"))  # type: ignore[arg-type]
    assert there.digest == sftdata.prepare(**settings(tmp_path / f"a.{kind}", tmp_path / "near")).digest


def test_a_set_is_pushed_and_read_there(
    cloud: Cloud, made: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, whole = cloud.url("pushed"), content(made)
    assert sftdata.push(made, url).sent == len(whole)
    assert cloud.objects("pushed") == whole
    assert sftdata.push(made, url).sent == 0
    said = []
    for place in (str(made), url):
        for words in ("stats", "inspect --row 0", "verify", "audit"):
            command, *more = words.split()
            assert main([command, place, *more, "--json"]) == 0
            said.append(capsys.readouterr().out.replace(place, "SET"))
    assert said[: len(said) // 2] == said[len(said) // 2 :]
    assert [row.labels.tolist() for row in sftdata.open(url)] == [
        row.labels.tolist() for row in sftdata.open(made)
    ]
    assert sftdata.view(url, output=tmp_path / "view", max_length=48).digest
    sftdata.prepare(**settings(data, tmp_path / "other", max_length=32))
    with pytest.raises(UsageError, match=f"{url}: another set is there"):
        sftdata.push(tmp_path / "other", url)


def test_what_replaced_the_bytes_of_an_object_is_found_without_reading(
    cloud: Cloud, data: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By another program, which keeps no hash beside them, or by the file of another set."""
    url, name = cloud.url("replaced"), "shard-00001.arrow"
    sftdata.push(made, url)

    def verified() -> tuple[int, str]:
        local.stored_hashes.cache_clear()
        return main(["verify", url, "--quick"]), capsys.readouterr().out

    code, said = verified()
    assert (code, ", tokens by the hashes that the store keeps;" in said) == (0, True)
    sound = (made / name).read_bytes()
    cloud.replace(f"replaced/{name}", sound)
    assert verified()[0] == 0, "read, for want of a hash, and sound"
    cloud.replace(f"replaced/{name}", sound[:-1] + b"?")
    code, said = verified()
    assert (code, f"{url}/{name}: xxh3-128 is " in said) == (4, True)
    put(f"{url}/{name}", sound[:-1] + b"?")
    code, said = verified()
    assert (code, f"{url}/{name}: other bytes, whose hash is " in said) == (4, True)
    for each in made.glob("*.arrow"):
        cloud.replace(f"replaced/{each.name}", each.read_bytes())
    code, said = verified()
    assert (code, ", tokens by their size alone;" in said) == (0, True)


def test_a_push_goes_on_where_it_stopped(cloud: Cloud, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, send, sent = content(made), stores.Objects.put, []

    def stop(self: Any, name: str, writer: Any) -> Any:
        sent.append(name)
        if len(sent) == 5:
            raise KeyboardInterrupt
        return send(self, name, writer)

    monkeypatch.setattr(stores.Objects, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        sftdata.push(made, cloud.url("stopped"))
    left = cloud.objects("stopped")
    assert push.MARK in left
    assert MANIFEST_NAME not in left
    assert sftdata.push(made, cloud.url("stopped")).sent == len(whole) - (len(left) - 1)
    assert cloud.objects("stopped") == whole


def test_one_of_many_creates_or_swaps_an_object(cloud: Cloud) -> None:
    place = stores.Objects(cloud.url("race"))
    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(lambda number: place.create("one", b"%d" % number), range(16))) == 1
        version = place.find("one")
        assert version is not None
        swapped = [*pool.map(lambda number: place.swap("one", b"to %d" % number, version.version), range(16))]
    assert sum(swapped) == 1
    assert cloud.objects("race") == {"one": b"to %d" % swapped.index(True)}
    assert not place.swap("none", b"", version.version)
    place.remove(["none", "one", "neither"])
    assert cloud.objects("race") == {}


def test_parts_finish_one_set(cloud: Cloud, data: Path, made: Path) -> None:
    command = [sys.executable, "-m", "sftdata", "prepare", str(data), "-o", cloud.url("parts")]
    command += [
        "--max-length",
        "64",
        "--set",
        "slice_bytes=2000",
        "--max-rejects",
        "50%",
        "--engine",
        "tokenizers",
    ]
    command += ["--workers", "1", "-t", str(settings(data, made)["tokenizer"])]
    crew = [
        subprocess.Popen([*command, "--part", f"{number}/2"], stderr=subprocess.PIPE, text=True)
        for number in (2, 1)
    ]
    for one in crew:
        said = one.communicate(timeout=HANGS)[1]
        assert one.returncode == 0, said
    assert cloud.files("parts") == content(made)


# ---------------------------------------------------------------------------------------- what goes wrong


def refused(call: Callable[..., object], *arguments: object, **more: object) -> str:
    """Return the one line that a call is refused with."""
    with pytest.raises(SftError) as caught:
        call(*arguments, **more)
    said = str(caught.value)
    assert "\n" not in said
    assert AZURE_KEY not in said
    return said


def test_a_store_that_throttles_is_asked_again_and_then_given_up_until_the_next_run(
    cloud: Cloud, data: Path, made: Path
) -> None:
    put(cloud.url("slow-in/in.jsonl"), data.read_bytes())
    cloud.gate.slow = lambda number: number % 3 == 0
    sftdata.prepare(**settings(data, cloud.url("throttled")))
    assert cloud.files("throttled") == content(made)
    assert sftdata.verify(cloud.url("throttled")).ok
    cloud.gate.requests, cloud.gate.slow = 0, lambda number: number > 25
    said = refused(sftdata.prepare, **settings(data, cloud.url("given-up")))
    assert cloud.gate.slowly[:3] in said
    assert "run the same command again; what is finished is kept" in said
    assert cloud.files("given-up") == {}
    cloud.gate.slow = lambda number: False
    notes: list[str] = []
    sftdata.prepare(**settings(data, cloud.url("given-up")), on_note=notes.append)
    assert any(note.startswith("Resuming: ") for note in notes)
    assert cloud.files("given-up") == content(made)


def test_no_bucket_and_nothing_there(cloud: Cloud, data: Path, made: Path, tmp_path: Path) -> None:
    nowhere = f"{cloud.scheme}://nowhere"
    for call in (
        lambda: sftdata.prepare(**settings(data, f"{nowhere}/set")),  # type: ignore[arg-type]
        lambda: sftdata.push(made, f"{nowhere}/set"),
        lambda: sftdata.open(f"{nowhere}/set"),
    ):
        assert "there is no such bucket" in (said := refused(call))
        assert "Fix: create it, or check the URL." in said
    assert f"{cloud.url('none')}: no such set" in refused(sftdata.open, cloud.url("none"))
    for url in (
        f"{nowhere}/in.jsonl",
        cloud.url("none.jsonl"),
        cloud.url("none/"),
        cloud.url("none/*.jsonl"),
    ):
        said = refused(sftdata.prepare, **settings(url, tmp_path / "set"))  # type: ignore[arg-type]
        assert "Fix: " in said
        assert url in said


def test_nobody_listens(cloud: Cloud, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*cloud.place(9))
    forget()
    said = refused(sftdata.prepare, **settings(data, cloud.url("set")))
    assert "Fix: check the endpoint, or run the same command again" in said
    said = refused(sftdata.prepare, **settings(cloud.url("in.jsonl"), tmp_path / "set"))  # type: ignore[arg-type]
    assert "Fix: check region, endpoint and credentials" in said


def test_no_credentials(
    cloud: Cloud, data: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {
        "gs": "GOOGLE_APPLICATION_CREDENTIALS",
        "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    }
    for name in (HOST, CONNECTION, "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    # Where a machine of the provider would give them; nobody listens there.
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP", "GCE_METADATA_ROOT"):
        monkeypatch.setenv(name, "127.0.0.1:9")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nonexistent")  # of the programs of providers, which know logins
    for account in (None, AZURE_ACCOUNT) if cloud.scheme == "az" else (None,):
        if account:
            monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", account)
            monkeypatch.setenv("IDENTITY_ENDPOINT", "http://127.0.0.1:9/msi/token")
            monkeypatch.setenv("IDENTITY_HEADER", "none")
        for call in (
            lambda: sftdata.prepare(**settings(data, cloud.url("set"))),  # type: ignore[arg-type]
            lambda: sftdata.push(made, cloud.url("set")),
            lambda: sftdata.open(cloud.url("set")),
        ):
            forget()
            said = refused(call)
            assert f"Fix: set {keys[cloud.scheme]}." in said
            assert "no credentials" in said or "no account" in said
    monkeypatch.setenv(*cloud.place(cloud.gate.port))
    sftdata.push(made, cloud.url("helped"))  # the advice helps in the same process


def test_credentials_that_are_wrong_or_may_only_read(
    cloud: Cloud, data: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cloud.url("read-only/in.jsonl"), data.read_bytes())
    if cloud.gcs is not None:
        monkeypatch.setattr(cloud.gcs, "tokens", {"Bearer none": False})
        only_read = None

        def wrong() -> None:
            monkeypatch.setattr(cloud.gcs, "answer", lambda method, path: 403)

    else:
        from datetime import UTC, datetime

        from azure.storage.blob import ContainerSasPermissions, generate_container_sas

        until = datetime.now(UTC) + timedelta(hours=1)
        may = ContainerSasPermissions(read=True, list=True)
        only_read = generate_container_sas(AZURE_ACCOUNT, "bucket", AZURE_KEY, permission=may, expiry=until)

        def wrong() -> None:
            monkeypatch.setenv(CONNECTION, connection(cloud.gate.port).replace("Eby8", "AAAA"))

    if only_read:
        at = f"BlobEndpoint=http://127.0.0.1:{cloud.gate.port}/{AZURE_ACCOUNT};AccountName={AZURE_ACCOUNT}"
        monkeypatch.setenv(CONNECTION, f"{at};SharedAccessSignature={only_read}")
    forget()
    assert sftdata.prepare(**settings(cloud.url("read-only/in.jsonl"), tmp_path / "set")).digest  # type: ignore[arg-type]
    said = refused(sftdata.prepare, **settings(data, cloud.url("read-only/set")))
    assert "access is denied" in said
    assert "may read and write there." in said
    assert cloud.objects("read-only").keys() == {"in.jsonl"}
    wrong()
    forget()
    for call in (
        lambda: sftdata.push(made, cloud.url("read-only/set")),
        lambda: sftdata.prepare(**settings(cloud.url("read-only/in.jsonl"), tmp_path / "other")),  # type: ignore[arg-type]
    ):
        said = refused(call)
        assert "access is denied" in said or "the credentials are refused" in said
        assert "Fix: check " in said


def test_a_store_that_ignores_conditions_is_refused_before_work(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cloud in google():
        assert cloud.gcs is not None
        monkeypatch.setenv(*cloud.place(cloud.gate.port))
        monkeypatch.setattr(cloud.gcs, "conditions", False)
        said = refused(sftdata.prepare, **settings(data, cloud.url("unsafe")))
        assert "the store replaces an object where it was asked not to" in said
        assert "Fix: choose a store with conditional puts" in said
        assert [key for key in cloud.objects("unsafe") if not key.endswith("plan.json")] == []


# ------------------------------------------------------------------------------------------------ credentials


def test_the_key_of_a_service_account_gives_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_packages("obstore", "gcsfs", "cryptography")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()).decode()
    with gcs_server() as gcs:
        account = {
            "type": "service_account",
            "client_email": "a@b",
            "private_key": pem,
            "token_uri": f"{gcs.url}/token",
        }
        (tmp_path / "key.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
        config, provider = clients._of_google("gs://bucket/set")
        assert provider is not None
        assert (config, provider()["token"]) == ({}, "none")
        assert gcs.asked == [("POST", "/token")]
    (tmp_path / "key.json").write_text("{}")
    said = refused(sftdata.open, "gs://bucket/set")
    assert "no credentials" in said
    assert "Fix: set GOOGLE_APPLICATION_CREDENTIALS." in said


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("AccountName=a;AccountKey=k+/=;EndpointSuffix=core.example", "https://a.blob.core.example"),
        ("DefaultEndpointsProtocol=http;AccountName=a;AccountKey=k+/=;EndpointSuffix=e", "http://a.blob.e"),
        ("AccountName=a;AccountKey=k+/=;EndpointSuffix=e;BlobEndpoint=http://host:1/a", "http://host:1/a"),
        ("AccountName=a;AccountKey=k+/=", None),
    ],
)
def test_a_connection_string_names_account_key_and_endpoint(
    text: str, endpoint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONNECTION, text)
    config, provider = clients._of_azure("az://bucket/set")
    assert (config["account_name"], config["account_key"], config.get("endpoint")) == ("a", "k+/=", endpoint)
    assert provider is None


# --------------------------------------------------------------------------------------- an emulator of others


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    need_packages("gcsfs", "gcp_storage_emulator", "obstore")
    from gcp_storage_emulator.server import create_server

    with create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket") as server:
        monkeypatch.setenv(HOST, f"http://127.0.0.1:{server._api._httpd.server_port}")
        forget()
        yield


def test_inputs_from_an_emulator_of_others_and_sets_there_are_refused(
    emulator: None, data: Path, made: Path, tmp_path: Path
) -> None:
    import gcsfs

    store = gcsfs.GCSFileSystem()
    store.pipe_file("bucket/rows/in.jsonl", data.read_bytes())
    there = sftdata.prepare(**settings("gs://bucket/rows", tmp_path / "set"))  # type: ignore[arg-type]
    assert there.digest == sftdata.open(made).manifest.digest
    assert "the store cannot do what a set needs" in refused(
        sftdata.prepare, **settings(data, "gs://bucket/set")
    )
