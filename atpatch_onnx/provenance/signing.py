"""Signatures of patched files by the OpenSSF Model Signing specification (OMS). Needs model-signing.

What is signed are the files of one folder: the patched file, those with its external data, its statement and its bill
of materials. So the signature covers the digests of base, patch and patched model, and the figures. Any verifier of OMS
accepts it; model-signing's own is

    model_signing verify key FOLDER --signature FILE --public_key KEY --ignore_unsigned_files

A key is an elliptic curve key (PEM). With a certificate the whole chain lies in the signature, and who verifies it
names the root that is trusted. Nothing is looked up elsewhere.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpatch_onnx.errors import SignatureError, one_line, require
from atpatch_onnx.files import staging, write_whole
from atpatch_onnx.provenance.bill import bill_of_materials
from atpatch_onnx.provenance.manifest import Manifest, manifest
from atpatch_onnx.provenance.statement import check_statement, statement

STATEMENT, BILL, SIGNATURE = ".intoto.json", ".cdx.json", ".sig"
"""What the names of the files beside a patched file end with, behind its own."""


@dataclass(frozen=True)
class Signer:
    """Who signs: a private key, with the certificate of its owner or without."""

    private_key: Path
    password: str | None = None
    """Of an encrypted key; only where there is no certificate."""

    certificate: Path | None = None
    chain: tuple[Path, ...] = ()
    """Certificates between it and the root, the root too."""


@dataclass(frozen=True)
class Trusted:
    """Whose signature is taken: that of a public key, or of whom a root certificate vouches for."""

    public_key: Path | None = None
    roots: tuple[Path, ...] = ()


def sign(
    path: str | os.PathLike[str], signer: Signer, *, base: Path | None = None, patch: Path | None = None
) -> tuple[Path, ...]:
    """Write the statement, the bill of materials and the signature of a patched file beside it.

    Args:
        path: The patched file.
        signer: Who signs.
        base: The file of the base, whose SHA-256 is to be stated.
        patch: The file of the patch, whose SHA-256 is to be stated.

    Returns:
        The three files.

    Raises:
        MissingExtraError: model-signing or cyclonedx-python-lib is not installed.
        UnbakeError: The file is not patched.
        PatchMismatchError: Base or patch is not the one that the file names.
        SignatureError: The key cannot be used, or a file cannot be written.
    """
    require("model_signing", "sign", "signing a patched file")
    from model_signing import signing

    path = Path(path)
    found = manifest(path)
    beside = {STATEMENT: statement(found, base=base, patch=patch), BILL: bill_of_materials(found, path.name)}
    made = tuple(path.with_name(path.name + suffix) for suffix in (*beside, SIGNATURE))
    config = signing.Config().set_hashing_config(_Only(_signed_files(path, found)))
    secret: Any = None if signer.password is None else signer.password.encode()  # it says str and takes bytes
    try:
        if signer.certificate is None:
            config.use_elliptic_key_signer(private_key=signer.private_key, password=secret)
        else:
            config.use_certificate_signer(
                private_key=signer.private_key,
                signing_certificate=signer.certificate,
                certificate_chain=signer.chain,
            )
    except Exception as error:  # cryptography raises many types
        raise SignatureError(
            str(signer.private_key),
            expected="a key that signs",
            found=one_line(error),
            advice="Give an elliptic curve key in PEM; of a certificate, its own key and the whole chain.",
        ) from error
    before = {place: place.read_bytes() if place.is_file() else None for place in made}
    try:
        for place, content in zip(made, beside.values(), strict=False):
            write_whole(place, content)
        with staging(path.parent) as aside:
            config.sign(path.parent, aside / "new")
            os.replace(aside / "new", made[-1])
    except Exception as error:  # cryptography and model-signing raise many types
        _put_back(before)
        raise SignatureError(
            str(path),
            expected="a folder to write to, with all files of the model",
            found=one_line(error),
            advice="Sign it where its data lies, and where there is room.",
        ) from error
    return made


def _put_back(before: Mapping[Path, bytes | None]) -> None:
    """Leave files as they were: an earlier signature still holds then."""
    for place, content in before.items():
        if content is None:
            place.unlink(missing_ok=True)
        elif place.read_bytes() != content:
            with suppress(OSError):  # a full disk, of which is said already
                write_whole(place, content)


def check_signature(path: str | os.PathLike[str], signature: Path, trusted: Trusted) -> Manifest:
    """Check that a patched file, all its data, its statement and its bill are what somebody trusted has signed.

    Returns:
        The manifest of the file.

    Raises:
        MissingExtraError: model-signing is not installed.
        UnbakeError: The file is not patched.
        SignatureError: The signature is not there, of another key, or of other files; or the statement says other
            things than the file.
    """
    require("model_signing", "sign", "checking a signature")
    from model_signing import verifying

    path = Path(path)
    found = manifest(path)
    try:
        config = verifying.Config().set_hashing_config(_Only(_signed_files(path, found)))
        if trusted.public_key is not None:
            config.use_elliptic_key_verifier(public_key=trusted.public_key)
        else:
            config.use_certificate_verifier(certificate_chain=trusted.roots)
        config.verify(path.parent, signature)
    except Exception as error:  # cryptography and model-signing raise many types
        raise SignatureError(
            str(signature),
            expected=f"a signature of {path.name} and what belongs to it, by whom you trust",
            found=one_line(error),
            advice="Do not use this file: it is not what was signed, or not by this key.",
        ) from error
    check_statement(path.with_name(path.name + STATEMENT), found)
    return found


def signed_by(signature: Path) -> str:
    """Whom a signature names, unchecked: the digest of a key, or the owner of a certificate.

    Raises:
        SignatureError: It is damaged.
    """
    try:
        if signature.stat().st_size > 2**24:
            raise ValueError("more than 16 MiB")
        material = json.loads(signature.read_text(encoding="utf-8"))["verificationMaterial"]
        if "publicKey" in material:
            return f"the key with SHA-256 {material['publicKey']['hint']}"
        return _owner(material["x509CertificateChain"]["certificates"][0]["rawBytes"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise SignatureError(
            str(signature), expected="a signature of OMS", found=one_line(error), advice="Sign the file again."
        ) from error


def _owner(certificate: str) -> str:
    from base64 import b64decode

    require("cryptography", "sign", "reading a certificate")
    from cryptography import x509

    return str(x509.load_der_x509_certificate(b64decode(certificate)).subject.rfc4514_string())


def _signed_files(path: Path, found: Manifest) -> Sequence[Path]:
    names = (*found.files, path.name + STATEMENT, path.name + BILL)
    return [path.parent / name for name in names]


class _Only:
    """Hashing of these files and no others, whatever a signature says of files to leave out."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = tuple(files)

    def hash(self, folder: Path, *, files_to_hash: Iterable[Path] | None = None) -> Any:
        """The digests of the files, by their paths from the folder."""
        from model_signing import hashing

        return hashing.Config().hash(folder, files_to_hash=self._files)

    def add_ignored_paths(self, *, model_path: Path, paths: Iterable[Path]) -> None:
        """A signature may not leave out what it has to cover."""
