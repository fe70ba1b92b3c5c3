"""What `surgeon.verify.reader_child` asks of a model that stock transformers loaded quantized.

Loaded by that file from its own folder, so that nothing of this program is imported beside the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def quantized_modules(model: Any) -> dict[str, int]:
    """Count the modules that hold quantized weights, by class; before the first pass, which unpacks some."""
    found: dict[str, int] = {}
    for module in model.modules():
        kind = type(module)
        packed = hasattr(module, "weight_packed") or hasattr(module, "qweight")
        weight = getattr(module, "weight", None)
        short = str(getattr(weight, "dtype", "")).startswith("torch.float8")
        if packed or short or kind.__module__.startswith("bitsandbytes"):
            found[kind.__name__] = found.get(kind.__name__, 0) + 1
    return found


@contextmanager
def decoded(model: Any) -> Iterator[str]:
    """Multiply with the matrices as the reader decodes them, in float32, and leave activations alone; yields the precision.

    Kernels for few bits round in their own ways, eight-bit forms round activations, and sums of 16 bits let routers of
    experts choose otherwise. Without all that, what is computed follows from what was loaded, to the last digits. Before any
    ordinary pass: the first of those makes bitsandbytes pack four bits anew on processors. Kernels of auto-round that are not
    torch's run in 16 bits alone.
    """
    import torch

    if getattr(model, "ct_decompress_hook", None) is not None:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))  # compressed-tensors unpacks in the first pass
    own = [module for module in model.modules() if hasattr(module, "qweight")]
    wide = all(type(module).__module__.startswith("auto_round_extension.torch") for module in own)
    dtype = str(model.dtype).removeprefix("torch.")
    changed = _arithmetic(model)
    widened = _widen(model, {id(b) for module in own for b in module.buffers()}) if wide else []
    try:
        yield "float32" if wide else dtype
    finally:
        for tensor, stored in widened:  # exact: it held nothing else before
            tensor.data = tensor.data.to(stored)
        for module, name, value in changed:
            if name == "forward":
                del module.forward
            else:
                setattr(module, name, value)


def _arithmetic(model: Any) -> list[tuple[Any, str, Any]]:
    """Make quantized modules multiply plainly; returns (module, attribute, former value)."""
    changed: list[tuple[Any, str, Any]] = []

    def change(module: Any, name: str, value: Any) -> None:
        changed.append((module, name, None if name == "forward" else getattr(module, name, True)))
        setattr(module, name, value)

    for module in model.modules():
        kind = type(module)
        if getattr(module, "quantization_scheme", None) is not None:  # compressed-tensors
            change(module, "quantization_enabled", False)
        elif kind.__module__.startswith("bitsandbytes") and kind.__name__ in _DECODERS:
            change(module, "forward", _forward(module, _DECODERS[kind.__name__]))
    return changed


def _forward(module: Any, decode: Callable[[Any], Any]) -> Any:
    """Return a forward pass with the decoded matrix, rounded to 16 bits as it is where it is used."""
    import torch

    def forward(x: Any) -> Any:
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return torch.nn.functional.linear(x, decode(module).to(x.dtype), bias)

    return forward


def _four_bits(module: Any) -> Any:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def _eight_bits(module: Any) -> Any:
    """Return codes * (largest of the row / 127), float16."""
    held = module.weight if module.weight.CB is not None else module.state
    return (held.CB.float() * held.SCB.float()[:, None] / 127).half()


_DECODERS: dict[str, Callable[[Any], Any]] = {"Linear4bit": _four_bits, "Linear8bitLt": _eight_bits}


def _widen(model: Any, kept: set[int]) -> list[tuple[Any, Any]]:
    """Turn 16-bit tensors to float32, but those of ``kept``, whose products are rounded; returns (tensor, former type)."""
    import torch

    found = []
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype in (torch.bfloat16, torch.float16) and id(tensor) not in kept:
            found.append((tensor, tensor.dtype))
            tensor.data = tensor.data.float()
    return found
