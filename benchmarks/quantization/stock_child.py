"""Loads folders with from_pretrained as any user would, in a process of its own, and says what came of it.

    python stock_child.py JOB.json OUT.json

JOB: {"ids": token ids, "decoder": path of surgeon/verify/quantized_child.py, "jobs": [{"folder", "plain": whether it holds
plain numbers, "logits": file to write}]}. Nothing of surgeon is imported but that file. Logits are those in float32 with
decoded matrices, and those as the kernels run; of plain numbers those in float32 and in bfloat16.
auto-round changes how its process loads plain mixtures from then on: plain folders come first.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import warnings
from typing import Any

NEW = 6
"""Tokens generated."""


def plain(folder: str, logits: str, ids: Any) -> dict[str, Any]:
    """Run a plain model in both types."""
    import numpy as np
    import torch
    import transformers

    found: list[Any] = []
    info: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype=dtype
        )
        model, info = loaded
        with torch.no_grad():
            found.append(model.eval()(ids).logits.float().numpy())
    np.save(logits, np.stack(found))
    return {"folder": folder, "faults": {key: len(value) for key, value in info.items() if value}}


def tried(folder: str, logits: str, ids: Any, decoder: Any) -> dict[str, Any]:
    """Return what loading and using a folder gave; "error" where it raised."""
    import numpy as np
    import torch
    import transformers

    started = time.monotonic()
    found: dict[str, Any] = {"folder": folder}
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype="auto"
        )
        model, info = loaded
        model.eval()
        found["faults"] = {key: len(value) for key, value in info.items() if value}
        found["quantized"] = decoder.quantized_modules(model)
        with torch.no_grad():
            with decoder.decoded(model) as found["precision"]:
                exact = model(ids).logits.float().numpy()
            np.save(logits, np.stack([exact, model(ids).logits.float().numpy()]))
            options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW,
                       "min_new_tokens": NEW, "pad_token_id": 0}  # fmt: skip
            for name, cache in (("cached", True), ("uncached", False)):
                found[name] = model.generate(ids, use_cache=cache, **options)[:, ids.shape[1] :].tolist()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found["error"] = f"{type(error).__name__}: {' '.join(lines)}"[:300]
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
    spec = importlib.util.spec_from_file_location("quantized_child", job["decoder"])
    assert spec is not None and spec.loader is not None
    decoder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decoder)
    ids = torch.tensor(job["ids"])
    out = [
        plain(one["folder"], one["logits"], ids)
        if one["plain"]
        else tried(one["folder"], one["logits"], ids, decoder)
        for one in job["jobs"]
    ]
    with open(sys.argv[2], "w") as stream:
        json.dump(out, stream)


if __name__ == "__main__":
    main()
