"""Whose signature of a patched file is taken: options that commands share."""

from pathlib import Path
from typing import Annotated

import typer

SIGNING = "Signature"

Signature = Annotated[
    Path | None,
    typer.Option(
        "--signature",
        help="Check this signature of PATCHED as well, as 'atpatch sign' wrote it.",
        show_default=False,
        rich_help_panel=SIGNING,
    ),
]
PublicKey = Annotated[
    Path | None,
    typer.Option("--public-key", help="The key that must have signed.", show_default=False, rich_help_panel=SIGNING),
]
Roots = Annotated[
    list[Path] | None,
    typer.Option(
        "--root",
        help="The certificate that must vouch for who signed; once for each of several.",
        show_default=False,
        rich_help_panel=SIGNING,
    ),
]


def checked_signature(
    patched: Path, signature: Path | None, public_key: Path | None, roots: list[Path] | None
) -> str | None:
    """Who has signed PATCHED, once that is checked; None where no signature is given."""
    if (signature is None) is not (public_key is None and not roots) or (public_key is not None and roots):
        raise typer.BadParameter("give --signature together with --public-key or --root")
    if signature is None:
        return None
    from atpatch_onnx.provenance import signing

    signing.check_signature(patched, signature, signing.Trusted(public_key, tuple(roots or ())))
    return signing.signed_by(signature)
