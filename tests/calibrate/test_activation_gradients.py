"""Gated activations and their gradients against autograd on the library's whole model with its own expert code."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
from walk_models import model_folder, stock

from surgeon.calibrate import activation_pass, forward_and_back
from surgeon.calibrate import head as head_module
from surgeon.calibrate.activation_gradients import activation_gradients, spilled_bytes
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import EnvironmentFault, InputError, Interrupted

CPU = Settings(threads=1)


@dataclass(frozen=True)
class Sample:
    ids: np.ndarray
    answer_start: int = 0
    line: int = 0
    domain: str = ""


def some_samples(lengths=(17, 16, 17, 9, 18), starts=(0, 5, 1, 4, 12), seed=3):
    """Two equal and two nearly equal lengths, so that batches are padded; some with a prompt."""
    drawn = np.random.default_rng(seed)
    return [
        Sample(drawn.integers(3, 67, n), start, line)
        for line, (n, start) in enumerate(zip(lengths, starts, strict=True), 1)
    ]


class Rows:
    """Keeps what it receives, by (layer, expert)."""

    identity = "rows"

    def __init__(self):
        self.a: dict[tuple[int, int], torch.Tensor] = {}
        self.g: dict[tuple[int, int], torch.Tensor] = {}
        self.down: dict[tuple[int, int], torch.Tensor] = {}
        self.layers: list[int] = []

    def gated(self, found):
        place = (found.layer, found.expert)
        assert found.activations.shape == found.gradients.shape and len(found.activations)
        assert not found.activations.requires_grad and not found.gradients.requires_grad
        self.layers.append(found.layer)
        for held, value in ((self.a, found.activations), (self.g, found.gradients)):
            held[place] = torch.cat([held[place], value]) if place in held else value.clone()
        self.down[place] = found.down.clone()

    def state(self):
        tables = {"a": self.a, "g": self.g, "down": self.down}
        return {f"{n}:{p[0]}:{p[1]}": v.numpy() for n, t in tables.items() for p, v in t.items()}

    def restore(self, state):
        for name, value in state.items():
            table, layer, expert = name.split(":")
            getattr(self, table)[int(layer), int(expert)] = torch.from_numpy(value.copy())


class Watch(TorchFunctionMode):
    """Sees every product with an expert's down projection inside the library's own code, and its input."""

    def __init__(self, model):
        super().__init__()
        self.downs = {}
        for name, parameter in model.named_parameters():
            if name.endswith("experts.down_proj"):
                layer = int(name.split("layers.")[1].split(".")[0])
                self.downs[parameter.untyped_storage().data_ptr()] = (layer, parameter)
        self.seen: list[tuple[int, int | None, torch.Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            weight = args[1]
            found = self.downs.get(weight.untyped_storage().data_ptr())
            if found is not None:
                layer, whole = found
                expert = (weight.data_ptr() - whole.data_ptr()) // (whole[0].numel() * whole.element_size())
                args[0].retain_grad()
                self.seen.append((layer, expert, args[0]))
        if func is torch.bmm and args[1].untyped_storage().data_ptr() in self.downs:
            args[0].retain_grad()
            self.seen.append((self.downs[args[1].untyped_storage().data_ptr()][0], None, args[0]))
        return func(*args, **(kwargs or {}))

    def by_expert(self):
        """Yield (layer, expert), activations and gradients; of products with all experts the rows that are not zero."""
        for layer, expert, a in self.seen:
            values, gradients = a.detach(), a.grad
            if expert is not None:
                yield (layer, expert), values.reshape(-1, a.shape[-1]), gradients.reshape(-1, a.shape[-1])
                continue
            for number in range(len(values)):
                routed = values[number].abs().sum(1) > 0
                if routed.any():
                    yield (layer, number), values[number][routed], gradients[number][routed]


def plain(folder, samples, dtype=torch.float32):
    """Return loss, activations and gradients of the stock model, each sample on its own."""
    model = stock(folder, dtype=dtype)
    with contextlib.suppress(ValueError):  # llama4 has none to choose from
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # so that everything has a graph whatever comes first
    total, rows = 0.0, Rows()
    for sample in samples:
        ids = torch.as_tensor(sample.ids)[None]
        with Watch(model) as watch:
            logits = model(input_ids=ids, use_cache=False).logits[0]
        first = max(sample.answer_start, 1)
        loss = torch.nn.functional.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum")
        loss.backward()
        total += loss.item()
        for place, a, gradient in watch.by_expert():
            for held, value in ((rows.a, a), (rows.g, gradient)):
                held[place] = torch.cat([held[place], value]) if place in held else value
    return total, rows


def in_order(rows, place):
    """Return activations and gradients of one expert, rows sorted by the activations' sum."""
    order = torch.argsort(rows.a[place].double().sum(1))
    return rows.a[place][order], rows.g[place][order]


def worst_difference(found, expected):
    """Return the largest relative difference of activations and of gradients over all experts."""
    assert found.a.keys() == expected.a.keys()
    worst = [0.0, 0.0]
    for place in expected.a:
        assert found.a[place].shape == expected.a[place].shape, place
        for n, (one, other) in enumerate(zip(in_order(found, place), in_order(expected, place), strict=True)):
            worst[n] = max(worst[n], float((one.double() - other.double()).norm() / other.double().norm()))
    return worst


def measured(folder, samples, settings=CPU, **options):
    rows = Rows()
    loss = activation_gradients(open_path(folder), samples, rows, settings, **options)
    return loss, rows


FAMILIES = [
    ("mixtral", ()),
    ("qwen3_moe", ()),
    ("deepseek_v3", ()),
    ("gpt_oss", ()),
    ("granitemoe", (("logits_scaling", 3.0), ("residual_multiplier", 0.5))),
    ("qwen2_moe", (("tie_word_embeddings", True),)),
    ("nemotron_h", ()),  # no gate: relu^2(up x)
    ("llama4_text", ()),  # the routing weight multiplies what enters an expert
]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("family", "extra"), FAMILIES, ids=lambda v: v if isinstance(v, str) else "")
def test_everything_equals_autograd_on_the_stock_model(family, extra, streamed):
    folder, samples = model_folder(family, extra), some_samples()
    expected_loss, expected = plain(folder, samples)
    loss, found = measured(folder, samples, Settings(threads=1, stream_experts=streamed, batch_tokens=40))
    assert loss.total == pytest.approx(expected_loss, rel=2e-6)
    assert loss.tokens == sum(len(s.ids) - max(s.answer_start, 1) for s in samples)
    differences = worst_difference(found, expected)
    assert max(differences) < 2e-5, differences


def test_the_clamp_of_gpt_oss_is_at_work_and_its_gradients_are_right():
    folder, samples = model_folder("gpt_oss", (("swiglu_limit", 0.5),)), some_samples()
    _, expected = plain(folder, samples)
    _, unclamped = measured(model_folder("gpt_oss"), samples)
    _, found = measured(folder, samples)
    assert max(worst_difference(found, expected)) < 2e-5
    place = next(iter(found.a))
    assert (
        found.a[place].abs().max() < unclamped.a[place].abs().max()
    )  # up + 1 <= 1.5, gate sigmoid(gate) <= 0.5


def test_gradients_contain_the_routing_weight():
    """Twice the routing weights (deepseek's scaling factor) and half the down projections: the same model, half of
    g twice."""
    one = model_folder("deepseek_v3", (("routed_scaling_factor", 1.0),))
    two = Path(str(one) + "-twice")
    shutil.copytree(one, two)
    config = (two / "config.json").read_text()
    (two / "config.json").write_text(
        config.replace('"routed_scaling_factor": 1.0', '"routed_scaling_factor": 2.0')
    )
    state = load_file(two / "model.safetensors")
    state = {n: v / 2 if ".experts." in n and "down" in n else v for n, v in state.items()}
    save_file(state, two / "model.safetensors", {"format": "pt"})
    samples = some_samples()
    (first, a), (second, b) = measured(one, samples), measured(two, samples)
    assert first.total == pytest.approx(second.total, rel=1e-6)
    assert max(worst_difference(b, a)) < 1e-5
    for place in a.down:
        assert torch.equal(b.down[place], a.down[place] / 2)


def test_a_small_step_along_an_activations_gradient_changes_the_loss_by_it():
    """An oracle without autograd: scale one channel's down column, and the loss changes by sum(a g)."""
    folder, samples = model_folder("mixtral"), some_samples()
    _, rows = measured(folder, samples)
    place = max(rows.a, key=lambda p: len(rows.a[p]))
    slope = (rows.a[place].double() * rows.g[place].double()).sum(0)
    channel = int(slope.abs().argmax())
    model = stock(folder, dtype=torch.float64)
    model.set_experts_implementation("eager")
    (down,) = (
        p for n, p in model.named_parameters() if n.endswith("experts.down_proj") and f".{place[0]}." in n
    )

    def loss(factor):
        with torch.no_grad():
            kept = down[place[1], :, channel].clone()
            down[place[1], :, channel] *= factor
            total = 0.0
            for sample in samples:
                logits = model(input_ids=torch.as_tensor(sample.ids)[None], use_cache=False).logits[0]
                first = max(sample.answer_start, 1)
                total += torch.nn.functional.cross_entropy(
                    logits[first - 1 : -1], torch.as_tensor(sample.ids)[first:], reduction="sum"
                ).item()
            down[place[1], :, channel] = kept
        return total

    # The router computes in float32 whatever the model does: a smaller step would drown in that.
    assert (loss(1.003) - loss(0.997)) / 6e-3 == pytest.approx(float(slope[channel]), rel=2e-3)


DOWNS = {
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.w2.weight", False),
    "nemotron_h": ("backbone.layers.{}.mixer.experts.{}.down_proj.weight", False),
    "gpt_oss": ("model.layers.{}.mlp.experts.down_proj", True),
    "llama4_text": ("model.layers.{}.feed_forward.experts.down_proj", True),
}


@pytest.mark.parametrize("family", DOWNS)
def test_the_down_projection_comes_along_in_one_orientation(family):
    folder, (name, stacked) = model_folder(family), DOWNS[family]
    state = load_file(folder / "model.safetensors")
    _, rows = measured(folder, some_samples())
    for (layer, expert), down in rows.down.items():
        stored = state[name.format(layer)][expert].T if stacked else state[name.format(layer, expert)]
        assert torch.equal(down, stored)
        assert down.shape == (32, rows.a[layer, expert].shape[1])


# ------------------------------------------------------------------------------- batches, padding, memory


def test_batches_and_padding_change_nothing():
    folder, samples = model_folder("qwen3_moe"), some_samples()
    _, alone = measured(folder, samples, Settings(threads=1, batch_tokens=1))
    _, together = measured(folder, samples, Settings(threads=1, batch_tokens=1000))
    assert sum(map(len, together.a.values())) == 2 * 2 * sum(len(s.ids) for s in samples)  # 2 layers, top-2
    assert max(worst_difference(together, alone)) < 1e-6


def test_kept_inputs_and_recomputed_ones_give_the_same_bits(scratch, monkeypatch):
    folder, samples = model_folder("mixtral", (("num_hidden_layers", 5),)), some_samples()
    _, kept = measured(folder, samples)
    for every in (2, 3, 8):
        monkeypatch.setattr(forward_and_back, "KEPT_EVERY", every)
        _, recomputed = measured(folder, samples, Settings(threads=1, spill=scratch / str(every)))
        assert recomputed.layers == kept.layers
        assert all(torch.equal(recomputed.g[place], kept.g[place]) for place in kept.g)


def test_states_beyond_memory_go_to_files(monkeypatch):
    folder, samples = model_folder("mixtral", (("num_hidden_layers", 5),)), some_samples()
    _, kept = measured(folder, samples)
    monkeypatch.setattr(forward_and_back, "KEPT_EVERY", 2)
    one = 18 * 5 * 32 * 4  # bytes of all states at one boundary, or a little more
    monkeypatch.setattr(activation_pass.Pass, "_room", lambda self: 2 * one)
    made = []
    original = forward_and_back.Boundaries.passing

    def passing(self):
        made.append(original(self))
        return made[-1]

    monkeypatch.setattr(forward_and_back.Boundaries, "passing", passing)
    _, filed = measured(folder, samples)
    kinds = {type(store).__name__ for store in made}
    assert kinds == {"InMemory", "InFile"}
    assert all(torch.equal(filed.g[place], kept.g[place]) for place in kept.g)
    assert not any(store.path.exists() for store in made if type(store).__name__ == "InFile")


def test_files_take_no_more_than_announced_and_leftovers_of_a_killed_pass_go(scratch, monkeypatch):
    folder, samples = model_folder("mixtral", (("num_hidden_layers", 5),)), some_samples((18,) * 4, (0,) * 4)
    monkeypatch.setattr(forward_and_back, "KEPT_EVERY", 2)
    monkeypatch.setattr("surgeon.calibrate.activation_gradients.KEPT_EVERY", 2)
    monkeypatch.setattr(activation_pass.Pass, "_room", lambda self: 0)
    settings = Settings(threads=1, spill=scratch)
    measured(folder, samples, settings)
    place = next(scratch.iterdir())
    (place / "surgeon-activations-old").mkdir()
    (place / "surgeon-activations-old" / "1.bin").write_bytes(bytes(10**6))
    most = [0]

    def look(done, total):
        files = [f for f in place.rglob("*.bin")]
        most[0] = max(most[0], sum(f.stat().st_size for f in files))

    original = activation_pass.Pass._compute

    def compute(self, layer, inputs, outputs):
        original(self, layer, inputs, outputs)
        look(0, 0)

    monkeypatch.setattr(activation_pass.Pass, "_compute", compute)
    measured(folder, samples, settings, progress=look)
    one = 4 * 18 * 32 * 4
    announced = spilled_bytes(5, 4 * 18, 32, "float32")
    assert announced == (3 + 2 + 2) * one
    assert 5 * one <= most[0] <= announced
    assert not list(place.glob("surgeon-activations-*"))


def test_nothing_below_the_first_experts_is_gone_back_through():
    folder, samples = model_folder("deepseek_v3", (("first_k_dense_replace", 2),)), some_samples()
    done: list[tuple[int, int]] = []
    _, rows = measured(folder, samples, progress=lambda *n: done.append(n))
    assert set(rows.layers) == {2}
    assert done == [(n, 6) for n in range(1, 7)]  # embedding, three forward, loss, one back


def test_layers_come_from_last_to_first():
    _, rows = measured(model_folder("mixtral"), some_samples())
    assert list(dict.fromkeys(rows.layers)) == [2, 1, 0]


def test_blocks_of_the_vocabulary_change_nothing(monkeypatch):
    folder, samples = model_folder("mixtral"), some_samples()
    loss, whole = measured(folder, samples)
    monkeypatch.setattr(head_module, "BLOCK_BYTES", 5 * 32 * 4)  # five rows of 67
    in_blocks, found = measured(folder, samples)
    assert in_blocks.total == pytest.approx(loss.total, rel=1e-6)
    assert max(worst_difference(found, whole)) < 1e-5


# ------------------------------------------------------------------------------------------- 16 bits


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.2), ("float16", 0.02)])
def test_sixteen_bits_are_near_float32(dtype, bound):
    """Routing must not flip for rows to be the same, so experts are compared by their mean squares."""
    folder, samples = model_folder("mixtral"), some_samples()
    _, exact = measured(folder, samples)
    _, rough = measured(folder, samples, Settings(threads=1, dtype=dtype))
    worst = [
        float((r.pow(2).mean(0) - e.pow(2).mean(0)).norm() / e.pow(2).mean(0).norm())
        for r, e in ((rough.g[p], exact.g[p]) for p in exact.g)
        if len(r) == len(e)
    ]
    assert len(worst) >= len(exact.g) // 2
    assert float(np.median(worst)) < bound, worst


def test_float16_gradients_that_would_underflow_survive(scratch):
    """A large residual stream, small down projections and a flat head make gradients of 1e-8, which float16 cannot hold."""
    samples, folder = some_samples(), scratch / "faint"
    shutil.copytree(model_folder("mixtral"), folder)
    state = load_file(folder / "model.safetensors")
    factors = {".w2.": 1 / 200, "embed": 8000.0, "lm_head": 1 / 40}
    state = {n: v * next((f for part, f in factors.items() if part in n), 1.0) for n, v in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    _, exact = measured(folder, samples)
    _, rough = measured(folder, samples, Settings(threads=1, dtype="float16"))
    places = [p for p in exact.g if len(rough.g.get(p, ())) == len(exact.g[p])]
    assert len(places) >= len(exact.g) // 2

    def error(found, place):
        one, other = found.double().pow(2).mean(0), exact.g[place].double().pow(2).mean(0)
        return float((one - other).norm() / other.norm())

    assert np.median([error(exact.g[p].half(), p) for p in places]) > 0.1  # what float16 would keep at best
    assert np.median([error(rough.g[p], p) for p in places]) < 0.02


# -------------------------------------------------------------------------------------- continuing


@pytest.mark.parametrize("at", [1, 4, 6, 7, 9, 11, 12])
def test_an_interrupted_pass_continues_with_the_same_bits(scratch, monkeypatch, at):
    folder, samples = model_folder("mixtral", (("num_hidden_layers", 5),)), some_samples()
    monkeypatch.setattr(forward_and_back, "KEPT_EVERY", 2)
    whole_loss, whole = measured(folder, samples, Settings(threads=1, spill=scratch / "whole"))
    settings = Settings(threads=1, spill=scratch / "spill")
    stop = threading.Event()

    def after(done, total):
        assert total == 12  # embedding, five forward, loss, five back
        if done == at:
            stop.set()

    rows = Rows()
    if at < 12:
        with pytest.raises(Interrupted):
            activation_gradients(open_path(folder), samples, rows, settings, progress=after, stop=stop)
    else:
        activation_gradients(open_path(folder), samples, rows, settings)
    steps: list[int] = []
    loss, found = measured(
        folder, samples, settings, resume=True, progress=lambda done, total: steps.append(done)
    )
    assert steps == list(range(at + 1, 13))
    assert loss == whole_loss
    assert found.a.keys() == whole.a.keys()
    assert all(torch.equal(found.g[place], whole.g[place]) for place in whole.g)
    left = {file.name for file in next((scratch / "spill").iterdir()).iterdir()}
    assert not any(name.startswith("kept-") for name in left), left


def test_a_damaged_or_foreign_state_is_not_continued(scratch, caplog):
    folder, samples = model_folder("mixtral"), some_samples()
    settings = Settings(threads=1, spill=scratch / "spill")
    loss, whole = measured(folder, samples, settings)
    place = next((scratch / "spill").iterdir())
    for file in place.glob("activations-*.bin"):
        content = bytearray(file.read_bytes())
        content[5] ^= 1
        file.write_bytes(content)
    steps: list[int] = []
    again, found = measured(folder, samples, settings, resume=True, progress=lambda n, _: steps.append(n))
    assert steps[0] == 1 and again == loss
    assert all(torch.equal(found.g[place], whole.g[place]) for place in whole.g)
    steps.clear()
    others = [Sample(s.ids, s.answer_start + 1) for s in samples]
    measured(folder, others, settings, resume=True, progress=lambda n, _: steps.append(n))
    assert steps[0] == 1


# ---------------------------------------------------------------------------------------- refusals


def broken(folder, scratch, name, value):
    copy = scratch / "broken"
    shutil.copytree(folder, copy)
    state = load_file(copy / "model.safetensors")
    state[name].view(-1)[0] = value
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_that_are_not_finite_name_layer_and_expert(scratch, monkeypatch, streamed):
    """float16 overflows on the way back where the forward pass does not."""
    folder, samples = model_folder("mixtral"), some_samples()
    from surgeon.calibrate import expert_gradients, expert_reverse

    original = expert_gradients.reverse_gated

    def overflowing(module, expert, rows, hidden, weights, given, slices, receive):
        if expert == 2:
            given = torch.full_like(given, torch.inf)
        return original(module, expert, rows, hidden, weights, given, slices, receive)

    monkeypatch.setattr(expert_gradients, "reverse_gated", overflowing)
    monkeypatch.setattr(expert_reverse, "reverse_gated", overflowing)
    with pytest.raises(InputError, match=r"E434.*gradients of expert 2 in layer 2 are not finite"):
        measured(folder, samples, Settings(threads=1, stream_experts=streamed))


def test_weights_that_are_not_finite_are_found_on_the_way_forward(scratch):
    copy = broken(
        model_folder("mixtral"), scratch, "model.layers.1.block_sparse_moe.experts.0.w1.weight", torch.nan
    )
    with pytest.raises(InputError, match=r"E384.*layer 1"):
        measured(copy, some_samples())


def test_models_without_experts_or_without_a_loss_are_refused():
    with pytest.raises(InputError, match=r"E435.*no experts"):
        measured(model_folder("llama"), some_samples())
    with pytest.raises(InputError, match=r"E380.*no language-model head"):
        measured(model_folder("mixtral", (), True, "MixtralModel"), some_samples())
    with pytest.raises(InputError, match="E380"):
        measured(model_folder("bert"), some_samples())


def test_samples_that_have_no_loss_are_refused():
    folder = model_folder("mixtral")
    with pytest.raises(InputError, match=r"E387.*line 42"):
        measured(folder, [Sample(np.arange(3, 9), 6, 42)])
    with pytest.raises(InputError, match="E385"):
        measured(folder, [])


def test_a_memory_limit_below_one_layer_is_refused():
    with pytest.raises(EnvironmentFault, match="E504"):
        measured(model_folder("mixtral"), some_samples(), Settings(threads=1, memory_limit=1000))


def test_a_tight_memory_limit_streams_experts_by_itself():
    folder, samples = model_folder("mixtral", (("num_local_experts", 60),)), some_samples()
    skeleton = Skeleton(open_path(folder), CPU)
    layer = skeleton.bytes_of_layer(0)
    tight = Settings(threads=1, memory_limit=2 * layer, batch_tokens=20)
    _, whole = measured(folder, samples, Settings(threads=1, batch_tokens=20))
    loaded = []
    original = Skeleton.read_layer

    def read(self, number, *, experts_too=True):
        loaded.append(experts_too)
        return original(self, number, experts_too=experts_too)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Skeleton, "read_layer", read)
        _, found = measured(folder, samples, tight)
    assert not any(loaded)
    assert max(worst_difference(found, whole)) < 1e-5


# --------------------------------------------------------------------------------------------------- memory

CHILD = """
import json, sys
from pathlib import Path
import numpy as np, torch
from surgeon.calibrate.activation_gradients import activation_gradients
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import open_path
from surgeon.system import peak_memory
torch.set_num_threads(1)
class S:
    answer_start, line = 0, 1
    def __init__(self, seed): self.ids = np.random.default_rng(seed).integers(3, 2000, size=128)
class R:
    identity, total = "", 0.0
    def gated(self, found): self.total += float(found.gradients.square().sum())
receiver = R()
Skeleton(open_path(Path(sys.argv[1])), Settings())  # imports the model's own code, which is no work of the pass
base = peak_memory()
limit = int(sys.argv[2]) or None
settings = Settings(threads=1, memory_limit=limit, batch_tokens=256)
activation_gradients(open_path(Path(sys.argv[1])), [S(n) for n in range(16)], receiver, settings)
print("RESULT", json.dumps({"peak": peak_memory() - base, "total": receiver.total}))
"""


@pytest.mark.slow
def test_the_peak_is_a_layer_or_less_of_the_model(tmp_path):
    config = transformers.MixtralConfig(
        hidden_size=256, intermediate_size=640, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
        num_local_experts=32, num_experts_per_tok=2, vocab_size=2000, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    size = 4 * sum(p.numel() for p in model.parameters())
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "model", save_original_format=True)
    del model

    def run(limit):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "model"), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.rpartition("RESULT")[2])

    free, tight = run(0), run(layer + (40 << 20))
    assert size > 11 * layer > 600e6
    assert tight["total"] == pytest.approx(free["total"], rel=1e-4)
    assert free["peak"] < 3.5 * layer, (free["peak"], layer)
    assert tight["peak"] < 2 * layer and tight["peak"] < free["peak"], (tight["peak"], free["peak"], layer)
