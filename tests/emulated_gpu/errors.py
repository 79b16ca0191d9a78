"""Errors of the GPU's fused 3x3 convolution beside PyTorch's own, both against float64; see build.py for what runs.

Of every case, dtype and tensor: root of the mean square and largest difference, each over that of batch_norm, relu and
conv2d by PyTorch on the CPU in the same dtype. Over the seeds together, without a floor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ran_ext import ops, set_conv3x3

SEEDS = 2
EPS = 1e-5
NAMES = ("y", "dx", "dgamma", "dbeta", "dweight", "dbias")
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    name: str
    n: int
    c_in: int
    height: int
    width: int
    c_out: int
    stride: int = 1
    padding: int = 1
    beta: float = 0.0  # added to the batch normalisation's
    mean: float = 0.0  # of x, in its standard deviations


CASES = (
    Case("even", 4, 32, 8, 8, 40),
    Case("odd", 3, 24, 9, 7, 72),
    Case("stride 2, even", 4, 32, 10, 8, 40, stride=2),
    Case("stride 2, odd", 3, 24, 9, 7, 40, stride=2),
    Case("padding 0, odd", 3, 24, 9, 7, 40, padding=0),
    Case("padding 0, stride 2, even", 4, 24, 10, 8, 40, stride=2, padding=0),
    Case("beta 20", 3, 24, 9, 8, 40, beta=20),
    Case("beta 20, stride 2", 3, 24, 9, 8, 40, stride=2, beta=20),
    Case("mean 30", 4, 32, 8, 7, 40, mean=30),
    Case("deep", 2, 264, 4, 4, 136),
)

Values = dict[str, Tensor]


def inputs(case: Case, dtype: torch.dtype, seed: int) -> tuple[Values, Tensor]:
    """What goes in, rounded to ``dtype`` (vectors of the normalisation: float32), and the output's gradient."""
    torch.manual_seed(seed)
    x = torch.randn(case.n, case.c_in, case.height, case.width) + case.mean
    weight = torch.randn(case.c_out, case.c_in, 3, 3) / (9 * case.c_in) ** 0.5
    gamma, beta = torch.rand(case.c_in) + 0.5, torch.randn(case.c_in) / 2 + case.beta
    values = {"x": x, "gamma": gamma, "beta": beta, "weight": weight, "bias": torch.randn(case.c_out)}
    dout = torch.randn_like(F.conv2d(x, weight, stride=case.stride, padding=case.padding))
    low = {name: v if name in ("gamma", "beta") else laid_out(v.to(dtype)) for name, v in values.items()}
    return low, laid_out(dout.to(dtype))


def laid_out(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def fused(v: Values, case: Case, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    with set_conv3x3("fused"):
        return ops.bn_relu_conv2d(
            v["x"], v["gamma"], v["beta"], mean, var, v["weight"], v["bias"],
            stride=case.stride, padding=case.padding, training=mean is None, eps=EPS,
        )  # fmt: skip


def pytorch(v: Values, case: Case, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    z = F.batch_norm(v["x"], mean, var, v["gamma"], v["beta"], training=mean is None, eps=EPS)
    return F.conv2d(F.relu(z), v["weight"], v["bias"], stride=case.stride, padding=case.padding)


def results(run: Callable[..., Tensor], values: Values, dout: Tensor, *more: Tensor | Case) -> dict[str, Tensor]:
    """The output and all gradients, by the names of NAMES."""
    leaves = {name: v.detach().clone().requires_grad_() for name, v in values.items()}
    y = run(leaves, *more)
    gradients = torch.autograd.grad(y, list(leaves.values()), dout)
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def wide(values: Values) -> Values:
    return {name: v.double() for name, v in values.items()}


def ratios(case: Case, dtype: torch.dtype) -> Iterator[dict[str, object]]:
    squares, largest = torch.zeros(2, len(NAMES)).double(), torch.zeros(2, len(NAMES)).double()
    for seed in range(SEEDS):
        low, dout = inputs(case, dtype, seed)
        exact = results(pytorch, wide(low), dout.double(), case)
        for side, run in enumerate((fused, pytorch)):
            got = results(run, low, dout, case)
            for i, name in enumerate(NAMES):
                off = (got[name].double() - exact[name]).abs() / exact[name].square().mean().sqrt()
                squares[side, i] += off.square().mean() / SEEDS
                largest[side, i] = max(largest[side, i], off.max())
    rms = squares.sqrt()
    for i, name in enumerate(NAMES):
        yield {
            "case": case.name, "dtype": str(dtype).removeprefix("torch."), "tensor": name,
            "rms": float(rms[0, i] / rms[1, i]), "max": float(largest[0, i] / largest[1, i]),
            "theirs": float(rms[1, i]),
        }  # fmt: skip


def nan_places(case: Case, dtype: torch.dtype) -> list[str]:
    """The tensors that are NaN elsewhere than PyTorch's, for a NaN in x; its statistics are given.

    PyTorch's in float64: in bfloat16 its own weight gradient may have a NaN in a tap that reaches none.
    """
    low, dout = inputs(case, dtype, 0)
    low["x"][0, 3, 0, 0] = low["x"][-1, 9, -1, -2] = low["x"][0, 4, 3, 2] = torch.nan
    statistics = torch.full((case.c_in,), float(case.mean)), torch.ones(case.c_in)
    ours = results(fused, low, dout, case, *statistics)
    theirs = results(pytorch, wide(low), dout.double(), case, *(v.double() for v in statistics))
    assert all(theirs[name].isnan().any() for name in ("y", "dgamma", "dweight"))
    return [name for name in NAMES if not torch.equal(ours[name].isnan(), theirs[name].isnan())]


def main() -> None:
    rows = [row for case in CASES for dtype in DTYPES for row in ratios(case, dtype)]
    nan = {f"{case.name}, {dtype}": found for case in CASES for dtype in DTYPES if (found := nan_places(case, dtype))}
    print(json.dumps({"rows": rows, "nan_differs": nan, "launched": torch.ops.emulated_gpu.launched()}))


if __name__ == "__main__":
    main()
