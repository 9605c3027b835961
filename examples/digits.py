"""Plain against deformable convolution on handwritten digits, each rotated and scaled at random.

    python examples/digits.py [--quick] [--picture digits.png]

Trains both networks on the CPU for several seeds and prints the accuracy on digits that were not trained on, whichever
is better. The picture shows where one filter of the trained deformable layer samples, on digits of three sizes.
Needs torch and scikit-learn, and matplotlib for the picture.
"""

import argparse
import math
import sys
from importlib.util import find_spec

if missing := [name for name in ("torch", "sklearn") if find_spec(name) is None]:
    sys.exit(f"digits.py needs {' and '.join(missing)}: pip install torch scikit-learn (and matplotlib for --picture)")

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from dcn_kernels import sampling_points
from dcn_kernels.torch import ModulatedDeformConv2dPack

SIZE = 16


def warped(images: torch.Tensor, generator: torch.Generator, scale: float | None = None) -> torch.Tensor:
    """8x8 images on a 16x16 canvas, each rotated by up to 60 degrees and scaled by 0.5 to 1.2 of the canvas."""
    angle = (torch.rand(len(images), generator=generator) * 2 - 1) * math.radians(60)
    size = torch.rand(len(images), generator=generator) * 0.7 + 0.5
    if scale is not None:
        angle, size = angle * 0, torch.full_like(size, scale)
    cos, sin, zero = torch.cos(angle) / size, torch.sin(angle) / size, torch.zeros(len(images))
    matrix = torch.stack((torch.stack((cos, -sin, zero), 1), torch.stack((sin, cos, zero), 1)), 1)
    grid = nn.functional.affine_grid(matrix, [len(images), 1, SIZE, SIZE], align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def network(deformable: bool) -> nn.Sequential:
    """Three convolutions; the last is plain, or deformable with a convolution of its own for offsets and masks."""
    last = ModulatedDeformConv2dPack(24, 32, 3, padding=1) if deformable else nn.Conv2d(24, 32, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(),
        last, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def accuracy_of(deformable: bool, seed: int, epochs: int, data: tuple) -> tuple[float, nn.Sequential]:
    """Train one network; the share of right answers on the held-out digits."""
    train, train_labels, test, test_labels = data
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = network(deformable)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        images = warped(train, generator)
        for part in torch.randperm(len(train), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), train_labels[part]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        answers = model(warped(test, torch.Generator().manual_seed(1000))).argmax(1)
    return (answers == test_labels).double().mean().item(), model


def draw(model: nn.Sequential, images: torch.Tensor, path: str) -> None:
    """Where the deformable filter samples for the centre of one digit at three sizes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4))
    for axis, scale in zip(axes, (0.5, 0.8, 1.2), strict=True):
        image = warped(images[:1], torch.Generator(), scale)
        with torch.no_grad():
            features = model[:4](image)
            channels = model[4].offsets(features)
            offset, mask = channels[:, :18].contiguous(), channels[:, 18:].sigmoid()
        points = sampling_points(offset.numpy(), 3, padding=1)[0, 0]  # (K, 2, OH, OW)
        middle = points[:, :, 4, 4] * 2  # the layer sees the image at half size
        axis.imshow(image[0, 0], cmap="gray", vmin=0, vmax=1)
        weights = 20 + 160 * mask[0, :, 4, 4].numpy()
        axis.scatter(middle[:, 1], middle[:, 0], s=weights, c="red", edgecolors="white", label="samples")
        axis.scatter([8], [8], marker="+", c="yellow", s=80, label="output position")
        axis.set(title=f"size {scale}", xlim=(-0.5, SIZE - 0.5), ylim=(SIZE - 0.5, -0.5), xticks=[], yticks=[])
    axes[0].legend(loc="lower left", fontsize=7)
    figure.suptitle("Samples of one 3x3 filter (area: its mask)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two seeds, few epochs: for the tests")
    parser.add_argument("--picture", help="file to draw into")
    options = parser.parse_args()
    if options.picture and find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib")
    torch.set_num_threads(1)  # the layers are small, and waiting threads would take the cores from our own
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images = torch.from_numpy(digits.images[order, None] / 16).float()
    labels = torch.from_numpy(digits.target[order]).long()
    data = images[:1200], labels[:1200], images[1200:], labels[1200:]
    seeds, epochs = (2, 5) if options.quick else (4, 20)
    results: dict[str, list[float]] = {"plain": [], "deformable": []}
    sizes: dict[str, int] = {}
    for seed in range(seeds):
        for name, found in results.items():
            accuracy, model = accuracy_of(name == "deformable", seed, epochs, data)
            found.append(accuracy)
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    for name, found in results.items():
        each = " ".join(f"{100 * value:.1f}" for value in found)
        deviation = 100 * np.std(found, ddof=1)
        print(f"{name:10} {100 * np.mean(found):.1f} % +- {deviation:.1f} over seeds: {each}; {sizes[name]} parameters")
    if options.picture:
        draw(model, images[1200:], options.picture)


if __name__ == "__main__":
    main()
