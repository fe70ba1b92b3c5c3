"""Under which conditions is measured, and how carefully.

Codes: E281 conditions that cannot be, E518 no such device.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from surgeon.errors import EnvironmentFault, UsageError
from surgeon.system import memory_budget, physical_cores

DTYPES = ("float32", "bfloat16", "float16")
PRECISION = 0.01
"""Half-width of the 95 % interval that is asked for: a third of the 3 % within which a target is met."""


@dataclass(frozen=True)
class Conditions:
    """Where and how exactly times are taken.

    Attributes:
        device: "cpu", "cuda" (the first GPU), "cuda:N", or "auto" (a GPU when there is one).
        dtype: precision of weights and activations; "auto" is the one the weights are stored in.
        threads: threads of torch; None takes the physical cores.
        attention: attention implementation of transformers; None keeps the default of the family.
        precision: wanted half-width of the 95 % interval, relative.
        repeat: exactly so many rounds; None measures until the precision is reached.
        time_limit: seconds after which a comparison stops, precise or not.
        memory_limit: bytes of memory for models; None asks the machine.
        seed: of token ids, orders and resampling.
    """

    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    attention: str | None = None
    precision: float = PRECISION
    repeat: int | None = None
    time_limit: float = 60.0
    memory_limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in (*DTYPES, "auto"):
            raise UsageError("E281", f'--dtype is "{self.dtype}"', help="use auto, " + ", ".join(DTYPES))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError("E281", f'--device is "{self.device}"', help="auto, cpu, cuda or cuda:N")
        if not 0 < self.precision < 1:
            raise UsageError(
                "E281", f"--precision is {self.precision:g}", help="between 0 and 1: 0.01 is 1 %"
            )
        if not self.time_limit > 0:
            raise UsageError("E281", f"--time-limit is {self.time_limit:g}", help="seconds, above 0")
        # An interval of fewer than 3 values says nothing.
        for name, value, least in (("--threads", self.threads, 1), ("--repeat", self.repeat, 3)):
            if value is not None and value < least:
                raise UsageError("E281", f"{name} is {value}", help=f"at least {least}")

    @property
    def place(self) -> str:
        """The device as torch names it.

        Raises:
            EnvironmentFault: E518 no such device.
        """
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.device == "cpu" or (self.device == "auto" and not count):
            return "cpu"
        number = int(self.device.partition(":")[2] or 0)
        if number >= count:
            raise EnvironmentFault("E518", f"{self.device} is not there: this machine has {count} CUDA devices",
                                   help="--device cpu; surgeon doctor shows what there is")  # fmt: skip
        return f"cuda:{number}"

    @property
    def cores(self) -> int:
        """Threads torch computes with."""
        return self.threads or physical_cores()

    def precision_of(self, stored: str) -> str:
        """Return the type to compute in, given the one the weights are stored in."""
        return stored if self.dtype == "auto" else self.dtype

    def memory(self) -> int:
        """Return the bytes models may take."""
        if self.memory_limit is not None:
            return self.memory_limit
        if self.place == "cpu":
            return memory_budget()
        import torch

        return int(0.9 * torch.cuda.mem_get_info(self.place)[0])

    def clock(self) -> tuple[str, Callable[[], float]]:
        """Return the clock in use, by name.

        One thread: its own CPU time, which other programs on the machine do not enter. More threads: the wall
        clock, since the CPU time of a thread knows nothing of the others. GPU: the wall clock after everything
        that was launched is done.
        """
        import time

        if self.place != "cpu":
            import torch

            def synchronised() -> float:
                torch.cuda.synchronize(self.place)
                return time.perf_counter()

            return "wall clock, synchronised", synchronised
        if self.cores == 1:
            return "CPU time of the thread", time.thread_time
        return "wall clock", time.perf_counter

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Let torch use the threads meanwhile."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.cores)
        try:
            yield
        finally:
            torch.set_num_threads(before)
