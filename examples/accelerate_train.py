"""accelerate with a residual attention network: accumulation of gradients, clipping, checkpoints. Needs accelerate.

python examples/accelerate_train.py
accelerate launch examples/accelerate_train.py
python examples/accelerate_train.py --tiny
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader

import ran_ext
from ran_ext.data import sample


def main() -> None:
    """Train, and print the loss of each epoch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = ran_ext.models.create_model("ran_compact", width=0.125 if tiny else 0.5).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    images = sample("train").subset(torch.arange(32)) if tiny else sample("train")
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(images, batch_size=8, shuffle=True))
    for epoch in range(1 if tiny else 3):
        total = 0.0
        for batch, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(batch), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item()
        accelerator.print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)


if __name__ == "__main__":
    main()
