"""Commands that say what a patched file is made of, and by whom."""

from pathlib import Path
from typing import Annotated

import typer

from atpatch_onnx.cli.arguments import AsJson, Patched
from atpatch_onnx.cli.printing import atpatch, show
from atpatch_onnx.cli.trusting import PublicKey, Roots, Signature, checked_signature
from atpatch_onnx.errors import MissingExtraError, SignatureError
from atpatch_onnx.report.manifest import manifest_view


def inspect(
    patched: Patched,
    signature: Signature = None,
    public_key: PublicKey = None,
    root: Roots = None,
    as_json: AsJson = False,
) -> None:
    """Say what is in PATCHED: what was added, node by node, by which patch, with which figures, signed by whom."""
    from atpatch_onnx.provenance.manifest import manifest
    from atpatch_onnx.provenance.signing import SIGNATURE, signed_by

    checked = checked_signature(patched, signature, public_key, root)
    found, beside = manifest(patched), patched.with_name(patched.name + SIGNATURE)
    signed = f"by {checked}, checked" if checked is not None else "no signature beside it"
    if checked is None and beside.exists():
        try:
            signed = f"by {signed_by(beside)}, as {beside.name} says; not checked (--signature)"
        except (MissingExtraError, SignatureError) as error:  # the file is looked into all the same
            signed = f"not known by whom: of {beside.name} was expected {error.expected}; found {error.found}"
    then = atpatch("verify", "BASE.onnx", patched, "--patch", "FIX.safetensors")
    shown = {**found.to_json(), "signed": {"by": checked, "checked": checked is not None}}
    show(shown, [manifest_view(found, signed)], as_json, then=then)


def sign(
    patched: Patched,
    private_key: Annotated[Path, typer.Option(help="An elliptic curve key, a PEM file.", show_default=False)],
    password: Annotated[
        str | None,
        typer.Option(
            help="Of an encrypted key; better in the environment.", envvar="ATPATCH_KEY_PASSWORD", show_default=False
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="The certificate of the key, a PEM file.", show_default=False)
    ] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option(help="A certificate behind it, up to the root; once for each.", show_default=False),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The base, whose SHA-256 is stated as well.", show_default=False)
    ] = None,
    patch: Annotated[
        Path | None, typer.Option(help="The patch, whose SHA-256 is stated as well.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign PATCHED, with a statement of what it is made of and a bill of materials, which are written beside it."""
    from atpatch_onnx.provenance import signing

    if (certificate is None and chain) or (certificate is not None and password):
        raise typer.BadParameter("give --chain with --certificate, and --password without")
    signer = signing.Signer(private_key, password, certificate, tuple(chain or ()))
    made = signing.sign(patched, signer, base=base, patch=patch)
    trusted = ("--public-key", "KEY.pub") if certificate is None else ("--root", "ROOT.pem")
    then = atpatch("verify", base or "BASE.onnx", patched, "--signature", made[-1], *trusted)
    shown = {"files": [str(file) for file in made], "signed_by": signing.signed_by(made[-1])}
    show(shown, [*(f"wrote {file}" for file in made), f"signed by {shown['signed_by']}"], as_json, then=then)
