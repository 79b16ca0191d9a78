"""Lightning with a network of torchvision's and one added line: ``ran_ext.convert``. Needs lightning, torchvision.

python examples/lightning_cnn.py             ResNet-18 on the CIFAR-10 images in the package
python examples/lightning_cnn.py --tiny
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import ran_ext
from ran_ext.data import sample


class Classifier(lightning.LightningModule):
    """ResNet-18 for ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torchvision.models.resnet18(num_classes=10)
        ran_ext.convert(self.model)  # the added line

    def training_step(self, batch: Any, index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def main() -> None:
    """Train, and print the last loss."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    lightning.seed_everything(0)
    images = sample("train").subset(torch.arange(16)) if tiny else sample("train")
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1 if tiny else 3,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(images, batch_size=8 if tiny else 64, shuffle=True))
    print(f"loss {trainer.callback_metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
