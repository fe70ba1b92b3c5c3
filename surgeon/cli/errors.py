"""From exceptions to exit codes: one table for every command."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from surgeon.cli.output import Output
from surgeon.errors import Interrupted, SurgeonError


def as_json(error: SurgeonError) -> dict[str, Any]:
    """Return the JSON form of a refusal."""
    where = error.where
    return {
        "code": error.code,
        "message": error.message,
        "where": None
        if where is None
        else {"file": where.file, "line": where.line, "column": where.column, "tensor": where.tensor},
        "help": error.help,
        "exit_code": error.exit_code,
        "others": [as_json(other) for other in error.others],
    }


def run_command(out: Output, command: str, work: Callable[[], dict[str, Any] | None]) -> int:
    """Run a command's work; print its document or error; return the exit code.

    Anything that is not a SurgeonError is a bug: its traceback goes to a file whose path is printed.
    """
    try:
        document = work() or {}
    except SurgeonError as error:
        status = "gate-failed" if error.exit_code == 4 else "failed"
        return _failed(out, command, error, status)
    except MemoryError:
        from surgeon.errors import EnvironmentFault

        return _failed(out, command, EnvironmentFault("E504", "the memory of this process is used up",
                                                      help="set --memory-limit lower than the real limit"), "failed")  # fmt: skip
    except KeyboardInterrupt:
        return _failed(out, command, Interrupted("E130", "interrupted"), "failed")
    except ImportError as error:
        fault = _missing_package(error)
        return _bug(out, command, error) if fault is None else _failed(out, command, fault, "failed")
    except Exception as bug:
        return _bug(out, command, bug)
    code = int(document.pop("exit_code", 0))
    if out.json_mode:
        out.document(
            {"schema": 1, "command": command, "status": "ok", "exit_code": code, "error": None, **document}
        )
    return code


_OF_PACKAGES = ("E324", "E360", "E364", "E380", "E392", "E512")
"""Codes that a package which is missing or older than needed can be the reason of."""


_EXTRAS = {
    "torch": "run", "transformers": "run", "safetensors": "run", "accelerate": "run", "scipy": "run",
    "compressed_tensors": "quantize", "auto_round": "quantize", "bitsandbytes": "quantize", "gguf": "gguf",
    "xllamacpp": "gguf", "pyarrow": "data", "datasets": "data", "matplotlib": "report", "lm_eval": "eval",
}  # fmt: skip
"""Module of a package that need not be installed -> the extra that brings it, as in pyproject.toml."""


def _missing_package(error: ImportError) -> SurgeonError | None:
    """Return the refusal for an optional package that cannot be imported; None where the import is a mistake of ours."""
    from surgeon.errors import EnvironmentFault

    named = (error.name or "").partition(".")[0]
    if not named:  # raised by a package itself
        named = next((word for word in re.findall(r"\w+", str(error)) if word in _EXTRAS), "")
    if named not in _EXTRAS:
        return None
    what = "is not installed" if isinstance(error, ModuleNotFoundError) and error.name == named else f"cannot be imported: {error}"  # fmt: skip
    return EnvironmentFault("E512", f"{named} {what}", help=f'pip install "model-surgeon[{_EXTRAS[named]}]"')


def package_faults(message: str) -> list[str]:
    """Say which packages are too old, and of those that the message names, which are missing (fault H7)."""
    from surgeon.python.diagnosis import packages

    named = set(re.findall(r"[\w-]+", message))
    return [
        f"{row['name']} {row['found'] or 'is missing'}: {row['needed']} or newer is needed"
        for row in packages()
        if not row["ok"] and (row["found"] or row["name"] in named)
    ]


def _failed(out: Output, command: str, error: SurgeonError, status: str) -> int:
    if error.code in _OF_PACKAGES:
        error.help = (
            "; ".join([*([error.help] if error.help else []), *package_faults(error.message)]) or None
        )
    if out.json_mode:
        out.document(
            {
                "schema": 1,
                "command": command,
                "status": status,
                "exit_code": error.exit_code,
                "error": as_json(error),
            }
        )
    out.error(error)
    return error.exit_code


def _bug(out: Output, command: str, bug: Exception) -> int:
    descriptor, path = tempfile.mkstemp(prefix="surgeon-bug-", suffix=".log")
    with os.fdopen(descriptor, "w") as stream:
        stream.write(f"surgeon {command}\n{sys.version}\n\n")
        traceback.print_exception(bug, file=stream)
    message = f"a bug in surgeon: {type(bug).__name__}: {bug}"
    help = f"the traceback is in {path}; please report it with the command you ran"
    faults = package_faults(message) if isinstance(bug, (ImportError, AttributeError, TypeError)) else []
    help = "; ".join([*faults, help])
    if out.json_mode:
        out.document(
            {"schema": 1, "command": command, "status": "failed", "exit_code": 1,
             "error": {"code": "E001", "message": message, "where": {"file": path}, "help": help, "exit_code": 1, "others": []}}
        )  # fmt: skip
    out.log(f"error[E001]: {message}")
    out.log(f"  help: {help}")
    return 1


@contextlib.contextmanager
def stop_on_signals(out: Output) -> Iterator[tuple[threading.Event, list[int]]]:
    """Turn the first SIGINT or SIGTERM into a stop request; the second one ends the process (fault A4)."""
    stop = threading.Event()
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        stop.set()
        out.log("stopping after the work in progress; again to stop at once")

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread
            previous[number] = signal.signal(number, handle)
    try:
        yield stop, received
    except Interrupted as error:
        error.exit_code = 128 + (received[0] if received else signal.SIGINT)
        error.help = error.help or "run the same command again to continue; --no-resume starts over"
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
