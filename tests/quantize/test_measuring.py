"""Sensitivities against plain torch: stock models with hooks and autograd, loops over tokens and over whole models."""

from __future__ import annotations

import copy
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from surgeon.calibrate.matrices import Matrix
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.errors import EnvironmentFault, Interrupted, UsageError
from surgeon.formats import float4
from surgeon.formats.scheme import Scheme
from surgeon.quantize import gptq, rtn
from surgeon.quantize.measuring import fisher, kl, relative_output
from surgeon.quantize.solving import Options
from surgeon.seeds import stream_key, uniform

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring_models import GPTQ, LENGTHS, MENU, NAMES, SETTINGS, Model, Scaled, texts


@pytest.fixture(scope="module")
def llama() -> Model:
    return Model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def mixtral() -> Model:
    return Model("mixtral", num_hidden_layers=2)


@pytest.fixture(scope="module")
def qwen() -> Model:
    return Model("qwen3_moe", num_hidden_layers=2)


# ---- the same with plain torch ----------------------------------------------------------------------


class Plain:
    """Inputs of every matrix, gates, and gradients at every output, by the checkpoint's names; from the stock model."""

    def __init__(self, model: Model, seed: int | None = None) -> None:
        self.inputs: dict[str, list] = {}
        self.gates: dict[str, list] = {}
        self.gradients: dict[str, list] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.tokens = 0
        network = model.stock().requires_grad_(False)
        names = {name.removesuffix(".weight") for name in model.checkpoint.tensors}
        self._network, self._model = network, model
        for number, ids in enumerate(model.samples):
            self._sample(number, torch.from_numpy(ids)[None], names, seed)

    def _sample(self, number, ids, names, seed) -> None:
        network = self._network
        linear, experts, handles = [], [], []

        def hook(name):
            def seen(module, args, out):
                if out.requires_grad:
                    out.retain_grad()
                linear.append((name, module, args[0].detach(), out))

            return seen

        def routed(name):
            def seen(module, args, out):
                if out.requires_grad:
                    out.retain_grad()
                experts.append((name, module, *(value.detach() for value in args), out))

            return seen

        for name, module in network.named_modules():
            if (
                isinstance(module, nn.Linear)
                and name in names
                and ".gate" not in name.replace("gate_proj", "")
            ):
                handles.append(module.register_forward_hook(hook(name)))
            elif name.endswith(".experts"):
                handles.append(module.register_forward_hook(routed(name)))
        embedded = network.get_input_embeddings()(ids).detach().requires_grad_(seed is not None)
        logits = network(inputs_embeds=embedded).logits[0]
        if seed is not None:
            with torch.no_grad():
                running = torch.softmax(logits[:-1].double(), 1).cumsum(1).numpy()
            chances = uniform(stream_key(seed, number, "labels of the Fisher information"), 0, len(running))
            labels = torch.tensor(
                [int((row <= chance).sum()) for row, chance in zip(running, chances, strict=True)]
            )
            functional.cross_entropy(logits[:-1], labels, reduction="sum").backward()
            self.tokens += len(labels)
        for handle in handles:
            handle.remove()
        for name, module, given, out in linear:
            self._add(
                name,
                module.weight,
                given.flatten(0, -2),
                None,
                None if seed is None else out.grad.flatten(0, -2),
            )
        for name, module, hidden, index, weights, out in experts:
            self._experts(name, module, hidden, index, weights, None if seed is None else out.grad)

    def _experts(self, name, module, hidden, index, weights, gradient) -> None:
        """One expert after the other, token by token what the block does."""
        first, gate_up_down = self._names(name)
        for expert in range(len(module.gate_up_proj)):
            rows, slots = (index == expert).nonzero(as_tuple=True)
            gates, x = weights[rows, slots], hidden[rows]
            inner = (x @ module.gate_up_proj[expert].T).requires_grad_()
            half = inner.shape[1] // 2
            product = module.act_fn(inner[:, :half]) * inner[:, half:]
            out = product @ module.down_proj[expert].T
            found = [None, None, None]
            if gradient is not None:
                at_out = gradient[rows] * gates[:, None]
                (out * at_out).sum().backward()
                found = [inner.grad[:, :half], inner.grad[:, half:], at_out]
            parts = [
                module.gate_up_proj[expert][:half],
                module.gate_up_proj[expert][half:],
                module.down_proj[expert],
            ]
            for leaf, weight, given, own in zip(
                gate_up_down, parts, (x, x, product.detach()), found, strict=True
            ):
                self._add(f"{first}.{expert}.{leaf}", weight, given, gates, own)

    def _names(self, name):
        """The checkpoint's names of a block of experts."""
        layer = re.search(r"layers\.(\d+)\.", name)[1]
        for tensor in self._model.checkpoint.tensors:
            found = re.match(rf"(.*\.layers\.{layer}\..*\.experts)\.0\.(w1|gate_proj)\.weight", tensor)
            if found:
                return found[1], ("w1", "w3", "w2") if found[2] == "w1" else (
                    "gate_proj",
                    "up_proj",
                    "down_proj",
                )
        raise AssertionError(name)

    def _add(self, name, weight, given, gates, gradient) -> None:
        self.weights[name] = weight.detach()
        self.inputs.setdefault(name, []).append(given)
        self.gates.setdefault(name, []).append(torch.ones(len(given)) if gates is None else gates)
        if gradient is not None:
            self.gradients.setdefault(name, []).append(gradient)

    def x(self, matrix):
        return torch.cat(self.inputs[_module(matrix)]).double()

    def g(self, matrix):
        return torch.cat(self.gradients[_module(matrix)]).double()

    def hessian(self, matrix):
        x = self.x(matrix) * torch.cat(self.gates[_module(matrix)]).double()[:, None]
        return x.T @ x


def _module(matrix: Matrix) -> str:
    return matrix.tensor.removesuffix(".weight")


def delta_of(weight, scheme, hessian=None, clip: bool | None = False):
    """D of rounding to nearest, or of GPTQ."""
    if hessian is None:
        codes = rtn.quantize(weight, scheme, scale_dtype="F32", clip=clip)
    else:
        codes = gptq.quantize(weight, hessian.float(), scheme, scale_dtype="F32", clip=clip)[0]
    return torch.from_numpy(codes.values()).double() - weight.double()


def projection(matrix):
    return re.sub(r"experts\.\d+", "experts", matrix.tensor)


# ---- relative errors of outputs ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", pytest.param("qwen", marks=pytest.mark.slow)])
def test_relative_errors_of_outputs(family, request, tmp_path):
    model = request.getfixturevalue(family)
    plain, found = Plain(model), model.measure("relative-output", tmp_path)
    assert found.kind == "rel-output" and found.formats == NAMES
    assert found.modules == tuple(matrix.label for matrix in model.matrices)
    energies: dict[str, float] = {}
    for matrix in model.matrices:
        outputs = plain.x(matrix) @ plain.weights[_module(matrix)].double().T
        gated = outputs * torch.cat(plain.gates[_module(matrix)]).double()[:, None]
        energies[projection(matrix)] = energies.get(projection(matrix), 0.0) + float(gated.square().sum())
    for row, matrix in enumerate(model.matrices):
        weight, gates = plain.weights[_module(matrix)], torch.cat(plain.gates[_module(matrix)]).double()
        assert found.tokens[row] == len(gates)
        for place, scheme in enumerate(MENU):
            change = plain.x(matrix) @ delta_of(weight, scheme).T * gates[:, None]
            expected = float(change.square().sum()) / energies[projection(matrix)]
            assert found.losses[row, place] == pytest.approx(expected, rel=2e-4), (matrix.label, scheme.name)


def test_the_errors_are_those_of_gptq(llama, tmp_path):
    plain, found = Plain(llama), llama.measure("rel-output", tmp_path, GPTQ)
    nearest = llama.measure("rel-output", tmp_path)
    for row, matrix in enumerate(llama.matrices):
        weight, hessian = plain.weights[_module(matrix)], plain.hessian(matrix)
        for place, scheme in enumerate(MENU):
            delta = delta_of(weight, scheme, hessian)
            expected = float(
                ((delta @ hessian) * delta).sum() / ((weight.double() @ hessian) * weight.double()).sum()
            )
            # Sums in another order may move a weight that lies between two codes.
            assert found.losses[row, place] == pytest.approx(expected, rel=0.03), (matrix.label, scheme.name)
    assert found.losses.sum() < 0.8 * nearest.losses.sum()


# ---- squared gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", pytest.param("qwen", marks=pytest.mark.slow)])
def test_errors_weighted_by_gradients(family, request, tmp_path):
    model = request.getfixturevalue(family)
    plain, found = Plain(model, seed=3), model.measure("fisher", tmp_path, seed=3)
    assert plain.tokens == sum(LENGTHS) - len(LENGTHS)
    for row, matrix in enumerate(model.matrices):
        weight = plain.weights[_module(matrix)]
        for place, scheme in enumerate(MENU):
            change = plain.x(matrix) @ delta_of(weight, scheme).T
            expected = float((plain.g(matrix) * change).square().sum()) / (2 * plain.tokens)
            assert found.losses[row, place] == pytest.approx(expected, rel=2e-3), (matrix.label, scheme.name)
        assert found.tokens[row] == len(plain.x(matrix))


@pytest.mark.slow
def test_gradients_with_the_errors_of_gptq(mixtral, tmp_path):
    """The Hessians come from a forward pass inside the way back; what is quantized is what the forward kind sees."""
    seen: dict[str, dict] = {"rel-output": {}, "fisher": {}}
    original = relative_output.Quantizer.deltas

    def kept(table):
        def deltas(self, weights, moments, shared):
            for matrix, place, delta in original(self, weights, moments, shared):
                table[matrix.label, place] = delta.clone()
                yield matrix, place, delta

        return deltas

    for kind, table in seen.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(relative_output.Quantizer, "deltas", kept(table))
            mixtral.measure(kind, tmp_path, GPTQ, menu=MENU[1:2])
    assert seen["fisher"].keys() == seen["rel-output"].keys() and len(seen["fisher"]) == len(mixtral.matrices)
    for place, delta in seen["fisher"].items():
        assert torch.allclose(delta, seen["rel-output"][place], atol=1e-5), place


def test_other_labels_give_other_losses_of_the_same_size(llama, tmp_path):
    first, second = (llama.measure("fisher", tmp_path, seed=seed).losses for seed in (0, 1))
    assert not np.allclose(first, second, rtol=1e-3)
    assert 0.5 < first.sum() / second.sum() < 2


def test_gradients_in_sixteen_bits_are_scaled_and_come_out_the_same(llama, tmp_path):
    wide = llama.measure("fisher", tmp_path)
    half = llama.measure("fisher", tmp_path, settings=Settings(threads=1, dtype="bfloat16"))
    assert np.median(np.abs(np.log(half.losses / wide.losses))) < 0.1


# ---- divergences -------------------------------------------------------------------------------------


def divergence(model, network, changes, search):
    """KL(model || changed), a plain loop over samples."""
    other = copy.deepcopy(network)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for matrix, weight in changes.items():
            found = re.fullmatch(
                r"(.*\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight", matrix.tensor
            )
            if found is None:
                parameters[matrix.tensor].copy_(weight)
                continue
            path = found[1].replace("block_sparse_moe", "mlp")
            stack, half = parameters[f"{path}.gate_up_proj"], matrix.rows
            if found[3] in ("w2", "down_proj"):
                parameters[f"{path}.down_proj"][int(found[2])] = weight
            else:
                start = 0 if found[3] in ("w1", "gate_proj") else half
                stack[int(found[2]), start : start + half] = weight
        total, count = 0.0, 0
        for ids in search:
            p, q = (
                torch.log_softmax(one(torch.from_numpy(ids)[None]).logits[0].double(), 1)
                for one in (network, other)
            )
            total += float((p.exp() * (p - q)).sum())
            count += len(ids)
    return total / count


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_divergences_are_those_of_a_plain_loop(family, request, tmp_path):
    model = request.getfixturevalue(family)
    search, menu = texts((29, 17, 29), seed=5), MENU[:2]
    groups = {m.label: f"{m.layer} {'qkv' if re.search('[qkv]_proj', m.label) else 'experts'}"
              for m in model.matrices if re.search(r"\.([qkv]_proj|experts)\.", m.label)}  # fmt: skip
    found = model.measure("kl", tmp_path, menu=menu, search=search, groups=groups)
    network = model.stock()
    rows = {label: row for row, label in enumerate(found.modules)}
    members: dict[str, list[Matrix]] = {}
    for matrix in model.matrices:
        members.setdefault(groups.get(matrix.label, matrix.label), []).append(matrix)
    assert len(members) < len(model.matrices)
    weights = {name: torch.from_numpy(model.checkpoint.read(name, 0, info.elements).copy()).reshape(info.shape)
               for name, info in model.checkpoint.tensors.items()}  # fmt: skip
    for name, matrices in members.items():
        for place, scheme in enumerate(menu):
            changed = {
                m: (weights[m.tensor].double() + delta_of(weights[m.tensor], scheme)).float()
                for m in matrices
            }
            expected = divergence(model, network, changed, search)
            own = sum(found.losses[rows[m.label], place] for m in matrices)
            assert own == pytest.approx(expected, rel=1e-3, abs=1e-7), (name, scheme.name)
    shares = found.losses[[rows[m.label] for m in members["0 qkv"]], 0] / [
        m.elements for m in members["0 qkv"]
    ]
    assert np.ptp(shares) < 1e-9 * shares.max()


def test_the_model_is_restored_after_every_group(llama, tmp_path):
    """Measured alone, the last layer's matrices lose what they lose after all others."""
    search = texts((20,), seed=5)
    everything = llama.measure("kl", tmp_path, menu=MENU[:1], search=search)
    alone = llama.measure("kl", tmp_path, menu=MENU[:1], search=search, layers=((), llama.layers[1][-1:]))
    assert alone.losses[0, 0] == pytest.approx(everything.losses[-1, 0], rel=1e-6)


def test_too_many_groups_are_refused_with_their_number(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(kl, "MOST_GROUPS", 13)
    with pytest.raises(UsageError, match=r"14 groups .* 13 are the most") as caught:
        llama.measure("kl", tmp_path, search=llama.samples)
    assert caught.value.code == "E474"


def test_a_model_that_does_not_fit_is_refused(llama, tmp_path):
    with pytest.raises(EnvironmentFault, match="for the whole model") as caught:
        llama.measure(
            "kl", tmp_path, search=llama.samples, settings=Settings(threads=1, memory_limit=200_000)
        )
    assert caught.value.code == "E476"


def test_no_text_is_refused(llama, tmp_path):
    for kind, given in (("fisher", {"samples": ()}), ("rel-output", {"samples": ()}), ("kl", {})):
        with pytest.raises(UsageError, match="text") as caught:
            llama.measure(kind, tmp_path, **given)
        assert caught.value.code == "E475"
    with pytest.raises(UsageError, match="unknown sensitivity") as caught:
        llama.measure("fischer", tmp_path)
    assert caught.value.help and "fisher" in caught.value.help


# ---- weights -----------------------------------------------------------------------------------------


def test_relative_errors_of_weights_need_no_text(mixtral, tmp_path):
    found = mixtral.measure("weight", tmp_path, Options(method="gptq"), samples=(), layers=mixtral.layers[:1])
    for row, matrix in enumerate(mixtral.layers[0]):
        shape = (matrix.rows, matrix.columns)
        weight = torch.from_numpy(mixtral.checkpoint.read(matrix.tensor, 0, matrix.elements).copy()).reshape(
            shape
        )
        for place, scheme in enumerate(MENU):
            expected = matrix.elements * float(
                delta_of(weight, scheme, clip=None).square().sum() / weight.double().square().sum()
            )
            assert found.losses[row, place] == pytest.approx(expected, rel=1e-4)
    assert found.estimated == ()


# ---- what all kinds have in common -------------------------------------------------------------------


def test_schemes_that_do_not_fit_are_left_open(qwen, tmp_path):
    """Experts of 20 channels are no whole number of groups of 16; their 32 inputs are."""
    found = qwen.measure("rel-output", tmp_path, GPTQ, menu=(Scheme("int", 4, 16), Scheme("float8", 8)))
    for row, matrix in enumerate(qwen.matrices):
        assert np.isnan(found.losses[row, 0]) == (matrix.columns % 16 != 0), matrix.label
        assert found.losses[row, 1] > 0
    assert np.isnan(found.losses[:, 0]).any() and not np.isnan(found.losses[:, 0]).all()


@pytest.mark.parametrize("kind", ["weight", "rel-output", "fisher", "kl"])
def test_more_bits_lose_less(kind, llama, tmp_path):
    found = llama.measure(kind, tmp_path, search=texts((40, 40), seed=5)).losses
    assert (np.diff(found.sum(axis=0)) < 0).all()
    assert (np.diff(found, axis=1) > 0).mean() < 0.05
    # An error a third as large costs a ninth.
    assert 5 < found[:, 0].sum() / found[:, 2].sum() < 200


@pytest.mark.parametrize("kind", ["fisher", "kl"])
def test_a_planted_layer_is_found(kind, tmp_path):
    """What other layers add is next to nothing: the errors of the one down projection that is left cost most."""
    model = Model("llama", num_hidden_layers=4)
    name = "model.layers.2.mlp.down_proj.weight"
    planted = copy.copy(model)
    others = (
        m.tensor
        for m in model.matrices
        if ("down_proj" in m.tensor or "o_proj" in m.tensor) and m.tensor != name
    )
    planted.checkpoint = Scaled(model.checkpoint, dict.fromkeys(others, 0.01))
    downs = tuple(tuple(m for m in layer if "down_proj" in m.tensor) for layer in model.layers)
    given = {"menu": MENU[:2], "search": texts((40, 40), seed=5), "layers": downs}
    before, after = (one.measure(kind, tmp_path, **given) for one in (model, planted))
    row = before.modules.index(name)
    assert before.losses.argmax(axis=0).tolist() != [row, row] == after.losses.argmax(axis=0).tolist()
    share_before, share_after = ((one.losses / one.losses.sum(axis=0))[row] for one in (before, after))
    assert (share_after > 0.6).all() and (share_after > 2 * share_before).all()
    # A relative error knows nothing of what a matrix is for.
    plain = planted.measure("rel-output", tmp_path, menu=MENU[:2], layers=downs).losses
    assert (plain[row] < 2 * plain.mean(axis=0)).all()


@pytest.mark.parametrize("kind", ["rel-output", "fisher"])
def test_experts_without_tokens_have_the_losses_of_others(kind, tmp_path):
    model = Model("qwen3_moe", num_hidden_layers=2)
    model.samples = texts((2,))
    found = model.measure(kind, tmp_path)
    unseen = {label for label, tokens in zip(found.modules, found.tokens, strict=True) if tokens == 0}
    assert unseen and set(found.estimated) == unseen
    for row, matrix in enumerate(model.matrices):
        if matrix.label in unseen:
            like = [
                r
                for r, m in enumerate(model.matrices)
                if projection(m) == projection(matrix) and found.tokens[r]
            ]
            assert found.losses[row] == pytest.approx(found.losses[like].mean(axis=0))


def with_head(model):
    """The layers of a model, with its output head behind them."""
    rows, columns = model.checkpoint.tensors["lm_head.weight"].shape
    return (
        *model.layers,
        (Matrix("lm_head.weight", len(model.layers), "lm_head", False, None, rows, columns, False),),
    )


@pytest.mark.parametrize("kind", ["weight", "rel-output", "fisher", "kl"])
def test_the_head_is_one_more_layer(kind, llama, tmp_path):
    search, menu = texts((29, 17), seed=5), MENU[:2]
    found = llama.measure(kind, tmp_path, layers=with_head(llama), search=search, menu=menu)
    others = llama.measure(kind, tmp_path, search=search, menu=menu)
    assert np.allclose(found.losses[:-1], others.losses, rtol=1e-5)
    network = llama.stock()
    weight = network.lm_head.weight.detach()
    with torch.no_grad():
        states = [network.model(torch.from_numpy(ids)[None]).last_hidden_state[0] for ids in llama.samples]
        for place, scheme in enumerate(menu):
            delta = delta_of(weight, scheme)
            if kind == "weight":
                expected = weight.numel() * float(delta.square().sum() / weight.double().square().sum())
            elif kind == "rel-output":
                x = torch.cat(states).double()
                expected = float((x @ delta.T).square().sum() / (x @ weight.double().T).square().sum())
            elif kind == "fisher":
                expected = head_loss(states, weight, delta)
            else:
                changed = copy.deepcopy(network)
                changed.lm_head.weight.copy_(weight.double() + delta)
                expected = 0.0
                for ids in search:
                    p, q = (
                        torch.log_softmax(one(torch.from_numpy(ids)[None]).logits[0].double(), 1)
                        for one in (network, changed)
                    )
                    expected += float((p.exp() * (p - q)).sum()) / sum(map(len, search))
            assert found.losses[-1, place] == pytest.approx(expected, rel=1e-3), scheme.name


def head_loss(states, weight, delta):
    """1/2 mean of (p - onehot)^2 (D h)^2 over places and vocabulary, labels drawn one by one."""
    total, count = 0.0, 0
    for number, hidden in enumerate(states):
        hidden = hidden[:-1].double()
        shares = torch.softmax(hidden @ weight.double().T, 1)
        chances = uniform(stream_key(0, number, "labels of the Fisher information"), 0, len(hidden))
        for row, share, chance in zip(hidden, shares, chances, strict=True):
            gradient = share.clone()
            gradient[int((share.numpy().cumsum() <= chance).sum())] -= 1
            total += float((gradient * (delta @ row)).square().sum())
        count += len(hidden)
    return total / (2 * count)


def test_a_layer_whose_sums_do_not_fit_is_looked_at_again(qwen, tmp_path, monkeypatch):
    """Room for the sums of one module at a time; the losses are the same."""
    whole = qwen.measure("rel-output", tmp_path / "whole", menu=MENU[:1])
    monkeypatch.setattr(Walk, "unused_bytes", property(lambda walk: 8 * 40**2 + 1))
    looks = []
    original = Walk._run
    monkeypatch.setattr(
        Walk, "_run", lambda self, layer, *args: looks.append(layer) or original(self, layer, *args)
    )
    parts = qwen.measure("rel-output", tmp_path / "parts", menu=MENU[:1])
    assert looks.count(0) > 4
    assert np.allclose(parts.losses, whole.losses, rtol=1e-5) and np.array_equal(parts.tokens, whole.tokens)


def test_experts_that_are_streamed_have_the_same_losses(qwen, tmp_path):
    given = {"menu": MENU[:1]}
    whole = qwen.measure("rel-output", tmp_path / "whole", **given)
    streamed = qwen.measure(
        "rel-output", tmp_path / "streamed", settings=Settings(threads=1, stream_experts=True), **given
    )
    assert np.allclose(streamed.losses, whole.losses, rtol=1e-4)


def test_matrices_that_are_loaded_as_one_share_a_scale(llama, tmp_path):
    """NVFP4 of q is that with the scale of q, k and v together, whichever reader."""
    scheme = Scheme("nvfp4", 4)
    found = llama.measure("weight", tmp_path, menu=(scheme,))
    weights = {
        m.tensor: llama.checkpoint.read(m.tensor, 0, m.elements).reshape(m.rows, m.columns)
        for m in llama.layers[0]
    }
    group = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    shared = float4.shared_scale(weights[name] for name in group)
    for name in group:
        values = float4.quantize(weights[name], scheme, shared).values()
        weight = weights[name].astype(np.float64)
        expected = weight.size * ((values - weight) ** 2).sum() / (weight**2).sum()
        assert found.losses[found.modules.index(name), 0] == pytest.approx(expected, rel=1e-5)
    alone = [float4.shared_scale([weights[name]]) for name in group]
    assert len({float(value) for value in alone}) == 3


# ---- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weight", "rel-output", "fisher", "kl"])
def test_a_table_is_measured_once(kind, llama, tmp_path, monkeypatch):
    search = texts((20,), seed=5)
    told = []
    first = llama.measure(
        kind, tmp_path, GPTQ, menu=MENU[2:], search=search, progress=lambda *what: told.append(what)
    )
    assert told and told[-1][1] == told[-1][2] and isinstance(told[0][0], str)
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["sensitivities"]

    def again(*args):
        raise AssertionError("it is measured already")

    for module in (relative_output, fisher, kl):
        monkeypatch.setattr(module, "measured", again)
    monkeypatch.setattr("surgeon.quantize.measuring.weight.measured", again)
    second = llama.measure(kind, tmp_path, GPTQ, menu=MENU[2:], search=search)
    assert np.array_equal(first.losses, second.losses) and first.modules == second.modules
    assert first.about["schemes"] == list(NAMES[2:])
    changes = [{"menu": MENU[3:]}, {"layers": llama.layers[:1]}]
    if kind != "weight":
        changes += [
            {"samples": llama.samples[:2]},
            {"options": Options(method="gptq", damp=0.02, clip=False)},
        ]
    for change in changes:
        given = {"menu": MENU[2:], "search": search, "options": GPTQ, **change}
        with pytest.raises(AssertionError, match="measured already"):
            llama.measure(kind, tmp_path, given.pop("options"), **given)


def test_a_damaged_table_is_measured_again(llama, tmp_path):
    first = llama.measure("weight", tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("0.", "1.", 1))
    assert np.array_equal(llama.measure("weight", tmp_path).losses, first.losses)


@pytest.mark.parametrize("kind", ["rel-output", "fisher", "kl"])
def test_an_interrupted_measurement_goes_on(kind, llama, tmp_path):
    settings = Settings(threads=1, spill=tmp_path / "pass")
    given = {"menu": MENU[2:3], "search": texts((20,), seed=5), "settings": settings}
    whole = llama.measure(kind, tmp_path / "whole", GPTQ, **{**given, "settings": SETTINGS})
    stop = threading.Event()

    def finished():
        return list((tmp_path / "parts").glob("unfinished-*/layer-*.json"))

    def progress(what, done, total):
        if finished():
            stop.set()

    with pytest.raises(Interrupted):
        llama.measure(kind, tmp_path / "parts", GPTQ, progress=progress, stop=stop, **given)
    (held,) = finished()
    before = held.stat().st_mtime_ns
    touched = []
    found = llama.measure(kind, tmp_path / "parts", GPTQ, progress=lambda *_: touched.append(
        held.stat().st_mtime_ns if held.exists() else None), **given)  # fmt: skip
    assert set(touched) == {before}
    assert np.allclose(found.losses, whole.losses, rtol=1e-5) and not finished()


def test_stopping_before_anything_is_done(llama, tmp_path):
    stop = threading.Event()
    stop.set()
    for kind in ("weight", "rel-output", "fisher", "kl"):
        with pytest.raises(Interrupted):
            llama.measure(kind, tmp_path, search=llama.samples, stop=stop)


def test_the_model_is_run_once(llama, tmp_path, monkeypatch):
    runs = []
    original = Walk.run
    monkeypatch.setattr(
        Walk, "run", lambda self, *args, **options: runs.append(1) or original(self, *args, **options)
    )
    llama.measure("rel-output", tmp_path, GPTQ)
    llama.measure("rel-output", tmp_path, GPTQ)
    assert runs == [1]
