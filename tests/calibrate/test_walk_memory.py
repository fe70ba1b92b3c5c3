"""A pass must run where the model does not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from surgeon.calibrate.walk import Settings, Walk
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import EnvironmentFault

sys.path.insert(0, str(Path(__file__).resolve().parent))
from walk_models import model_folder, texts

LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np, torch, transformers, transformers.models.llama.modeling_llama
torch.set_num_threads(1)
from surgeon.calibrate.walk import Settings, Walk
from surgeon.checkpoint.checkpoint import open_path
class Nothing:
    def wants(self, module): return False
    def observe(self, *what): raise AssertionError
def data():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) * 1024
folder, limit, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if mode == "stream":
    walk = Walk(open_path(folder), [np.arange(3, 131)] * 4, Settings(memory_limit=limit // 2, batch_tokens=128))
    warm = Walk(open_path(folder), [np.arange(3, 20)], Settings(batch_tokens=128))  # threads and tables of torch
    steps = warm.steps(Nothing()); next(steps); next(steps); steps.close(); warm.close()
resource.setrlimit(resource.RLIMIT_DATA, (data() + limit, resource.RLIM_INFINITY))
if mode == "stream":
    walk.run(Nothing())
    print(sum(1 for _ in walk.hidden()))
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        print(len([p.data.clone() for p in model.parameters()]))
"""


@pytest.mark.slow
def test_a_model_three_times_larger_than_the_memory(tmp_path):
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=8, vocab_size=2048
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    outcome = {}
    for mode in ("stream", "whole"):
        command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(tmp_path), str(size // 3), mode]
        outcome[mode] = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert outcome["stream"].returncode == 0, outcome["stream"].stderr
    assert outcome["stream"].stdout.split()[-1] == "4"
    assert outcome["whole"].returncode != 0  # the limit is one: the whole model does not fit under it


def test_a_limit_below_one_layer_is_refused_with_the_need():
    with pytest.raises(EnvironmentFault) as caught:
        Walk(open_path(model_folder("llama")), texts(), Settings(memory_limit=1000))
    assert caught.value.code == "E504" and "MB" in caught.value.message
