"""Make the environments of the programs that surgeon is compared with: ``python benchmarks/quantization/environments.py FOLDER``.

Their requirements exclude each other and surgeon's own (llm-compressor 0.14.0 needs transformers 5.15 to 5.17 and
compressed-tensors 0.19, GPTQModel 7.6.0 needs numpy 2.2.6), so each gets a virtual environment FOLDER/NAME. All have the
torch of the interpreter that runs this, to the build, so that equal matrix products take equal time.
An environment that is there and complete is left alone. About 1.5 GB each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

PEERS = {"llmcompressor": "0.14.0", "gptqmodel": "7.6.0"}


def python_of(folder: Path, peer: str) -> Path:
    """Return the interpreter of a peer's environment."""
    return folder / peer / "bin" / "python"


def version_of(folder: Path, peer: str) -> str | None:
    """Return the version of the peer that is installed, None where it is not."""
    python = python_of(folder, peer)
    if not python.exists():
        return None
    asked = f"import importlib.metadata as m; print(m.version({peer!r}), m.version('torch'))"
    found = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    peer_version, _, torch_version = found.stdout.strip().partition(" ")
    return (
        peer_version
        if found.returncode == 0 and torch_version == importlib.metadata.version("torch")
        else None
    )


def make(folder: Path, peer: str, version: str) -> None:
    """Make the environment of one peer."""
    venv.create(folder / peer, with_pip=True, clear=True)
    pip = [python_of(folder, peer), "-m", "pip", "install", "--quiet"]
    torch = importlib.metadata.version("torch")
    # torch first and pinned in the second call: a range would bring the newest build and several GB of CUDA.
    subprocess.run([*pip, f"torch=={torch}"], check=True)
    subprocess.run([*pip, f"torch=={torch}", f"{peer}=={version}"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make environments for llm-compressor and GPTQModel.")
    parser.add_argument("folder", type=Path, help="where the environments lie")
    parser.add_argument("--only", choices=sorted(PEERS), help="one of them")
    given = parser.parse_args()
    failed = False
    for peer, version in PEERS.items():
        if given.only not in (None, peer):
            continue
        if version_of(given.folder, peer) != version:
            print(f"{peer} {version}: installing", flush=True)
            try:
                make(given.folder, peer, version)
            except subprocess.CalledProcessError as error:
                print(f"{peer} {version}: {error}", file=sys.stderr)
        found = version_of(given.folder, peer)
        failed |= found != version
        print(f"{peer} {found or 'is not installed'}: {python_of(given.folder, peer)}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
