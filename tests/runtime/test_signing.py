"""Signed plans: real keys, real files; what is refused, and in which words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import aivmm
from aivmm.errors import BundleError, UsageError
from aivmm.runtime.bundle import Bundle
from aivmm.runtime.signing import CONTEXT, new_key, sign, signers
from tests.making import ONNXRUNTIME, Part, chain_model, make_bundle, normal

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("made") / "m.aivmm", chain_model(width=16), [Part(ONNXRUNTIME)])


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    private, public = new_key()
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "key.pub.pem").write_bytes(public)
    return tmp_path / "key.pem", tmp_path / "key.pub.pem"


@pytest.fixture
def signed(made: Path, keys: tuple[Path, Path], tmp_path: Path) -> Path:
    bundle = Path(shutil.copytree(made, tmp_path / "m.aivmm"))
    (bundle / "signature.json").write_text(sign((bundle / "plan.json").read_bytes(), keys[0]).to_json())
    return bundle


def refused(bundle: Path, key: object, match: str) -> None:
    with pytest.raises(BundleError, match=match) as caught:
        Bundle.open(bundle, signed_by=key).close()  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_signed_plan_loads_where_its_key_is_required(signed: Path, keys: tuple[Path, Path]) -> None:
    for key in (keys[1], str(keys[1]), keys[1].read_bytes(), keys[1].read_text(), [new_key()[1], keys[1]]):
        with aivmm.load_plan(signed, require_signature=key) as engine:
            assert engine.run({"x": normal(2, 16)})["y"].shape == (2, 16)


def test_a_signed_plan_loads_where_no_signature_is_required_even_without_the_library(signed: Path) -> None:
    code = "import sys; sys.modules['cryptography'] = None; import aivmm; aivmm.load_plan(sys.argv[1]).close()"
    subprocess.run([sys.executable, "-c", code, str(signed)], check=True)


def test_a_missing_library_is_named_with_its_remedy(signed: Path, keys: tuple[Path, Path]) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None; import aivmm\n"
        "try: aivmm.load_plan(sys.argv[1], require_signature=sys.argv[2])\nexcept aivmm.UsageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(signed), str(keys[1])], check=True, capture_output=True, text=True)
    assert done.stdout == "signatures need the library cryptography; pip install 'aivmm[sign]'\n"


def test_a_zip_of_a_signed_plan_is_signed(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for each in sorted(signed.rglob("*")):
            archive.write(each, each.relative_to(signed).as_posix())
    Bundle.open(tmp_path / "m.zip", signed_by=keys[1]).close()
    refused(tmp_path / "m.zip", new_key()[1], r"m\.zip is signed by key")


def test_an_unsigned_plan_is_refused(made: Path, keys: tuple[Path, Path]) -> None:
    refused(made, keys[1], "is not signed, and a signature is required; sign it with: aivmm plan sign")


def test_a_signature_by_another_key_is_refused_and_both_keys_are_named(signed: Path) -> None:
    (signer,) = signers((signed / "signature.json").read_bytes(), "")
    refused(signed, new_key()[1], f"is signed by key {signer[:16]}, and not by the required key [0-9a-f]{{16}}; require")


def test_a_plan_changed_after_it_was_signed_is_refused_before_it_is_read(signed: Path, keys: tuple[Path, Path]) -> None:
    text = (signed / "plan.json").read_bytes()
    for changed in (text + b" ", text.replace(b'"latency"', b'"throughput"'), b"[" * 100_000):
        (signed / "plan.json").write_bytes(changed)
        refused(signed, keys[1], r"was changed after key [0-9a-f]{16} signed it")


def test_a_file_changed_under_a_signed_plan_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    weights = signed / "segments" / "weights.bin"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    refused(signed, keys[1], "weights.bin was changed")


def test_a_signature_for_something_else_is_none_of_a_plan(signed: Path, keys: tuple[Path, Path]) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    private = load_pem_private_key(keys[0].read_bytes(), None)
    raw = json.loads((signed / "signature.json").read_text())
    text = (signed / "plan.json").read_bytes()
    assert raw["signatures"][0]["signature"] == private.sign(CONTEXT + text).hex()  # type: ignore[union-attr, call-arg]
    raw["signatures"][0]["signature"] = private.sign(text).hex()  # type: ignore[union-attr, call-arg]
    (signed / "signature.json").write_text(json.dumps(raw))
    refused(signed, keys[1], "was changed after")


def test_a_signature_moved_to_another_plan_is_refused(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other.aivmm", chain_model(width=8), [Part(ONNXRUNTIME)])
    shutil.copy(signed / "signature.json", other)
    refused(other, keys[1], "was changed after")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "signature.json is not valid JSON"),
        (b"[]", "signature.json"),
        (b'{"schema": 2, "signatures": []}', "signature.json has schema 2; .* upgrade aivmm, or sign the plan again with this one"),
        (b'{"schema": 1, "signatures": [{"algorithm": "none", "key": "", "signature": ""}]}', r"signature.json: signatures\.0\.algorithm"),
        (b"[" * 50_000, "signature.json"),
        (b" " * (65 << 10), "larger than 64 KiB"),
    ],
)
def test_a_damaged_signature_file_is_refused_at_its_place(signed: Path, keys: tuple[Path, Path], text: bytes, match: str) -> None:
    (signed / "signature.json").write_bytes(text)
    refused(signed, keys[1], match)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_a_signature_that_is_a_link_is_refused(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (signed / "signature.json").rename(tmp_path / "aside")
    (signed / "signature.json").symlink_to(tmp_path / "aside")
    refused(signed, keys[1], "is not signed")
    refused(signed, None, "a link or a special file")


def test_several_may_sign_and_each_once(signed: Path, keys: tuple[Path, Path]) -> None:
    plan, file = (signed / "plan.json").read_bytes(), signed / "signature.json"
    second, public = new_key()
    for _ in range(2):
        file.write_text(sign(plan, second, earlier=file.read_bytes()).to_json())
    assert len(signers(file.read_bytes(), "")) == 2
    for key in (keys[1], public):
        Bundle.open(signed, signed_by=key).close()


def rsa() -> bytes:
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return generate_private_key(65537, 1024).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    ("key", "match"),
    [
        (lambda: new_key()[0], "holds a private key; who checks a signature needs the public half only"),
        (rsa, "of another kind than Ed25519"),
        (lambda: b"no key", "is not the PEM file of a public key"),
        (lambda: "missing.pem", "missing.pem cannot be read"),
        (list, "names no key"),
    ],
)
def test_what_is_no_public_key_is_a_usage_error_that_shows_nothing_of_it(signed: Path, key: Callable[[], object], match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        aivmm.load_plan(signed, require_signature=key())  # type: ignore[arg-type]
    assert "BEGIN" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_encrypted_key_signs_with_its_passphrase_only(made: Path) -> None:
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat, load_pem_private_key

    private, _ = new_key()
    locked = load_pem_private_key(private, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    plan = (made / "plan.json").read_bytes()
    assert sign(plan, locked, passphrase=b"secret") == sign(plan, private)
    with pytest.raises(UsageError, match="passphrase-file"):
        sign(plan, locked)
    with pytest.raises(UsageError, match="passphrase is another"):
        sign(plan, locked, passphrase=b"wrong")
