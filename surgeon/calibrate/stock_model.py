"""Building the library's own model of a checkpoint, without data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surgeon import architectures
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where


def kept_in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return a pattern of the tensor names that the library keeps in float32 in a model of 16 bits."""
    names = sorted(model._get_dtype_plan(dtype))
    return re.compile("|".join(name.replace("*", ".*") for name in names)) if names else None


def build(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Build the stock model of a checkpoint on the meta device."""
    config = checkpoint.config
    if config is None:
        raise InputError("E380", f"{checkpoint.label} has no config.json, so there is no model to run",
                         where=Where(checkpoint.label), help="give the model folder, or --config")  # fmt: skip
    model_type = config.get("model_type")
    record = architectures.get(model_type)
    if record is None or model_type not in CONFIG_MAPPING:
        raise InputError(
            "E380", f"{checkpoint.label} is a {printable(str(model_type))} model; such models cannot be run layer by layer",
            where=Where(checkpoint.label), help="these can: " + ", ".join(architectures.known()),
        )  # fmt: skip
    if config.get("quantization_config"):
        raise InputError("E381", f"{checkpoint.label} is quantized", where=Where(checkpoint.label),
                         help="use the model it was made from, or dequantize it first")  # fmt: skip
    clean = {key: value for key, value in config.items() if key not in ("auto_map", "_name_or_path", "dtype", "torch_dtype")}  # fmt: skip
    try:
        parsed = CONFIG_MAPPING[str(model_type)].from_dict(clean)
        kind = _class_of(parsed, config)
        with torch.device("meta"), _quiet():
            model = kind._from_config(parsed, dtype=dtype)
    except InputError:
        raise
    except Exception as error:  # the library checks its configurations with many kinds of exceptions
        raise InputError("E380", f"the library cannot build {checkpoint.label}: {type(error).__name__}: {str(error)[:200]}",
                         where=Where(checkpoint.label), help="check config.json") from error  # fmt: skip
    return model.eval().requires_grad_(False)


def _class_of(parsed: Any, config: Mapping[str, Any]) -> Any:
    """Return the model class config.json names when it is the library's own for this type, else the usual one."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if (
        isinstance(found, type)
        and issubclass(found, transformers.PreTrainedModel)
        and getattr(found, "config_class", None) is type(parsed)
    ):
        return found
    usual = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if parsed.model_type == "bert":
        usual = transformers.MODEL_FOR_MASKED_LM_MAPPING
    return usual[type(parsed)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from printing about models without data."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
