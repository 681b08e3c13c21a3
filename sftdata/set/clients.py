"""The clients of object stores: connected as the environment says, what they refuse said in one line.

Each is given what the tools of its provider find in the environment, and those that read inputs: the same
credentials, endpoint and account.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from typing import Any
from urllib.parse import quote

from sftdata.errors import SftError, UsageError, need, without_secrets
from sftdata.sources.remote import EXTRAS, KEYS

_CLIENT = {"timeout": "15m", "connect_timeout": "20s"}  # of one request
_RETRIES = {
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=15), "base": 2},
    "retry_timeout": timedelta(minutes=3),
}
_ALSO = {"gcs": "gs"}  # what the client does not know
_AGAIN = "run the same command again; what is finished is kept."


def library(url: str) -> Any:
    """Return the package that talks to a store.

    Raises:
        UsageError: it is not installed.
    """
    scheme = url.partition("://")[0]
    return need("obstore", EXTRAS[scheme], f"{scheme}:// takes a client")


@cache
def connect(url: str) -> object:
    """Return the client of a store, one in each process.

    Raises:
        UsageError: it cannot be, as the environment names no credentials or account.
    """
    scheme, _, rest = url.partition("://")
    config, provider = {"s3": _of_aws, "gcs": _of_google, "azure": _of_azure}[EXTRAS[scheme]](url)
    if (at := str(config.pop("at", ""))) and not re.fullmatch(r"https?://[^\s/][^\s]*", at):  # it would panic
        what = f"{without_secrets(url)}: the endpoint {without_secrets(at)} is no URL."
        raise UsageError(what, "begin it with https://, or with http://.")
    options = _CLIENT | {"allow_http": at.startswith("http://")}
    with explained_store(url):
        return library(url).store.from_url(
            f"{_ALSO.get(scheme, scheme)}://{quote(rest, safe='/@:')}",  # a key may hold `#` and `%`
            config=config, credential_provider=provider, client_options=options, retry_config=_RETRIES,
        )  # fmt: skip


# Settings beside those that a client finds in the environment by itself, `at` being the endpoint; and what to
# ask for credentials, None for its own ways.
_Given = tuple[dict[str, Any], Callable[[], Any] | None]


def _of_aws(url: str) -> _Given:
    """Return credentials and region as the tools of AWS find them, where variables do not name them."""
    at = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    config = {"checksum_algorithm": "SHA256", "at": at}
    if _is_set("FSSPEC_S3_ANON"):
        return config | {"skip_signature": True}, None
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return config, None
    session = need("botocore.session", "s3", f"{url} takes credentials of AWS").get_session()
    found = session.get_credentials()
    if found is None:
        raise UsageError(f"{without_secrets(url)}: no credentials.", f"set {KEYS['s3']}.")
    region = session.get_config_variable("region")
    return config | ({"region": region} if region else {}), partial(_frozen, found)


def _of_google(url: str) -> _Given:
    """Return the default credentials of Google's tools, or an emulator, which takes any."""
    if at := os.environ.get("STORAGE_EMULATOR_HOST", ""):
        at = at if "://" in at else f"http://{at}"
        return {"base_url": at, "at": at}, lambda: {"token": "none", "expires_at": None}
    if os.environ.get("FSSPEC_GCS_TOKEN") == "anon":
        return {"skip_signature": True}, None
    auth = need("google.auth", "gcs", f"{url} takes credentials of Google")
    try:
        found, _ = auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])
    except auth.exceptions.GoogleAuthError as error:
        said = " ".join(str(error).split())[:300]
        raise UsageError(f"{url}: no credentials ({said}).", f"set {KEYS['gcs']}.") from None
    return {}, need(
        "obstore.auth.google", "gcs", f"{url} takes credentials of Google"
    ).GoogleCredentialProvider(found)


def _of_azure(url: str) -> _Given:
    """Return account and key of a connection string, or else what Azure's own tools are logged in with."""
    text = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    said = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
    if "EndpointSuffix" in said and "AccountName" in said:
        host = f"{said['AccountName']}.blob.{said['EndpointSuffix']}"
        said.setdefault("BlobEndpoint", f"{said.get('DefaultEndpointsProtocol', 'https')}://{host}")
    config: dict[str, Any] = {key: said[name] for name, key in _CONNECTION.items() if name in said}
    config["at"] = config.get("endpoint") or os.environ.get("AZURE_STORAGE_ENDPOINT", "")
    if _is_set("AZURE_STORAGE_ANON"):
        return config | {"skip_signature": True}, None
    if {"account_key", "sas_key"} & config.keys() or any(name in os.environ for name in _AZURE_KEYS):
        return config, None
    return config, need(
        "obstore.auth.azure", "azure", f"{url} takes a login of Azure"
    ).AzureCredentialProvider()


_CONNECTION = {
    "AccountName": "account_name",
    "AccountKey": "account_key",
    "SharedAccessSignature": "sas_key",
    "BlobEndpoint": "endpoint",
}
_AZURE_KEYS = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def _frozen(credentials: Any) -> dict[str, object]:
    """Return credentials as the client takes them, which asks again before they expire."""
    now = credentials.get_frozen_credentials()
    keys = {"access_key_id": now.access_key, "secret_access_key": now.secret_key, "token": now.token}
    return keys | {"expires_at": datetime.now(UTC) + timedelta(minutes=5)}


# ---------------------------------------------------------------------------------------------- refusals

_REFUSALS = {  # what a store, or its client, says: what is wrong, and the fix; {keys} are variables
    "RequestTimeTooSkewed": ("the clock of this machine is wrong", "set the clock, then {again}"),
    "NoSuchBucket|ContainerNotFound|bucket does not exist": (
        "there is no such bucket",
        "create it, or check the URL.",
    ),
    "AuthorizationHeaderMalformed|PermanentRedirect|IllegalLocationConstraint|[Rr]edirect without": (
        "the bucket is in another region",
        "set AWS_REGION to the region of the bucket.",
    ),
    "MissingAccount": ("no account", "set {keys}."),
    "DefaultAzureCredential|169.254.169.254|No credentials": ("no credentials", "set {keys}."),
    "InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|ExpiredToken|AuthenticationFailed"
    "|Invalid Access Key|invalid_grant": ("the credentials are refused", "check {keys}."),
    "401 Unauthorized|403 Forbidden": ("access is denied", "check that {keys} may read and write there."),
    "InvalidPathError": (
        "another object there has a name that no file can have",
        "remove it, or choose another folder.",
    ),
    "405 Method|501 Not Impl": ("the store cannot do what a set needs", "choose another store for -o."),
    "404 Not Found": ("not there", "check the URL: the bucket, and the endpoint."),
}


@contextmanager
def explained_store(where: str) -> Iterator[None]:
    """Turn what the client of a store raises into one line."""
    try:
        yield
    except SftError:
        raise
    except Exception as error:
        connect.cache_clear()  # the fix may be another setting of the environment, which a client reads once
        keys = KEYS[EXTRAS[where.partition("://")[0]]]
        text = str(error)
        short = without_secrets(" ".join(text.partition("Debug source")[0].split()))[:300]  # queries are long
        said = f"{type(error).__name__}: {short}"
        for pattern, (what, fix) in _REFUSALS.items():
            if re.search(pattern, f"{said} {text}"):
                raise UsageError(f"{where}: {what} ({said}).", fix.format(keys=keys, again=_AGAIN)) from None
        what = f"{where}: failed, several times where that may help ({said})."
        raise SftError(what, f"check the endpoint, or {_AGAIN}") from None
