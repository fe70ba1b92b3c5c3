"""Learned thresholds on a convolutional network from scratch: ``python benchmarks/pruning/lapp_cnn.py``.

A ResNet-20 (He et al., arXiv 1512.03385; its stem halves the image, for speed) for 32x32 images of ten
classes that are drawn here. What arXiv
2309.14157 does with CIFAR-10 is done in its style: every residual block has a light path beside it from the
start (1x1 to r channels and back), one threshold a block decides which filters of its first convolution stay,
a FLOPs budget tightens during the first 30 % of training, then the network is sliced and trained on. The path
stays in the network and its FLOPs are counted. Beside it, trained for as many steps on the same images: the
whole network, and networks with equally many filters less in every block at no fewer FLOPs, and a network that has the learned widths from
the start, which tells the choice of widths from the way there.

Writes LAPP-CNN.md beside this file. One thread, four to five minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from surgeon.train.cost import Cost
from surgeon.train.freeze import Learned, freeze, kept_units
from surgeon.train.gates import Control, Gate, Gates
from surgeon.train.threshold_task import Budget, ThresholdTask

HERE = Path(__file__).parent
CLASSES = (
    "disc",
    "square",
    "triangle",
    "cross",
    "ring",
    "rows",
    "columns",
    "checks",
    "diagonal",
    "two discs",
)
PRUNING_SHARE = 0.3

READING = """
How to read it: with training this short, learned thresholds are not better than equal widths here; equal widths get
slightly more multiply-adds, for a few filters are a coarse grid and they are rounded against the method. The learned
widths trained from the start lie within the spread of the seeds of the uniform networks, so the choice of widths
neither helps nor hurts visibly; in two of three seeds they end above the network that was pruned on the way.
Two settings were run before this one and are not in the table. 300 steps with a stem that does not halve the image,
three seeds: 77.1 % against 85.2 % and 81.5 % of the uniform networks (with and without path) and 92.0 % of the whole
one. 450 steps on images with clutter that no network learned (whole network 40.8 %, two seeds): 20.5 % against 29.6 %
and 34.2 %. The published result, ResNet-20 on CIFAR-10 at 40.3 % without loss, is neither reached nor refuted:
these runs see their images four times.
"""


# ---- images ------------------------------------------------------------------------------------------


def images(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return [count, 3, size, size] and classes: a figure of random place, size, colour and angle in noise."""
    drawn = np.random.default_rng(seed)
    labels = drawn.integers(0, len(CLASSES), count)
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    out = np.empty((count, 3, size, size), dtype=np.float32)
    for n, label in enumerate(labels):
        inside = _figure(int(label), x, y, size, drawn)
        ground = drawn.uniform(-1, 1, (3, 1, 1))
        ink = ground + drawn.choice([-1, 1], (3, 1, 1)) * drawn.uniform(0.5, 1.5, (3, 1, 1))
        out[n] = np.where(inside, ink, ground) + drawn.normal(0, 0.45, (3, size, size))
    return torch.from_numpy(out).to(memory_format=torch.channels_last), torch.from_numpy(labels)


def _figure(label: int, x: np.ndarray, y: np.ndarray, size: int, drawn: np.random.Generator) -> np.ndarray:
    """Return which pixels a figure of a class covers."""
    radius = drawn.uniform(7, 11)
    cx, cy = drawn.uniform(radius, size - radius, 2)
    angle = drawn.uniform(-0.25, 0.25)
    u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    distance, box = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v)) < radius
    stripes = radius / 2.2
    return {
        "disc": distance < radius,
        "square": box,
        "triangle": (v < radius) & (v > 2 * np.abs(u) - radius),
        "cross": box & ((np.abs(u) < radius / 3) | (np.abs(v) < radius / 3)),
        "ring": (distance < radius) & (distance > 0.6 * radius),
        "rows": box & (np.floor(v / stripes) % 2 == 0),
        "columns": box & (np.floor(u / stripes) % 2 == 0),
        "checks": box & ((np.floor(u / stripes) + np.floor(v / stripes)) % 2 == 0),
        "diagonal": box & (np.floor((u + v) / (1.4 * stripes)) % 2 == 0),
        "two discs": (np.hypot(u - radius / 2, v) < radius / 2.2)
        | (np.hypot(u + radius / 2, v) < radius / 2.2),
    }[CLASSES[label]]


# ---- the network -------------------------------------------------------------------------------------


class Block(nn.Module):
    """A basic block with ``inner`` filters in its first convolution and, for rank > 0, a light path beside both."""

    def __init__(self, channels_in: int, channels: int, inner: int, stride: int, rank: int) -> None:
        super().__init__()
        self.stride, self.grow = stride, channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, inner, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.path = None
        if rank:
            self.path = nn.Sequential(
                nn.Conv2d(channels_in, rank, 1, stride, bias=False), nn.Conv2d(rank, channels, 1, bias=False)
            )
            nn.init.zeros_(self.path[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(functional.relu(self.norm1(self.conv1(x))))
        if self.path is not None:
            out = out + self.path(x)
        if self.stride > 1 or self.grow:  # shortcut A: subsampling and zeros
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow))
        return functional.relu(self.norm2(out) + x)


class ResNet20(nn.Module):
    """Three stages of three blocks; ``inner`` gives the filters of every block's first convolution."""

    def __init__(self, width: int, inner: list[int] | None = None, rank: int = 0) -> None:
        super().__init__()
        channels = [width, *(width * 2**stage for stage in range(3) for _ in range(3))]
        inner = inner or channels[1:]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            Block(channels[n], channels[n + 1], inner[n], 2 if n in (3, 6) else 1, rank) for n in range(9)
        )
        self.head = nn.Linear(channels[-1], len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def cost_of(network: ResNet20, size: int = 32) -> Cost:
    """Return multiply-adds of an image; a curve for the filters of every block."""
    side = size // 2
    rest = 3 * 9 * network.stem[0].out_channels * side**2 + network.head.weight.numel()
    curves = {}
    for number, block in enumerate(network.blocks):
        side //= block.stride
        each = 9 * side**2 * (block.conv1.in_channels + block.conv2.out_channels)
        curves[number, "ffn"] = each * np.arange(block.conv1.out_channels + 1.0)
        if block.path is not None:
            rest += side**2 * sum(conv.weight.numel() for conv in block.path)
    return Cost("multiply-adds", float(rest), curves)


class FilterGate(Gate):
    """A gate on the channels that enter a convolution: the filters of the one before."""

    def rows(self, inputs: Tensor) -> Tensor:
        return inputs.permute(0, 2, 3, 1).flatten(0, 2)

    def squared_norms(self) -> Tensor:
        return self.behind[0].weight.detach().square().sum((0, 2, 3))

    def apply_mask(self, inputs: Tensor, mask: Tensor) -> Tensor:
        return inputs * mask[None, :, None, None]


@torch.no_grad()
def sliced(network: ResNet20, kept: dict, width: int, rank: int) -> ResNet20:
    """Return a network of the kept filters with the weights it has learned so far."""
    small = ResNet20(width, [len(kept[n, "ffn"]) for n in range(9)], rank)
    state = network.state_dict()
    for n in range(9):
        rows = list(kept[n, "ffn"])
        for name in (
            "conv1.weight",
            *(f"norm1.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
        ):
            state[f"blocks.{n}.{name}"] = state[f"blocks.{n}.{name}"][rows]
        state[f"blocks.{n}.conv2.weight"] = state[f"blocks.{n}.conv2.weight"][:, rows]
    small.load_state_dict(state)
    return small


# ---- training ----------------------------------------------------------------------------------------


def steps_of(
    network: nn.Module, data, first: int, last: int, total: int, options, task: ThresholdTask | None = None
) -> None:
    """Train from step ``first`` to ``last`` of ``total``: AdamW, one cosine over all of them."""
    others = [{"params": list(network.parameters()), "lr": options.rate, "weight_decay": 0.02}]
    groups = task.groups() if task is not None else others
    optimizer = torch.optim.AdamW(groups)
    network.to(memory_format=torch.channels_last)  # half as fast again on a CPU
    x, labels = data
    network.train()
    for step in range(first, last):
        rate = options.rate * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / total))
        for group in optimizer.param_groups:
            if not group.get("constant"):
                group["lr"] = rate
        if task is not None:
            loss, _ = task.loss(step, 0)
        else:
            rows = batch_rows(step, len(x), options)
            loss = functional.cross_entropy(network(x[rows]), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if task is not None:
            task.after_update(step, optimizer)


def batch_rows(step: int, count: int, options) -> np.ndarray:
    return np.random.default_rng((options.seed, step)).integers(0, count, options.batch)


@torch.inference_mode()
def accuracy(network: nn.Module, data) -> float:
    network.eval()
    right = sum(
        int((network(x).argmax(1) == y).sum())
        for x, y in zip(*(part.split(250) for part in data), strict=True)
    )
    return right / len(data[1])


def lapp(data, options) -> tuple[ResNet20, dict]:
    """Train with thresholds, freeze, slice, train on."""
    torch.manual_seed(options.seed)
    network = ResNet20(options.width, rank=options.rank)
    cost, plain = cost_of(network), cost_of(ResNet20(options.width))
    remaining = options.remaining * plain.dense / cost.dense  # of the network without paths
    gates = Gates(Control())
    for n, block in enumerate(network.blocks):
        gates.ffn[n] = FilterGate(block.conv2, block.conv1.out_channels, gates.control)
    x, labels = data

    def data_loss(step: int, part: int):
        rows = batch_rows(step, len(x), options)
        return functional.cross_entropy(network(x[rows]), labels[rows]), {}

    phase = round(options.steps * PRUNING_SHARE)
    weights = [{"params": list(network.parameters()), "lr": options.rate, "weight_decay": 0.02}]
    budget = Budget(remaining=remaining, warm_up=2 / 30)
    task = ThresholdTask(gates, cost, budget, phase, data_loss, rate=0.02, others=weights)
    steps_of(network, data, 0, phase, options.steps, options, task)
    learned = {
        key: Learned(gate.scores().double().numpy(), gate.tau.item())
        for *key, gate in gates.all() for key in [tuple(key)]
    }  # fmt: skip
    kept = kept_units(learned, freeze(learned, cost, remaining * cost.dense))
    gates.remove()
    small = sliced(network, kept, options.width, options.rank)
    steps_of(small, data, phase, options.steps, options.steps, options)
    return small, kept


def uniform(data, options, rank: int) -> ResNet20:
    """Train a network with the same share of filters in every block, the least that is not cheaper than asked."""
    plain = cost_of(ResNet20(options.width))
    whole = [len(curve) - 1 for _, curve in sorted(plain.curves.items())]
    for share in np.linspace(0.05, 1, 400):
        inner = [max(1, round(share * units)) for units in whole]
        if cost_of(ResNet20(options.width, inner, rank)).dense >= options.remaining * plain.dense:
            break
    return scratch(data, options, inner, rank)


def scratch(data, options, inner: list[int], rank: int | None = None) -> ResNet20:
    """Train a network of given widths from the start; with the path unless ``rank`` says otherwise."""
    torch.manual_seed(options.seed)
    network = ResNet20(options.width, inner, options.rank if rank is None else rank)
    steps_of(network, data, 0, options.steps, options.steps, options)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage; 16 in the paper")
    parser.add_argument("--rank", type=int, default=2, help="channels of the path beside a block")
    parser.add_argument("--remaining", type=float, default=0.4, help="share of the multiply-adds")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    train, test = images(options.images, 1), images(2000, 2)
    rows: dict[str, list[tuple[float, float]]] = {}
    widths = []
    dense = cost_of(ResNet20(options.width)).dense
    for seed in range(options.seeds):
        options.seed = seed
        torch.manual_seed(options.seed)
        whole = ResNet20(options.width)
        steps_of(whole, train, 0, options.steps, options.steps, options)
        small, kept = lapp(train, options)
        widths.append([len(units) for _, units in sorted(kept.items())])
        networks = {
            "whole network": whole,
            "learned thresholds, path kept and counted": small,
            "the widths learned, trained from the start": scratch(train, options, widths[-1]),
            "uniform, path kept and counted": uniform(train, options, options.rank),
            "uniform": uniform(train, options, 0),
        }
        for name, network in networks.items():
            rows.setdefault(name, []).append((cost_of(network).dense / dense, accuracy(network, test)))
            print(
                f"seed {options.seed}: {name}: {rows[name][-1][0]:.1%}, {rows[name][-1][1]:.1%}", flush=True
            )
    write(rows, widths, options, dense, time.process_time() - begun)


def write(rows: dict, widths: list, options, dense: float, seconds: float) -> None:
    whole = [options.width * 2**stage for stage in range(3) for _ in range(3)]
    lines = [
        "# Learned thresholds on a CNN from scratch",
        "",
        f"ResNet-20 with {options.width}, {2 * options.width}, {4 * options.width} channels ({dense / 1e6:.2f} M multiply-adds),",
        f"{options.images:,} drawn 32x32 images of ten classes, {options.steps} steps of {options.batch}, {options.seeds} seeds, one thread, {seconds:.0f} s of its time.",
        "`python benchmarks/pruning/lapp_cnn.py`. LAPP-style: arXiv 2309.14157 publishes no equations; see `surgeon/train/gates.py`.",
        "",
        "| network | multiply-adds left | test accuracy (by seed) | mean |",
        "|---|---|---|---|",
    ]
    for name, found in rows.items():
        each = ", ".join(f"{right:.1%}" for _, right in found)
        lines.append(
            f"| {name} | {np.mean([c for c, _ in found]):.1%} | {each} | {np.mean([a for _, a in found]):.1%} |"
        )
    lines += ["", f"Filters of the first convolution of the nine blocks; the whole network has {whole}:", ""]
    lines += [f"- seed {seed}: {inner}" for seed, inner in enumerate(widths)]
    lines += ["", READING.strip()]
    (HERE / "LAPP-CNN.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
