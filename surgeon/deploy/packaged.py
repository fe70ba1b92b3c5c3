"""Which packaged class loads a model folder whose layers differ, for a reader in another process."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from surgeon.deploy import decilm, per_layer
from surgeon.verify.readers import OwnCode


def code_of(folder: Path, config: Mapping[str, Any]) -> OwnCode | None:
    """Return the packaged class for a folder, None for one that stock transformers loads.

    Raises:
        InputError: E326 a code file in the folder is not the packaged one; E327 a family without such a class.
    """
    if not per_layer.is_per_layer(config):
        return None
    place = Path(str(resources.files("surgeon.deploy.modeling")))
    if config.get("model_type") == decilm.MODEL_TYPE:
        per_layer.check_own_code(folder, decilm.CODE_FILES)
        return OwnCode(place, "modeling_decilm", "DeciLMForCausalLM")
    family = per_layer.family_of(config)
    per_layer.check_own_code(folder)
    return OwnCode(place, "modeling_surgeon", family.model)
