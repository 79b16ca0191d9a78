"""A loop in the manner of timm's train.py, with one added line: ``ran_ext.convert``. Needs timm.

python examples/timm_train.py --model resnetv2_50
python examples/timm_train.py --tiny
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

import ran_ext
from ran_ext.data import sample


def main() -> None:
    """Train, and print loss and learning rate of each epoch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="resnet18", help="a name of timm's")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = sample("train").subset(torch.arange(16)) if options.tiny else sample("train")
    loader = DataLoader(images, batch_size=8 if options.tiny else 32, shuffle=True)

    model = timm.create_model(options.model, num_classes=10)
    model = ran_ext.convert(model)  # the added line

    ema = ModelEmaV3(model, decay=0.99)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9, weight_decay=1e-4)
    epochs = 1 if options.tiny else 3
    scheduler, criterion = CosineLRScheduler(optimizer, t_initial=epochs), LabelSmoothingCrossEntropy(0.1)
    for epoch in range(epochs):
        total = 0.0
        for batch, labels in loader:
            loss = criterion(model(batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}, lr {optimizer.param_groups[0]['lr']:.3f}")
        scheduler.step(epoch + 1)


if __name__ == "__main__":
    main()
