"""Peak memory of using a model, measured in a process of its own.

Codes: E517 it did not fit, E516 to E518 as in the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import surgeon
from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, InputError, Interrupted, UsageError, Where
from surgeon.measure.conditions import Conditions
from surgeon.measure.environment import Environment
from surgeon.measure.workload import Workload

_KINDS = {"UsageError": UsageError, "InputError": InputError, "EnvironmentFault": EnvironmentFault}


@dataclass(frozen=True)
class Peak:
    """Peak memory in bytes after each stage; each contains the ones before.

    Attributes:
        libraries: the process before the model is loaded.
        load: after loading.
        prefill: after one prefill of the workload.
        decode: after the decode steps; None for an encoder.
        weights: bytes of the model's parameters.
        device: peak on the GPU as the allocator counts it; None on a CPU.
    """

    libraries: int
    load: int
    prefill: int
    decode: int | None
    weights: int
    device: int | None
    environment: Environment

    @property
    def total(self) -> int:
        """Peak of it all: on the GPU when there is one."""
        return self.device if self.device is not None else (self.decode or self.prefill)


def peak(
    folder: Path, workload: Workload, conditions: Conditions, *, stop: threading.Event | None = None
) -> Peak:
    """Load a model, run one prefill and a few decode steps, in a fresh process; return the peaks.

    Raises:
        InputError: the model does not load. EnvironmentFault: E517 the process ran out of memory.
        Interrupted: E130.
    """
    settings = {k: v for k, v in asdict(conditions).items()}
    with tempfile.TemporaryDirectory(prefix="surgeon-memory-") as place:
        answer = Path(place) / "answer.json"
        request = {
            "folder": str(folder.absolute()),
            "workload": workload.document(),
            "conditions": settings,
            "answer": str(answer),
        }
        parts = [str(Path(surgeon.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, "-m", "surgeon.measure.memory_child"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in parts if p)},
        )  # fmt: skip
        errors = _finish(process, json.dumps(request), stop)
        document: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    if "error" in document:
        error = document["error"]
        where = Where(error["where"]) if error["where"] else None
        raise _KINDS[error["kind"]](error["code"], error["message"], where=where, help=error["help"])
    if process.returncode or "peak" not in document:
        lines = [line for line in errors.splitlines() if line.strip()]
        reason = (
            f"killed by signal {-process.returncode}"
            if process.returncode < 0
            else (lines[-1] if lines else "no answer")
        )
        raise EnvironmentFault("E517", f"the model could not be used within this machine's memory: {printable(reason[:200])}",
                               where=Where(str(folder)), help="--dtype bfloat16, or a machine with more memory")  # fmt: skip
    return Peak(**document["peak"], environment=Environment.from_document(document["environment"]))


def _finish(process: subprocess.Popen[str], request: str, stop: threading.Event | None) -> str:
    """Send the request and wait; the answer is a file, what is said on stderr comes back."""
    assert process.stdin is not None and process.stderr is not None
    said: list[str] = []
    reader = threading.Thread(
        target=lambda: said.append(process.stderr.read() if process.stderr else ""), daemon=True
    )
    reader.start()
    try:
        process.stdin.write(request)
        process.stdin.close()
        while process.poll() is None:
            if stop is not None and stop.is_set():
                raise Interrupted("E130", "interrupted while measuring")
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join()
        process.stderr.close()
    return "".join(said)
