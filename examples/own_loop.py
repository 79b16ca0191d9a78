"""A training loop of one's own: a residual attention network on CIFAR-10 images, in plain PyTorch style.

python examples/own_loop.py                  a minute on two cores
python examples/own_loop.py --tiny           seconds, to see that it runs
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import ran_ext
from ran_ext.data import sample


def main() -> float:
    """Train; the accuracy on the test images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny

    train, test = sample("train"), sample("test")  # data sets of (float32 image in 0..1, label)
    if tiny:
        train, test = train.subset(torch.arange(64)), test.subset(torch.arange(32))
    torch.manual_seed(0)
    model = ran_ext.models.create_model("ran_compact", width=0.125 if tiny else 0.5)
    model = model.to(memory_format=torch.channels_last)
    epochs, loader = 1 if tiny else 3, DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(loader))

    for epoch in range(epochs):
        model.train()
        total = 0.0
        for images, labels in loader:
            images = images.sub(0.5).to(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}")

    folded = ran_ext.fold_for_inference(model.eval())
    with torch.no_grad():
        right = sum(
            int((folded(images.sub(0.5)).argmax(1) == labels).sum())
            for images, labels in DataLoader(test, batch_size=128)
        )
    print(f"test accuracy {right / len(test):.3f} ({len(test)} images)")
    return right / len(test)


if __name__ == "__main__":
    main()
