from collections.abc import Callable, Sequence
from typing import TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    torch: str
    cuda: str | None
    cpu_kernels: str

def build_info() -> BuildInfo: ...
def explain_conv(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], paths: int, with_norm: bool
) -> list[tuple[bool, str, str]]: ...
def explain_conv_gate(trunk: Tensor, x: Tensor, weight: Tensor, scale: int, paths: int) -> tuple[bool, str, str]: ...
def bn_act_recomputed(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    batch_stats: bool,
    eps: float,
    act: str,
    a: float,
    b: float,
) -> Tensor: ...
def bn_act_conv2d(
    value: Tensor,
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    batch_stats: bool,
    eps: float,
    act: str,
    a: float,
    b: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    paths: int | None,
) -> Tensor: ...
def set_deferred_history(
    out: Tensor, inputs: Sequence[Tensor | None], backward: Callable[[Tensor], Sequence[Tensor | None]]
) -> None: ...

# Of a shape: device, threads, pass, dtype, sizes; then microseconds by path.
_Shape = tuple[int, int, str, str, tuple[int, ...]]
_Rows = Sequence[tuple[_Shape, dict[str, float]]]

def set_measured(device: int, tuned: _Rows, shipped: _Rows) -> None: ...
def set_measuring(load: Callable[[int], None], tune: Callable[[_Shape, Sequence[str], str], None]) -> None: ...
def try_path(path: str | None) -> None: ...
def chosen_path(shape: _Shape, allowed: Sequence[str], rule: str) -> str: ...
def record_shapes(on: bool) -> None: ...
def recorded_shapes() -> list[tuple[_Shape, list[str], str]]: ...

# In builds with CUDA:
def explain_bn_relu(x: Tensor, paths: int) -> list[tuple[bool, str, str]]: ...
