"""What a pass of activation gradients has found so far, beside the boundary it stands at, and how it lies on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon.calibrate.activations import Activations, InFile
from surgeon.calibrate.answers import TokenSample
from surgeon.calibrate.boundaries import Boundaries
from surgeon.calibrate.skeleton import Skeleton


@dataclass
class PassState:
    """Sums and scales of a pass, and the inputs of layers it goes back from.

    Attributes:
        exponents: of each batch, int64: its gradient is stored times 2**exponent.
        loss, tokens: the summed loss and the tokens it sums over.
        kept: layer -> inputs of all batches.
    """

    exponents: np.ndarray
    loss: float = 0.0
    tokens: int = 0
    kept: dict[int, Activations] = field(default_factory=dict)

    def packed(self) -> dict[str, np.ndarray]:
        """Return it as arrays; inputs that do not outlive the pass are left out."""
        found = {
            "loss": np.array([self.loss]),
            "tokens": np.array([self.tokens]),
            "exponents": self.exponents,
        }
        for layer, store in self.kept.items():
            if isinstance(store, InFile) and store.digests[0]:
                found[f"kept-{layer}"] = np.array(store.digests)
        return found

    @classmethod
    def unpacked(cls, arrays: Mapping[str, np.ndarray], stores: Boundaries) -> PassState | None:
        """Return what `packed` described, None when inputs on disk are not what they were."""
        kept: dict[int, Activations] = {}
        for name, digests in arrays.items():
            if name.startswith("kept-"):
                store = stores.found(name, [str(digest) for digest in digests])
                if store is None:
                    return None
                kept[int(name[5:])] = store
        return cls(arrays["exponents"].copy(), float(arrays["loss"][0]), int(arrays["tokens"][0]), kept)


def identity_of(skeleton: Skeleton, samples: Sequence[TokenSample]) -> dict[str, Any]:
    """Return everything that the boundaries of a pass depend on, as plain data."""
    digest = hashlib.sha256()
    for sample in samples:
        ids = np.asarray(sample.ids, dtype="<i8").reshape(-1)
        digest.update(len(ids).to_bytes(8, "little") + int(sample.answer_start).to_bytes(8, "little") + ids.tobytes())  # fmt: skip
    checkpoint = skeleton.checkpoint
    return {
        "headers": [header.sha256 for header in checkpoint.headers],
        "stamps": [[h.stamp.size, h.stamp.mtime_ns] for h in checkpoint.headers],
        "view": getattr(checkpoint, "identity", ""),
        "config": checkpoint.config,
        "samples": digest.hexdigest(),
        "dtype": skeleton.settings.dtype,
        "devices": [device.type for device in skeleton.placement.devices],
        "batch_tokens": skeleton.settings.batch_tokens,
        "versions": [importlib.metadata.version(name) for name in ("torch", "transformers")],
    }
