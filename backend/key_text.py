"""What a key looks like, and what is kept of it."""

from __future__ import annotations

import hmac
import re
import secrets
import string

_ID = "abcdefghijklmnopqrstuvwxyz234567"
# Letters and digits alone, so that a double click takes a key whole: 32 of 62 are 190 random bits.
_SECRET = string.ascii_letters + string.digits
_KEY_ID = re.compile(r"[a-z2-7]{12}")
_KEY = re.compile(r"crane_([a-z2-7]{12})_[A-Za-z0-9]{32}")

ID_PLACE = slice(6, 18)  # where a key has its id


def looks_like_key(text: str) -> bool:
    """Whether a text begins as our keys do, and so was meant to be one."""
    return text.startswith("crane_")


def id_of(text: str) -> str | None:
    """The id in a text that is a key from its first letter to its last."""
    match = _KEY.fullmatch(text)
    return match[1] if match else None


def is_id(text: str) -> bool:
    return bool(_KEY_ID.fullmatch(text))


def new_id() -> str:
    return "".join(secrets.choice(_ID) for _ in range(12))


def new_text(id_: str) -> str:
    return f"crane_{id_}_" + "".join(secrets.choice(_SECRET) for _ in range(32))


def mac_of(pepper: bytes, text: str) -> str:
    """What is kept of a key: no use without the pepper, and none for finding the key with it."""
    return hmac.digest(pepper, text.encode(), "sha256").hex()


def mark_of(pepper: bytes) -> str:
    """Tells one pepper from another, and says nothing else of it."""
    return mac_of(pepper, "which pepper")[:8]
