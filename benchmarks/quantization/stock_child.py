"""Loads folders with from_pretrained as any user would, in a process of its own, and says what came of it.

    python stock_child.py JOB.json OUT.json

JOB: {"ids": token ids, "jobs": [{"folder": ..., "logits": file to write}, ...]}. Nothing of surgeon is imported.
auto-round changes how its process loads plain mixtures from then on: plain folders come first.
"""

from __future__ import annotations

import json
import sys
import time
import warnings

NEW = 6


def quantized_modules(model) -> dict[str, int]:
    """Count modules that hold quantized weights, by class."""
    found: dict[str, int] = {}
    for module in model.modules():
        kind = type(module)
        held = any(hasattr(module, name) for name in ("weight_packed", "qweight"))
        own = kind.__module__.startswith("bitsandbytes")
        eight = str(getattr(getattr(module, "weight", None), "dtype", "")) == "torch.float8_e4m3fn"
        if held or own or eight:
            found[kind.__name__] = found.get(kind.__name__, 0) + 1
    return found


def tried(folder: str, logits: str, ids) -> dict:
    import numpy as np
    import torch
    import transformers

    started = time.monotonic()
    found: dict = {"folder": folder}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype="auto"
        )
        model.eval()
        found["faults"] = {key: len(value) for key, value in info.items() if value}
        found["quantized"] = quantized_modules(model)
        with torch.no_grad():
            np.save(logits, model(ids).logits.float().numpy())
            options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW,
                       "min_new_tokens": NEW, "pad_token_id": 0}  # fmt: skip
            for name, cache in (("cached", True), ("plain", False)):
                found[name] = model.generate(ids, use_cache=cache, **options)[:, ids.shape[1] :].tolist()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found["error"] = f"{type(error).__name__}: {' '.join(lines)}"[:400]
    found["seconds"] = time.monotonic() - started
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with open(sys.argv[1]) as stream:
        job = json.load(stream)
    ids = torch.tensor(job["ids"])
    out = [tried(one["folder"], one["logits"], ids) for one in job["jobs"]]
    with open(sys.argv[2], "w") as stream:
        json.dump(out, stream)


if __name__ == "__main__":
    main()
