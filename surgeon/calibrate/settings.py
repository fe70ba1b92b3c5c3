"""How a calibration pass runs: where, in which precision, within how much memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from surgeon.errors import UsageError
from surgeon.system import memory_budget

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Settings:
    """The conditions of a pass.

    Attributes:
        device: "cpu", "cuda", "cuda:N" or "auto" (a GPU when there is one). "cuda" and "auto" spread
            the layers over all GPUs; "cuda:N" uses that one.
        dtype: precision of weights and activations.
        memory_limit: bytes the pass may use; None asks the machine. It decides between keeping
            activations in memory and spilling them, and between whole layers and single experts.
        spill: folder for activations and for the state that a resumed pass starts from; None keeps
            nothing beyond the pass.
        batch_tokens: tokens computed at once.
        threads: threads of torch during the pass; None leaves them alone.
        stream_experts: read experts one at a time; None does so when a layer does not fit otherwise.
    """

    device: str = "cpu"
    dtype: str = "float32"
    memory_limit: int | None = None
    spill: Path | None = None
    batch_tokens: int = 4096
    threads: int | None = None
    stream_experts: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError("E230", f"{self.dtype!r} is not a precision to calibrate in",
                             help="use " + ", ".join(DTYPES))  # fmt: skip
        if self.batch_tokens < 1:
            raise UsageError("E230", f"batch_tokens is {self.batch_tokens}", help="it must be at least 1")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def budget(self) -> int:
        """Return the bytes the pass may use."""
        return self.memory_limit if self.memory_limit is not None else memory_budget()


class Observer(Protocol):
    """What looks at the inputs and outputs of modules while a model runs.

    An observer may also have ``state() -> dict[str, np.ndarray]`` and ``restore(state)``; a pass with
    a spill folder then continues after an interruption; ``restore`` may return False for a state it cannot
    take up, and the pass starts over. An attribute ``identity`` (text) separates
    observers whose states must not be mixed.

    With ``observe_tokens(module, inputs, gates, samples)`` it gets that instead of ``observe``: ``gates``
    [tokens], what the output of an expert is multiplied by for each token, None elsewhere; ``samples`` int64
    [tokens], the sample of each. With ``observe_original(module, inputs)`` it sees, before each batch, what
    the model without replacements gives (see `surgeon.calibrate.walk.Walk`). With ``again(layer) -> bool``
    a layer that was observed and replaced is observed once more, for as long as the answer is True.
    """

    def wants(self, module: str) -> bool:
        """Say whether a module matters; its name is the checkpoint's, without ".weight"."""
        ...

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        """Look at one call: inputs [tokens, in], outputs [tokens, out] or None when not computed.

        Padding is removed. ``sample`` is the sample's index when the batch holds one, else None.
        """
        ...


State = Mapping[str, Any]
"""What an observer's ``state`` returns: names to NumPy arrays."""
