"""Quantizing layer by layer, against a plain loop over the stock model with hooks, and token by token for experts."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
from walk_models import base_of, model_folder, stock, texts

from surgeon.calibrate.matrices import Matrix, matrices_of, read_matrix
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.header import read_header
from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.dequantized import dequantized
from surgeon.formats.float4 import shared_scale
from surgeon.formats.scheme import Scheme
from surgeon.kernels.cast import round_to, widen
from surgeon.quantize import forms, gptq, rtn, shrinkage, target_shift
from surgeon.quantize.moments import Moments, held_out
from surgeon.quantize.observing import Inputs, kind_of
from surgeon.quantize.sequential import Options, quantize_layers
from surgeon.quantize.view import QuantizedView

ONE = Settings(threads=1, batch_tokens=64)
MANY = (20, 21, 21, 20, 24, 18) * 3
"""More than four tokens for each input of the tiny models."""
FOUR, THREE, TWO, EIGHT = (
    Scheme("int", 4, 16),
    Scheme("int", 3, 16),
    Scheme("int", 2, 16),
    Scheme("int", 8, -1),
)
TWO_LAYERS = ("num_hidden_layers", 2)
DENSE = {"llama": (TWO_LAYERS,), "qwen3": (TWO_LAYERS, ("head_dim", 16))}
MOE = {
    "qwen3_moe": (TWO_LAYERS, ("head_dim", 16), ("moe_intermediate_size", 32)),  # experts, then a dense layer
    "mixtral": (TWO_LAYERS,),
}


def folder_of(family):
    return model_folder(family, {**DENSE, **MOE}[family])


def opened(family):
    checkpoint = open_path(folder_of(family))
    return checkpoint, matrices_of(checkpoint, Skeleton(checkpoint, ONE))


def form_of(name="compressed-tensors", dtype="BF16", runtime="transformers", model_type=None):
    return forms.get(name, Reader(runtime, dtype), model_type)


def every(layers, scheme):
    return {matrix.label: scheme for layer in layers for matrix in layer}


def values_of(checkpoint, schemes, form, files):
    """Return what the reader of the form makes of the files: plain name -> float32 [out, in]."""
    view = dequantized(QuantizedView(checkpoint, files, schemes, (), form))
    return {
        name: torch.from_numpy(widen(view.read(name, 0, view.tensors[name].elements), view.tensors[name].dtype).copy())
        .reshape(view.tensors[name].shape)
        for name, scheme in schemes.items() if scheme is not None
    }  # fmt: skip


# ---- the plain loop ----------------------------------------------------------------------------------


class Stock:
    """The stock model, in which matrices are looked at and replaced by hand."""

    def __init__(self, family, samples):
        self.model = stock(folder_of(family))
        self.original = stock(folder_of(family))
        self.samples = [torch.from_numpy(sample)[None] for sample in samples]
        self.experts = {
            int(re.search(r"layers\.(\d+)", path)[1]): module
            for path, module in self.model.named_modules() if path.endswith(".experts")
        }  # fmt: skip

    def parameter(self, name):
        """Return the weights that a checkpoint's tensor is in this model."""
        found = re.match(r".*layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight", name)
        if found is None:
            return self.model.get_parameter(name).data
        module, expert = self.experts[int(found[1])], int(found[2])
        if found[3] in ("down_proj", "w2"):
            return module.down_proj.data[expert]
        half = module.gate_up_proj.shape[1] // 2
        rows = slice(0, half) if found[3] in ("gate_proj", "w1") else slice(half, None)
        return module.gate_up_proj.data[expert, rows]

    def inputs(self, matrices, model=None):
        """Return of each module, sample by sample, the inputs [tokens, in] and the gates [tokens] of an expert's."""
        model = model or self.model
        seen = {matrix.module: [] for matrix in matrices}
        handles = []
        for name, held in seen.items():
            expert = re.match(r".*layers\.(\d+)\..*experts\.(\d+)\.(\w+)", name)
            module = self.experts[int(expert[1])] if expert else model.get_submodule(name)

            def look(module, args, kwargs, held=held, expert=expert):
                given = [*args, *kwargs.values()]
                if expert is None:
                    held.append((given[0].reshape(-1, given[0].shape[-1]), None))
                else:
                    held.append(token_by_token(module, int(expert[2]), expert[3], *given[:3]))

            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
        with torch.no_grad():
            for ids in self.samples:
                base_of(model)(ids)
        for handle in handles:
            handle.remove()
        return seen


def token_by_token(module, expert, part, hidden, index, weights):
    """Return what enters one matrix of an expert, and the routing weights, one token after the other."""
    rows, gates = [], []
    for token in range(len(hidden)):
        for slot in range(index.shape[1]):
            if int(index[token, slot]) != expert:
                continue
            x = hidden[token]
            if part in ("down_proj", "w2"):
                gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
                x = functional.silu(gate) * up
            rows.append(x)
            gates.append(weights[token, slot])
    return (torch.stack(rows), torch.stack(gates)) if rows else (hidden[:0], torch.zeros(0))


def sums(seen, columns, originals=None):
    """Return the moments of three quarters of the samples and of the rest, in float64, as plain products."""
    parts = []
    for apart in (False, True):
        hessian = torch.zeros(columns, columns, dtype=torch.float64)
        cross, squares, fourths = torch.zeros_like(hessian), 0.0, 0.0
        for number, (rows, gates) in enumerate(seen):
            if held_out(number) is not apart or not len(rows):
                continue
            x = rows.double()
            g = torch.ones(len(x), dtype=torch.float64) if gates is None else gates.double()
            hessian += (x * g[:, None] ** 2).T @ x
            squares, fourths = squares + float((g**2).sum()), fourths + float((g**4).sum())
            if originals is not None:
                cross += (originals[number][0].double() - x).T @ x
        parts.append(Moments(hessian.float(), squares, fourths, None if originals is None else cross.float()))
    return parts


def by_hand(family, layers, schemes, samples, options, order=lambda layer: [layer]):
    """Quantize with hooks on the stock model; ``order`` divides a layer into steps."""
    model, found = Stock(family, samples), {}
    checkpoint = open_path(folder_of(family))
    more = {"scale_dtype": "BF16", "order": options.order, "damp": options.damp, "clip": options.clip}
    for layer in layers:
        for step in order(layer):
            new = {}
            seen = model.inputs(step)
            beside = model.inputs(step, model.original) if options.target_shift else {}
            for matrix in step:
                scheme = schemes[matrix.label]
                if scheme is None:
                    continue
                weight = read_matrix(checkpoint, matrix)
                train, held = sums(seen[matrix.module], matrix.columns, beside.get(matrix.module))
                whole = train.merged(held)
                if whole.count == 0:
                    codes = rtn.quantize(weight, scheme, scale_dtype="BF16", clip=True)
                elif options.target_shift:
                    factor = gptq.factorise(whole.hessian, order=options.order, damp=options.damp)
                    target = target_shift.shifted(weight, whole.cross, factor)
                    codes, _ = gptq.quantize_with(
                        target, factor, scheme, scale_dtype="BF16", clip=options.clip
                    )
                elif not matrix.routed and whole.count >= 4 * matrix.columns:
                    codes, _ = gptq.quantize(weight, whole.hessian, scheme, **more)
                else:
                    shared = [
                        read_matrix(checkpoint, other) for other in layer
                        if other.module == matrix.module and schemes[other.label] == scheme
                    ]  # fmt: skip
                    results, _ = shrinkage.quantize(shared, train, held, scheme, **more)
                    codes = next(
                        c
                        for c, w in zip((c for c, _ in results), shared, strict=True)
                        if torch.equal(w, weight)
                    )
                new[matrix.tensor] = torch.from_numpy(round_to(codes.values(), "BF16"))
            for name, values in new.items():
                model.parameter(name).copy_(values)
            found |= new
    return found


def agree(found, wanted, share=0.999):
    """Compare quantized weights; a code may differ where two were equally near but for the last bits of a sum."""
    assert found.keys() == wanted.keys() and found
    equal = torch.cat([(found[name] == wanted[name]).reshape(-1) for name in wanted])
    assert float(equal.float().mean()) >= share, float(equal.float().mean())


# ---- whole models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        ("llama", MANY),
        ("qwen3", MANY[:6]),
        pytest.param("llama", MANY[:6], marks=pytest.mark.slow),
        pytest.param("qwen3", MANY, marks=pytest.mark.slow),
    ],
    ids=["many", "few", "few too", "many too"],
)
def test_dense_layers_equal_a_plain_loop(family, lengths, tmp_path):
    checkpoint, layers = opened(family)
    schemes = every(layers, FOUR)
    schemes[layers[0][0].label] = EIGHT  # mixed widths, in one group of inputs too
    schemes[next(label for label in schemes if label.endswith("1.self_attn.k_proj.weight"))] = None
    options, samples = Options("gptq", clip=True), texts(lengths)
    done = quantize_layers(checkpoint, layers, schemes, form_of(), samples, ONE, options, tmp_path)
    found = values_of(checkpoint, schemes, form_of(), done.files)
    agree(found, by_hand(family, layers, schemes, samples, options))
    assert len(done.files) == len(layers)
    records = {record["label"]: record for record in done.records}
    assert records.keys() == {label for label, scheme in schemes.items() if scheme}
    for label, record in records.items():
        assert record["tokens"] == sum(lengths) and record["scheme"] == schemes[label].name
        assert 0 < record["error"] < 1 and 0 < record["weight_error"] < 1
        assert (record["shrinkage"] == 0 and "shrinkage_by" not in record) or sum(lengths) < 4 * 48
    better = np.mean([record["error"] / record["rounding_error"] for record in done.records])
    assert better < 1


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_layers_of_experts_equal_a_token_loop(family, tmp_path):
    checkpoint, layers = opened(family)
    schemes = every(layers, FOUR)
    options, samples = Options("gptq"), texts(MANY[:8])
    done = quantize_layers(checkpoint, layers, schemes, form_of(), samples, ONE, options, tmp_path)
    found = values_of(checkpoint, schemes, form_of(), done.files)
    agree(found, by_hand(family, layers, schemes, samples, options))
    routed = [record for record in done.records if ".experts." in record["label"] and record["tokens"]]
    assert routed and all(0 < record["effective_tokens"] < record["tokens"] for record in routed)


def test_the_hessian_of_an_expert_weighs_tokens_by_their_squared_gates():
    checkpoint, layers = opened("qwen3_moe")
    samples = texts(MANY[:8])
    observer = Inputs(layers, identity="", finished=lambda layer: False)
    model, checked = Stock("qwen3_moe", samples), 0
    seen = model.inputs([matrix for layer in layers for matrix in layer])
    for settings in (
        ONE,
        dataclasses.replace(ONE, batch_tokens=20),
        dataclasses.replace(ONE, stream_experts=True),
    ):
        with Walk(checkpoint, samples, settings) as walk:
            assert settings.batch_tokens == 20 or any(batch.padded for batch in walk.batches)
            for number, stage in enumerate(walk.steps(observer)):
                if not stage.startswith("layer"):
                    continue
                for matrix in layers[number - 1]:
                    rows = seen[matrix.module]
                    assert observer.tokens(matrix.module) == sum(len(one) for one, _ in rows)
                    parts = sums(rows, matrix.columns), observer.moments(matrix.module)
                    for wanted, got in zip(*parts, strict=True):
                        torch.testing.assert_close(got.hessian, wanted.hessian, rtol=1e-4, atol=1e-4)
                        assert got.count == pytest.approx(wanted.count, rel=1e-5)
                    checked += matrix.routed
                observer.forget()
    assert checked == 3 * 4 * 3  # ways, experts, matrices


KINDS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj", "w1", "w3"),
    ("down_proj", "w2"),
)


def in_turn(layer):
    """Divide a layer into what reads attention's input, its output, the input of the MLP, its hidden units."""
    return [[m for m in layer if m.tensor.split(".")[-2] in names] for names in KINDS]


@pytest.mark.parametrize(
    ("family", "lengths"),
    [("llama", MANY), pytest.param("qwen3_moe", MANY[:8], marks=pytest.mark.slow)],
    ids=["llama", "qwen3_moe"],
)
def test_true_sequential_order_equals_a_plain_loop(family, lengths, tmp_path):
    checkpoint, layers = opened(family)
    schemes, samples = every(layers, THREE), texts(lengths)
    for matrix in layers[-1]:
        schemes[matrix.label] = FOUR  # the order is decided layer by layer
    options = Options("gptq")
    done = quantize_layers(checkpoint, layers, schemes, form_of(), samples, ONE, options, tmp_path)
    found = values_of(checkpoint, schemes, form_of(), done.files)
    agree(found, by_hand(family, layers, schemes, samples, options, lambda layer: [layer] if layer is layers[-1] else in_turn(layer)))  # fmt: skip
    # It is another result than without: the comparison above means something.
    plain = quantize_layers(
        checkpoint, layers, schemes, form_of(), samples, ONE, Options("gptq", true_sequential=False), tmp_path
    )
    other = values_of(checkpoint, schemes, form_of(), plain.files)
    same = torch.cat([(found[name] == other[name]).reshape(-1) for name in found]).float().mean()
    assert 0.2 < float(same) < 0.99


def test_target_shift_equals_a_plain_loop_beside_the_original_model(tmp_path):
    checkpoint, layers = opened("llama")
    schemes, samples, options = every(layers, THREE), texts(MANY), Options("gptq", target_shift=True)
    done = quantize_layers(checkpoint, layers, schemes, form_of(), samples, ONE, options, tmp_path)
    agree(
        values_of(checkpoint, schemes, form_of(), done.files),
        by_hand("llama", layers, schemes, samples, options),
    )
    assert {record["target_shift"] for record in done.records} == {1.0}


# ---- the same by other ways ---------------------------------------------------------------------------------


def contents(finished):
    """Return name -> bytes of all stored tensors, and the records."""
    found = {}
    for file in finished.files:
        header = read_header(file)
        found |= {name: tensor_file.read(header, name).tobytes() for name in header.tensors}
    return found, finished.records


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return quantizations of a mixture of experts that nothing disturbed: scheme -> contents."""
    checkpoint, layers = opened("qwen3_moe")
    return {
        scheme: contents(quantize_layers(
            checkpoint, layers, every(layers, scheme), form_of(), texts(MANY[:8]), ONE, Options("gptq"),
            tmp_path_factory.mktemp("whole"),
        )) for scheme in (FOUR, THREE)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "limit"),
    [
        (FOUR, 30_000),
        (THREE, 0),
        pytest.param(FOUR, 0, marks=pytest.mark.slow),
        pytest.param(THREE, 30_000, marks=pytest.mark.slow),
    ],
    ids=lambda entry: str(getattr(entry, "name", entry)),
)
def test_sums_that_do_not_fit_together_take_several_passes_with_the_same_result(scheme, limit, whole, tmp_path, monkeypatch):  # fmt: skip
    passes = []
    ask = Inputs.new_pass
    monkeypatch.setattr(Inputs, "new_pass", lambda self: (passes.append(self.kind()), ask(self)))
    monkeypatch.setattr("surgeon.quantize.sequential._limit", lambda walk: limit)
    checkpoint, layers = opened("qwen3_moe")
    schemes = every(layers, scheme)
    done = quantize_layers(
        checkpoint, layers, schemes, form_of(), texts(MANY[:8]), ONE, Options("gptq"), tmp_path
    )
    assert len(passes) > (3 if limit == 0 else 1) * len(layers)
    assert contents(done) == whole[scheme]


@pytest.mark.parametrize("scheme", [pytest.param(FOUR, marks=pytest.mark.slow), THREE], ids=["layer by layer", "in true order"])  # fmt: skip
def test_experts_read_one_at_a_time_give_the_same_result(scheme, whole, tmp_path):
    checkpoint, layers = opened("qwen3_moe")
    settings = dataclasses.replace(ONE, stream_experts=True)
    done = quantize_layers(
        checkpoint, layers, every(layers, scheme), form_of(), texts(MANY[:8]), settings, Options("gptq"), tmp_path
    )  # fmt: skip
    assert contents(done) == whole[scheme]


class Breaking:
    """A form whose process ends when it is to pack one matrix."""

    def __init__(self, name):
        self._form, self._name = form_of(), name

    def __getattr__(self, name):
        return getattr(self._form, name)

    def pack(self, name, codes):
        if name == self._name:
            raise KeyboardInterrupt
        return self._form.pack(name, codes)


@pytest.mark.parametrize(
    ("scheme", "spill"),
    [
        (FOUR, True),
        pytest.param(THREE, True, marks=pytest.mark.slow),
        pytest.param(FOUR, False, marks=pytest.mark.slow),
        pytest.param(THREE, False, marks=pytest.mark.slow),
    ],
    ids=lambda entry: str(getattr(entry, "name", entry)),
)
def test_an_interrupted_run_goes_on_with_the_same_bytes(scheme, spill, whole, tmp_path):
    checkpoint, layers = opened("qwen3_moe")
    schemes, samples, options = every(layers, scheme), texts(MANY[:8]), Options("gptq")
    settings = dataclasses.replace(ONE, spill=tmp_path / "spill") if spill else ONE
    breaking = Breaking("model.layers.1.mlp.down_proj.weight")
    with pytest.raises(KeyboardInterrupt):
        quantize_layers(checkpoint, layers, schemes, breaking, samples, settings, options, tmp_path)
    first = sorted(tmp_path.glob("layer-*"))
    assert len(first) == 1
    before = first[0].stat()
    done = quantize_layers(checkpoint, layers, schemes, form_of(), samples, settings, options, tmp_path)
    assert contents(done) == whole[scheme]
    after = first[0].stat()
    assert not spill or (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert not list(tmp_path.glob("values-*"))  # needed by nobody any more


def test_a_run_cut_off_behind_a_layers_file_does_not_solve_it_again(whole, tmp_path, monkeypatch):
    checkpoint, layers = opened("qwen3_moe")
    schemes, samples, options = every(layers, FOUR), texts(MANY[:8]), Options("gptq")
    settings = dataclasses.replace(ONE, spill=tmp_path / "spill")
    replace = Skeleton.replace

    def broken(self, layer, tensors):
        if layer == 1:
            raise KeyboardInterrupt
        replace(self, layer, tensors)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Skeleton, "replace", broken)
        quantize_layers(checkpoint, layers, schemes, form_of(), samples, settings, options, tmp_path)
    files = sorted(tmp_path.glob("layer-*"))
    assert len(files) == 2
    known = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
    done = quantize_layers(checkpoint, layers, schemes, form_of(), samples, settings, options, tmp_path)
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files] == known
    assert contents(done) == whole[FOUR]


KILLED = """
import dataclasses, os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {calibrate!r}]
import test_sequential as here
from surgeon.calibrate.matrices import matrices_of
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import open_path

class Killed(here.Breaking):
    def pack(self, name, codes):
        if name == self._name:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._form.pack(name, codes)

checkpoint, work = open_path(Path({folder!r})), Path({work!r})
layers = matrices_of(checkpoint, Skeleton(checkpoint, here.ONE))
here.quantize_layers(
    checkpoint, layers, here.every(layers, here.THREE), Killed("model.layers.1.mlp.down_proj.weight"),
    here.texts(here.MANY[:8]), dataclasses.replace(here.ONE, spill=work / "spill"), here.Options("gptq"), work,
)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bytes(whole, tmp_path):
    tests = Path(__file__).resolve().parent
    script = KILLED.format(tests=str(tests), calibrate=str(tests.parent / "calibrate"),
                           folder=str(folder_of("qwen3_moe")), work=str(tmp_path))  # fmt: skip
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -signal.SIGKILL
    known = {file: file.stat().st_mtime_ns for file in tmp_path.glob("layer-*")}
    assert len(known) == 1
    checkpoint, layers = opened("qwen3_moe")
    settings = dataclasses.replace(ONE, spill=tmp_path / "spill")
    done = quantize_layers(
        checkpoint, layers, every(layers, THREE), form_of(), texts(MANY[:8]), settings, Options("gptq"), tmp_path
    )  # fmt: skip
    assert contents(done) == whole[THREE]
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in known.items())


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_target_shift_with_few_tokens_goes_on_where_it_was_stopped(family, tmp_path):
    checkpoint, layers = opened(family)
    schemes, samples, options = every(layers, THREE), texts(MANY[:8]), Options("gptq", target_shift=True)
    found = []
    for cut in (True, False):
        folder = tmp_path / str(cut)
        settings = dataclasses.replace(ONE, spill=folder / "spill")
        if cut:
            breaking = Breaking("model.layers.1.mlp.down_proj.weight")
            with pytest.raises(KeyboardInterrupt):
                quantize_layers(checkpoint, layers, schemes, breaking, samples, settings, options, folder)
        done = quantize_layers(checkpoint, layers, schemes, form_of(), samples, settings, options, folder)
        found.append(contents(done))
    assert found[0] == found[1]
    for record in done.records:
        assert ("target_shift" in record) == (".experts." not in record["label"])
        assert record.get("target_shift", 0) in target_shift.AMOUNTS
    assert {record.get("target_shift") for record in done.records if ".1." in record["label"]} != {0.0}


def test_results_that_are_gone_are_made_again(whole, tmp_path):
    checkpoint, layers = opened("qwen3_moe")
    schemes, samples, options = every(layers, FOUR), texts(MANY[:8]), Options("gptq")
    settings = dataclasses.replace(ONE, spill=tmp_path / "spill")
    with pytest.raises(KeyboardInterrupt):
        breaking = Breaking("model.layers.1.self_attn.o_proj.weight")
        quantize_layers(checkpoint, layers, schemes, breaking, samples, settings, options, tmp_path)
    next(tmp_path.glob("layer-0000-*")).unlink()
    done = quantize_layers(checkpoint, layers, schemes, form_of(), samples, settings, options, tmp_path)
    assert contents(done) == whole[FOUR]


def test_a_finished_run_is_taken_from_its_files(whole, tmp_path, monkeypatch):
    checkpoint, layers = opened("qwen3_moe")
    arguments = (form_of(), texts(MANY[:8]), ONE, Options("gptq"), tmp_path)
    quantize_layers(checkpoint, layers, every(layers, FOUR), *arguments)
    monkeypatch.setattr("surgeon.quantize.sequential.Walk", None)
    assert contents(quantize_layers(checkpoint, layers, every(layers, FOUR), *arguments)) == whole[FOUR]
    with pytest.raises(TypeError):  # other schemes are another run
        quantize_layers(checkpoint, layers, every(layers, EIGHT), *arguments)


def test_runs_that_differ_later_share_their_first_layers(tmp_path):
    checkpoint, layers = opened("llama")
    schemes = every(layers, FOUR)
    other = schemes | {matrix.label: EIGHT for matrix in layers[1]}
    done = [
        quantize_layers(checkpoint, layers, chosen, form_of(), texts(MANY[:6]), ONE, Options("gptq"), tmp_path).files
        for chosen in (schemes, other)
    ]  # fmt: skip
    assert done[0][0] == done[1][0] and done[0][1] != done[1][1] and len(done[0]) == 2


def test_stopping_is_refused_nothing(tmp_path):
    import threading

    stop = threading.Event()
    stop.set()
    checkpoint, layers = opened("llama")
    for options, samples in ((Options("gptq"), texts()), (Options("rtn"), ())):
        with pytest.raises(Interrupted):
            quantize_layers(checkpoint, layers, every(layers, FOUR), form_of(), samples, ONE, options, tmp_path, stop=stop)  # fmt: skip


# ---- without calibration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compressed-tensors", "auto-round"])
def test_rounding_equals_rtn_and_the_form(name, tmp_path):
    checkpoint, layers = opened("qwen3_moe")
    form = form_of(name, model_type="qwen3_moe")
    if name == "auto-round":  # takes no others
        layers = [[m for m in layer if m.rows % 32 == 0 == m.columns % 32] for layer in layers]
    schemes = every(layers, Scheme("int", 4, 16)) | {
        layers[0][0].label: Scheme("int", 2, 16),
        layers[1][1].label: None,
    }
    done = quantize_layers(checkpoint, layers, schemes, form, (), ONE, Options("rtn"), tmp_path)
    stored, records = contents(done)
    records = {record["label"]: record for record in records}
    for matrix in (matrix for layer in layers for matrix in layer):
        scheme = schemes[matrix.label]
        if scheme is None:
            assert matrix.label not in records
            continue
        weight = read_matrix(checkpoint, matrix)
        codes = rtn.quantize(weight, scheme, scale_dtype=form.scale_dtype)
        for part, (_, array) in form.pack(matrix.tensor, codes).items():
            assert stored.pop(part) == array.tobytes()
        wanted = np.square(codes.values() - weight.numpy()).sum() / np.square(weight.numpy()).sum()
        assert records[matrix.label]["weight_error"] == pytest.approx(float(wanted), rel=1e-4)
        assert records[matrix.label]["clipped"] == (scheme.bits == 2)
    assert not stored and len(done.files) == len(layers)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("compressed-tensors", Scheme("float8", 8, 0)),
        ("compressed-tensors", Scheme("mxfp4", 4, 0)),
        ("compressed-tensors", Scheme("nvfp4", 4, 0)),
        ("bitsandbytes", Scheme("nf4", 4, 0)),
        ("bitsandbytes", Scheme("int8", 8, 0)),
    ],
    ids=lambda entry: entry if isinstance(entry, str) else entry.kind,
)
def test_kinds_that_are_encoded_directly_need_no_text(name, scheme, tmp_path):
    checkpoint, layers = opened("llama")
    layers = [
        [m for m in layer if m.columns % 32 == 0] for layer in layers
    ]  # blocks do not divide the others
    form = form_of(name)
    done = quantize_layers(
        checkpoint, layers, every(layers, scheme), form, (), ONE, Options("gptq"), tmp_path
    )
    stored, _ = contents(done)
    for layer in layers:
        weights = {m.tensor: read_matrix(checkpoint, m).numpy() for m in layer}
        for tensor, weight in weights.items():
            alike = [
                t for t in weights if t.split(".")[-2] in next(k for k in KINDS if tensor.split(".")[-2] in k)
            ]
            shared = shared_scale(weights[t] for t in alike) if scheme.kind == "nvfp4" else None
            for part, (_, array) in form.encode(tensor, weight, scheme, shared)[0].items():
                assert stored.pop(part) == array.tobytes(), part
    assert not stored


def test_encoded_matrices_beside_gptq_are_what_the_next_layer_sees(tmp_path):
    checkpoint, layers = opened("llama")
    eight, samples, options = Scheme("float8", 8, 0), texts(MANY), Options("gptq")
    schemes = every(layers, FOUR) | {matrix.label: eight for matrix in layers[0]}
    done = quantize_layers(checkpoint, layers, schemes, form_of(), samples, ONE, options, tmp_path)
    assert [record["method"] for record in done.records] == ["encoded"] * 7 + ["gptq"] * 7
    # The rest of the model behind a first layer that has the values it was encoded to.
    model = Stock("llama", samples)
    for matrix in layers[0]:
        values = form_of().encode(matrix.tensor, read_matrix(checkpoint, matrix).numpy(), eight)[1]
        model.parameter(matrix.tensor).copy_(torch.from_numpy(round_to(values, "BF16")))
    matrix = next(m for m in layers[1] if ".q_proj" in m.tensor)
    hessian = sum(part.hessian for part in sums(model.inputs([matrix])[matrix.module], matrix.columns))
    codes, _ = gptq.quantize(read_matrix(checkpoint, matrix), hessian, FOUR, scale_dtype="BF16")
    stored = contents(done)[0]
    assert (
        stored[f"{matrix.tensor}_packed"]
        == form_of().pack(matrix.tensor, codes)[f"{matrix.tensor}_packed"][1].tobytes()
    )


# ---- edges ---------------------------------------------------------------------------------------------------


def head_of(family):
    checkpoint, layers = opened(family)
    rows, columns = checkpoint.tensors["lm_head.weight"].shape
    return (
        checkpoint,
        layers,
        Matrix("lm_head.weight", len(layers), "lm_head", False, None, rows, columns, False),
    )


@pytest.mark.parametrize("cut", [False, True])
def test_the_head_is_quantized_on_the_last_hidden_states(cut, tmp_path):
    checkpoint, layers, head = head_of("llama")
    schemes, samples = {head.label: FOUR, layers[1][0].label: FOUR}, texts(MANY)
    settings = dataclasses.replace(ONE, spill=tmp_path / "spill")
    if cut:  # behind the last stage of the walk
        with pytest.raises(KeyboardInterrupt):
            quantize_layers(checkpoint, (*layers, (head,)), schemes, Breaking(head.tensor), samples, settings, Options("gptq"), tmp_path)  # fmt: skip
    done = quantize_layers(checkpoint, (*layers, (head,)), schemes, form_of(), samples, settings, Options("gptq"), tmp_path)  # fmt: skip
    found = values_of(checkpoint, schemes, form_of(), done.files)
    model = Stock("llama", samples)
    model.parameter(layers[1][0].tensor).copy_(found[layers[1][0].tensor])
    with torch.no_grad():
        rows = [(base_of(model.model)(ids).last_hidden_state[0], None) for ids in model.samples]
    train, held = sums(rows, head.columns)
    codes, _ = gptq.quantize(
        read_matrix(checkpoint, head), train.merged(held).hessian, FOUR, scale_dtype="BF16"
    )
    agree(
        {head.tensor: found[head.tensor]},
        {head.tensor: torch.from_numpy(round_to(codes.values(), "BF16"))},
        0.998,
    )
    assert done.records[-1]["label"] == "lm_head.weight" and done.records[-1]["tokens"] == sum(MANY)


def test_the_head_is_rounded_without_text(tmp_path):
    checkpoint, layers, head = head_of("llama")
    done = quantize_layers(checkpoint, (*layers, (head,)), {head.label: FOUR}, form_of(), (), ONE, Options("rtn"), tmp_path)  # fmt: skip
    codes = rtn.quantize(read_matrix(checkpoint, head), FOUR, scale_dtype="BF16")
    assert len(done.files) == 1
    assert contents(done)[0]["lm_head.weight_packed"] == form_of().pack(head.tensor, codes)["lm_head.weight_packed"][1].tobytes()  # fmt: skip


def test_experts_without_tokens_are_rounded_and_listed(tmp_path):
    checkpoint, layers = opened("mixtral")
    samples = [np.array([5, 5, 5]), np.array([5, 5])]  # one token of the vocabulary reaches few experts
    done = quantize_layers(checkpoint, layers, every(layers, FOUR), form_of(), samples, ONE, Options("gptq"), tmp_path)  # fmt: skip
    idle = [record for record in done.records if not record["tokens"]]
    assert idle and all(".experts." in record["label"] for record in idle)
    matrices = {matrix.label: matrix for layer in layers for matrix in layer}
    found = values_of(checkpoint, every(layers, FOUR), form_of(), done.files)
    for record in idle:
        assert record["method"] == "rtn" and record["clipped"] and record["fallback"] == "no token reached it"
        weight = read_matrix(checkpoint, matrices[record["label"]])
        codes = rtn.quantize(weight, FOUR, scale_dtype="BF16", clip=True)
        assert torch.equal(found[record["label"]], torch.from_numpy(round_to(codes.values(), "BF16")))


def test_a_dense_matrix_that_no_token_reaches_is_refused(tmp_path, monkeypatch):
    checkpoint, layers = opened("llama")
    wants = Inputs.wants
    monkeypatch.setattr(
        Inputs, "wants", lambda self, module: wants(self, module) and not module.endswith("1.mlp.down_proj")
    )
    for scheme in (FOUR, THREE):
        with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj") as caught:
            quantize_layers(checkpoint, layers, every(layers, scheme), form_of(), texts(MANY[:4]), ONE, Options("gptq"), tmp_path)  # fmt: skip
        assert caught.value.code == "E452"


def test_very_large_matrices_are_quantized_in_ranges_of_outputs(tmp_path, monkeypatch):
    checkpoint, layers = opened("llama")
    found = []
    for worked_on in (1 << 26, 300):
        monkeypatch.setattr("surgeon.quantize.solving.WORKED_ON", worked_on)
        monkeypatch.setattr("surgeon.quantize.solving.PIECE", worked_on)
        found.append(quantize_layers(checkpoint, layers, every(layers[:1], FOUR), form_of(), texts(MANY), ONE,
                                     Options("gptq"), tmp_path / str(worked_on)))  # fmt: skip
    assert contents(found[0])[0] == contents(found[1])[0]
    for one, two in zip(*(finished.records for finished in found), strict=True):
        assert one["error"] == pytest.approx(two["error"], rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "awq"}, {"method": "gptq", "order": "best"}, {"method": "gptq", "damp": -1.0},
        {"method": "gptq", "block": 0}, {"method": "rtn", "target_shift": True},
        {"method": "gptq", "target_shift": True, "true_sequential": True},
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UsageError) as caught:
        Options(**wrong)
    assert caught.value.code in ("E470", "E471") and caught.value.help


def test_kinds_of_modules():
    assert kind_of("model.layers.3.mlp.experts.17.down_proj") == ("mlp", "down_proj")
    assert kind_of("model.layers.3.self_attn.q_proj") == ("self_attn", "q_proj")
    assert kind_of("lm_head") == ("lm_head", "lm_head")
