"""Fault injection: a disk that fails or kills at call N, children that are killed, limits.

A `Scenario` is one way to run a merge. `enumerate_faults` lets call 1, 2, 3, ... fail until a
run gets through, and after each failure checks the promises: the destination is what it was or
what it should become, the inputs are untouched, and the same command finishes the job with the
same bytes as an undisturbed run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checker

from surgeon import api
from surgeon.errors import SurgeonError
from surgeon.execute import Outcome, execute
from surgeon.output.disk import Disk

KILLED = 77
REPOSITORY = Path(__file__).resolve().parents[2]


class FaultyDisk(Disk):
    """Counts calls; call number ``at`` raises ``error``, or ends the process when that is None.

    Args:
        at: 1-based number of the call that fails; 0 = none.
        error: errno, or None to end the process.
        lasting: every later call that needs space fails, too (a full disk stays full).
    """

    GROWS = frozenset({"mkdir", "create", "write", "append"})

    def __init__(self, at: int = 0, error: int | None = errno.EIO, *, lasting: bool = False) -> None:
        self.at, self.error, self.lasting = at, error, lasting
        self.calls: list[tuple[str, str]] = []
        self.hit = False
        self._guard = threading.Lock()

    def _step(self, action: str, path: object) -> None:
        with self._guard:
            self.calls.append((action, _name_of(path)))
            now = len(self.calls) == self.at
            again = self.hit and self.lasting and action in self.GROWS
            self.hit = self.hit or now
        if now and self.error is None:
            os._exit(KILLED)
        if now or again:
            assert self.error is not None
            raise OSError(self.error, os.strerror(self.error), _name_of(path))


def _name_of(path: object) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    return str(path)


class NoExchange(FaultyDisk):
    """A system without an atomic exchange of two folders."""

    def exchange(self, left: Path, right: Path) -> bool:
        self._step("exchange", right)
        return False


class MountPoint(FaultyDisk):
    """The destination cannot be replaced: renaming it, or onto it, gives EBUSY (a mount point)."""

    destination: Path | None = None

    def rename(self, source: Path, target: Path) -> None:
        if self.destination in {Path(source), Path(target)}:
            self._step("rename", target)
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))
        super().rename(source, target)

    def exchange(self, left: Path, right: Path) -> bool:
        self._step("exchange", right)
        return False


class OtherFileSystem(MountPoint):
    """As a mount point of another file system: files cannot be renamed into it either."""

    def rename(self, source: Path, target: Path) -> None:
        crosses = (self.destination in Path(target).parents) != (self.destination in Path(source).parents)
        if crosses:
            self._step("rename", target)
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(target))
        super().rename(source, target)


def plan(models: list[Path] | list[str], **options: Any):
    """Plan a merge; options as in `surgeon.merge`."""
    options.setdefault("method", "ties")
    return api.plan_merge(api.build_request(models=tuple(map(str, models)), **options)).plan


def snapshot(paths: list[Path]) -> dict[str, tuple]:
    """Return what must not change about inputs: content, mtime, inode, mode of every file."""
    found = {}
    for root in paths:
        for path in [root, *sorted(root.rglob("*"))] if root.is_dir() else [root]:
            info = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path)] = (content, info.st_mtime_ns, info.st_ino, info.st_mode, info.st_size)
    return found


def leftovers(destination: Path) -> list[str]:
    """Return hidden files and folders that belong to runs to this destination."""
    found = [p.name for p in destination.parent.iterdir() if p.name.startswith(f".{destination.name}.")]
    if destination.is_dir():
        found += [p.name for p in destination.iterdir() if p.name.startswith(".")]
    return sorted(found)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@dataclass
class Scenario:
    """One way to run.

    Attributes:
        models: inputs.
        destination: where the result goes.
        options: of the merge.
        previous: puts the earlier model in place (or removes it); called before every attempt.
        overwrite: passed on.
        disk: class of the disk.
        replaceable: False where the destination folder is filled file by file.
    """

    models: list[Path]
    destination: Path
    options: dict[str, Any] = field(default_factory=dict)
    previous: Callable[[Path], None] | None = None
    overwrite: bool = False
    disk: type[FaultyDisk] = FaultyDisk
    replaceable: bool = True
    threads: int = 1
    plan: Any = None

    def prepare(self) -> None:
        """Start from nothing, or from the previous model."""
        import shutil

        for path in list(self.destination.parent.iterdir()):
            if path.name.startswith((f".{self.destination.name}.", self.destination.name)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.previous is not None:
            self.previous(self.destination)

    def run(self, disk: FaultyDisk | None = None) -> Outcome:
        if self.plan is None:
            self.plan = plan(self.models, **self.options)
        disk = disk or self.disk()
        if isinstance(disk, MountPoint):
            disk.destination = self.destination
        return execute(
            self.plan, self.destination, threads=self.threads, overwrite=self.overwrite, disk=disk,
            memory_limit=1 << 40,
        )  # fmt: skip


def run_to_death(scenario: Scenario, at: int) -> bool:
    """Run in a forked process that ends at call ``at``; return whether it got there."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            scenario.run(scenario.disk(at, None))
            code = 0
        except BaseException as error:
            os.write(2, f"in the forked run: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in {0, KILLED}, f"the run that should die at call {at} ended with {code}"
    return code == KILLED


def run_to_failure(scenario: Scenario, at: int, error: int, lasting: bool) -> bool:
    """Run on a disk that fails at call ``at``; the failure must be a named refusal, exit code 5."""
    disk = scenario.disk(at, error, lasting=lasting)
    try:
        scenario.run(disk)
    except SurgeonError as refusal:
        assert disk.hit
        assert refusal.exit_code == 5, f"call {at} {disk.calls[at - 1]}: {refusal}"
        assert refusal.help
    except OSError as raw:
        raise AssertionError(f"call {at} {disk.calls[at - 1]} surfaced as {raw!r}") from raw
    return disk.hit


def accepted(destination: Path) -> dict[str, bytes]:
    """Return what a loader accepts at the destination: {} without config.json (folders) or file."""
    if destination.is_dir() and not (destination / "config.json").exists():
        return {}
    found = checker.tree(destination)
    return {n: c for n, c in found.items() if not n.startswith(".")}


def enumerate_faults(scenario: Scenario, error: int | None, *, lasting: bool = False, step: int = 1) -> int:
    """Let call 1, 1 + step, ... fail until a run succeeds; check everything after each; return the calls."""
    before_inputs = snapshot(scenario.models)
    scenario.prepare()
    old = accepted(scenario.destination)
    scenario.run()
    checker.check(scenario.destination)
    new = checker.tree(scenario.destination)
    assert not leftovers(scenario.destination)
    at, open_files = 1, descriptors()
    while True:
        scenario.prepare()
        if error is None:
            struck = run_to_death(scenario, at)
        else:
            struck = run_to_failure(scenario, at, error, lasting)
        now = accepted(scenario.destination)
        if scenario.destination.suffix == ".safetensors":  # the sidecar only describes; the file decides
            name = scenario.destination.name
            assert now.get(name) in {old.get(name), new[name]}, f"call {at}: a third state"
        else:
            allowed = [old, new] if scenario.replaceable else [old, new, {}]
            assert now in allowed, f"call {at}: a third state: {sorted(now)}"
        assert snapshot(scenario.models) == before_inputs, f"call {at}: an input was touched"
        outcome = scenario.run()
        assert checker.tree(scenario.destination) == new, f"call {at}: the resumed run gave other bytes"
        checker.check(scenario.destination)
        assert not leftovers(scenario.destination), f"call {at}: {leftovers(scenario.destination)} remain"
        assert descriptors() <= open_files + 2, f"call {at}: descriptors leak"
        if not struck:
            assert outcome.unchanged
            return at - 1
        at += step


# --- children -------------------------------------------------------------------------------

_CHILD = """
import json, sys, time, threading
sys.path[:0] = [{repository!r}, {faults!r}]
job = json.loads(sys.argv[1])
import resource
for name, value in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
import kit
from surgeon.errors import SurgeonError
from surgeon.execute import execute
class Slow(kit.FaultyDisk):
    def _step(self, action, path):
        super()._step(action, path)
        if len(self.calls) == 3:
            print("writing", flush=True)
        time.sleep(job["pause"])
try:
    plan = kit.plan(job["models"], **job["options"])
    outcome = execute(plan, kit.Path(job["output"]), threads=job["threads"], overwrite=job["overwrite"],
                      memory_limit=job["memory_limit"], disk=Slow())
except SurgeonError as error:
    print(json.dumps({{"code": error.code, "message": error.message, "help": error.help,
                       "loaded": sorted(set(sys.modules) & {{"torch", "transformers"}})}}), flush=True)
    sys.exit(error.exit_code)
peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps({{"resumed": outcome.resumed_items, "unchanged": outcome.unchanged, "peak": peak,
                   "loaded": sorted(set(sys.modules) & {{"torch", "transformers"}})}}), flush=True)
"""


@dataclass
class Child:
    """A merge in a process of its own (library only: it must not import torch)."""

    process: subprocess.Popen

    def wait_until_writing(self, timeout: float = 30) -> None:
        line = self.process.stdout.readline()
        assert line.strip() == "writing", (line, self.process.stderr.read() if not line else "")

    def finish(self, timeout: float = 60) -> tuple[int, dict[str, Any], str]:
        """Return exit code, the last JSON line, stderr."""
        out, err = self.process.communicate(timeout=timeout)
        lines = [line for line in out.splitlines() if line.startswith("{")]
        return self.process.returncode, json.loads(lines[-1]) if lines else {}, err

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.process.stdout.close()
        self.process.stderr.close()
        return code


def child(
    models: list[Path],
    output: Path,
    *,
    threads: int = 1,
    overwrite: bool = False,
    pause: float = 0.0,
    memory_limit: int = 1 << 40,
    limits: dict[str, int] | None = None,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    **options: Any,
) -> Child:
    """Start a merge in a child process.

    Args:
        pause: seconds to sleep at every disk call, so that kills find it at work.
        limits: resource limits, e.g. {"RLIMIT_FSIZE": 4096}.
        environment: added to this process's.
    """
    job = {
        "models": [str(m) for m in models], "output": str(output), "threads": threads, "overwrite": overwrite,
        "pause": pause, "memory_limit": memory_limit, "limits": limits or {}, "options": options,
    }  # fmt: skip
    code = _CHILD.format(repository=str(REPOSITORY), faults=str(Path(__file__).parent))
    return Child(
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(job)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(environment or {})}, cwd=cwd,
        )
    )  # fmt: skip


def surgeon(
    *arguments: str | Path,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess:
    """Run the command line and wait."""
    return subprocess.run(
        [sys.executable, "-m", "surgeon", *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})}, cwd=cwd,
    )  # fmt: skip


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail instead of hanging."""

    def stop(number, frame):
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def limit(name: int, value: int) -> Iterator[None]:
    """Lower a soft resource limit of this process for a while."""
    before = resource.getrlimit(name)
    resource.setrlimit(name, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(name, before)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
