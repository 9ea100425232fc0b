"""Which tenant a call belongs to, and so which memories it can name."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from memlong_vllm.config import DeploymentConfig, MemoryConfigError
from memlong_vllm.endpoints.errors import EndpointError
from memlong_vllm.memories.names import tenant_salt

CACHE_SALT_HEADER = "x-cache-salt"
MAX_HEADER_BYTES = 1024
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")

RawHeaders = list[tuple[bytes, bytes]]
"""Of an ASGI scope: names in lower case."""


class Tenancy(Protocol):
    """How tenants are told apart.

    Attributes:
        separates: whether the server does it, so that a client's own ``cache_salt`` counts for
            nothing. If not, whoever knows a salt is its tenant.
        needs_key: whether calls must have a key.
    """

    separates: bool
    needs_key: bool

    def salt(self, headers: RawHeaders) -> str | None:
        """The ``cache_salt`` of a call's tenant.

        Raises:
            EndpointError: if the call does not say who it is from.
        """


class KeyRing:
    """API keys and what belongs to each; only their digests are kept."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._keys = [(_digest(key.encode()), value) for key, value in keys.items()]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, headers: RawHeaders) -> str | None:
        """What belongs to the key of a call, or None. Takes as long whichever key matches."""
        scheme, _, key = (header(headers, "authorization") or "").partition(" ")
        presented, found = _digest(key.encode("latin-1")), None
        for digest, value in self._keys:
            if hmac.compare_digest(presented, digest):
                found = value
        return found if scheme.lower() == "bearer" else None


class OwnSalts:
    """A client says its salt itself: in a request's body, or in a header where there is none."""

    separates = False
    needs_key = False

    def salt(self, headers: RawHeaders) -> str | None:
        value = header(headers, CACHE_SALT_HEADER)
        return None if value is None else _text(value, CACHE_SALT_HEADER)


class HeaderTenants:
    """A header names the tenant. Who can set it, such as a gateway, is trusted."""

    separates = True
    needs_key = False

    def __init__(self, name: str) -> None:
        if not _HEADER_NAME.fullmatch(name):
            raise MemoryConfigError("tenant_header", name, "must be the name of an HTTP header")
        self._name = name.lower()

    def salt(self, headers: RawHeaders) -> str:
        value = header(headers, self._name)
        if value is None:
            raise EndpointError(400, f"the header {self._name!r} must name the tenant", "TenantError")
        return tenant_salt(_text(value, self._name))


class KeyTenants:
    """An API key tells the tenant.

    Args:
        keys: {API key: tenant}.
    """

    separates = True
    needs_key = True

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._ring = KeyRing(keys)

    @classmethod
    def read(cls, path: str) -> KeyTenants:
        """Read the file of keys.

        Raises:
            MemoryConfigError: if it is not an object of keys and tenants. No key is repeated.
        """
        try:
            keys: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MemoryConfigError("tenant_keys", path, f"cannot be read: {type(error).__name__}") from None
        is_object = isinstance(keys, dict) and len(keys) > 0
        if not is_object or not all(isinstance(v, str) and v for pair in keys.items() for v in pair):
            raise MemoryConfigError("tenant_keys", path, "must hold a JSON object {API key: tenant}, not empty")
        if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
            raise MemoryConfigError("tenant_keys", path, "must have keys of printable ASCII without spaces")
        return cls(keys)

    def salt(self, headers: RawHeaders) -> str:
        tenant = self._ring.find(headers)
        if tenant is None:
            raise EndpointError(401, "a valid API key is required", "AuthenticationError")
        return tenant_salt(tenant)


def tenancy_of(deployment: DeploymentConfig) -> Tenancy:
    """As a deployment is configured.

    Raises:
        MemoryConfigError: naming the setting that cannot be used.
    """
    if deployment.tenant_keys is not None:
        return KeyTenants.read(deployment.tenant_keys)
    if deployment.tenant_header is not None:
        return HeaderTenants(deployment.tenant_header)
    return OwnSalts()


def ring_of(keys: Iterable[str | None]) -> KeyRing:
    """Keys that nothing in particular belongs to."""
    return KeyRing({key: "" for key in keys if key})


def header(headers: RawHeaders, name: str) -> str | None:
    """A header's value, as Latin-1.

    Raises:
        EndpointError: if it is there twice: proxies and servers disagree on which counts.
    """
    values = [value for key, value in headers if key.lower() == name.encode()]
    if len(values) > 1:
        raise EndpointError(400, f"the header {name!r} must be there once only", "TenantError")
    return values[0].decode("latin-1") if values else None


def _text(value: str, name: str) -> str:
    try:
        text = value.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        raise EndpointError(400, f"the header {name!r} must be UTF-8", "TenantError") from None
    if not text or len(value) > MAX_HEADER_BYTES:
        rule = f"must have 1 to {MAX_HEADER_BYTES} bytes"
        raise EndpointError(400, f"the header {name!r} {rule}", "TenantError")
    return text


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
