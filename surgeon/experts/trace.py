"""A compact record of routing: which experts every token went to in every layer, and how heavily.

    writer = TraceWriter(path, checkpoint, ids, settings, experts)
    route(checkpoint, ids, settings, writer, experts=experts)      # or collect_statistics(..., also=[writer])
    writer.finish()

    trace = Trace.open(path, checkpoint)
    for layer in trace.layers:
        ids = trace.ids(layer)                # uint16 [N, K], the E of a slot that was not routed

One safetensors file. Its rows are tokens: all samples one after the other in their order, padding removed;
``trace.offsets`` says where each sample begins, and nothing may span two samples. It is written in place batch by batch, so
memory does not grow with the text; the length of its header comes last, so half a file never opens. With the folder
of an interrupted pass a trace is continued: finished layers are believed after their digests are computed again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from surgeon.calibrate.routing import Routed
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import Header
from surgeon.errors import InputError
from surgeon.experts.arrays_file import (
    VERSION,
    damaged,
    described_header,
    header_text,
    read_array,
    unwritable,
)
from surgeon.experts.origin import check_origin, origin_of
from surgeon.structure.experts.parts import Experts

KIND = "routing trace"
CHUNK = 8 << 20


class TraceWriter:
    """Writes a trace during a pass (a `surgeon.calibrate.routing.RoutingObserver`).

    Args:
        path: the file that `finish` publishes; until then it lies beside, under another name.
        checkpoint, samples, settings: what the pass runs.
        experts: where the experts are.
        logits: keep the router's logits too, float16; of 128 experts they are most of the file.
        about: plain data on the samples.

    Raises:
        EnvironmentFault: E501 the file cannot be written.
    """

    wants_sums = False

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        samples: Sequence[np.ndarray],
        settings: Settings,
        experts: Experts,
        *,
        logits: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.wants_logits = logits
        self._path = path
        self._samples = [np.asarray(sample, np.int64).reshape(-1) for sample in samples]
        self._offsets = np.concatenate([[0], np.cumsum([len(sample) for sample in self._samples])])
        self._counts = {layer.index: layer.count for layer in experts.running}
        tokens = int(self._offsets[-1])
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            "offsets": ("I64", (len(self._samples) + 1,)),
            "tokens": ("I32", (tokens,)),
        }
        for layer, count in self._counts.items():
            tensors[f"{layer}.ids"] = ("U16", (tokens, experts.top_k))
            tensors[f"{layer}.weights"] = ("F32", (tokens, experts.top_k))
            tensors[f"{layer}.norms"] = ("F32", (tokens, experts.top_k))
            if logits:
                tensors[f"{layer}.logits"] = ("F16", (tokens, count))
        self._tensors = tensors
        self._about = {
            "record": origin_of(checkpoint, self._samples, settings, about),
            "layers": list(self._counts),
            "experts": list(self._counts.values()),
            "top_k": experts.top_k,
        }
        self._digests = {layer: "0" * 64 for layer in self._counts}
        text = self._header()
        self.identity = hashlib.sha256(text).hexdigest()
        self._partial = path.with_name(f".{path.name}.{self.identity[:12]}.partial")
        self._start = 8 + len(text)
        self._places: dict[str, int] = {}
        size = 0
        for name, (code, shape) in tensors.items():
            self._places[name] = self._start + size
            size += int(np.prod(shape, dtype=np.int64)) * DTYPES[code].bits // 8
        self._size = self._start + size
        self._current: int | None = None
        self._open()

    def _header(self) -> bytes:
        digests = {str(layer): digest for layer, digest in self._digests.items()}
        described = {"version": VERSION, "kind": KIND, "sha256": digests, "about": self._about}
        return header_text(self._tensors, described)

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._file, self._size)
            self._put("offsets", 0, self._offsets.astype("<i8"))
            self._put("tokens", 0, np.concatenate(self._samples).astype("<i4"))
        except OSError as error:
            raise unwritable(self._path, error) from error

    def _put(self, name: str, row: int, values: np.ndarray) -> None:
        """Write rows of a tensor, from ``row`` on."""
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        place = self._places[name] + row * values[:1].nbytes
        while len(content):
            done = os.pwrite(self._file, content, place)
            content, place = content[done:], place + done

    def routed(self, batch: Routed) -> None:
        if self._current is not None and self._current != batch.layer:
            self._close_layer(self._current)
        self._current = batch.layer
        if batch.index.shape[1] != self._about["top_k"]:
            raise InputError("E406", f"layer {batch.layer} routes to {batch.index.shape[1]} experts, "
                             f"config.json says {self._about['top_k']}",
                             help="the number of experts a token goes to must be the one the model was trained with: restore config.json")  # fmt: skip
        named = {
            "ids": ("<u2", batch.index),
            "weights": ("<f4", batch.weights),
            "norms": ("<f4", batch.norms),
        }
        if self.wants_logits:
            assert batch.logits is not None
            named["logits"] = ("<f2", batch.logits)
        samples = batch.samples.cpu().numpy()
        starts = np.flatnonzero(np.diff(samples, prepend=-1))
        try:
            for name, (code, value) in named.items():
                rows = value.cpu().numpy().astype(code)
                for start, stop in zip(starts, [*starts[1:], len(samples)], strict=True):
                    first = int(self._offsets[samples[start]]) + int(batch.positions[start])
                    self._put(f"{batch.layer}.{name}", first, rows[start:stop])
        except OSError as error:
            raise unwritable(self._path, error) from error

    def expert_sums(self, layer: int, sums: Tensor) -> None:
        raise AssertionError("sums of outputs were not asked for")

    def _close_layer(self, layer: int) -> None:
        self._digests[layer] = self._digest(layer)
        self._current = None

    def _digest(self, layer: int) -> str:
        digest = hashlib.sha256()
        start = self._places[f"{layer}.ids"]
        following = [place for name, place in self._places.items() if place > start and name.endswith(".ids")]
        place, end = start, min(following, default=self._size)
        while place < end:
            piece = os.pread(self._file, min(CHUNK, end - place), place)
            if not piece:
                break
            digest.update(piece)
            place += len(piece)
        return digest.hexdigest()

    def state(self) -> dict[str, np.ndarray]:
        if self._current is not None:  # a stage of the walk is a layer: this one is complete
            self._close_layer(self._current)
        os.fsync(self._file)
        return {
            str(layer): np.frombuffer(digest.encode(), np.uint8).copy()
            for layer, digest in self._digests.items()
            if digest.strip("0")
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> bool:
        """Take up finished layers; False when the file does not hold them any more."""
        found = {int(layer): value.tobytes().decode() for layer, value in state.items()}
        if any(self._digest(layer) != digest for layer, digest in found.items()):
            return False
        self._digests.update(found)
        return True

    def finish(self) -> Path:
        """Complete the file, publish it under its name, and return that."""
        if self._current is not None:
            self._close_layer(self._current)
        missing = [layer for layer, digest in self._digests.items() if not digest.strip("0")]
        if missing:
            raise RuntimeError(f"layers {missing} were not run")
        text = self._header()
        assert 8 + len(text) == self._start
        try:
            os.pwrite(self._file, text, 8)
            os.fsync(self._file)
            os.pwrite(self._file, len(text).to_bytes(8, "little"), 0)
            os.fsync(self._file)
            os.replace(self._partial, self._path)
        except OSError as error:
            raise unwritable(self._path, error) from error
        finally:
            self.close()
        return self._path

    def close(self) -> None:
        """Close the file; what is not finished stays for a resumed pass."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def discard(self) -> None:
        """Remove what was written and not published."""
        self.close()
        self._partial.unlink(missing_ok=True)


class Trace:
    """A trace on disk; layers are read when they are asked for.

    Attributes:
        path: the file.
        record: what it was made on; plain data.
        layers: numbers of the layers of experts.
        experts: layer -> its number of experts.
        top_k: experts a token goes to, K.
        offsets: int64 [samples + 1], the first token of each sample; the last one is N.
        tokens: int32 [N], token ids.
        has_logits: whether the router's logits are there.
    """

    def __init__(self, header: Header, described: Mapping[str, Any]) -> None:
        about = described["about"]
        self.path = header.file
        self._header = header
        try:
            self.record: dict[str, Any] = dict(about["record"])
            self.layers = tuple(map(int, about["layers"]))
            self.experts = dict(zip(self.layers, map(int, about["experts"]), strict=True))
            self.top_k = int(about["top_k"])
            self._digests = {int(layer): str(digest) for layer, digest in described["sha256"].items()}
            self.offsets = read_array(header, "offsets")
            self.tokens = read_array(header, "tokens")
            self.has_logits = f"{self.layers[0]}.logits" in header.tensors
            rows = {header.tensors[f"{layer}.ids"].shape for layer in self.layers}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise damaged(self.path) from None
        in_order = bool((np.diff(self.offsets) > 0).all()) and self.offsets[0] == 0
        if rows != {(len(self.tokens), self.top_k)} or not in_order or self.offsets[-1] != len(self.tokens):
            raise damaged(self.path)

    @classmethod
    def open(cls, path: Path, checkpoint: Checkpoint | None = None, *, force: bool = False) -> Trace:
        """Open a trace.

        Args:
            path: the file.
            checkpoint: the model it must be of; None takes that of any.
            force: take that of another model too.

        Raises:
            InputError: E431 the file is no trace, or damaged; E432 it is another model's.
        """
        trace = cls(*described_header(path, KIND))
        if checkpoint is not None and not force:
            check_origin(path, trace.record, checkpoint)
        return trace

    @property
    def samples(self) -> int:
        return len(self.offsets) - 1

    def ids(self, layer: int) -> np.ndarray:
        """Return the chosen experts, uint16 [N, K]; E where a slot was not routed."""
        return self._read(layer, "ids")

    def weights(self, layer: int) -> np.ndarray:
        """Return their weights as the layer used them, float32 [N, K]."""
        return self._read(layer, "weights")

    def norms(self, layer: int) -> np.ndarray:
        """Return the norms of their outputs before the weights, float32 [N, K]."""
        return self._read(layer, "norms")

    def logits(self, layer: int) -> np.ndarray:
        """Return the router's logits, float16 [N, E].

        Raises:
            InputError: E431 the trace was made without.
        """
        if not self.has_logits:
            raise InputError("E431", f"{self.path.name} was made without the router's logits",
                             help="make the trace again, with logits")  # fmt: skip
        return self._read(layer, "logits")

    def _read(self, layer: int, name: str) -> np.ndarray:
        return read_array(self._header, f"{layer}.{name}")

    def verify(self) -> None:
        """Compare every layer with the digest taken when it was written.

        Raises:
            InputError: E431 one differs.
        """
        kinds = ("ids", "weights", "norms", "logits") if self.has_logits else ("ids", "weights", "norms")
        for layer in self.layers:
            digest = hashlib.sha256()
            for name in kinds:
                digest.update(np.ascontiguousarray(self._read(layer, name)).reshape(-1).view(np.uint8).data)
            if digest.hexdigest() != self._digests.get(layer):
                raise damaged(self.path)
