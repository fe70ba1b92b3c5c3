"""A LoRA or DoRA adapter folded into its base while reading; no second model is ever made.

    LoRA:  W + s B A                  s = alpha / r, or alpha / sqrt(r) (rank-stabilised)
    DoRA:  m * (W + s B A) / ||W + s B A||    norms over each output row, m the learned magnitude

Rows are computed in float32 and handed over unrounded, so that small updates are not erased by
an intermediate bfloat16 model. Sources: Hu et al. 2021 (2106.09685), Kalajdzievski 2023
(2312.03732), Liu et al. 2024 (2402.09353); file layout as written by the peft library.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint, StoredCheckpoint
from surgeon.checkpoint.header import TensorInfo, printable, read_header
from surgeon.checkpoint.index import Weights
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.errors import InputError, Where, raise_all
from surgeon.kernels.cast import widen

_KNOWN_KINDS = {"LORA"}
_PART = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
_REFUSED = {
    "layer_replication": "repeated layers",
    "target_parameters": "target_parameters (adapters on bare parameters)",
    "trainable_token_indices": "trainable_token_indices",
    "megatron_config": "Megatron layouts",
    "use_qalora": "QA-LoRA",
}


@dataclass
class _Low:
    """The factors of one weight, float32: B [out, r], A [r, in]; ``transposed`` for Conv1D weights [in, out]."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    transposed: bool = False


def _read_all(adapter: StoredCheckpoint, name: str) -> np.ndarray:
    info = adapter.tensors[name]
    return widen(adapter.read(name, 0, info.elements), info.dtype).astype(np.float32).reshape(info.shape)


class AdapterView:
    """Base checkpoint plus adapter, as one Checkpoint.

    Raises (constructor):
        InputError: E338 unsupported kind of adapter, or it does not fit the base.
    """

    def __init__(self, base: Checkpoint, folder: Path, label: str) -> None:
        self.base = self._base = base
        self.notes = getattr(base, "notes", ())
        config = read_json_object(folder / "adapter_config.json")
        weights = folder / "adapter_model.safetensors"
        if not weights.exists():
            raise InputError("E332", f"{folder} has no adapter_model.safetensors", where=Where(str(folder)),
                             help="pickled adapters (adapter_model.bin) are not read; save it as safetensors")  # fmt: skip
        header = read_header(weights)
        stored = StoredCheckpoint(str(folder), None, None, Weights((header,), header.tensors, None, ()))
        self.label = label
        self.folder = base.folder
        self.config = base.config
        self.headers = (*base.headers, header)
        self.adapter_folder = folder
        self.tensors: dict[str, TensorInfo] = dict(base.tensors)
        self._low: dict[str, _Low] = {}
        self._replaced: dict[str, np.ndarray] = {}
        self.identity = hashlib.sha256(
            (getattr(base, "identity", "") + json.dumps(config, sort_keys=True)).encode()
        ).hexdigest()
        self._refuse_unsupported(config, folder)
        self._load(stored, config, folder)
        stored.close()

    def _refuse_unsupported(self, config: dict[str, Any], folder: Path) -> None:
        kind = config.get("peft_type")
        problems = [] if kind in _KNOWN_KINDS else [f"peft_type {printable(str(kind))}"]
        problems += [text for key, text in _REFUSED.items() if config.get(key)]
        if problems:
            raise InputError("E338", f"{folder} is an adapter of a kind that cannot be folded in: {', '.join(problems)}",
                             where=Where(str(folder / "adapter_config.json")),
                             help="merge it with the library that made it, and give the merged model")  # fmt: skip

    def _load(self, stored: StoredCheckpoint, config: dict[str, Any], folder: Path) -> None:
        parts: dict[str, dict[str, str]] = {}
        findings: list[InputError] = []
        where = Where(str(folder / "adapter_model.safetensors"))
        for name in sorted(stored.tensors):
            found = _PART.match(name)
            if found:
                parts.setdefault(found["module"], {})[found["part"]] = name
                continue
            target = self._plain_target(name)
            if target is None:
                findings.append(InputError("E338", f"the adapter holds {printable(name)}, which the base has no place for",
                                           where=where, help="it was trained on another model"))  # fmt: skip
            elif stored.tensors[name].shape != self.tensors[target].shape:
                findings.append(self._misfit(target, stored.tensors[name].shape, where))
            else:
                self._replaced[target] = _read_all(stored, name).reshape(-1)
        for module, found_parts in parts.items():
            error = self._add(stored, config, module, found_parts, where)
            if error is not None:
                findings.append(error)
        raise_all(findings)
        if not self._low and not self._replaced:
            raise InputError("E338", f"{folder} changes no tensor", where=where, help="use the base alone")

    def _plain_target(self, name: str) -> str | None:
        plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(
            ".modules_to_save", "").replace(".base_layer", "")  # fmt: skip
        return plain if plain in self.tensors else self._tail_match(plain)

    def _tail_match(self, plain: str) -> str | None:
        """Base models are stored with or without their prefix ("model.")."""
        tails = [n for n in self.tensors if n.endswith("." + plain) or plain.endswith("." + n)]
        return tails[0] if len(tails) == 1 else None

    def _misfit(self, target: str, shape: tuple[int, ...], where: Where) -> InputError:
        return InputError(
            "E338", f"the adapter's part for {printable(target)} has shape {list(shape)}, "
            f"the base has {list(self.tensors[target].shape)}", where=where, help="it was trained on another model",
        )  # fmt: skip

    def _add(self, stored, config, module: str, parts: dict[str, str], where: Where) -> InputError | None:
        target = self._plain_target(f"{module}.weight")
        if target is None:
            return InputError("E338", f"the adapter changes {printable(module)}, which the base does not have",
                              where=where, help="it was trained on another model")  # fmt: skip
        embedding = "lora_embedding_A" in parts
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if first not in parts or second not in parts:
            return InputError(
                "E338",
                f"the adapter's part for {printable(module)} is incomplete",
                where=where,
                help="fetch the adapter again",
            )
        a, b = _read_all(stored, parts[first]), _read_all(stored, parts[second])
        if embedding:  # stored as A [r, vocabulary], B [hidden, r]; the weight is [vocabulary, hidden]
            a, b = b.T.copy(), a.T.copy()
        shape = self.tensors[target].shape
        transposed = bool(config.get("fan_in_fan_out")) and not embedding
        wanted = shape[::-1] if transposed else shape
        if (
            len(shape) != 2
            or a.ndim != 2
            or b.ndim != 2
            or (b.shape[0], a.shape[1]) != wanted
            or a.shape[0] != b.shape[1]
        ):
            return self._misfit(target, (b.shape[0], a.shape[-1]), where)
        rank = a.shape[0]
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        if (
            not rank
            or isinstance(alpha, bool)
            or not isinstance(alpha, (int, float))
            or not math.isfinite(alpha)
        ):
            return InputError("E338", f"the adapter's scale for {printable(module)} is no number: {str(alpha)!r:.40} / {rank}",
                              where=where, help="lora_alpha in adapter_config.json must be a number")  # fmt: skip
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        magnitude = None
        if config.get("use_dora"):
            if "lora_magnitude_vector" not in parts:
                return InputError(
                    "E338",
                    f"the DoRA magnitude of {printable(module)} is missing",
                    where=where,
                    help="the adapter is incomplete; fetch it again",
                )
            if transposed or embedding:
                return InputError("E338", f"DoRA on {printable(module)} (embedding or Conv1D) is not supported", where=where,
                                  help="merge it with peft and give the merged model")  # fmt: skip
            magnitude = _read_all(stored, parts["lora_magnitude_vector"]).reshape(-1)
            if magnitude.shape != (shape[0],):
                return self._misfit(target, magnitude.shape, where)
        self._low[target] = _Low(
            np.ascontiguousarray(a), np.ascontiguousarray(b), scale, magnitude, transposed
        )
        return None

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        inner = getattr(self._base, "computed", lambda name: False)
        return name in self._low or name in self._replaced or inner(name)

    def memory(self, name: str) -> int:
        """Return the bytes the base holds beside the blocks while a tensor is worked on."""
        return getattr(self._base, "memory", lambda name: 0)(name)

    def kept_bytes(self, name: str) -> int:
        """Return the bytes that stay in memory after a tensor of the base was read."""
        return getattr(self._base, "kept_bytes", lambda name: 0)(name)

    def granularity(self, name: str) -> int:
        inner, columns = self._base.granularity(name), self.tensors[name].shape[-1:]
        return columns[0] if name in self._low and inner % columns[0] else inner

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.computed(name):
            raise AssertionError(f"{name} is changed by an adapter; it has no stored bytes")
        return self._base.read_bytes(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        low = self._low.get(name)
        if low is None and name in self._replaced:
            return self._replaced[name][start:stop].copy()
        if low is None:
            return self._base.read(name, start, stop)
        columns = self.tensors[name].shape[-1]
        first, last = start // columns, -(-stop // columns)
        info = self._base.tensors[name]
        if name in self._replaced:  # an adapter may store the layer it was trained on, too
            base = self._replaced[name][first * columns : last * columns]
        else:
            base = widen(self._base.read(name, first * columns, last * columns), info.dtype).astype(
                np.float32
            )
        weight = base.reshape(-1, columns)
        if low.transposed:  # W.T = B A, so rows of W are columns of B A
            weight = weight + np.float32(low.scale) * (low.a[:, first:last].T @ low.b.T)
        else:
            weight = weight + np.float32(low.scale) * (low.b[first:last] @ low.a)
        if low.magnitude is not None:
            norms = np.sqrt(np.square(weight, dtype=np.float64).sum(axis=1)).astype(np.float32)
            weight = weight * (low.magnitude[first:last] / np.where(norms > 0, norms, 1))[:, None]
        return weight.reshape(-1)[start - first * columns : stop - first * columns]


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the entry whose key is the module's name or its tail, as peft matches alpha_pattern."""
    if isinstance(patterns, dict):
        for key, value in patterns.items():
            try:
                found = re.fullmatch(rf"(.*\.)?({key})", module)
            except re.error:
                found = module == key or module.endswith(f".{key}")
            if found:
                return value
    return default
