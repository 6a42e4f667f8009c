"""Signatures of patched files: ours are taken by model-signing's own verifier, and what was changed is refused."""

import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from command_line import PLANTED, call, files, four_parts
from planted import fitted

import atpatch_onnx as atp
from atpatch_onnx.cli import main
from atpatch_onnx.errors import SignatureError
from atpatch_onnx.provenance.signing import Signer, Trusted, check_signature, sign, signed_by

pytest.importorskip("model_signing")
pytest.importorskip("cyclonedx")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NOW = datetime.datetime.now(datetime.UTC)
BESIDE = {"patched.onnx.intoto.json", "patched.onnx.cdx.json", "patched.onnx.sig"}


def key(name: str, password: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """A new key, as `<name>.key` and `<name>.pub`."""
    made = ec.generate_private_key(ec.SECP256R1())
    hidden = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    Path(f"{name}.key").write_bytes(made.private_bytes(pem, form, hidden))
    public = made.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    Path(f"{name}.pub").write_bytes(public)
    return made


def certificate(name: str, issuer: str, issuer_key: ec.EllipticCurvePrivateKey) -> None:
    """A certificate of a new key, `<name>.pem`; a root where it is its own issuer."""
    root = name == issuer
    own = issuer_key if root else key(name)
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, one)]) for one in (name, issuer)]
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"), False
    )
    usage |= {"encipher_only": False, "decipher_only": False, "digital_signature": not root, "key_cert_sign": root}
    built = (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=1))
        .not_valid_after(NOW + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
    )
    if not root:
        built = built.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    made = built.sign(issuer_key, hashes.SHA256())
    Path(f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))


@pytest.fixture
def signed(place: Path, here: Path) -> Path:
    """The patched file in a folder, signed with `own.key`, beside a file that is none of ours."""
    key("own")
    key("other")
    Path("out").mkdir()
    shutil.copy(place / "patched.onnx", "out")
    Path("out/README").write_text("not signed")
    sign("out/patched.onnx", Signer(Path("own.key")), base=place / "base.onnx", patch=place / "fix.safetensors")
    return Path("out/patched.onnx")


def model_signing(*arguments: str) -> subprocess.CompletedProcess[str]:
    """model-signing's own command line."""
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *arguments], capture_output=True, text=True, check=False
    )


def test_its_own_verifier_takes_our_signature_by_key(signed):
    command = ("verify", "key", "out", "--signature", f"{signed}.sig", "--ignore_unsigned_files", "--public_key")
    done = model_signing(*command, "own.pub")
    assert done.returncode == 0, done.stderr
    assert model_signing(*command, "other.pub").returncode != 0
    signed.write_bytes(signed.read_bytes() + b" ")
    assert model_signing(*command, "own.pub").returncode != 0


def test_its_own_verifier_takes_our_signature_by_certificate(place, here, capsys):
    root = key("root")
    certificate("root", "root", root)
    certificate("team", "root", root)
    shutil.copy(place / "patched.onnx", here)
    command = "sign patched.onnx --private-key team.key --certificate team.pem --chain root.pem"
    assert main(command.split()) == 0
    assert "signed by CN=team" in capsys.readouterr().out
    command = "verify certificate . --signature patched.onnx.sig --ignore_unsigned_files --certificate_chain root.pem"
    done = model_signing(*command.split())
    assert done.returncode == 0, done.stderr
    assert call(place, "inspect patched.onnx --signature patched.onnx.sig --root root.pem --json") == 0
    assert json.loads(capsys.readouterr().out)["signed"] == {"by": "CN=team", "checked": True}
    another = key("stranger")
    certificate("stranger", "stranger", another)
    assert call(place, "inspect patched.onnx --signature patched.onnx.sig --root stranger.pem") == 1
    four_parts(capsys.readouterr().err)


def test_signed_and_verified_on_the_command_line(place, here, capsys):
    key("own")
    shutil.copy(place / "patched.onnx", here)
    command = "sign patched.onnx --private-key own.key --base @base.onnx --patch @fix.safetensors"
    assert call(place, command) == 0
    shown = capsys.readouterr().out
    then = f"Next: atpatch verify {place}/base.onnx patched.onnx --signature patched.onnx.sig --public-key KEY.pub"
    assert shown.rstrip().endswith(then)
    assert files(here) == {"own.key", "own.pub", "patched.onnx", *BESIDE}
    assert call(place, "verify @base.onnx patched.onnx --signature patched.onnx.sig --public-key own.pub --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["passed"]
    assert shown["signed_by"].startswith("the key with SHA-256 ")
    assert call(place, "inspect patched.onnx") == 0
    assert "not checked (--signature)" in " ".join(capsys.readouterr().out.split())
    assert call(place, "verify @base.onnx patched.onnx --signature patched.onnx.sig") == 2
    assert call(place, "verify @base.onnx patched.onnx --public-key own.pub") == 2


def test_an_encrypted_key(place, here, capsys, monkeypatch):
    key("own", b"secret")
    shutil.copy(place / "patched.onnx", here)
    assert main(["sign", "patched.onnx", "--private-key", "own.key"]) == 1
    four_parts(capsys.readouterr().err)
    assert not BESIDE & files(here)
    monkeypatch.setenv("ATPATCH_KEY_PASSWORD", "secret")
    assert main(["sign", "patched.onnx", "--private-key", "own.key"]) == 0
    check_signature("patched.onnx", Path("patched.onnx.sig"), Trusted(Path("own.pub")))


@pytest.mark.parametrize("ending", ["", ".intoto.json", ".cdx.json", ".sig"])
def test_what_was_changed_is_refused(signed, ending):
    trusted = Trusted(Path("own.pub"))
    check_signature(signed, Path(f"{signed}.sig"), trusted)
    assert signed_by(Path(f"{signed}.sig")).startswith("the key with")
    changed = Path(f"{signed}{ending}")
    content = changed.read_bytes()
    place = len(content) // 2
    if ending:
        changed.write_bytes(content[:place] + content[place + 1 :])
    else:  # still a model, and a patched one
        model = onnx.load(changed)
        model.doc_string = "changed"
        onnx.save(model, changed)
    with pytest.raises(SignatureError):
        check_signature(signed, Path(f"{signed}.sig"), trusted)


def test_a_signature_of_another_file_of_the_folder_is_none_of_this_one(signed):
    shutil.copy(signed, "out/second.onnx")
    sign("out/second.onnx", Signer(Path("own.key")))
    with pytest.raises(SignatureError, match="Signature mismatch"):
        check_signature(signed, Path("out/second.onnx.sig"), Trusted(Path("own.pub")))


def test_signing_again_that_fails_keeps_the_signature(signed, monkeypatch):
    from model_signing import signing as theirs

    beside = [signed.with_name(signed.name + ending) for ending in (".intoto.json", ".cdx.json", ".sig")]
    before = [file.read_bytes() for file in beside]

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(theirs.Config, "sign", full)
    with pytest.raises(SignatureError, match="no space left"):
        sign(signed, Signer(Path("own.key")))  # of other contents: neither base nor patch is stated
    assert [file.read_bytes() for file in beside] == before


def test_another_key_is_refused(signed):
    with pytest.raises(SignatureError, match="Key mismatch"):
        check_signature(signed, Path(f"{signed}.sig"), Trusted(Path("other.pub")))


def test_data_files_are_signed_as_well(here):
    key("own")
    onnx.save(PLANTED.proto(), "base.onnx", save_as_external_data=True, location="base.data", size_threshold=100)
    atp.save(atp.bake(atp.load("base.onnx"), fitted(PLANTED)), "patched.onnx", external="reference")
    sign("patched.onnx", Signer(Path("own.key")))
    check_signature("patched.onnx", Path("patched.onnx.sig"), Trusted(Path("own.pub")))
    data = bytearray(Path("base.data").read_bytes())
    data[0] ^= 1
    Path("base.data").write_bytes(data)
    with pytest.raises(SignatureError, match=r"Hash mismatch for .*base\.data"):
        check_signature("patched.onnx", Path("patched.onnx.sig"), Trusted(Path("own.pub")))


@pytest.mark.parametrize(
    "command", ["sign @base.onnx --private-key own.key", "sign @patched.onnx --private-key no.key"]
)
def test_what_cannot_be_signed_leaves_nothing_behind(command, place, here, capsys):
    key("own")
    before = files(place)
    assert call(place, command) == 1
    four_parts(capsys.readouterr().err)
    assert files(place) == before
