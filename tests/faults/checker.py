"""A second opinion on published results: standard library only, nothing shared with the writer.

Deliberately simple and slow. Every test that publishes something runs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import stat
from pathlib import Path

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
}  # fmt: skip


def header_of(file: Path) -> dict:
    """Return a weight file's parsed header, after checking that its entries tile the file exactly."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        assert 2 <= length <= size - 8, f"{file.name}: header length {length} in a file of {size}"
        text = stream.read(length).decode("utf-8")
    assert (8 + length) % 8 == 0, f"{file.name}: the data does not start at a multiple of 8"
    header = json.loads(text, object_pairs_hook=_no_twins)
    position = 0
    spans = sorted((e["data_offsets"], n) for n, e in header.items() if n != "__metadata__")
    for (begin, end), name in spans:
        entry = header[name]
        assert set(entry) == {"dtype", "shape", "data_offsets"}, name
        assert begin == position, f"{file.name}: {name} starts at {begin}, not at {position}"
        count = 1
        for d in entry["shape"]:
            count *= d
        assert (end - begin) * 8 == count * BITS[entry["dtype"]], f"{file.name}: {name} has the wrong size"
        position = end
    assert 8 + length + position == size, (
        f"{file.name}: {size - 8 - length - position} bytes are in no tensor"
    )
    return header


def _no_twins(pairs):
    assert len({k for k, _ in pairs}) == len(pairs), "a key occurs twice"
    return dict(pairs)


def tensors_of(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return name -> (code, shape, stored bytes) of a weight file."""
    header = header_of(file)
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = (entry["dtype"], tuple(entry["shape"]), content[start + begin : start + end])
    return found


def model_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return all tensors of a folder or file."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found = {}
    for file in files:
        for name, tensor in tensors_of(file).items():
            assert name not in found, f"{name} is stored twice"
            found[name] = tensor
    return found


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check(path: Path, forbidden: tuple[str, ...] = ()) -> None:
    """Assert that a published folder or file is complete and consistent (AssertionError names the fault).

    Args:
        path: what was published.
        forbidden: texts that may appear nowhere, e.g. local paths.
    """
    if path.is_file():
        sidecar = path.with_name(path.name + ".surgeon.json")
        files = [path, sidecar]
        recorded = json.loads(sidecar.read_bytes(), object_pairs_hook=_no_twins)["files"]
        assert recorded == {path.name: _digest(path)}
        assert header_of(path)["__metadata__"] == {"format": "pt"}
    else:
        files = _check_folder(path)
    wanted = 0o666 & ~_mask()
    for file in files:
        mode = stat.S_IMODE(file.lstat().st_mode)
        assert not file.is_symlink() and file.is_file(), f"{file.name} is not a plain file"
        assert mode == wanted, f"{file.name} has mode {mode:o}, not {wanted:o}"
    for file in files:
        if file.suffix != ".safetensors":
            _check_text(file, forbidden)


def _check_folder(path: Path) -> list[Path]:
    files = sorted(p for p in path.rglob("*") if not p.is_dir())
    names = {str(p.relative_to(path)) for p in files}
    assert not [n for n in names if Path(n).name.startswith(".")], f"hidden files were published: {names}"
    sums = {}
    listing = (path / "SHA256SUMS").read_text()
    assert listing.endswith("\n"), "SHA256SUMS is cut"
    for line in listing.splitlines():
        digest, name = line.split("  ", 1)
        sums[name] = digest
    assert set(sums) == names - {"SHA256SUMS"}, (
        f"SHA256SUMS lists {set(sums) ^ (names - {'SHA256SUMS'})} differently"
    )
    for name, digest in sums.items():
        assert _digest(path / name) == digest, f"{name} is not what SHA256SUMS says"
    manifest = json.loads((path / "surgeon.json").read_bytes(), object_pairs_hook=_no_twins)
    assert manifest["files"] == {n: d for n, d in sums.items() if n != "surgeon.json"}
    config = json.loads((path / "config.json").read_bytes(), object_pairs_hook=_no_twins)
    assert isinstance(config, dict)
    weights = sorted(p for p in files if p.suffix == ".safetensors")
    stored, total = {}, 0
    for file in weights:
        header = header_of(file)
        assert header.pop("__metadata__") == {"format": "pt"}, f"{file.name}: metadata"
        assert header, f"{file.name} is an empty shard"
        for name, entry in header.items():
            assert name not in stored, f"{name} is stored twice"
            stored[name] = file.name
            total += entry["data_offsets"][1] - entry["data_offsets"][0]
    index = path / "model.safetensors.index.json"
    if len(weights) == 1:
        assert weights[0].name == "model.safetensors" and not index.exists()
    else:
        body = json.loads(index.read_bytes(), object_pairs_hook=_no_twins)
        assert body["weight_map"] == stored, "index and shards disagree"
        assert list(body["weight_map"]) == sorted(stored)
        assert body["metadata"]["total_size"] == total
        wanted = [f"model-{i + 1:05d}-of-{len(weights):05d}.safetensors" for i in range(len(weights))]
        assert [w.name for w in weights] == wanted
    assert manifest["output"]["tensors"] == len(stored) and manifest["output"]["bytes"] == total
    return files


def _check_text(file: Path, forbidden: tuple[str, ...]) -> None:
    text = file.read_text("utf-8")
    words = [*forbidden, os.path.expanduser("~") + "/"]
    if len(socket.gethostname()) > 4:
        words.append(socket.gethostname())
    for word in words:
        assert word not in text, f"{file.name} contains {word!r}"
    if file.name in {"surgeon.json", "README.md"} or file.name.endswith(".surgeon.json"):
        assert not re.search(r"20\d\d-\d\d-\d\d[T ]\d\d:\d\d", text), f"{file.name} contains a time"
        assert not re.search(r"(?<![\w:/.])/(home|root|tmp|work|dev|var|mnt|data)/", text), (
            f"{file.name}: a path"
        )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def tree(path: Path) -> dict[str, bytes]:
    """Return relative name -> content of a folder, or of a file and its sidecar; {} when absent."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
    both = [path, path.with_name(path.name + ".surgeon.json")]
    return {p.name: p.read_bytes() for p in both if p.is_file()}
