"""Make the calibration text that ships with the package: surgeon/calibrate/texts/*.jsonl.

    python benchmarks/calibrate/make_texts.py                      # mathematics and conversations
    python benchmarks/calibrate/make_texts.py --sources PACKAGES   # prose and code as well

Mathematics and conversations are own work and made from nothing. Prose and code are taken from
the packages listed in excerpts.py, which have to lie in the folder PACKAGES, and from the
standard library of the running Python, which has to be the version named there. Raise VERSION in
surgeon/calibrate/shipped.py, and the sums in tests/calibrate/test_shipped_text.py, with every change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import conversations
import mathematics

TEXTS = Path(__file__).resolve().parents[2] / "surgeon/calibrate/texts"


def lines(records: list[dict]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def generated() -> dict[str, str]:
    """Return the content of the files that need no sources."""
    return {"chat.jsonl": lines(conversations.records()), "mathematics.jsonl": lines(mathematics.records())}


def excerpted(folder: Path) -> dict[str, str]:
    """Return the content of the files taken from packages."""
    import excerpts

    if f"Python {platform.python_version()}" != excerpts.PYTHON:
        raise SystemExit(f"run this with {excerpts.PYTHON}: its standard library is a source")
    for name, origin, digest in excerpts.origins(folder):
        print(f"{digest}  {name}  ({origin})")
    with tempfile.TemporaryDirectory() as work:
        unpacked = excerpts.unpack(folder, Path(work))
        library = Path(sysconfig.get_paths()["stdlib"])
        return {
            "code.jsonl": lines(excerpts.code(unpacked, library)),
            "prose.jsonl": lines(excerpts.prose(unpacked)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", type=Path, help="folder with the packages of excerpts.py")
    given = parser.parse_args()
    files = generated() | (excerpted(given.sources) if given.sources else {})
    TEXTS.mkdir(parents=True, exist_ok=True)
    for name, text in sorted(files.items()):
        (TEXTS / name).write_bytes(text.encode())
        digest = hashlib.sha256(text.encode()).hexdigest()
        print(f"{digest}  {name}  {len(text.encode()):,} bytes, {text.count(chr(10))} records")


if __name__ == "__main__":
    main()
