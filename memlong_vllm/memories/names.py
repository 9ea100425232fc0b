"""Names of memories and folders of tenants: what may become part of a path."""

from __future__ import annotations

import hashlib
import re

from memlong_vllm.memories.errors import MemoryNameError

DEFAULT_TENANT = "default"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TENANT = re.compile(r"default|t-[0-9a-f]{32}")
_RULE = "must be 1 to 64 of A-Z a-z 0-9 . _ - and start with a letter or digit, without '..'"


def validate_name(name: str) -> str:
    """Return the name of a memory if it is one.

    Raises:
        MemoryNameError: saying the rule.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise MemoryNameError(f"the memory's name {_shown(name)} is not valid: it {_RULE}")
    return name


def tenant_folder(salt: str | None) -> str:
    """The folder of those who send a ``cache_salt``, or none.

    A salt is a secret: it is hashed, so that a folder's name does not tell it and no salt can
    name another folder.
    """
    if salt is None:
        return DEFAULT_TENANT
    return "t-" + hashlib.sha256(salt.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def tenant_salt(tenant: str) -> str:
    """The ``cache_salt`` of a tenant that the server tells apart by itself, by key or by header.

    Not a secret: where tenants are told apart, the salts that clients send are not used.
    """
    return hashlib.sha256(b"memlong-tenant:" + tenant.encode("utf-8", "surrogatepass")).hexdigest()


def validate_tenant(tenant: str) -> str:
    """Return a tenant's folder if :func:`tenant_folder` could have made it.

    Raises:
        MemoryNameError: if not. The message does not repeat it: it may be a salt.
    """
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise MemoryNameError("not a tenant's folder: it must come from tenant_folder(salt)")
    return tenant


def _shown(name: object) -> str:
    text = ascii(name)
    return text if len(text) <= 80 else text[:77] + "..."
