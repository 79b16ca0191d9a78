"""A loop in the manner of torchvision's references, with one added line: ``ran_ext.convert``. Needs torchvision.

python examples/torchvision_train.py --model vgg16_bn
python examples/torchvision_train.py --tiny
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import ran_ext
from ran_ext.data import sample


def main() -> None:
    """Train, and print loss and images a second of each epoch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="resnet18", help="a name of torchvision.models")
    parser.add_argument("--size", type=int, default=64, help="pixels along a side")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    augment = v2.Compose(
        [
            v2.Resize(32 if options.tiny else options.size),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26]),
        ]
    )
    images = sample("train").subset(torch.arange(16)) if options.tiny else sample("train")
    images.transform = augment
    loader = DataLoader(images, batch_size=8 if options.tiny else 32, shuffle=True)

    model = torchvision.models.get_model(options.model, num_classes=10)
    model = ran_ext.convert(model)  # the added line

    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    for epoch in range(1 if options.tiny else 3):
        began, total = time.perf_counter(), 0.0
        for batch, labels in loader:
            loss = criterion(model(batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        rate = len(images) / (time.perf_counter() - began)
        print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}, {rate:.0f} images/s")


if __name__ == "__main__":
    main()
