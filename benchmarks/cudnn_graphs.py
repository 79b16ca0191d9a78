"""cuDNN's graph API as a contender: BN-ReLU in training, and scale-bias-ReLU-convolution with the output's statistics.

Needs a GPU and the package ``nvidia-cudnn-frontend`` (``import cudnn``). Which graphs have an engine only the device
can say: what it refuses is raised, and ends as the reason in the row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .cases import BNReLU, BNReLUConv, Case, draw
from .contenders import GRADIENT_SEED, Subject, captured

NAME = "cuDNN graph API"
#: Those of F.batch_norm, as host scalars: cuDNN takes them by value.
EPSILON, MOMENTUM = torch.full((1, 1, 1, 1), 1e-5), torch.full((1, 1, 1, 1), 0.1)


def offers(case: Case, task: str, dtype: torch.dtype) -> bool:
    """Whether cuDNN documents an engine: BN-ReLU both ways, in float16 also the convolution with its prologue."""
    if isinstance(case, BNReLU):
        return dtype in (torch.bfloat16, torch.float16)
    return isinstance(case, BNReLUConv) and task == "forward" and dtype == torch.float16


def subject(case: Case, task: str, dtype: torch.dtype, device: torch.device) -> Subject:
    """The fused graphs of one case, captured in a CUDA graph, as they would run in a captured training step.

    Raises:
        ImportError: the package is missing.
        RuntimeError: cuDNN has no engine for the graph here (or an exception of its own that says so).
    """
    if isinstance(case, BNReLU):
        return _bn_relu(case, task, dtype, device)
    assert isinstance(case, BNReLUConv)
    return _scale_bias_relu_conv(case, dtype, device)


class Fusion:
    """One cuDNN graph and the buffers that its tensors stand for; after :meth:`build` calling it runs it.

    Args:
        dtype: of the activations.
        intermediate: of what stays inside the graph.
    """

    def __init__(self, dtype: torch.dtype, intermediate: torch.dtype):
        self.cudnn, self.handle = _library()
        named = self.cudnn.data_type
        self.types = {torch.float16: named.HALF, torch.bfloat16: named.BFLOAT16, torch.float32: named.FLOAT}
        self.graph = self.cudnn.pygraph(
            io_data_type=self.types[dtype],
            intermediate_data_type=self.types[intermediate],
            compute_data_type=named.FLOAT,
            handle=self.handle,
        )
        self.buffers: dict[Any, Tensor] = {}

    def input(self, buffer: Tensor) -> Any:
        """A tensor of the graph that reads ``buffer``: 4-d and packed as NHWC, or a scalar on the host."""
        if buffer.device.type == "cpu":
            tensor = self.graph.tensor_like(buffer)
        else:
            tensor = self.graph.tensor(
                dim=list(buffer.shape), stride=_strides(buffer), data_type=self.types[buffer.dtype]
            )
        self.buffers[tensor] = buffer
        return tensor

    def output(self, tensor: Any, buffer: Tensor) -> None:
        """``tensor`` is written to ``buffer``."""
        tensor.set_output(True).set_data_type(self.types[buffer.dtype])
        tensor.set_dim(list(buffer.shape)).set_stride(_strides(buffer))
        self.buffers[tensor] = buffer

    def build(self) -> None:
        """Choose an engine and compile it.

        Raises:
            RuntimeError, cudnn.cudnnGraphNotSupportedError: there is none.
        """
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self.workspace = torch.empty(max(1, self.graph.get_workspace_size()), dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        self.graph.execute(self.buffers, self.workspace, handle=self.handle)


def _strides(buffer: Tensor) -> list[int]:
    """Of NHWC, by formula: torch leaves those of dimensions of size 1 open."""
    _, c, h, w = buffer.shape
    return [h * w * c, 1, w * c, c]


@cache
def _library() -> tuple[Any, Any]:
    import cudnn  # optional, and useful on a GPU only

    return cudnn, cudnn.create_handle()


def _vector(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _bn_relu(case: BNReLU, task: str, dtype: torch.dtype, device: torch.device) -> Subject:
    layout = torch.channels_last
    x, *vectors = (tensor.detach() for tensor in case.inputs(dtype, layout, device))
    scale, bias, running_mean, running_var = map(_vector, vectors)
    mean, inverse_std, y = torch.empty_like(scale), torch.empty_like(scale), torch.empty_like(x)

    forward = Fusion(dtype, torch.float32)
    normalised, *statistics = forward.graph.batchnorm(
        input=forward.input(x),
        scale=forward.input(scale),
        bias=forward.input(bias),
        in_running_mean=forward.input(running_mean),
        in_running_var=forward.input(running_var),
        epsilon=forward.input(EPSILON),
        momentum=forward.input(MOMENTUM),
    )
    forward.output(forward.graph.relu(input=normalised), y)
    for tensor, buffer in zip(statistics, (mean, inverse_std, running_mean, running_var), strict=True):
        forward.output(tensor, buffer)
    forward.build()
    if task == "forward":
        return _captured([forward], (y,))

    dout = draw(case.shape, GRADIENT_SEED, dtype, device, layout)
    results = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
    backward = _bn_relu_backward(x, scale, bias, mean, inverse_std, dout, results)
    return _captured([forward, backward], (y, results[0], results[1].flatten(), results[2].flatten()))


def _bn_relu_backward(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    dout: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
) -> Fusion:
    """dx, dscale and dbias into ``results``; the ReLU's mask is computed again from x, so that none is stored."""
    backward = Fusion(x.dtype, torch.float32)
    graph, read = backward.graph, backward.input
    image, gamma, mu, r = read(x), read(scale), read(mean), read(inverse_std)
    y = graph.batchnorm_inference(input=image, mean=mu, inv_variance=r, scale=gamma, bias=read(bias))
    dz = graph.relu_backward(loss=read(dout), input=y)
    dz.set_data_type(backward.types[x.dtype])
    gradients = graph.batchnorm_backward(grad=dz, input=image, scale=gamma, mean=mu, inv_variance=r)
    for tensor, buffer in zip(gradients, results, strict=True):
        backward.output(tensor, buffer)
    backward.build()
    return backward


def _scale_bias_relu_conv(case: BNReLUConv, dtype: torch.dtype, device: torch.device) -> Subject:
    """The statistics of x are given, those of the output are made: in a chain as much work as the whole unit."""
    layout = torch.channels_last
    x, gamma, beta, _, _, weight, bias = (tensor.detach() for tensor in case.inputs(dtype, layout, device))
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    scale = gamma * (var + EPSILON.item()).rsqrt()
    n, _, h, w = case.shape
    out = torch.empty((n, case.out_channels, h, w), dtype=dtype, device=device, memory_format=layout)
    sums = [torch.empty((1, case.out_channels, 1, 1), device=device) for _ in range(2)]

    fusion = Fusion(dtype, dtype)
    graph, read = fusion.graph, fusion.input
    scaled = graph.scale(input=read(x), scale=read(_vector(scale.to(dtype))))
    shifted = graph.bias(input=scaled, bias=read(_vector((beta - mean * scale).to(dtype))))
    padding = [case.kernel // 2] * 2
    y = graph.conv_fprop(
        image=graph.relu(input=shifted), weight=read(weight), padding=padding, stride=[1, 1], dilation=[1, 1]
    )
    fusion.output(y, out)
    for tensor, buffer in zip(graph.genstats(input=y), sums, strict=True):
        fusion.output(tensor, buffer)
    fusion.build()
    timed = _captured([fusion], (out,))
    return Subject(timed.run, lambda: (timed.check()[0] + _vector(bias),))  # the graph has no place for the bias


def _captured(fusions: list[Fusion], results: tuple[Tensor, ...]) -> Subject:
    def run() -> tuple[Tensor, ...]:
        for fusion in fusions:
            fusion()
        return results

    replay = captured(run)
    return Subject(replay, replay)
