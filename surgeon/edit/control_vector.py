"""A direction as a llama.cpp control vector: no weight changes, any architecture whose graph applies them.

A GGUF file of architecture ``controlvector`` with a tensor ``direction.N`` (F32) for each layer N whose output
is shifted. llama.cpp applies none to layer 0. Use: ``--control-vector-scaled FILE:GAMMA``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, UsageError, Where


def write(path: Path, vectors: Mapping[int, np.ndarray], model_type: str) -> None:
    """Write a control vector.

    Args:
        path: a .gguf file; replaced when it exists.
        vectors: layer -> what is added to its output, [hidden].
        model_type: for the reader's information.

    Raises:
        UsageError: E299 layer 0, no layer, or another ending.
        EnvironmentFault: E512 the gguf package is missing, E502 the file cannot be written.
    """
    if path.suffix != ".gguf":
        raise UsageError("E299", f"a control vector is a GGUF file, {printable(path.name)} does not end in .gguf",
                         help="--control-vector FILE.gguf")  # fmt: skip
    if not vectors or min(vectors) < 1:
        raise UsageError(
            "E299",
            "llama.cpp shifts the outputs of layers from 1 on, not of layer 0",
            help="--layer 1 or above",
        )
    if importlib.util.find_spec("gguf") is None:
        raise EnvironmentFault(
            "E512", "the package gguf is not installed; it writes control vectors", help="pip install gguf"
        )
    import gguf

    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(part, "controlvector")
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", max(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(path)
    except OSError as error:
        raise EnvironmentFault("E502", f"cannot write {printable(str(path))}: {error.strerror}", where=Where(str(path)),
                               help="choose another file") from error  # fmt: skip
