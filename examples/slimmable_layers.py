"""Train a slimmable network in a plain PyTorch loop, and cut ordinary networks of two widths out of it.

    python examples/slimmable_layers.py

`slimmable` converts an existing model; the loop is the sandwich rule of slimmable networks: in every step each width
adds its gradient, then the optimizer takes one step.
"""

import torch
from torch import nn

from dspnet_fast.nn import activate, slimmable
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics

WIDTHS = (0.5, 1.0)
STEPS = 60


def images_and_labels(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise [N, 3, 16, 16] with a bright row (class 0) or column (class 1)."""
    images = torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    places = torch.randint(16, (count,), generator=generator)
    for image, label, place in zip(images, labels, places, strict=True):
        (image[:, place] if label == 0 else image[:, :, place]).add_(2)
    return images, labels


def main() -> None:
    """Train both widths together and print the accuracy of the networks cut out."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    model = slimmable(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        images, labels = images_and_labels(64, generator)
        losses = []
        for width in WIDTHS:
            with activate(model, width):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            print(
                f"step {step + 1}  "
                + "  ".join(f"width {w}: loss {v:.3f}" for w, v in zip(WIDTHS, losses, strict=True))
            )

    test_images, test_labels = images_and_labels(500, generator)
    post_statistics(model, WIDTHS, [images_and_labels(64, generator)[0] for _ in range(8)])  # batch norm, per width
    for width in WIDTHS:
        network = slim(model, width)  # torch.nn layers only
        with torch.no_grad():
            accuracy = (network(test_images).argmax(1) == test_labels).float().mean()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        print(f"width {width}: {parameters:,} parameters, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
