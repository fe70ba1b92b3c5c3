"""In place of writing a plan's result: everything but its weights, and a view that computes those."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon import __version__, engine
from surgeon.checkpoint.header import printable
from surgeon.derive import Source
from surgeon.errors import OutputConflict
from surgeon.execute import Outcome, disk_fault, fit_memory, input_locations, same_inputs, write_companions
from surgeon.output import staging
from surgeon.output.disk import Disk
from surgeon.output.manifest import CHECKSUMS, MANIFEST, checksums, sha256
from surgeon.output.modelcard import short_name
from surgeon.plan import Plan
from surgeon.unwritten.view import Unwritten
from surgeon.verify.static import verify_unwritten

WEIGHTS = ".safetensors"


@dataclass
class Leaving:
    """Takes the place of `surgeon.execute.execute` where only the next step reads a result.

    Attributes:
        source: the model, to be read by the next step; None until it was made.
    """

    source: Source | None = None

    def __call__(
        self, plan: Plan, destination: Path, *, threads: int, overwrite: bool = False, resume: bool = True,
        memory_limit: int | None = None, progress: engine.Progress | None = None, stop: threading.Event | None = None,
        input_paths: list[Path] | None = None,
    ) -> Outcome:  # fmt: skip
        """Compute a plan's only model without keeping its weights; arguments and result as of `execute`.

        What an earlier call left is taken up when it is of the same plan and the same inputs.

        Raises:
            SurgeonError: as `execute`; nothing is left then.
        """
        began = time.perf_counter()
        inputs = input_paths if input_paths is not None else input_locations(plan)
        staging.check_destination(destination, inputs, overwrite=overwrite, is_file=False)
        if plan.models[""].config is None:
            raise OutputConflict("E601", f"the result is one file without a config; {printable(destination.name)} is a folder",
                                 help="give model folders to get a model folder")  # fmt: skip
        _, threads, _ = fit_memory(plan, threads, memory_limit)
        view = Unwritten(plan, destination, threads=threads, stop=stop)
        timing = engine.Timing()
        try:
            body = _left(plan, destination) if resume else None
            unchanged = body is not None
            if body is None:
                verify_unwritten(view)
                result = view.seal(progress)
                body, timing = _write(plan, view, result, destination), result.timing
        except OSError as error:
            view.close()
            raise disk_fault(error, destination) from error
        except BaseException:
            view.close()
            raise
        view.described(body["files"])
        self.source = Source(short_name(str(destination)), view, str(destination))
        return Outcome(
            destination, {"": destination}, {"": body}, timing, 0, unchanged, time.perf_counter() - began
        )

    @contextmanager
    def looked_at(
        self, plan: Plan, folder: Path, threads: int, stop: threading.Event | None = None
    ) -> Iterator[Unwritten]:
        """Give what a plan makes, to be compared with what it must equal before it is left."""
        view = Unwritten(plan, folder, threads=threads, stop=stop)
        try:
            yield view
        finally:
            view.close()


def _write(plan: Plan, view: Unwritten, result: engine.RunResult, destination: Path) -> dict[str, Any]:
    """Put everything but the weights into its folder, all at once; return the manifest."""
    disk, beside = Disk(), destination.with_name(f".{destination.name}.unwritten")
    shutil.rmtree(beside, ignore_errors=True)
    disk.make_folder(beside)
    _, body = write_companions(
        plan, plan.models[""], view.layout, beside, result, disk, False, destination.name
    )
    if destination.exists():
        shutil.rmtree(destination)
    disk.rename(beside, destination)
    return body


def _left(plan: Plan, folder: Path) -> dict[str, Any] | None:
    """Return the manifest an earlier call left, when it is of this plan and every file but the weights is there."""
    body = left(folder)
    if body is None or body.get("plan") != plan.plan_id():
        return None
    return body if same_inputs(plan, body.get("inputs")) else None


def left(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a model that was left unwritten, undamaged and of this program; None for anything else."""
    try:
        content = (folder / MANIFEST).read_bytes()
        body = json.loads(content)
        files: dict[str, str] = body["files"]
        others = {name: digest for name, digest in files.items() if not name.endswith(WEIGHTS)}
        if body["program"]["version"] != __version__ or any(folder.glob(f"*{WEIGHTS}")):
            return None
        if any(sha256((folder / name).read_bytes()) != digest for name, digest in others.items()):
            return None
        sums = checksums({**files, MANIFEST: sha256(content)})
        return body if (folder / CHECKSUMS).read_bytes() == sums else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
