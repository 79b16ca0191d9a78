from collections.abc import Callable, Sequence
from typing import TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    torch: str
    cuda: str | None
    cpu_kernels: str

def build_info() -> BuildInfo: ...
def explain_conv(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], conv3x3: int
) -> list[tuple[bool, str]]: ...
def explain_conv_gate(trunk: Tensor, x: Tensor, weight: Tensor, scale: int) -> tuple[bool, str]: ...
def set_deferred_history(
    out: Tensor, inputs: Sequence[Tensor | None], backward: Callable[[Tensor], Sequence[Tensor | None]]
) -> None: ...

# In builds with CUDA:
def explain_bn_relu(x: Tensor) -> list[tuple[bool, str]]: ...
def set_dispatch_table(entries: Sequence[tuple[int, str, str, int, int, int, float, float]]) -> None: ...
