"""What GPTQ takes beside a layer is counted in the memory limit: refused with the number needed, and enough once it is given."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring_models import Model

from surgeon.calibrate.settings import Settings
from surgeon.errors import EnvironmentFault
from surgeon.formats.scheme import Scheme
from surgeon.quantize.sequential import Options, quantize_layers
from surgeon.quantize.workspace import reserved, workspace

CHILD = """
import json, sys, threading
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from surgeon.calibrate.matrices import matrices_of
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import open_path
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.scheme import Scheme
from surgeon.quantize import columns, forms
from surgeon.quantize.sequential import Options, quantize_layers
columns.enable(True)
small, folder, work, form, limit, tokens = sys.argv[1:]

def quantized(folder, work, limit, length):
    checkpoint = open_path(Path(folder))
    settings = Settings(threads=1, memory_limit=limit, batch_tokens=128, spill=Path(work) / "spill")
    layers = matrices_of(checkpoint, Skeleton(checkpoint, settings))
    made = forms.get(form, Reader(dtype="BF16"), "llama")
    schemes = {m.label: Scheme("int", 4, 32) for layer in layers for m in layer}
    drawn = np.random.default_rng(0)
    samples = [drawn.integers(3, 60, 128) for _ in range(length // 128)]
    return quantize_layers(checkpoint, layers, schemes, made, samples, settings, Options("gptq", clip=False), Path(work))

quantized(small, work + "-warm", None, 512)
def held(what="RssAnon"):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(what + ":")) * 1024
before, most, done = held(), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.002):
        most = max(most, held())
watching = threading.Thread(target=watch, daemon=True)
watching.start()
result = quantized(folder, work, int(limit), int(tokens))
done.set()
watching.join()
print(json.dumps({"grown": most - before, "how": sorted({r.get("shrinkage_by", "") for r in result.records})}))
"""


def quantize(model, folder, limit, tokens=256, form=None, **options):
    drawn = np.random.default_rng(0)
    samples = [drawn.integers(3, 60, 64) for _ in range(tokens // 64)]
    schemes = {m.label: Scheme("int", 4, 16) for m in model.matrices}
    return quantize_layers(model.checkpoint, model.layers, schemes, form or model.form, samples,
                           Settings(threads=1, memory_limit=limit), Options("gptq", clip=False, **options), folder)  # fmt: skip


def test_a_limit_without_room_for_gptq_is_refused_with_what_is_needed(tmp_path):
    model = Model("llama")
    with pytest.raises(EnvironmentFault) as caught:
        quantize(model, tmp_path, 1000)
    assert caught.value.code == "E504"
    said = re.search(
        r"about ([\d,]+) MB .*, ([\d,]+) MB of it to work on the layer's matrices", caught.value.message
    )
    assert said and not any(tmp_path.glob("layer-*"))


def test_what_is_reserved():
    model = Model("llama")
    pairs = [[(m, Scheme("int", 4, 16)) for m in layer] for layer in model.layers]
    kept = {few: reserved(pairs, model.form, few=few) for few in (True, False)}
    widest = max(m.columns for m in model.matrices)
    assert kept[True] > kept[False] > 4 * 3 * widest**2
    assert (
        reserved(pairs, model.form, few=False, cross=True)
        >= kept[False] + 4 * min(m.columns for m in model.matrices) ** 2
    )
    routed = Model("mixtral", num_hidden_layers=2)
    experts = [[(m, Scheme("int", 4, 16)) for m in layer if m.routed] for layer in routed.layers]
    # Experts' sums are always taken apart; two of them that read the same inputs are rounded beside each other.
    assert reserved(experts, routed.form, few=False) == reserved(experts, routed.form, few=True)
    first = [pair for pair in experts[0] if pair[0].module == experts[0][0][0].module]
    assert len(first) == 2 and workspace(first, few=True) > workspace(first[:1], few=True)
    assert reserved([[]], model.form, few=True) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("form", "tokens"), [("compressed-tensors", 512), ("auto-round", 16384)])
def test_the_peak_of_a_wide_layer_stays_under_the_limit(form, tokens, tmp_path):
    import torch
    import transformers

    base = {"num_hidden_layers": 1, "vocab_size": 64, "num_attention_heads": 32, "num_key_value_heads": 2}
    for name, width in (("small", 128), ("wide", 4096)):
        heads = {"num_attention_heads": 4} if name == "small" else {}
        config = transformers.LlamaConfig(hidden_size=width, intermediate_size=width, **{**base, **heads})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        del model

    def run(limit):
        folders = tmp_path / "small", tmp_path / "wide", tmp_path / f"work-{limit}"
        command = [sys.executable, "-W", "ignore", "-c", CHILD, *map(str, (*folders, form, limit, tokens))]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    refused = run(10_000_000)
    needed = int(re.search(r"needs about ([\d,]+) MB", refused.stderr)[1].replace(",", ""))
    ran = run((needed + 1) * 10**6)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    print(form, tokens, f"grown {said['grown'] / 1e6:,.0f} MB of {needed + 1:,}", said["how"])
    assert said["how"] == (["hold-out"] if tokens < 16384 else [""])
    assert (needed + 1) * 10**6 * 0.5 < said["grown"] <= (needed + 1) * 10**6
