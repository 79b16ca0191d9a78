"""Bytes that the GPU's torch side asks of its allocator, counted without a GPU; see build.py for what runs.

Kernels are not run, so that sizes are real ones. The library's convolutions and mean are stood in for by their results:
what cuDNN would work in is not counted, nor what the CPU's own would.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ran_ext import ops, set_backend, set_bn_relu, set_conv1x1, set_conv3x3
from ran_ext.models import create_model

gpu = torch.ops.emulated_gpu
BATCH = 128
STEPS = {
    "fused 3x3": ("fused", "library", "native"),
    "library's 3x3": ("library", "library", "native"),
    "fused 3x3 and 1x1": ("fused", "fused", "native"),
    "fused 1x1": ("library", "fused", "native"),
    "plain PyTorch": ("library", "library", "reference"),
}


def convolution(x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int], *_: object):
    height, width = ((x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in (0, 1))
    return torch.empty(
        x.shape[0], weight.shape[0], height, width, dtype=x.dtype, memory_format=torch.channels_last
    )  # fmt: skip


def convolution_backward(dout: Tensor, x: Tensor, weight: Tensor, *rest: Sequence[bool]):
    wanted = rest[-1]
    bias = x.new_empty(weight.shape[0]) if wanted[2] else None
    return torch.empty_like(x) if wanted[0] else None, torch.empty_like(weight) if wanted[1] else None, bias


def mean(x: Tensor, dim: Sequence[int], keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty([size for i, size in enumerate(x.shape) if i not in dim])


@dataclass
class Count:
    """Bytes: the most held and those held at the end, both beyond what was before; and the allocator's calls."""

    most: int
    kept: int
    sizes: list[int]


def count(run: Callable[[], object]) -> Count:
    before = gpu.bytes()
    gpu.peak(), gpu.sizes()
    kept = run()
    counted = Count(gpu.peak() - before, gpu.bytes() - before, gpu.sizes())
    del kept
    return counted


def layer() -> dict[str, dict[str, float]]:
    """Of one 3x3 convolution of 64 channels and 32x32 pixels with BN-ReLU, in tensors of x's size.

    Of each pass: what it holds at most beyond its results, the largest that it asks for of another size (scratch), and
    how many tensors of x's size it asks for.
    """
    x = torch.empty(BATCH, 64, 32, 32, dtype=torch.bfloat16, memory_format=torch.channels_last)
    weight = torch.empty(64, 64, 3, 3, dtype=x.dtype, memory_format=torch.channels_last)
    scale, shift = torch.ones(64), torch.zeros(64)
    leaves = [t.requires_grad_() for t in (x, weight, scale, shift)]
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.append(ops.bn_relu_conv2d(x, scale, shift, None, None, weight, padding=1, training=True))

    counts = {"forward": count(forward)}
    dout = torch.empty_like(outputs[0])
    counts["backward"] = count(lambda: torch.autograd.grad(outputs[0], leaves, dout, retain_graph=True))
    counts["weight's gradient alone"] = count(lambda: torch.autograd.grad(outputs[0], weight, dout, retain_graph=True))
    return {
        name: {
            "transient": (c.most - c.kept) / x.nbytes,
            "scratch": max(size for size in c.sizes if size != x.nbytes) / x.nbytes,
            "tensors": sum(size == x.nbytes for size in c.sizes),
        }
        for name, c in counts.items()
    }


def step(model: nn.Module) -> dict[str, int]:
    """Of a training step, beyond weights, gradients and the batch: kept for backward, most held, all asked for."""
    images, labels = torch.rand(BATCH, 3, 32, 32).bfloat16(), torch.randint(10, (BATCH,))
    images = images.contiguous(memory_format=torch.channels_last)
    losses: list[Tensor] = []
    forward = count(lambda: losses.append(F.cross_entropy(model(images), labels)))
    backward = count(lambda: losses.pop().backward())
    most = max(forward.most, forward.kept + backward.most)
    return {"kept": forward.kept, "most": most, "asked": sum(forward.sizes) + sum(backward.sizes)}


def steps() -> dict[str, dict[str, int]]:
    model = create_model("ran_compact").bfloat16().to(memory_format=torch.channels_last).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = {}
    for name, (conv3x3, conv1x1, backend) in STEPS.items():
        with set_conv3x3(conv3x3), set_conv1x1(conv1x1), set_bn_relu("streaming"), set_backend(backend):
            step(model)  # what is made once is made
            found[name] = step(model)
    return found


def main() -> None:
    library = torch.library.Library("aten", "IMPL")
    for function in (convolution, convolution_backward):
        library.impl(function.__name__, function, "CPU")
    library.impl("mean.dim", mean, "CPU")
    gpu.skip_kernels(True)
    layers = {}
    for path in ("fused", "library"):
        with set_conv3x3(path):
            layers[path] = layer()
    gpu.launched()
    print(json.dumps({"layer": layers, "step": steps(), "launched": gpu.launched()}))


if __name__ == "__main__":
    main()
