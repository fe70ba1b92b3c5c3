"""Hidden states at the borders of layers, several borders at a time: in memory while they fit, then in files.

Without a folder of its own a pass leaves nothing behind. With one, what is stored stays there under its name,
with digests, for a pass that continues later.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from surgeon.calibrate.activations import Activations, InFile, InMemory
from surgeon.errors import EnvironmentFault, Where

TEMPORARY = "surgeon-activations-"
"""What folders of files begin with that go with the pass."""


class Boundaries:
    """Makes and forgets stores of the same blocks, one block a batch. A context manager.

    Args:
        shapes: of each batch's hidden states.
        dtype: of all of them.
        limit: bytes that may lie in memory.
        folder: where stores lie, also those that outlive the pass; None keeps nothing beyond it and puts files
            where the system has temporary ones. Nobody else may use the folder meanwhile.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, limit: int, folder: Path | None
    ) -> None:
        self._shapes = list(shapes)
        self._dtype = dtype
        self._folder = folder
        size = torch.empty(0, dtype=dtype).element_size()
        self.bytes = sum(torch.Size(shape).numel() for shape in shapes) * size
        self.in_memory = limit // max(1, self.bytes)
        self._held: list[Activations] = []
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._made = 0
        for left in folder.glob(f"{TEMPORARY}*") if folder is not None else ():
            shutil.rmtree(left, ignore_errors=True)  # of a pass that was killed

    def __enter__(self) -> Boundaries:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for store in list(self._held):
            self.close(store)
        if self._temporary is not None:
            self._temporary.cleanup()

    def passing(self) -> Activations:
        """Return a store that goes with the pass."""
        if sum(isinstance(store, InMemory) for store in self._held) < self.in_memory:
            return self._keep(InMemory(len(self._shapes)))
        if self._temporary is None:
            try:
                self._temporary = tempfile.TemporaryDirectory(
                    prefix=TEMPORARY, dir=self._folder, ignore_cleanup_errors=True
                )
            except OSError as error:
                raise EnvironmentFault("E502", f"cannot write activations: {error.strerror}", where=Where(str(self._folder or tempfile.gettempdir())),
                                       help="choose another folder for them") from error  # fmt: skip
        self._made += 1
        return self._keep(InFile(Path(self._temporary.name) / f"{self._made}.bin", self._shapes, self._dtype))

    def lasting(self, name: str) -> Activations:
        """Return a store that outlives the pass under a name, or `passing` where there is no folder."""
        if self._folder is None:
            return self.passing()
        return self._keep(InFile(self._folder / f"{name}.bin", self._shapes, self._dtype, kept=True))

    def found(self, name: str, digests: Sequence[str]) -> InFile | None:
        """Return a store of an earlier pass when every block is what it was, else None."""
        assert self._folder is not None
        path = self._folder / f"{name}.bin"
        if not path.is_file() or len(digests) != len(self._shapes):
            return None
        store = InFile(path, self._shapes, self._dtype, existing=True, kept=True)
        if path.stat().st_size != store.bytes or any(
            store.digest(n) != digest for n, digest in enumerate(digests)
        ):
            store.close()
            return None
        store.digests = list(digests)
        self._keep(store)
        return store

    def close(self, store: Activations) -> None:
        """Release a store."""
        self._held.remove(store)
        store.close()

    def _keep(self, store: Activations) -> Activations:
        self._held.append(store)
        return store
