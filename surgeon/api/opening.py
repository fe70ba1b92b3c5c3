"""One model opened for reading, and where what is derived from it goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.derive import Source
from surgeon.errors import EnvironmentFault
from surgeon.merge.prepare import Opening, OpenModel, open_models
from surgeon.merge.references import parse_model_ref


@contextlib.contextmanager
def open_model(
    model: str | Path,
    *,
    offline: bool = False,
    weights: str = "auto",
    ignore_unlisted: bool = False,
    allow_pickle: bool = False,
    dequantize: bool = False,
) -> Iterator[OpenModel]:
    """Open one model (folder, file, hub id, MODEL+ADAPTER) for reading and close it afterwards.

    Args:
        dequantize: read a quantized model as plain numbers.

    Raises:
        SurgeonError: it does not exist or is malformed; nothing else, whatever the file system says.
    """
    try:
        reference = parse_model_ref(str(model))
        opening = Opening(offline, weights, None, ignore_unlisted, allow_pickle, dequantize)
        opened = open_models([reference], opening)[reference]
    except OSError as error:
        raise EnvironmentFault(
            "E502",
            f"cannot read {printable(str(model))}: {error.strerror or error}",
            help="give a path that this user can read",
        ) from error
    try:
        yield opened
    finally:
        close = getattr(opened.checkpoint, "close", None)
        if close is not None:
            close()


@contextlib.contextmanager
def open_source(model: str | Path | Source, **opening: Any) -> Iterator[Source]:
    """Open the one model that something is derived from; ``opening`` as in `open_model`.

    A source that is open already, such as a step's result that was not written, is given as it is and stays open.
    """
    if isinstance(model, Source):
        yield model
        return
    with open_model(model, **opening) as opened:
        yield Source(
            opened.key, opened.checkpoint, opened.ref.path, opened.located.repo, opened.located.commit
        )


def default_output(model: str | Path, ending: str) -> Path:
    """Return where a derived model goes when nobody says: beside a local model, else in the current folder."""
    path = Path(model)
    if path.exists():
        folder = path.resolve()
        return folder.parent / f"{folder.name}-{ending}"
    return Path(f"{str(model).rpartition('/')[2].partition('@')[0]}-{ending}")
