"""What fits into memory, and layers of experts that do not.

A large layer of experts is computed for a group of batches at a time: every batch runs up to the
experts, which only note what was routed to them; then one expert after the other is read and
computes its tokens of the whole group; then every batch runs again with the sums put in. Attention
is computed twice, each expert is read once per group, and one expert (and the next, which is read
meanwhile) is in memory.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgeon.calibrate.batches import Batch
from surgeon.calibrate.experts import RoutingWatch, entering, leaving, one_expert, routed
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Call, Skeleton
from surgeon.calibrate.watching import Watching
from surgeon.errors import EnvironmentFault

RELEASE_BYTES = 32 << 20
"""Weights of experts dropped before their memory is given back; without that it grows to the whole layer."""


RUNTIME_BYTES = 48 << 20
"""What torch takes for itself when it first computes: its code, compiled kernels, threads' buffers."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a pass shares its memory.

    Attributes:
        streamed: the layers whose experts are read one at a time.
        prefetch: whether the next layer is read while one computes.
        spill: whether activations lie in a file.
        calls: bytes for recorded masks and rotary tables.
        group_tokens: tokens of a group in layers of streamed experts.
        unused: bytes that are left to who observes.
    """

    streamed: frozenset[int]
    prefetch: bool
    spill: bool
    calls: int
    group_tokens: int
    unused: int

    def streams(self, layer: int) -> bool:
        return layer in self.streamed

    def groups(self, batches: Sequence[Batch]) -> Iterator[list[int]]:
        """Yield the numbers of batches that go through streamed experts together."""
        group: list[int] = []
        tokens = 0
        for number, batch in enumerate(batches):
            size = len(batch.samples) * batch.length
            if group and tokens + size > self.group_tokens:
                yield group
                group, tokens = [], 0
            group.append(number)
            tokens += size
        if group:
            yield group

    @classmethod
    def of(
        cls,
        skeleton: Skeleton,
        batches: Sequence[Batch],
        settings: Settings,
        stores: int = 1,
        reserve: int = 0,
    ) -> MemoryPlan:
        """Decide, from the sizes of layers and batches, what is held in memory.

        Args:
            stores: how many times hidden states of all batches are held.
            reserve: bytes that somebody else takes while a layer is in memory.

        Raises:
            EnvironmentFault: E504 not even one layer fits.
        """
        budget = settings.budget()
        size = torch.empty(0, dtype=skeleton.dtype).element_size()
        places = max(len(batch.samples) * batch.length for batch in batches)
        work = places * skeleton.widest * 4 * size  # gate, up, product and one copy
        if (
            skeleton.model.config._attn_implementation == "eager"
        ):  # scores of all heads, their softmax in float32
            heads = int(skeleton.model.config.num_attention_heads)
            work += max(len(b.samples) * b.length**2 for b in batches) * heads * (2 * size + 4)
        layers = range(skeleton.layers)
        whole = [skeleton.bytes_of_layer(layer) for layer in layers]
        dense = [skeleton.bytes_of_layer(layer, experts_too=False) for layer in layers]
        outer = skeleton.bytes_outside()
        wanted = settings.stream_experts
        free = budget - work - outer - reserve
        streamed = frozenset(
            layer
            for layer in layers
            if whole[layer] > dense[layer]
            and (wanted if wanted is not None else 2 * whole[layer] > free * 3 // 4)
        )
        largest = max(dense[layer] if layer in streamed else whole[layer] for layer in layers)
        if largest > free:
            needs = largest + work + outer + reserve
            beside = f", {reserve / 1e6:,.0f} MB of it to work on the layer's matrices" if reserve else ""
            raise EnvironmentFault(
                "E504", f"calibrating needs about {needs / 1e6:,.0f} MB for one layer and one batch{beside}; "
                f"the limit is {budget / 1e6:,.0f} MB", help="raise --memory-limit, or lower the sequence length",
            )  # fmt: skip
        prefetch = 2 * largest + RUNTIME_BYTES <= free
        left = max(0, free - RUNTIME_BYTES - largest * (2 if prefetch else 1))
        total = sum(len(batch.samples) * batch.length for batch in batches) * skeleton.hidden_size * size
        total *= stores
        each_token = skeleton.hidden_size * (4 * size) + 64 * 8
        return cls(
            streamed=streamed,
            prefetch=prefetch,
            spill=total > left // 2,
            calls=max(1 << 20, min(256 << 20, left // 4)),
            group_tokens=max(places, left // 2 // each_token),
            unused=left // 4,
        )


def release_memory() -> None:
    """Give freed blocks back to the system; glibc keeps them otherwise, a layer's weights included."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class _Routed(Exception):
    """Ends a layer's forward at its experts."""


class ExpertStream:
    """Computes one layer of experts for groups of batches, reading expert by expert.

    Args:
        skeleton, layer, watching: what runs, and who looks on.
        replaced: checkpoint names -> tensors that experts have instead of their own; each is asked for when it is
            its expert's turn.
    """

    def __init__(
        self, skeleton: Skeleton, layer: int, watching: Watching, replaced: Mapping[str, Tensor] | None = None
    ) -> None:
        self._skeleton = skeleton
        self._replaced = replaced
        self._layer = layer
        self._watching = watching
        self._module: Any = skeleton.expert_module(layer)

    def run(
        self,
        inputs: Mapping[int, Tensor],
        calls: Mapping[int, Call],
        batches: Mapping[int, Batch],
        check: Callable[[], None],
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (batch number, the layer's output) for a group of batches."""
        arrived = {number: self._arrive(states, calls[number]) for number, states in inputs.items()}
        sums = {number: torch.zeros_like(hidden) for number, (hidden, _, _) in arrived.items()}
        shares = {
            number: {expert: (rows, slots) for expert, rows, slots in routed(index, self._module.num_experts)}
            for number, (_, index, _) in arrived.items()
        }
        needed = sorted({expert for table in shares.values() for expert in table})
        routing: RoutingWatch | None = getattr(self._module, "surgeon_routing", None)
        for expert, weights in self._experts(needed):
            check()
            for number, table in shares.items():
                if expert not in table:
                    continue
                rows, slots = table[expert]
                hidden, index, scale = arrived[number]
                scales = scale[rows, slots]
                entered = entering(self._module, hidden[rows], scales)
                self._watching.begin(batches[number])
                out = one_expert(
                    self._module, expert, rows, entered, lambda _, name, held=weights: held[name],
                    scales=scales,
                )  # fmt: skip
                if routing is not None:
                    routing.output(expert, rows, slots, out, index)
                self._watching.end()
                sums[number].index_add_(0, rows, leaving(self._module, out, scales).to(hidden.dtype))
        arrived.clear()
        for number, states in inputs.items():
            check()
            total = sums.pop(number)
            self._module.surgeon_deferred = lambda hidden, index, scale, total=total: total
            self._watching.begin(batches[number])
            try:
                out = self._skeleton.call(self._layer, states, calls[number])
            finally:
                del self._module.surgeon_deferred
                self._watching.end()
            yield number, out

    def _arrive(self, states: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Run a layer up to its experts and return what they are given."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []

        def note(hidden: Tensor, index: Tensor, scale: Tensor) -> Tensor:
            found.append((hidden, index, scale))
            raise _Routed

        self._module.surgeon_deferred = note
        try:
            self._skeleton.call(self._layer, states, call)
        except _Routed:
            pass
        finally:
            del self._module.surgeon_deferred
        return found[0]

    def _experts(self, needed: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (expert, its weights), reading the next one meanwhile."""

        def read(layer: int, expert: int) -> dict[str, Tensor]:
            return self._skeleton.read_expert(layer, expert, self._replaced)

        with ThreadPoolExecutor(1, thread_name_prefix="surgeon-expert") as pool:
            ahead = pool.submit(read, self._layer, needed[0]) if needed else None
            freed = 0
            for place, expert in enumerate(needed):
                assert ahead is not None
                weights = ahead.result()
                ahead = pool.submit(read, self._layer, needed[place + 1]) if place + 1 < len(needed) else None
                yield expert, weights
                freed += sum(weight.nbytes for weight in weights.values())
                del weights
                if freed > RELEASE_BYTES:
                    release_memory()
                    freed = 0
