"""A trained model written back under the names, types and files of the one it started from."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from surgeon.calibrate.pieces import Piece, read_tensor, resolve
from surgeon.checkpoint.checkpoint import CONFIG_NAME, StoredCheckpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, InputError, OutputConflict, Where

TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TrainedFolder:
    """Where the parameters of a loaded model lie in the checkpoint it was loaded from.

    Args:
        model: a transformers model, loaded strictly from ``checkpoint``.
        checkpoint: a model folder.
    """

    def __init__(self, model: Any, checkpoint: StoredCheckpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        self.pieces: dict[str, list[Piece]] = resolve(model, checkpoint)

    @torch.no_grad()
    def round(self) -> None:
        """Give every parameter the values it will have on disk, and refuse those that are not finite (E411)."""
        for name, value in self.model.state_dict().items():
            for piece in self.pieces.get(name, ()):
                kind = TORCH_TYPES[self.checkpoint.tensors[piece.tensor].dtype]
                part = value[piece.index]
                part.copy_(part.to(kind))
                if not bool(torch.isfinite(part).all()):
                    raise InputError("E411", f"training left values in {printable(piece.tensor)} that {kind} cannot hold",
                                     where=Where(tensor=printable(piece.tensor)), help="lower the rate")  # fmt: skip

    def write(self, output: Path) -> None:
        """Write weights, index and config.json to a new folder; it appears complete or not at all.

        Tensors the model does not use (stored masks of old checkpoints) are copied.

        Raises:
            OutputConflict: E601 the folder exists. EnvironmentFault: E501 it cannot be written.
        """
        output = Path(output)
        refuse_existing(output)
        trained = self._tensors()
        staging = output.parent / f".{output.name}.surgeon-{secrets.token_hex(4)}"
        source = self.checkpoint
        assert source.folder is not None
        try:
            staging.mkdir(parents=True)
            for header in source.headers:
                shard = {
                    name: trained[name] if name in trained else _copy(source, name) for name in header.tensors
                }
                save_file(shard, staging / header.file.name, metadata={"format": "pt"})
            for file in (source.index_file, source.folder / CONFIG_NAME):
                if file is not None:
                    shutil.copyfile(file, staging / Path(file).name)
            for file in staging.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            os.rename(staging, output)
        except OSError as error:
            raise EnvironmentFault("E501", f"cannot write {printable(str(output))}: {error.strerror}",
                                   where=Where(str(output)), help="free disk space, or choose another folder") from error  # fmt: skip
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors under the checkpoint's names, in its types."""
        found: dict[str, Tensor] = {}
        for name, value in self.model.state_dict().items():
            for piece in self.pieces.get(name, ()):
                info = self.checkpoint.tensors[piece.tensor]
                if piece.stored and piece.tensor in found:
                    continue
                part = (
                    value if piece.stored else value[piece.index]
                )  # a stacked tensor is the parameter itself
                found[piece.tensor] = (
                    part.detach().to("cpu", TORCH_TYPES[info.dtype]).reshape(info.shape).contiguous()
                )
        return _apart(found)


def refuse_existing(output: Path) -> None:
    """Refuse an output that is there already (E601); before training, not after."""
    if Path(output).exists():
        raise OutputConflict("E601", f"{printable(str(output))} exists", where=Where(str(output)),
                             help="remove it, or name another folder")  # fmt: skip


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory: a checkpoint may store a tied matrix twice, and the format cannot say so."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def _copy(source: StoredCheckpoint, name: str) -> Tensor:
    info = source.tensors[name]
    kind = TORCH_TYPES.get(info.dtype)
    if kind is not None:
        return read_tensor(source, name, 0, info.elements, kind).reshape(info.shape)
    raw = torch.from_numpy(source.read_bytes(name, 0, info.nbytes))
    return raw.view(_OTHER_TYPES[info.dtype]).reshape(info.shape)


_OTHER_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
