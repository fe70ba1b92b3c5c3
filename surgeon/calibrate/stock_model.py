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
from surgeon.calibrate import input_gated
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where

LIBRARY_TYPES = {"kimi_k2": "deepseek_v3"}
"""Model types whose class the library has under another name."""


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
    library = LIBRARY_TYPES.get(str(model_type), str(model_type))
    if record is None or library not in CONFIG_MAPPING:
        raise InputError(
            "E380", f"{checkpoint.label} is a {printable(str(model_type))} model; such models cannot be run layer by layer",
            where=Where(checkpoint.label), help="these can: " + ", ".join(architectures.known()),
        )  # fmt: skip
    if config.get("quantization_config"):
        raise InputError("E381", f"{checkpoint.label} is quantized", where=Where(checkpoint.label),
                         help="use the model it was made from, or dequantize it first")  # fmt: skip
    clean = {key: value for key, value in config.items() if key not in ("auto_map", "_name_or_path", "dtype", "torch_dtype")}  # fmt: skip
    try:
        parsed = CONFIG_MAPPING[library].from_dict(with_infinities({**clean, "model_type": library}))
        parsed = parsed.get_text_config() if record.section else parsed
        kind = _class_of(parsed, config)
        with torch.device("meta"), _quiet():
            model = kind._from_config(parsed, dtype=dtype)
    except InputError:
        raise
    except Exception as error:  # the library checks its configurations with many kinds of exceptions
        raise InputError("E380", f"the library cannot build {checkpoint.label}: {type(error).__name__}: {str(error)[:200]}",
                         where=Where(checkpoint.label), help="check config.json") from error  # fmt: skip
    input_gated.adapt(model)
    return model.eval().requires_grad_(False)


def base_of(model: Any, stack: str) -> tuple[Any, str]:
    """Return the part of a model without its head, and the beginning of its parameters' names ("model.", or "").

    Args:
        stack: path of the layers inside that part. Some classes (Llama 4) name another part than they have.
    """
    for base, prefix in ((model.base_model, f"{model.base_model_prefix}."),
                         *((part, f"{name}.") for name, part in model.named_children())):  # fmt: skip
        if holds(base, stack):
            return base, "" if base is model else prefix
    raise InputError("E380", f"the library's {type(model).__name__} has no layers where its family has them: {stack}",
                     help="this version of the library is not known here")  # fmt: skip


def holds(module: Any, path: str) -> bool:
    """Say whether a module has a part at a path."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


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


def with_infinities(value: Any) -> Any:
    """Return a configuration with the infinite numbers that the library writes as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: with_infinities(inner) for key, inner in value.items()}
    return [with_infinities(inner) for inner in value] if isinstance(value, list) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from printing about models without data."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
