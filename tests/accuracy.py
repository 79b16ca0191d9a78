"""How close is close enough: one rule and one table for every op, dtype and device.

The rule: measured against float64, an op's error is at most twice that of PyTorch's own result in the same dtype. Where
PyTorch happens to be exact, the floor is a few roundings of the dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

#: Means in standard deviations, of which every op's random values have one: digits that only cancel at large ones.
MEANS = (0.0, 30.0, -3000.0, 1e4)

#: Relative error (2-norm) that is always allowed.
FLOOR = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def error(value: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm; NaN and infinities must stand in the same places."""
    value, exact = value.detach().double(), exact.detach().double()
    torch.testing.assert_close(value.isnan(), exact.isnan())
    good = exact.isfinite()
    norm = exact[good].norm().item()
    return (value[good] - exact[good]).norm().item() / norm if norm else (value[good].norm().item())


def assert_accurate(
    name: str, value: Tensor, eager: Tensor, exact: Tensor, times: float = 2, mean: float = 0.0
) -> None:
    """``value`` is at most twice as far from ``exact`` as ``eager`` is, or within the floor.

    Tests that draw tiny shapes say ``times=4``: of a handful of roundings either side may catch the luckier ones. What
    was normalised with a ``mean`` of so many standard deviations has the floor of as many more roundings: whoever keeps
    the mean in the working precision rounds it once, by as much, and with it a whole channel.
    """
    assert value.dtype == eager.dtype, f"{name}: dtype {value.dtype}, PyTorch's is {eager.dtype}"
    ours, theirs = error(value, exact), error(eager, exact)
    working = FLOOR[torch.float64 if value.dtype == torch.float64 else torch.float32]
    floor = FLOOR[value.dtype] + (0 if name.startswith("running") else abs(mean) * working)
    assert ours <= max(times * theirs, times / 2 * floor), f"{name}: error {ours:.3g}, PyTorch's own is {theirs:.3g}"


def strided_views() -> Iterator[Tensor]:
    """``(N, C, H, W)`` tensors that are not dense: sliced, transposed, expanded."""
    base = torch.randn(4, 12, 9, 10)
    yield from (base[:, 2:7], base[..., ::2], base[1:3, :, 1:, 3:])
    yield from (base.permute(0, 3, 1, 2), base[:, :1].expand(-1, 6, -1, -1))
