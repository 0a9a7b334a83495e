"""Signatures: who vouches for a bundle. Ed25519 (RFC 8032) by the library `cryptography`, which is imported only when one is asked for.

What is signed is a fixed line and then the bytes of `plan.json` as they lie on disk. `plan.json` holds the SHA-256 of every other file, so
a signature covers the whole bundle except `report.html`, which the engine never opens, and `signature.json` itself. Nothing is brought into
a canonical form: the bytes that were checked are the bytes that are then parsed, so no two readings of one text can differ. The fixed line
keeps a signature made for something else from passing for one of a plan, and the other way round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, field

from aivmm.errors import BundleError, UsageError
from aivmm.runtime.strict import Digest, Reader, Strict

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_FILE = "signature.json"
MAX_SIGNATURE_BYTES = 64 << 10
CONTEXT = b"aivmm plan signature 1\n"
_MAX_KEY_BYTES = 64 << 10

Key = str | bytes | PathLike[str]  # a PEM file's path, or PEM text


class Signature(Strict, frozen=True, kw_only=True):
    """One signature: by which key, and the 64 bytes of it, in hexadecimal."""

    algorithm: Literal["ed25519"]
    key: Digest  # SHA-256 of the 32 bytes of the public key
    signature: Annotated[str, Meta(pattern=r"^[0-9a-f]{128}(?![\s\S])")]


class Signatures(Strict, frozen=True, kw_only=True):
    """What `signature.json` holds: at most one signature of each key."""

    schema_version: Literal[1] = field(name="schema", default=1)
    signatures: Annotated[list[Signature], Meta(min_length=1, max_length=16)]


_READER = Reader(Signatures, newest=1, remedy="sign the plan again")


def parse_signatures(text: bytes, where: str) -> Signatures:
    """Check the text of a `signature.json`.

    Raises:
        BundleError: it is not one; one line.
    """
    return _READER.read(text, where)


def sign(
    plan: bytes, key: Key, *, earlier: bytes | None = None, where: str = SIGNATURE_FILE, passphrase: bytes | None = None
) -> Signatures:
    """Return `earlier` signatures with one of `plan`'s bytes by the private `key` added, in the place of that key's own.

    Raises:
        UsageError: the key cannot be read or is of another kind, or `cryptography` is not installed.
        BundleError: the earlier signatures cannot be read.
    """
    private = _private_key(key, passphrase)
    name = key_id(private.public_key())
    made = Signature(algorithm="ed25519", key=name, signature=private.sign(CONTEXT + plan).hex())
    others = [] if earlier is None else [each for each in parse_signatures(earlier, SIGNATURE_FILE).signatures if each.key != name]
    if len(others) >= 16:
        raise BundleError(f"{SIGNATURE_FILE} holds 16 signatures already", advice="remove it, and sign the plan again")
    return Signatures(signatures=[*others, made])


def require_signature(plan: bytes, signature: bytes | None, keys: Key | Sequence[Key], shown: str) -> str:
    """Return the id of the first of the public `keys` that signed `plan`'s bytes.

    Raises:
        BundleError: none of them did: no signature at all, one of another key, or one of other bytes.
        UsageError: a key cannot be read or is of another kind, or `cryptography` is not installed.
    """
    trusted = {key_id(each): each for each in map(_public_key, [keys] if isinstance(keys, str | bytes | PathLike) else keys)}
    if not trusted:
        raise UsageError("require_signature names no key", advice="give the PEM file of a public key")
    if signature is None:
        raise BundleError(f"{shown} is not signed, and a signature is required", advice="sign it with: aivmm plan sign PLAN --key KEY.pem")
    found = parse_signatures(signature, f"{shown}/{SIGNATURE_FILE}").signatures
    by_trusted = [each for each in found if each.key in trusted]
    if not by_trusted:
        others, required = ", ".join(_short(each.key) for each in found), " or ".join(map(_short, trusted))
        raise BundleError(
            f"{shown} is signed by {others}, and not by the required {required}",
            advice="require the key that signed it, or have the plan signed by the required one",
        )
    for each in by_trusted:
        if _verifies(trusted[each.key], plan, each):
            return each.key
    raise BundleError(f"{shown} was changed after {_short(by_trusted[0].key)} signed it", advice="copy the bundle again, or sign it again")


def new_key() -> tuple[bytes, bytes]:
    """Return the PEM texts of a new private key (PKCS #8, not encrypted) and of its public half.

    Raises:
        UsageError: `cryptography` is not installed.
    """
    _require_library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    private = Ed25519PrivateKey.generate()
    return (
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )


def key_id(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of the key's 32 bytes, hexadecimal."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def signers(signature: bytes, where: str) -> list[str]:
    """Return the ids of the keys in a `signature.json`. Nothing is verified."""
    return [each.key for each in parse_signatures(signature, where).signatures]


def _verifies(key: Ed25519PublicKey, plan: bytes, signature: Signature) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(bytes.fromhex(signature.signature), CONTEXT + plan)
    except InvalidSignature:
        return False
    return True


def _private_key(key: Key, passphrase: bytes | None) -> Ed25519PrivateKey:
    _require_library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    text, shown = _pem(key)
    try:
        loaded = load_pem_private_key(text, passphrase)
    except TypeError as error:  # a passphrase is missing, or given for a key without one
        raise UsageError(f"{shown}: {' '.join(str(error).split())}", advice="see --passphrase-file") from error
    except _unreadable() as error:
        raise UsageError(f"{shown} is not the PEM file of a private key, or its passphrase is another", advice=_MAKE) from error
    if not isinstance(loaded, Ed25519PrivateKey):
        raise UsageError(f"{shown} holds a key of another kind than Ed25519", advice=_MAKE)
    return loaded


def _public_key(key: Key) -> Ed25519PublicKey:
    _require_library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    text, shown = _pem(key)
    if b"PRIVATE KEY" in text:
        raise UsageError(f"{shown} holds a private key", advice="who checks a signature needs the public half only")
    try:
        loaded = load_pem_public_key(text)
    except _unreadable() as error:
        raise UsageError(f"{shown} is not the PEM file of a public key", advice=_MAKE) from error
    if not isinstance(loaded, Ed25519PublicKey):
        raise UsageError(f"{shown} holds a key of another kind than Ed25519", advice=_MAKE)
    return loaded


_MAKE = "make a pair with: aivmm plan key NAME"


def _pem(key: Key) -> tuple[bytes, str]:
    """Return PEM text, and what an error calls it: never a part of the text, which may be a private key's."""
    if isinstance(key, bytes):
        return key, "the key"
    if isinstance(key, str) and "-----BEGIN" in key:
        return key.encode(), "the key"
    if not isinstance(key, str | PathLike):
        raise UsageError(
            f"a key is text or a path, and not of type {type(key).__name__}", advice="give the path of a PEM file, or what is in it"
        )
    path = Path(key)
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KEY_BYTES), str(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"the key {path} cannot be read ({reason})", advice=_MAKE) from error


def _short(key: str) -> str:
    return f"key {key[:16]}"


def _require_library() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise UsageError("signatures need the library cryptography", advice="pip install 'aivmm[sign]'") from error


def _unreadable() -> tuple[type[Exception], ...]:
    """Return what `cryptography` raises for keys that it cannot read."""
    from cryptography.exceptions import UnsupportedAlgorithm

    return (ValueError, UnsupportedAlgorithm)
