"""Models whose layers differ, seen at the sizes of their source: equal outputs, evaluation layer by layer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))
import commands
from deploy_models import FAMILIES, cut_folders, logits, write

from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy.build import load
from surgeon.deploy.expanded import ExpandedView
from surgeon.errors import InputError
from surgeon.evaluate.perplexity import token_losses
from surgeon.evaluate.texts import Passage


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_model_of_the_expanded_tensors_computes_the_same(family, scratch):
    masked, pruned = cut_folders(family, scratch)
    view = ExpandedView(open_path(pruned, "pruned"))
    assert (
        view.config is not None and view.config["model_type"] == family and "block_configs" not in view.config
    )
    stock = write(view, scratch / "expanded", finish=False)
    found = logits(load(stock))
    assert float((found - logits(load(pruned))).abs().max()) < 2e-5
    assert float((found - logits(load(masked))).abs().max()) < 2e-5


def test_every_stretch_of_a_tensor_reads_what_the_whole_reads(scratch):
    _, pruned = cut_folders("llama", scratch)
    view = ExpandedView(open_path(pruned, "pruned"))
    drawn = np.random.default_rng(0)
    for name, info in view.tensors.items():
        whole = view.read(name, 0, info.elements)
        start, stop = sorted(drawn.integers(0, info.elements + 1, 2).tolist())
        assert np.array_equal(view.read(name, start, stop), whole[start:stop]), name


def test_tensors_that_do_not_fit_the_blocks_are_refused(scratch):
    _, pruned = cut_folders("llama", scratch)
    config = json.loads((pruned / "config.json").read_text())
    config["block_configs"][0]["ffn"]["intermediate_size"] -= 1
    (pruned / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"layers\.0\.mlp.* by block_configs"):
        ExpandedView(open_path(pruned, "pruned"))


def test_perplexity_streamed_equals_that_of_the_whole_model(scratch):
    _, pruned = cut_folders("qwen3", scratch)
    passages = [np.random.default_rng(n).integers(6, 281, length) for n, length in enumerate((20, 31))]
    streamed = token_losses(
        ExpandedView(open_path(pruned, "pruned")), [Passage(ids, 1) for ids in passages], Settings()
    )
    model = load(pruned)
    for ids, losses in zip(passages, streamed, strict=True):
        tokens = torch.from_numpy(ids)[None]
        with torch.no_grad():
            own = torch.nn.functional.cross_entropy(
                model(input_ids=tokens).logits[0, :-1], tokens[0, 1:], reduction="none"
            )
        assert np.allclose(np.asarray(losses), own.numpy(), atol=1e-4)


def test_eval_answers_measures_perplexity_and_compares_with_the_source(scratch, capsys):
    _, pruned = cut_folders("qwen2", scratch)
    questions = scratch / "q.jsonl"
    questions.write_text('{"question": "three plus five", "answer": "eight"}\n')
    text = scratch / "text.jsonl"
    text.write_text('{"text": "three plus five is eight two plus two is four"}\n' * 3)
    ran = commands.run(capsys, "eval", pruned, "--questions", questions, "--max-new-tokens", 4, "--perplexity", text,
                       "--kl", scratch / "source", "--text", text, "--threads", 1, "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    metrics = ran.document["metrics"]
    assert (
        metrics["perplexity"]["value"] > 1
        and metrics["kl"]["value"] > 0
        and metrics["tokens_mean"]["value"] > 0
    )


def test_eval_does_not_run_code_that_was_changed(scratch, capsys):
    _, pruned = cut_folders("qwen2", scratch)
    marker = scratch / "ran"
    code = pruned / "modeling_surgeon.py"
    code.write_text(f"open({str(marker)!r}, 'w')\n" + code.read_text())
    questions = scratch / "q.jsonl"
    questions.write_text('{"question": "three plus five", "answer": "eight"}\n')
    ran = commands.run(
        capsys, "eval", pruned, "--questions", questions, "--max-new-tokens", 4, "--threads", 1
    )
    assert ran.code == 3 and "error[E326]" in ran.err and not marker.exists()
