"""Distillation: every term against plain torch, learning, resumption, and the folder that comes out."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from train_models import Text, disturbed, model_folder, moe_folder, read, stock, texts

from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError, Interrupted, OutputConflict, UsageError
from surgeon.structure.views import PrunedView
from surgeon.train import losses
from surgeon.train.batches import Order, batch_of, set_aside
from surgeon.train.distance import Distance, check_fit
from surgeon.train.distill import Correspondence, Distillation, Options, distill
from surgeon.train.running import Runner

CPU = torch.device("cpu")
QUICK = Options(steps=12, batch=4, rate=3e-3, held_out=0.25, checkpoint_every=5)


def runner(folder: Path) -> Runner:
    return Runner(folder, CPU, torch.float32, "float32")


@pytest.fixture
def pair(scratch) -> tuple[Path, Path]:
    teacher = model_folder("llama")
    return disturbed(teacher, scratch / "student"), teacher


def test_divergence_equals_its_definition():
    student, teacher = torch.randn(7, 11), torch.randn(7, 11)
    p, q = (torch.softmax(x.double() / 2, -1) for x in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum()
    assert losses.divergence(student, teacher, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.divergence(teacher, teacher, 3.0).item() == pytest.approx(0, abs=1e-5)


def test_square_head_ignores_padding_and_scale():
    student, teacher = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    rows = [(0, t) for t in range(5)] + [(1, 0), (1, 1)]
    a, b = (np.stack([x[r].numpy() for r in rows]) for x in (student, teacher))
    expected = ((a - b) ** 2).mean() / ((b**2).mean() + 2**-7)
    assert losses.square_head(student, teacher, valid).item() == pytest.approx(expected, rel=1e-6)
    big = losses.square_head(1000 * student, 1000 * teacher, valid).item()
    assert big == pytest.approx(expected * ((b**2).mean() + 2**-7) / (b**2).mean(), rel=1e-5)


def test_terms_equal_the_stock_models_own(pair):
    """The oracle runs every sample alone, with the library's labels and hidden states."""
    student, teacher = pair
    samples = [Text(t.ids, 4 if n % 2 else 0) for n, t in enumerate(texts(4))]
    options = Options(task=1.0, temperature=2.0)
    ours, theirs = runner(student), runner(teacher)
    distance = Distance(ours, theirs, options, check_fit(ours, theirs, options, None))
    found = distance.terms(batch_of(samples, CPU), all_terms=True)
    ce = kl = 0.0
    hidden: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    with torch.no_grad():
        for sample in samples:
            ids = torch.from_numpy(sample.ids)[None]
            labels = ids.clone()
            labels[0, : sample.answer_start] = -100
            a = stock(student)(input_ids=ids, labels=labels, output_hidden_states=True)
            b = stock(teacher)(input_ids=ids, output_hidden_states=True)
            first = max(sample.answer_start, 1)
            ce += a.loss.item() * (len(sample.ids) - first)
            p, q = (torch.log_softmax(x.logits[0, first - 1 : -1].double() / 2, -1) for x in (b, a))
            kl += 4 * (p.exp() * (p - q)).sum().item()
            hidden.append(list(zip(a.hidden_states[1:-1], b.hidden_states[1:-1], strict=True)))
    assert found["task"].item() == pytest.approx(ce, rel=1e-5)
    assert found["logit"].item() == pytest.approx(kl, rel=1e-4)
    for block in range(2):  # the library shows the last block behind the final norm
        a, b = (torch.cat([h[block][side][0] for h in hidden]) for side in (0, 1))
        here = ((a - b) ** 2).mean() / ((b**2).mean() + 2**-7)
        batch = batch_of(samples, CPU)
        seen = [r.run(batch, blocks=True).blocks[block] for r in (ours, theirs)]
        assert losses.square_head(seen[0], seen[1], batch.valid).item() == pytest.approx(
            here.item(), rel=1e-4
        )


def test_parts_of_a_step_add_up_to_one_large_batch(pair):
    student, teacher = pair
    grads = []
    for batch, accumulation in ((6, 1), (2, 3)):
        options = Options(batch=batch, accumulation=accumulation, task=0.7, token=0.0)
        ours, theirs = runner(student), runner(teacher)
        distance = Distance(ours, theirs, options, check_fit(ours, theirs, options, None))
        task = Distillation(distance, texts(10), [], options)
        for part in range(accumulation):
            task.loss(2, part)[0].backward()
        grads.append({name: p.grad.clone() for name, p in ours.model.named_parameters()})
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-3, atol=1e-5) for n in grads[0])


def test_a_student_equal_to_its_teacher_has_no_distance(pair):
    _, teacher = pair
    ours, theirs = runner(teacher), runner(teacher)
    fit = check_fit(ours, theirs, Options(), None)
    found = Distance(ours, theirs, Options(), fit).measure(texts(3), 2)
    assert found["token"] == 0
    assert found["logit"] == pytest.approx(0, abs=1e-6)
    assert found["task"] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_and_writes_the_students_folder(scratch, dtype):
    teacher = model_folder("llama")
    student = disturbed(teacher, scratch / "student", dtype=dtype)
    options = replace(QUICK, steps=60, held_out=0.25)
    record = distill(student, teacher, texts(16), options, scratch / "work", scratch / "out")
    for term in ("logit", "token"):
        assert record["after"][term] < 0.8 * record["before"][term]
    before, after = read(student), read(scratch / "out")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    assert (scratch / "out" / "config.json").read_bytes() == (student / "config.json").read_bytes()
    assert not list((scratch / "work").iterdir())
    assert not list(scratch.glob(".out*"))
    held = [texts(16)[n] for n in set_aside(16, QUICK.held_out, QUICK.seed)[1]]
    assert len(held) == record["samples_held_out"] == 4
    nll = tokens = 0.0
    with torch.no_grad():  # the figures are those of the model that was written
        for text in held:
            ids = torch.from_numpy(text.ids)[None]
            nll += stock(scratch / "out", dtype=torch.float32)(input_ids=ids, labels=ids).loss.item() * (
                len(text.ids) - 1
            )
            tokens += len(text.ids) - 1
    assert record["after"]["task"] == pytest.approx(nll / tokens, rel=1e-4)


def test_a_resumed_run_writes_the_same_bytes(pair, scratch):
    student, teacher = pair
    distill(student, teacher, texts(), QUICK, scratch / "w1", scratch / "whole")
    stop = threading.Event()
    with pytest.raises(Interrupted):
        distill(student, teacher, texts(), QUICK, scratch / "w2", scratch / "parts",
                progress=lambda step, steps: stop.set() if step == 7 else None, stop=stop)  # fmt: skip
    assert not (scratch / "parts").exists()
    record = distill(student, teacher, texts(), QUICK, scratch / "w2", scratch / "parts")
    assert record["resumed"] == 7
    assert (scratch / "whole/model.safetensors").read_bytes() == (
        scratch / "parts/model.safetensors"
    ).read_bytes()


def test_another_option_does_not_continue_the_run(pair, scratch):
    student, teacher = pair
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        distill(student, teacher, texts(), QUICK, scratch / "w", scratch / "out", stop=stop)
    record = distill(student, teacher, texts(), replace(QUICK, rate=1e-3), scratch / "w", scratch / "out")
    assert record["resumed"] is None


def test_an_encoder_learns_its_hidden_states(scratch):
    teacher = model_folder("bert")
    student = disturbed(teacher, scratch / "student")
    options = replace(QUICK, steps=8)
    record = distill(student, teacher, texts(), options, scratch / "w", scratch / "out")
    assert set(record["after"]) == {"logit", "token"}
    assert record["after"]["logit"] < record["before"]["logit"]
    assert read(student).keys() == read(scratch / "out").keys()
    with pytest.raises(UsageError) as caught:
        distill(student, teacher, texts(), replace(options, task=1.0), scratch / "w", scratch / "out2")
    assert caught.value.code == "E293"


def test_padding_does_not_change_an_encoders_distance(scratch):
    teacher = model_folder("bert")
    ours, theirs = runner(disturbed(teacher, scratch / "student")), runner(teacher)
    distance = Distance(ours, theirs, Options(), check_fit(ours, theirs, Options(), None))
    short, long = texts(1, 6), texts(1, 16, seed=1)
    assert batch_of(short + long, CPU).mask is not None
    blocks = ours.run(batch_of(short + long, CPU), blocks=True).blocks[-1][0, :6]
    alone = ours.run(batch_of(short, CPU), blocks=True).blocks[-1][0]
    assert torch.allclose(blocks, alone, atol=1e-4)
    assert math.isfinite(distance.measure(short + long, 2)["token"])


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_conv1d_and_stacked_experts_come_back_under_their_names(family, scratch):
    teacher = model_folder(family)
    student = disturbed(teacher, scratch / "student")
    distill(student, teacher, texts(4), replace(QUICK, steps=2, rate=1e-9), scratch / "w", scratch / "out")
    before, after = read(student), read(scratch / "out")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_fewer_layers_answer_to_those_that_are_named(scratch):
    """A student of the teacher's layers 0 and 2, unchanged: its first block has no distance to block 0."""
    from transformers import LlamaForCausalLM

    teacher = model_folder("llama")
    whole = stock(teacher)
    config = type(whole.config)(**{**whole.config.to_dict(), "num_hidden_layers": 2, "layer_types": None})
    small = LlamaForCausalLM(config)
    state = {n: t for n, t in whole.state_dict().items() if ".layers.1." not in n}
    small.load_state_dict({n.replace(".layers.2.", ".layers.1."): t for n, t in state.items()})
    small.save_pretrained(scratch / "student")
    ours, theirs = runner(scratch / "student"), runner(teacher)
    with pytest.raises(UsageError) as caught:
        check_fit(ours, theirs, Options(), None)
    assert caught.value.code == "E291"
    for wrong in ((0,), (2, 0), (0, 3)):
        with pytest.raises(UsageError):
            check_fit(ours, theirs, Options(), Correspondence(wrong))
    batch = batch_of(texts(2), CPU)
    a, b = ours.run(batch, blocks=True).blocks, theirs.run(batch, blocks=True).blocks
    assert losses.block_distance(a[:1], b, batch.valid, (0,)).item() == pytest.approx(0, abs=1e-9)
    record = distill(scratch / "student", teacher, texts(), QUICK, scratch / "w", scratch / "out",
                     correspondence=Correspondence((0, 2)), held_out=texts(3, seed=9))  # fmt: skip
    assert record["samples_held_out"] == 3
    assert record["after"]["logit"] < record["before"]["logit"]


def test_channels_of_a_narrower_student_are_compared():
    student, teacher = torch.randn(1, 4, 3), torch.randn(1, 4, 6)
    valid = torch.ones(1, 4, dtype=torch.bool)
    found = losses.block_distance([student], [teacher], valid, (0,), torch.tensor([0, 2, 5]))
    assert found.item() == losses.square_head(student, teacher[..., [0, 2, 5]], valid).item()


def test_blocks_are_found_where_a_class_names_its_base_wrongly():
    found = runner(moe_folder("llama4_text"))
    out = found.run(batch_of(texts(2), CPU), blocks=True)
    assert len(found.layers) == len(out.blocks) == 3
    assert all(block.shape == out.blocks[0].shape and block.shape[-1] == 32 for block in out.blocks)


def test_a_family_whose_blocks_nobody_knows_is_refused(scratch):
    config = transformers.OPTConfig(vocab_size=67, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                    ffn_dim=16, max_position_embeddings=32, word_embed_proj_dim=16)  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(scratch / "opt")
    with pytest.raises(InputError, match="layers of opt models") as caught:
        runner(scratch / "opt")
    assert caught.value.code == "E324" and "llama" in caught.value.help and caught.value.where


def test_models_and_samples_that_do_not_fit_are_refused(pair, scratch):
    student, teacher = pair
    with pytest.raises(InputError) as caught:
        distill(student, model_folder("qwen2"), texts(), QUICK, scratch / "w", scratch / "out")
    assert caught.value.code == "E410"
    for samples, code in (([], "E385"), ([Text(np.array([5, 99]))], "E383"), ([Text(np.array([5, 6]), 2)], "E387"),
                          ([Text(np.full(65, 3))], "E385")):  # fmt: skip
        with pytest.raises(InputError) as caught:
            distill(student, teacher, samples, QUICK, scratch / "w", scratch / "out")
        assert caught.value.code == code
    (scratch / "out").mkdir()
    with pytest.raises(OutputConflict) as conflict:
        distill(student, teacher, texts(), QUICK, scratch / "w", scratch / "out")
    assert conflict.value.code == "E601"


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"batch": 0}, {"precision": "fp8"}, {"task": 0.0, "logit": 0.0, "token": 0.0},
                                   {"temperature": 0}, {"held_out": 1.0}, {"seed": -1}])  # fmt: skip
def test_options_out_of_range(wrong):
    with pytest.raises(UsageError):
        Options(**wrong)


def test_every_sample_is_seen_once_an_epoch():
    order = Order(count=7, batch=2, parts=2, seed=1)
    seen = [row for step in range(7) for part in range(2) for row in order.rows(step, part)]
    assert all(sorted(seen[n : n + 7]) == list(range(7)) for n in range(0, 28, 7))
    assert seen[:7] != seen[7:14]


def test_products_in_bfloat16_keep_float32_parameters(pair, scratch):
    student, teacher = pair
    options = replace(QUICK, precision="bfloat16")
    record = distill(student, teacher, texts(), options, scratch / "w", scratch / "out")
    assert record["after"]["logit"] < record["before"]["logit"]
    assert all(t.dtype == torch.float32 for t in read(scratch / "out").values())


def test_a_student_with_layers_of_different_sizes(scratch):
    """Per-layer shapes: the folder comes back with its own configuration and loads strictly."""
    from safetensors.torch import save_file

    from surgeon.deploy import build, per_layer
    from surgeon.structure.config import pruned_config
    from surgeon.structure.cut import Cut, LayerCut
    from surgeon.structure.find import structure_of

    teacher = model_folder("llama")
    checkpoint = open_path(teacher)
    structure = structure_of(checkpoint)
    cut = Cut((LayerCut(None, tuple(range(24))), LayerCut((0, 1), None), LayerCut()))
    config, code = per_layer.finish(pruned_config(dict(checkpoint.config or {}), structure, cut))
    (scratch / "student").mkdir()
    (scratch / "student" / "config.json").write_text(json.dumps(config))
    for name, content in code:
        (scratch / "student" / name).write_bytes(content)
    view = PrunedView(checkpoint, structure, cut)
    tensors = {n: torch.tensor(view.read(n, 0, i.elements)).reshape(i.shape) for n, i in view.tensors.items()}
    save_file(tensors, scratch / "student" / "model.safetensors", metadata={"format": "pt"})
    record = distill(scratch / "student", teacher, texts(), QUICK, scratch / "w", scratch / "out")
    assert record["after"]["logit"] < record["before"]["logit"]
    assert (scratch / "out" / "config.json").read_text() == json.dumps(config)
    for name, content in code:
        (scratch / "out" / name).write_bytes(content)
    loaded = build.load(scratch / "out")
    assert loaded.model.layers[0].mlp.down_proj.weight.shape == (32, 24)
