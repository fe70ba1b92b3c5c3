"""Which device computes which layer.

One device: everything there. Several GPUs: layers alternate, so that the next layer is copied to
one GPU while another computes; what lies outside the layers is on the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgeon.errors import EnvironmentFault, UsageError


@dataclass(frozen=True)
class Placement:
    """Devices in the order layers use them."""

    devices: tuple[torch.device, ...]

    @property
    def outer(self) -> torch.device:
        """The device of embeddings, final norm and head."""
        return self.devices[0]

    def of_layer(self, layer: int) -> torch.device:
        return self.devices[layer % len(self.devices)]

    def send(self, value: Any, device: torch.device) -> Any:
        """Move tensors, also inside tuples and dictionaries, to a device; what is there already stays."""
        if device.type == "cpu" and len(self.devices) == 1:
            return value
        from accelerate.utils import send_to_device

        return send_to_device(value, device, non_blocking=True)

    @classmethod
    def of(cls, device: str, layers: int) -> Placement:
        """Return the placement for a device setting: "cpu", "cuda", "cuda:N" or "auto"."""
        name, colon, number = device.partition(":")
        if name not in ("cpu", "cuda", "auto") or (colon and not (name == "cuda" and number.isdecimal())):
            raise UsageError(
                "E230", f"{device!r} is not a device", help='use "cpu", "cuda", "cuda:1" or "auto"'
            )
        if name == "cpu":
            return cls((torch.device("cpu"),))
        found = usable_gpus()
        if name == "auto" and not found:
            return cls((torch.device("cpu"),))
        if not found or (number and int(number) not in found):
            raise EnvironmentFault("E515", f"{device} was asked for, but there is no such GPU",
                                   help='use "cpu", or "auto" for a GPU when there is one')  # fmt: skip
        chosen = [int(number)] if number else found
        return cls(alternate([torch.device("cuda", index) for index in chosen], layers))


def alternate(devices: Sequence[torch.device], layers: int) -> tuple[torch.device, ...]:
    """Return the devices that are used in turn; never more than there are layers."""
    return tuple(devices[: max(1, layers)])


def usable_gpus() -> list[int]:
    """Return the GPUs with free memory, the one with most first."""
    if not torch.cuda.is_available():
        return []
    from accelerate.utils import get_max_memory

    free = {key: size for key, size in get_max_memory().items() if isinstance(key, int) and size > 0}
    return sorted(free, key=lambda index: (-free[index], index))
