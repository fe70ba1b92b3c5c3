"""Buffers that no checkpoint stores: rotary frequencies, scales, position numbers.

A model built without data has no values for them either. The library computes them again in the
model's ``_init_weights``. That is asked here twice, over two different fillings: a buffer that keeps
any of the filling was not computed, and is refused instead of used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import InputError, Where


def compute_buffers(model: Any, root: nn.Module, device: torch.device, *, recurse: bool = True) -> None:
    """Give every buffer without data inside ``root`` its computed value on ``device``.

    Args:
        model: the transformers model that knows how to initialise its modules.
        root: the module to look into.
        device: where the values go.
        recurse: look into submodules too.

    Raises:
        InputError: E380 the model leaves a buffer undefined.
    """
    for path, module in root.named_modules() if recurse else [("", root)]:
        missing = [name for name, value in module._buffers.items() if value is not None and value.is_meta]
        if not missing:
            continue
        first, second = (_initialised(model, module, missing, filling) for filling in (0, 1))
        for name in missing:
            if not torch.equal(first[name], second[name]):
                raise InputError("E380", f"the library does not say how to compute the buffer {path}.{name} of this model",
                                 where=Where(tensor=f"{path}.{name}"), help="pip install --upgrade transformers; methods without calibration need no buffers")  # fmt: skip
            module._buffers[name] = first[name].to(device)


def _initialised(model: Any, module: nn.Module, names: list[str], filling: int) -> dict[str, Tensor]:
    """Return the named buffers as the model initialises them over a filling; the module is left unchanged."""
    kept = dict(module._buffers), dict(module._parameters)
    try:
        for name in names:
            like = module._buffers[name]
            assert like is not None
            module._buffers[name] = torch.full(like.shape, filling, dtype=like.dtype)
        for name, value in kept[1].items():  # real parameters must not be drawn anew
            module._parameters[name] = (
                None
                if value is None
                else nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
            )
        with torch.no_grad():
            model._init_weights(module)
        return {name: value.clone() for name in names if (value := module._buffers[name]) is not None}
    finally:
        module._buffers.update(kept[0])
        module._parameters.update(kept[1])
