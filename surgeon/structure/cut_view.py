"""What both views of a cut share: passing on what it does not touch, and the weights solved for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.kernels.cast import widen
from surgeon.structure.biases import with_biases
from surgeon.structure.check import kept_heads
from surgeon.structure.cut import Cut
from surgeon.structure.parts import Structure

HASHED_BYTES = 1 << 24
"""Bytes of solved weights hashed at a time."""


@dataclass(frozen=True)
class KeptInputs:
    """Kept ``indices`` along the input ``axis`` of an output matrix; no axis for its bias."""

    axis: int | None
    indices: np.ndarray


class CutView:
    """A source, a cut of it, and the weights solved for what the cut keeps.

    Attributes:
        source: the checkpoint, with zero biases added where ``solved`` brings some it lacks.
        structure: of ``source``.
        outputs: output matrices and biases that stay -> what is kept of their inputs.
    """

    def __init__(
        self, checkpoint: Checkpoint, structure: Structure, cut: Cut, solved: Checkpoint | None
    ) -> None:
        if solved is not None:
            checkpoint, structure = with_biases(checkpoint, structure, solved.tensors)
        self.source = checkpoint
        self.structure = structure
        self.cut = cut
        self._solved = solved
        self.label = checkpoint.label
        self.folder = checkpoint.folder
        self.adapter_folder = getattr(checkpoint, "adapter_folder", None)
        # What was solved follows from the model and the request: `identity` covers it, a manifest does not name its file.
        self.headers = checkpoint.headers
        self.outputs = dict(_outputs(structure, cut))
        if solved is not None:
            self._check_solved(solved)

    @cached_property
    def identity(self) -> str:
        """Digest of the cut and of the solved weights, for the id of a plan."""
        digest = hashlib.sha256(f"{type(self).__name__} 1\0".encode())
        digest.update(f"{getattr(self.source, 'identity', '')}\0{self.cut.identity()}\0".encode())
        if self._solved is not None:
            for name, info in sorted(self._solved.tensors.items()):
                digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
                for start in range(0, info.nbytes, HASHED_BYTES):
                    end = min(start + HASHED_BYTES, info.nbytes)
                    digest.update(self._solved.read_bytes(name, start, end).tobytes())
        return digest.hexdigest()

    def _check_solved(self, solved: Checkpoint) -> None:
        for name, info in solved.tensors.items():
            kept = self.outputs.get(name)
            source = self.source.tensors.get(name)
            if kept is None or source is None:
                raise _unfit(solved, name, "belongs to no output matrix that the cut keeps")
            wanted = list(source.shape)
            if kept.axis is not None:
                wanted[kept.axis] = len(kept.indices)
            if list(info.shape) != wanted:
                raise _unfit(solved, name, f"has shape {list(info.shape)}, the cut leaves {wanted}")
            if DTYPES[info.dtype].family != "float":
                raise _unfit(solved, name, f"is stored as {info.dtype}, which is not a plain number type")

    def is_solved(self, name: str) -> bool:
        """Say whether a tensor of the source comes from the solved weights."""
        return self._solved is not None and name in self._solved.tensors

    def solved_values(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements of a solved tensor: as stored where the source has the same type, else float32 or float64."""
        assert self._solved is not None
        code, target = self._solved.tensors[name].dtype, self.source.tensors[name].dtype
        raw = self._solved.read(name, start, stop)
        if code == target:
            return raw
        values = widen(raw, code)
        return values if target == "F64" else values.astype(np.float32, copy=False)

    def source_computed(self, name: str) -> bool:
        """Say whether the source computes a tensor."""
        inner = getattr(self.source, "computed", None)
        return inner is not None and inner(name)


def _outputs(structure: Structure, cut: Cut) -> Iterator[tuple[str, KeptInputs]]:
    """Yield every output matrix and bias that stays, with what is kept of its inputs."""
    for number in cut.kept_layers:
        layer, attention, ffn = cut.layers[number], structure.attention[number], structure.ffn[number]
        assert layer is not None
        if attention is not None and layer.heads != ():
            units = np.asarray(kept_heads(cut, attention), dtype=np.int64)
            size = attention.head_dim
            columns = (units[:, None] * size + np.arange(size)).reshape(-1)
            yield attention.output.weight, KeptInputs(attention.output.input_axis, columns)
            if attention.output.bias is not None:
                yield attention.output.bias, KeptInputs(None, np.empty(0, np.int64))
        if ffn is not None and layer.channels != ():
            channels = range(ffn.width) if layer.channels is None else layer.channels
            yield ffn.output.weight, KeptInputs(ffn.output.input_axis, np.asarray(channels, dtype=np.int64))
            if ffn.output.bias is not None:
                yield ffn.output.bias, KeptInputs(None, np.empty(0, np.int64))


def _unfit(solved: Checkpoint, name: str, fact: str) -> InputError:
    return InputError(
        "E369", f"{printable(name)} of the solved weights {fact}", where=Where(solved.label, tensor=printable(name)),
        help="they were solved for another model or another cut; solve them again",
    )  # fmt: skip
