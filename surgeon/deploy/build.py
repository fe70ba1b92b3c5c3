"""Building and loading models: stock ones, and ours with per-layer shapes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surgeon import architectures
from surgeon.calibrate.stock_model import base_of, holds, with_infinities
from surgeon.checkpoint.checkpoint import CONFIG_NAME
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.deploy import decilm, per_layer
from surgeon.deploy.per_layer import base_type
from surgeon.errors import EnvironmentFault, InputError, Where

_FIT = "surgeon verify MODEL compares config.json with the tensors; take both from the same download"
_KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")


def build(config: Mapping[str, Any], *, dtype: torch.dtype, device: str | torch.device = "cpu") -> nn.Module:
    """Build a model with random weights (no data at all on "meta").

    Args:
        config: config.json of a stock model, or one with ``block_configs`` (finished by
            `per_layer.finish` or not).
        dtype: type of the parameters.
        device: where they are; "meta" leaves buffers without data too.

    Returns:
        The class that ``architectures`` names when it is the library's own for the type, else the causal
        model where the type has one, else the base model; in evaluation mode.

    Raises:
        InputError: E324 the library cannot build it; E327 a family without per-layer reader.
    """
    try:
        parsed, kind = classes(config)
        with torch.device(device), quiet():
            model = kind._from_config(parsed, dtype=dtype)
    except InputError:
        raise
    except Exception as error:  # the library checks its configurations with many kinds of exceptions
        raise InputError("E324", f"the library cannot build this model: {_one_line(error)}",
                         where=Where(file=CONFIG_NAME), help=_FIT) from error  # fmt: skip
    return model.eval()


def load(folder: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Load a model folder, strictly: every tensor of the model comes from the files, and the reverse.

    Code in the folder is never run: per-layer models are loaded with the packaged classes after their
    code files were found equal to the packaged ones.

    Args:
        folder: a model folder.
        dtype: type of the parameters; None keeps the stored one.
        device: where they go.

    Raises:
        InputError: E324 config.json cannot be used; E325 tensors are missing, unexpected or of other
            shapes; E326 the code is not ours; E327 a family without per-layer reader.
        EnvironmentFault: E513 the memory is used up.
    """
    folder = Path(folder)
    config = read_json_object(folder / CONFIG_NAME)
    if per_layer.is_per_layer(config):
        own = decilm.CODE_FILES if config.get("model_type") == decilm.MODEL_TYPE else per_layer.CODE_FILES
        per_layer.check_own_code(folder, own)
    elif config.get("auto_map"):
        raise InputError("E326", f"{printable(str(folder))} needs its own code, which is not run", where=Where(str(folder)),
                         help="remove auto_map from config.json if the library knows the family")  # fmt: skip
    try:
        parsed, kind = classes(config)
        with quiet():
            model, info = kind.from_pretrained(
                folder, config=parsed, dtype="auto" if dtype is None else dtype, output_loading_info=True,
                local_files_only=True, ignore_mismatched_sizes=True, device_map=None if str(device) == "cpu" else {"": device},
            )  # fmt: skip
    except (InputError, MemoryError):
        raise
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault(
            "E513",
            f"{printable(str(folder))} does not fit into the memory of {device}",
            help="a device with more memory, or the CPU",
        ) from error
    except Exception as error:
        raise InputError("E324", f"the library cannot load {printable(str(folder))}: {_one_line(error)}",
                         where=Where(str(folder)), help=_FIT) from error  # fmt: skip
    check_complete(info, folder)
    return model.eval()


def check_complete(info: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model whose loading left anything out or made anything up (E325)."""
    findings = []
    for kind in _KINDS:
        shown = sorted(str(found) for found in info.get(kind) or ())
        if shown:
            words = kind.replace("_keys", " tensors").replace("_", " ").replace("msgs", "messages")
            findings.append(
                f"{len(shown)} {words}: {printable(', '.join(shown[:3]))}{', ...' if len(shown) > 3 else ''}"
            )
    if findings:
        raise InputError("E325", f"the model does not load as it is: {'; '.join(findings)}", where=Where(str(folder)),
                         help="surgeon verify MODEL names every tensor; the library would fill what is missing with random numbers")  # fmt: skip


def body(model: Any, folder: Path) -> tuple[Any, list[nn.Module]]:
    """Return the part of a loaded model without its head, and its layers.

    Some classes (Llama 4) name another part as their base than they have; in models with a vision part the language
    model lies one level deeper.

    Raises:
        InputError: E324 a family whose layers nothing here knows; E380 a version of the library that has them elsewhere.
    """
    family = base_type({"model_type": model.config.model_type})
    record = architectures.get(family)
    if record is None:
        raise InputError("E324", f"where the layers of {printable(family)} models lie is not known", where=Where(str(folder)),
                         help="these are known: " + ", ".join(architectures.known()))  # fmt: skip
    inside = record.prefix.removesuffix(".")
    if record.section and holds(model, f"{inside}.{record.stack}"):
        base = model.get_submodule(inside)
    else:
        base = base_of(model, record.stack)[0]
    return base, list(base.get_submodule(record.stack))


def classes(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the parsed configuration and the model class for config.json.

    Raises:
        InputError: E324 a model type the library does not know; E327 no per-layer reader.
    """
    clean = {key: value for key, value in config.items() if key not in ("_name_or_path", "auto_map")}
    if config.get("model_type") == decilm.MODEL_TYPE and per_layer.is_per_layer(config):
        kind = importlib.import_module("surgeon.deploy.modeling.modeling_decilm").DeciLMForCausalLM
        return kind.config_class.from_dict(clean), kind
    if per_layer.is_per_layer(config):
        family = per_layer.family_of(config)
        finished, _ = per_layer.finish(clean)
        module = importlib.import_module("surgeon.deploy.modeling.modeling_surgeon")
        kind = getattr(module, family.model)
        return kind.config_class.from_dict(finished), kind
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            "E324",
            f"the library knows no {printable(str(model_type))} models",
            where=Where(file=CONFIG_NAME),
            help=f"transformers {transformers.__version__} is installed; a newer one may know them: pip install --upgrade transformers",
        )
    parsed = CONFIG_MAPPING[str(model_type)].from_dict(with_infinities(clean))
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if (
        isinstance(found, type)
        and issubclass(found, transformers.PreTrainedModel)
        and getattr(found, "config_class", None) is type(parsed)
    ):
        return parsed, found
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(parsed) in mapping:
            return parsed, mapping[type(parsed)]
    raise InputError(
        "E324",
        f"the library has no model class for {printable(str(model_type))}",
        where=Where(file=CONFIG_NAME),
        help="models of text can be run: those with a causal class of transformers, and encoders",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's reports and progress bars off the terminal; what matters is raised here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(f"{type(error).__name__}: {' '.join(lines)}"[:300])
