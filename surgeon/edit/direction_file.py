"""Directions as a safetensors file with everything about them in its metadata.

Tensors: ``direction.N`` [hidden] from short to long for layer N, ``attention_input.N`` [heads * head_dim], the
mean input of its attention output projection over the short examples; float32.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.digests import InputDigester
from surgeon.checkpoint.header import printable, read_header
from surgeon.checkpoint.strict_json import read_bytes
from surgeon.errors import EnvironmentFault, InputError, Where

KIND = "surgeon directions 1"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "chat_template.jinja",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Directions:
    """Directions from short to long, by layer.

    Attributes:
        site: where in a layer.
        window: which tokens counted.
        vectors: layer -> float32 [hidden].
        inputs: layer -> mean input of the attention output projection over the short set, float32; empty when unknown.
        norms: layer -> mean norm of the stream.
        separated: layer -> share of held-out examples on the right side.
        modules: layer -> the module whose input the stream is there.
        examples: long, short.
        model: what model they are of (`fingerprint`).
        data: the record of the examples.
        precision: the model ran in.
    """

    site: str
    window: str
    vectors: Mapping[int, np.ndarray]
    inputs: Mapping[int, np.ndarray]
    norms: Mapping[int, float]
    separated: Mapping[int, float]
    modules: Mapping[int, str]
    examples: tuple[int, int]
    model: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "float32"

    @property
    def hidden(self) -> int:
        return len(next(iter(self.vectors.values())))

    @property
    def digest(self) -> str:
        """The sha256 of the vectors and where they are taken."""
        found = hashlib.sha256(f"{self.site} {self.window}".encode())
        for prefix, table in (("d", self.vectors), ("i", self.inputs)):
            for layer in sorted(table):
                found.update(
                    f"{prefix}{layer}".encode() + np.ascontiguousarray(table[layer], np.float32).tobytes()
                )
        return found.hexdigest()

    def record(self) -> dict[str, Any]:
        """Return plain data for a manifest."""
        return {
            "sha256": self.digest, "site": self.site, "window": self.window, "examples": list(self.examples),
            "data": dict(self.data), "separated": {str(k): round(v, 4) for k, v in sorted(self.separated.items())},
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Write the file; the same directions give the same bytes."""
        tensors = {f"direction.{n}": v for n, v in sorted(self.vectors.items())}
        tensors |= {f"attention_input.{n}": v for n, v in sorted(self.inputs.items())}
        about = {
            "kind": KIND, "site": self.site, "window": self.window, "examples": list(self.examples),
            "norms": {str(k): v for k, v in sorted(self.norms.items())},
            "separated": {str(k): v for k, v in sorted(self.separated.items())},
            "modules": {str(k): v for k, v in sorted(self.modules.items())},
            "model": dict(self.model), "data": dict(self.data), "precision": self.precision, "sha256": self.digest,
        }  # fmt: skip
        header: dict[str, Any] = {"__metadata__": {"surgeon": json.dumps(about, sort_keys=True)}}
        body = b""
        for name, value in tensors.items():
            content = np.ascontiguousarray(value, dtype="<f4").tobytes()
            header[name] = {
                "dtype": "F32",
                "shape": [len(value)],
                "data_offsets": [len(body), len(body) + len(content)],
            }
            body += content
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(struct.pack("<Q", len(text)) + text + body)
            part.replace(path)
        except OSError as error:
            raise EnvironmentFault("E502", f"cannot write {printable(str(path))}: {error.strerror}",
                                   where=Where(str(path)), help="choose another file for the directions") from error  # fmt: skip


def load(path: Path) -> Directions:
    """Read what `Directions.save` wrote.

    Raises:
        InputError: E416 another kind of file, or a damaged one; what reading its header raises.
    """
    header = read_header(path)
    content = read_bytes(path, 2_000_000_000)
    try:
        size = struct.unpack("<Q", content[:8])[0]
        about = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["surgeon"])
        if about["kind"] != KIND:
            raise KeyError(about["kind"])
        values = {
            name: np.frombuffer(content, "<f4", info.elements, info.offset).copy()
            for name, info in header.tensors.items()
        }
        found = Directions(
            site=about["site"], window=about["window"], vectors=_table(values, "direction."),
            inputs=_table(values, "attention_input."), norms=_numbered(about["norms"]),
            separated=_numbered(about["separated"]), modules=_numbered(about["modules"]),
            examples=(about["examples"][0], about["examples"][1]), model=about["model"], data=about["data"],
            precision=about["precision"],
        )  # fmt: skip
        intact = bool(found.vectors) and found.digest == about["sha256"]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InputError("E416", f"{printable(path.name)} holds no directions of this program", where=Where(str(path)),
                         help="surgeon edit MODEL --method thinkedit --responses FILE --save-direction FILE writes one") from error  # fmt: skip
    widths = {len(vector) for vector in found.vectors.values()}
    if not intact or len(widths) != 1 or not all(np.isfinite(v).all() for v in values.values()):
        raise InputError("E416", f"{printable(path.name)} is damaged: its directions are not those it was written with",
                         where=Where(str(path)), help="extract them again")  # fmt: skip
    return found


def _table(values: Mapping[str, np.ndarray], prefix: str) -> dict[int, np.ndarray]:
    return {int(name.removeprefix(prefix)): v for name, v in values.items() if name.startswith(prefix)}


def _numbered(table: Mapping[str, Any]) -> dict[int, Any]:
    return {int(layer): value for layer, value in table.items()}


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what tells a model from others: sha256 of its weights, tokenizer and template."""
    if checkpoint.headers:
        files = InputDigester(list(checkpoint.headers)).finish()
        weights = [files[header.file] for header in checkpoint.headers]
    else:  # in memory
        weights = [hashlib.sha256(checkpoint.read_bytes(n, 0, i.nbytes).tobytes()).hexdigest() for n, i in checkpoint.tensors.items()]  # fmt: skip
    beside = hashlib.sha256()
    for name in _TOKENIZER:
        file = None if checkpoint.folder is None else checkpoint.folder / name
        if file is not None and file.is_file():
            beside.update(name.encode() + read_bytes(file, 256_000_000))
    return {
        "weights": hashlib.sha256(
            "\n".join([*sorted(weights), getattr(checkpoint, "identity", "")]).encode()
        ).hexdigest(),
        "tokenizer": beside.hexdigest(),
    }


def check_belongs(directions: Directions, checkpoint: Checkpoint, hidden: int, *, force: bool) -> list[str]:
    """Refuse directions of another model.

    Returns:
        Warnings: with ``force`` that they are another model's.

    Raises:
        InputError: E416 they have another width, or are of other weights.
    """
    if directions.hidden != hidden:
        raise InputError("E416", f"the directions have {directions.hidden} channels, {checkpoint.label} has {hidden}",
                         where=Where(checkpoint.label), help="extract them from this model")  # fmt: skip
    if fingerprint(checkpoint)["weights"] == directions.model.get("weights"):
        return []
    if not force:
        raise InputError("E416", f"the directions were extracted from another model than {checkpoint.label}",
                         where=Where(checkpoint.label),
                         help="directions do not carry over, not even after a merge: extract them again; --force uses them all the same")  # fmt: skip
    return ["the directions are of another model, used because of --force"]
