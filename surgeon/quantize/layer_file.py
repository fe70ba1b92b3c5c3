"""Files of a quantization that goes layer by layer: what is stored of each, and what readers make of the one at hand.

A layer's file holds the stored tensors of its matrices under their final names, and the records of how they came
about. It is made under a key of everything it depends on, so an interrupted run, or another one with the same first
layers, finds it. The values that the next layer is to see lie beside it, plain, for as long as they are needed: the
layer may be too large for memory, and a run that was cut off between the two must not quantize it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.header import Header
from surgeon.kernels.cast import narrow
from surgeon.quantize.forms import Parts


class Values(Mapping[str, Tensor]):
    """Tensors in files, read when they are asked for."""

    def __init__(self, headers: Sequence[Header]) -> None:
        self._held = {name: header for header in headers for name in header.tensors}

    def __getitem__(self, name: str) -> Tensor:
        header = self._held[name]
        found = tensor_file.read(header, name)
        if header.tensors[name].dtype == "BF16":
            return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class LayerFiles:
    """The files of one run.

    Args:
        folder: where they lie.
        keys: of each layer, hexadecimal; what its result depends on.
    """

    def __init__(self, folder: Path, keys: Sequence[str]) -> None:
        self._folder = folder
        self._keys = list(keys)

    def path(self, layer: int) -> Path:
        """Return the file of a layer."""
        return self._folder / f"layer-{layer:04d}-{self._keys[layer][:16]}.safetensors"

    def about(self, layer: int) -> dict[str, Any] | None:
        """Return the plain data of a layer's file ("records", "steps"), None when it has to be made."""
        found = tensor_file.find(self.path(layer), self._keys[layer])
        return None if found is None else found[1]

    def write(self, layer: int, parts: Parts, records: Sequence[Mapping[str, Any]], steps: int) -> None:
        """Write a layer's file.

        Args:
            parts: stored name -> (storage code, array).
            records: of its matrices.
            steps: in how many parts its values were written.
        """
        tensor_file.write(
            self.path(layer), parts, {"key": self._keys[layer], "records": [dict(r) for r in records], "steps": steps}
        )  # fmt: skip

    # ---- values ----------------------------------------------------------------------------------------

    def _values(self, layer: int, step: int) -> Path:
        return self._folder / f"values-{layer:04d}-{step:04d}.safetensors"

    def writing(
        self, layer: int, step: int, names: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> tensor_file.TensorFile:
        """Return a file to write values into, name -> (storage code, shape) in the order they will come."""
        return tensor_file.TensorFile(self._values(layer, step), names, {"key": f"{self._keys[layer]} {step}"})  # fmt: skip

    def values(self, layer: int, steps: int) -> Values | None:
        """Return what readers make of a layer, None when it is not there any more."""
        found = [
            tensor_file.find(self._values(layer, step), f"{self._keys[layer]} {step}")
            for step in range(steps)
        ]
        headers = [entry[0] for entry in found if entry is not None]
        return Values(headers) if len(headers) == steps else None

    def forget_values(self, but: int | None = None) -> None:
        """Remove the values of all layers, or of all but one."""
        for path in self._folder.glob("values-*.safetensors"):
            if but is None or not path.name.startswith(f"values-{but:04d}-"):
                path.unlink(missing_ok=True)


def write_rows(out: tensor_file.TensorFile, name: str, rows: Iterable[np.ndarray], code: str) -> None:
    """Write a matrix, float32 [rows, in] in pieces, as numbers of a storage type."""
    for piece in rows:
        out.write(name, narrow(piece, code))
