"""Pickle checkpoints, read only with permission and only by torch's weights-only loader.

Pickle files can run code. ``--allow-pickle`` accepts them through ``torch.load(weights_only=True,
mmap=True)``, which builds nothing but tensors; without it they are refused (fault G1). torch is
imported here and nowhere else in the reading path.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import Header, TensorInfo, check_name, open_regular, printable, stamp_of
from surgeon.checkpoint.index import plain_file_name
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.errors import EnvironmentFault, InputError, Where

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


def pickle_files(folder: Path) -> list[Path]:
    """Return the pickle shards of a folder, [] when it has none."""
    if (folder / INDEX).exists():
        shards = read_json_object(folder / INDEX).get("weight_map", {})
        names = sorted({str(v) for v in shards.values()})
        if not names or not all(plain_file_name(n) for n in names):
            raise InputError(
                "E309",
                f"{INDEX} points outside its folder",
                where=Where(str(folder / INDEX)),
                help="fetch the model again, from a source you trust",
            )
        missing = [n for n in names if not (folder / n).exists()]
        if missing:
            raise InputError(
                "E302",
                f"{folder} is incomplete: {', '.join(missing[:3])} missing",
                where=Where(str(folder)),
                help="fetch the missing files again",
            )
        return [folder / n for n in names]
    return [folder / SINGLE] if (folder / SINGLE).exists() else []


class PickledCheckpoint:
    """A model folder or file of pickled tensors as a `Checkpoint`."""

    def __init__(
        self, label: str, folder: Path | None, config: dict[str, Any] | None, files: list[Path]
    ) -> None:
        try:
            import torch
        except ImportError:
            raise EnvironmentFault(
                "E531", "reading pickle files needs torch", help="pip install torch"
            ) from None
        self.label = label
        self.folder = folder
        self.config = config
        self.notes = ("pickle files are read with torch's weights-only loader",)
        self.index_file = None
        self.tensors: dict[str, TensorInfo] = {}
        self._values: dict[str, Any] = {}
        headers = []
        for path in files:
            descriptor = open_regular(path)
            stamp = stamp_of(descriptor)
            with open(descriptor, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # torch raises many types for a file that is not what it seems
                reason = str(error).strip().splitlines()
                raise InputError(
                    "E331", f"{path.name} cannot be read without running code or is damaged: "
                    f"{printable(reason[0] if reason else type(error).__name__)[:160]}", where=Where(str(path)),
                    help="convert it to safetensors in an environment you trust",
                ) from None  # fmt: skip
            if not isinstance(content, dict):
                raise InputError(
                    "E331",
                    f"{path.name} holds no dictionary of tensors",
                    where=Where(str(path)),
                    help="give the file of a model's weights (a state dict)",
                )
            headers.append(Header(path, {}, {}, 0, stamp, digest))
            for name, value in content.items():
                if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                    raise InputError("E331", f"{path.name} holds {printable(str(name))[:60]}, which is no tensor",
                                     where=Where(str(path)), help="save the state dict alone")  # fmt: skip
                self._add(path, name, value)
        self.headers = tuple(headers)

    def _add(self, path: Path, name: str, value: Any) -> None:
        check_name(path, name)
        code = _CODES.get(str(value.dtype).removeprefix("torch."))
        if code is None or value.layout.__str__() != "torch.strided":
            raise InputError("E307", f"{path.name}: {printable(name)} has type {value.dtype}, which is not supported",
                             where=Where(str(path), tensor=printable(name)), help="save it dense, as float32, float16, bfloat16 or an integer type")  # fmt: skip
        if name in self.tensors:
            raise InputError(
                "E309",
                f'two files hold "{printable(name)}"',
                where=Where(str(path)),
                help="files of two versions are mixed; fetch the model again",
            )
        nbytes = value.numel() * DTYPES[code].bits // 8
        self.tensors[name] = TensorInfo(name, code, tuple(value.shape), path, 0, nbytes)
        self._values[name] = value.detach()

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._carrier(name, start, stop)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        carrier = DTYPES[self.tensors[name].dtype].carrier
        assert carrier is not None
        width = carrier.itemsize
        first, last = start // width, -(-stop // width)
        raw = self._carrier(name, first, last).view(np.uint8)
        return raw[start - first * width : stop - first * width]

    def _carrier(self, name: str, start: int, stop: int) -> np.ndarray:
        import torch

        code = self.tensors[name].dtype
        flat = self._values[name].reshape(-1)[start:stop].contiguous()
        if code == "BF16":
            flat = flat.view(torch.int16)
        array = flat.numpy().copy()
        carrier = DTYPES[code].carrier
        assert carrier is not None
        return array.view(carrier)

    def granularity(self, name: str) -> int:
        return 1

    def close(self) -> None:
        self._values.clear()


_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
