"""Routing tokens again with some experts gone: the model's own router, given other logits.

A family's router is code (softmax before or after the choice, sigmoids, groups, correction biases, scales), and what it
would choose without some experts follows from nothing but running it. So its one matrix product is taken hold of: its
result is noted while the layer runs, and replaced by stored logits, minus infinity for the experts that are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from surgeon.architectures.expert_records.record import ExpertRecord
from surgeon.errors import InputError
from surgeon.experts.masked import NEVER_CHOSEN

PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm)


def dense_weights(index: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return float32 [T, E] from choices and weights [T, K]; 0 where not chosen, and for empty slots (index E)."""
    table = torch.zeros(len(index), count + 1, dtype=torch.float32, device=index.device)
    return table.scatter_add_(1, index, weights.float())[:, :count]


class Rerouter:
    """One loaded layer's router.

    Args:
        number: of the layer, for messages.
        root: the layer, loaded.
        record: of the family: where the router lies.
        count: experts.

    Raises:
        InputError: E444 the router is not where the record says.
    """

    def __init__(self, number: int, root: nn.Module, record: ExpertRecord, count: int) -> None:
        self._number = number
        self._count = count
        try:
            self._router: Any = root.get_submodule(record.taps.router)
        except AttributeError:
            raise self._refused("its router is not where the family's record says") from None
        names = {name.rpartition(".")[2] for name in record.router.correction}
        block = root.get_submodule(record.taps.block)
        self._corrections = [
            (module, name) for module in block.modules()
            for name, value in (*module._buffers.items(), *module._parameters.items())
            if name in names and value is not None
        ]  # fmt: skip
        self._logits: Tensor | None = None
        self._beside: tuple[tuple, Mapping[str, Any]] = ((), {})

    def _refused(self, why: str) -> InputError:
        return InputError("E444", f"the routing of layer {self._number} cannot be repeated: {why}",
                          help="this family is not supported here: use --method reap")  # fmt: skip

    # ---- while the layer runs ----------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the router's logits of every call."""

        def note(product: Callable[[], Tensor]) -> Tensor:
            self._logits = product()
            return self._logits

        with self._holding(note):
            yield

    def seen(self, tokens: int) -> Tensor:
        """Return the logits of the last call, [tokens, E]."""
        logits, self._logits = self._logits, None
        if logits is None or logits.numel() != tokens * self._count:
            raise self._refused("its router does not multiply tokens with one row for each expert")
        return logits.reshape(tokens, self._count).detach().clone()

    @contextmanager
    def without(self, gone: Collection[int]) -> Iterator[None]:
        """Let the layer route among the other experts."""

        def mask(product: Callable[[], Tensor]) -> Tensor:
            return self._masked(product(), gone)

        with self._holding(mask), self._uncorrected(gone):
            yield

    # ---- afterwards --------------------------------------------------------------------------------

    def weights(self, logits: Tensor, gone: Collection[int]) -> Tensor:
        """Return the weights of every expert, float32 [T, E], when tokens are routed without some experts.

        Args:
            logits: [T, E] as `seen` gave them.
        """
        given = self._masked(logits, gone)
        parameter = next(self._router.parameters())
        width = parameter.shape[-1]
        blank = torch.zeros(1, 1, dtype=parameter.dtype, device=logits.device).expand(len(logits), width)
        with self._holding(lambda product: given), self._uncorrected(gone), torch.no_grad():
            args, kwargs = self._beside
            found = self._router(blank, *args, **kwargs)
        listed = [value for value in found if isinstance(value, Tensor)] if isinstance(found, tuple) else []
        index = next((v for v in listed if v.dtype == torch.int64 and v.shape[:-1] == (len(logits),)), None)
        if index is None:
            raise self._refused("its router does not return what it chose")
        weights = [value for value in listed if value.is_floating_point() and value.shape == index.shape]
        if not weights:
            raise self._refused("its router does not return the weights of what it chose")
        return dense_weights(index, weights[-1], self._count)

    def _masked(self, logits: Tensor, gone: Collection[int]) -> Tensor:
        if not gone:
            return logits
        masked = logits.clone()
        masked[..., list(gone)] = float("-inf")
        return masked

    @contextmanager
    def _uncorrected(self, gone: Collection[int]) -> Iterator[None]:
        """Set correction biases of some experts far down: a score of zero plus a bias could still win."""
        before: list[tuple[Tensor, Tensor]] = []
        try:
            for module, name in self._corrections if gone else ():
                value = getattr(module, name).data
                before.append((value, value.clone()))
                value[..., list(gone)] = NEVER_CHOSEN
            yield
        finally:
            for value, kept in before:
                value.copy_(kept)

    @contextmanager
    def _holding(self, change: Callable[[Callable[[], Tensor]], Tensor]) -> Iterator[None]:
        """Let ``change`` decide about the router's product."""
        forward = self._router.forward
        count = self._count

        class Products(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
            ) -> Any:
                kwargs = kwargs or {}
                if func in PRODUCTS and _outputs(func, args, kwargs) == count:
                    return change(lambda: func(*args, **kwargs))
                return func(*args, **kwargs)

        def held(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._beside = args, kwargs  # some routers are handed their correction bias
            with Products():
                return forward(hidden, *args, **kwargs)

        own = self._router.__dict__.get("forward")
        self._router.forward = held
        try:
            yield
        finally:
            if own is None:
                del self._router.forward
            else:
                self._router.forward = own


def _outputs(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Return the last dimension of a product's result."""
    other = args[1] if len(args) > 1 else kwargs.get("weight", kwargs.get("mat2", kwargs.get("other")))
    assert isinstance(other, Tensor)
    return int(other.shape[0] if func is functional.linear else other.shape[-1])
