"""What `surgeon.verify.reader_child` asks of a model that stock transformers loaded quantized.

Loaded by that file from its own folder, so that nothing of this program is imported beside the reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def quantized_modules(model: Any) -> dict[str, int]:
    """Count the modules that hold quantized weights, by class; before the first pass, which unpacks some."""
    found: dict[str, int] = {}
    for module in model.modules():
        kind = type(module)
        held = hasattr(module, "weight_packed") or hasattr(module, "qweight") or kind.__module__.startswith("bitsandbytes")
        weight = getattr(module, "weight", None)
        if held or str(getattr(weight, "dtype", "")).startswith("torch.float8"):
            found[kind.__name__] = found.get(kind.__name__, 0) + 1
    return found


@contextmanager
def decoded(model: Any) -> Iterator[str]:
    """Multiply with the matrices as the reader decodes them, in float32, and leave activations alone; yields the precision.

    Kernels for few bits round in their own ways, eight-bit forms round activations, and 16-bit sums let routers of experts
    choose otherwise. Without all that, what is computed follows from what was loaded, to the last digits. bitsandbytes packs
    four bits anew in the first ordinary pass on processors: passes of this kind come before. Kernels of auto-round that are
    not torch's run in 16 bits alone.
    """
    import torch

    own = [m for m in model.modules() if hasattr(m, "qweight")]
    wide = all(type(m).__module__.startswith("auto_round_extension.torch") for m in own)
    unpack = getattr(model, "ct_decompress_hook", None)
    if unpack is not None:  # compressed-tensors' own first step; its result is widened with the rest
        unpack(model, ())
    undo = [*_plain_arithmetic(model), *(_widened(model, own) if wide else ())]
    try:
        yield "float32" if wide else str(model.dtype).removeprefix("torch.")
    finally:
        for holder, name, value in reversed(undo):
            if name == "forward":
                del holder.forward
            else:
                setattr(holder, name, value)
        del torch


def _eight_bits(module: Any) -> Any:
    """Return a forward pass of a Linear8bitLt with its decoded matrix: codes * (largest of the row / 127), in float16."""
    import torch

    def forward(x: Any) -> Any:
        held = module.weight if module.weight.CB is not None else module.state
        weight = (held.CB.float() * held.SCB.float()[:, None] / 127).to(torch.float16).to(x.dtype)
        return torch.nn.functional.linear(x, weight, None if module.bias is None else module.bias.to(x.dtype))

    return forward
