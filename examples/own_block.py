"""A pre-activation block of one's own (He et al. 2016) from fused modules, beside the same block in plain PyTorch.

python examples/own_block.py                 equal results, bytes kept for backward, time of a step
python examples/own_block.py --tiny          the same on a small tensor
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from ran_ext.nn import BNReLUConv2d


class FusedBlock(nn.Module):
    """BN-ReLU-3x3 twice, plus the input: two ops."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = BNReLUConv2d(channels, channels, 3, padding=1)
        self.conv2 = BNReLUConv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), residual=x)


class PlainBlock(nn.Module):
    """The same: seven ops."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x)))))) + x


def bytes_kept(block: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors that autograd keeps for backward, each counted once, parameters left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    for parameter in block.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del out
    return sum(kept.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tiny", action="store_true")
    shape = (2, 16, 8, 8) if parser.parse_args().tiny else (32, 64, 32, 32)

    torch.manual_seed(0)
    fused, plain = FusedBlock(shape[1]), PlainBlock(shape[1])
    weights = {
        name.replace(".bn", "").replace("conv", "bn", 1) if ".bn" in name else name.replace(".conv", ""): value
        for name, value in fused.state_dict().items()
    }
    plain.load_state_dict(weights)  # conv1.bn.weight is bn1.weight there, conv1.conv.weight is conv1.weight
    fused, plain = (block.to(memory_format=torch.channels_last) for block in (fused, plain))
    x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()

    difference = (fused(x) - plain(x)).abs().max().item()
    assert difference < 1e-3, difference
    print(f"largest difference of the outputs: {difference:.1e}")
    for name, block in (("plain", plain), ("fused", fused)):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            block(x).sum().backward()
            times.append(time.perf_counter() - began)
        print(
            f"{name}: {bytes_kept(block, x) / 1e6:6.1f} MB kept, {1e3 * sorted(times)[2]:6.1f} ms forward and backward"
        )


if __name__ == "__main__":
    main()
