"""What a quantized model holds: how its matrices are stored, how many bits a weight has, and what was left in 16 bits.

Bits per weight are stored bytes of the linear matrices in the layers, times 8, over their parameters: scales and zero
points are counted, and matrices that were left as they were. Everything is counted from what is stored, never from what
config.json says of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.architectures import naming
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import TensorInfo
from surgeon.formats.dequantized import DequantizedView, dequantized, scheme_of
from surgeon.formats.scheme import Scheme
from surgeon.formats.storage import Shape
from surgeon.traits import part_of

METHODS = {
    "compressed-tensors": "compressed-tensors",
    "auto-round": "auto-round (tensors of GPTQ files)",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8 in blocks",
    "fbgemm_fp8": "FP8 of fbgemm",
    "mxfp4": "MXFP4",
    "bitsandbytes": "bitsandbytes",
    "modelopt": "ModelOpt",
}
"""quant_method of config.json -> the format in words."""

LINEAR = ("attention", "mlp", "expert")
"""Parts whose matrices in layers count as linear ones."""


@dataclass
class Row:
    """Matrices that are stored alike.

    Attributes:
        words: how: a scheme's name with what it leaves open, or the storage type of plain numbers.
        inside: whether they are linear matrices of the layers; others are heads and embeddings.
        matrices, parameters, bytes: how many, and what they take with all that belongs to them.
        quantized: whether they are.
    """

    words: str
    inside: bool
    quantized: bool
    matrices: int = 0
    parameters: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        """Stored bits of a weight."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {
            "scheme": self.words, "linear": self.inside, "quantized": self.quantized, "matrices": self.matrices,
            "parameters": self.parameters, "bytes": self.bytes, "bits_per_weight": self.bits,
        }  # fmt: skip


@dataclass(frozen=True)
class Account:
    """What a quantized model holds.

    Attributes:
        method: quant_method of config.json, "" when it names none.
        words: the format in words.
        rows: matrices that are stored alike, the most parameters first.
        parameters, bytes: of the whole model: plain parameters, stored bytes of all tensors.
        matrices: name -> (shape, how it is stored, None as plain numbers) of every linear matrix, heads and routers too.
        experts: parameters of experts: (all, quantized).
    """

    method: str
    words: str
    rows: tuple[Row, ...]
    parameters: int
    bytes: int
    matrices: Mapping[str, tuple[Shape, Scheme | None]]
    experts: tuple[int, int]

    @property
    def linear(self) -> int:
        """Parameters of the linear matrices in the layers."""
        return sum(row.parameters for row in self.rows if row.inside)

    @property
    def quantized(self) -> int:
        """Those of them that are really quantized."""
        return sum(row.parameters for row in self.rows if row.inside and row.quantized)

    @property
    def bits(self) -> float:
        """Stored bits of a weight of the linear matrices in the layers."""
        return 8 * sum(row.bytes for row in self.rows if row.inside) / self.linear if self.linear else 0.0

    @property
    def file_bits(self) -> float:
        """Stored bits of a weight of the whole model."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0

    @property
    def warnings(self) -> list[str]:
        """What was left in 16 bits without anybody saying so."""
        found = []
        every, packed = self.experts
        if every and packed < every / 2 and self.quantized:
            found.append(
                f"{1 - packed / every:.0%} of the experts' parameters are not quantized ({every - packed:,} of {every:,}): "
                "whatever quantized this model passed over them"
            )
        rest = self.linear - every
        done = self.quantized - packed
        if rest > 0 and done < rest / 2 and not (every and packed):
            found.append(
                f"{1 - done / rest:.0%} of the parameters of linear matrices{' beside the experts' if every else ''} are not quantized"
            )
        return found

    def document(self) -> dict[str, Any]:
        """Return everything but the single matrices as plain data."""
        return {
            "method": self.method, "format": self.words, "bits_per_weight": self.bits, "file_bits_per_weight": self.file_bits,
            "linear_parameters": self.linear, "quantized_parameters": self.quantized, "parameters": self.parameters,
            "bytes": self.bytes, "schemes": [row.as_dict() for row in self.rows], "warnings": self.warnings,
        }  # fmt: skip


def account_of(checkpoint: Checkpoint) -> Account:
    """Count what a quantized model holds, from headers and the shapes that packed matrices store as data.

    Raises:
        InputError: as `surgeon.formats.dequantized.dequantized`: it is not quantized, or in a form that is not read.
    """
    view = dequantized(checkpoint)
    config = scheme_of(checkpoint.config)
    rows: dict[tuple[str, bool, bool], Row] = {}
    matrices: dict[str, tuple[Shape, Scheme | None]] = {}
    experts = [0, 0]
    for name, info in view.tensors.items():
        stored = view.matrices.get(name)
        inside = is_linear(name, info)
        if stored is None and not inside:
            if len(info.shape) == 2 and part_of(name) in ("head", "router"):
                matrices[name] = info.shape, None
            continue
        size = (
            info.nbytes if stored is None else sum(checkpoint.tensors[part].nbytes for part in stored.parts)
        )
        words = f"plain {info.dtype}" if stored is None else stored.words
        row = rows.setdefault((words, inside, stored is not None), Row(words, inside, stored is not None))
        count = info.shape[0] if len(info.shape) == 3 else 1
        row.matrices += count
        row.parameters += info.elements
        row.bytes += size
        matrices[name] = info.shape, None if stored is None else stored.scheme
        if part_of(name) == "expert":
            experts[0] += info.elements
            experts[1] += info.elements if stored is not None else 0
    return Account(
        method=str(config.get("quant_method") or ""),
        words=_words(config, view),
        rows=tuple(sorted(rows.values(), key=lambda row: (not row.inside, -row.parameters, row.words))),
        parameters=sum(info.elements for info in view.tensors.values()),
        bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        matrices=matrices,
        experts=(experts[0], experts[1]),
    )


def is_linear(name: str, info: TensorInfo) -> bool:
    """Say whether a plain tensor is a linear matrix of a layer, or a stack of them: no norm, router, bias or embedding."""
    place = naming.layer_of(name)
    part = part_of(name)
    axes = (2, 3) if part == "expert" else (2,)
    return (
        place is not None
        and part in LINEAR
        and len(info.shape) in axes
        and not name.endswith("bias")
        and DTYPES[info.dtype].family == "float"
    )


def _words(config: Mapping[str, Any], view: DequantizedView) -> str:
    method = str(config.get("quant_method") or "")
    said = METHODS.get(
        method, method or "named nowhere; by its tensors " + " and ".join(sorted(view.formats))
    )
    form = config.get("format")
    kinds: dict[str, int] = defaultdict(int)
    for stored in view.matrices.values():
        kinds[stored.words] += 1
    usual = sorted(kinds, key=lambda words: (-kinds[words], words))
    shown = ", ".join(usual[:3]) + (f" and {len(usual) - 3} more" if len(usual) > 3 else "")
    layout = f" {form}" if method == "compressed-tensors" and isinstance(form, str) else ""
    return f"{said}{layout}: {shown}"
