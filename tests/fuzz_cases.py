"""Random calls of the public ops, for fuzz_ops.py: shapes, layouts, dtypes, values, options; a seed gives a case."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ran_ext import ops

DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = (
    "nchw",
    "nchw",
    "channels_last",
    "channels_last",
    "sliced",
    "strided",
    "transposed",
    "expanded",
    "overlapping",
)


@dataclass
class Case:
    """One call: ``op(**arguments)``, and what of it is a tensor to differentiate or a statistic that it changes."""

    op: str
    arguments: dict[str, Any]
    differentiate: tuple[str, ...]
    changed: tuple[str, ...] = ()
    dout: Tensor | None = None  # drawn when the result's shape is known
    special: bool = False  # holds NaN or infinities
    notes: list[str] = field(default_factory=list)

    @property
    def ours(self) -> Callable[..., Any]:
        return chained if self.op == "chained_bn_relu_conv2d" else getattr(ops, self.op)

    @property
    def plain(self) -> Callable[..., Any]:
        return chained_plain if self.op == "chained_bn_relu_conv2d" else getattr(ops, f"{self.op}_ref")


class Draw:
    """The random choices of one case."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.dtype = self.random.choice(DTYPES)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.special = self.random.random() < 0.12
        self.whole = self.random.random() < 0.1

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def channels(self) -> int:
        return self.random.choice((1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 64))

    def shape(self, least: int = 1) -> tuple[int, int, int, int]:
        n = 0 if self.chance(0.06) else self.random.randint(1, 4)
        return n, self.channels(), self.random.randint(least, 17), self.random.randint(least, 17)

    def normal(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.torch, dtype=torch.float64).to(dtype)

    def activation(self, shape: tuple[int, ...]) -> Tensor:
        """``shape`` of the case's dtype; |mean| / std of a channel up to 1e4."""
        x = self.normal(shape, torch.float64)
        if self.whole:
            x = (x * 3).round()
            if self.chance(0.5) and x.dim() and x.numel() and shape[0] % 2 == 0:  # means of exactly 0
                half = x[: shape[0] // 2]
                x = torch.cat([half, -half])
        elif self.chance(0.6):
            most = {torch.float16: 3.0, torch.bfloat16: 2.0}.get(self.dtype, 4.0)
            size = (1, shape[1], 1, 1) if len(shape) == 4 else ()
            x = x + 10 ** (torch.rand(size, generator=self.torch, dtype=torch.float64) * most) * self.random.choice(
                (-1, 1)
            )
        x = x.to(self.dtype)
        if self.special and x.numel():
            for _ in range(self.random.randint(1, 3)):
                x.view(-1)[self.random.randrange(x.numel())] = self.random.choice(
                    (float("nan"), float("inf"), -float("inf"))
                )
        return self.laid_out(x)

    def laid_out(self, x: Tensor) -> Tensor:
        """The values of ``x`` (for "expanded" and "overlapping": some of them) in another layout."""
        if x.dim() != 4:
            return x
        kind = self.random.choice(LAYOUTS)
        n, c, h, w = x.shape
        if kind == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if kind == "sliced":
            base = x.new_zeros(n + 1, c + 2, h + 3, w + 1)
            view = base[1:, 1 : c + 1, 2 : h + 2, :w]
        elif kind == "strided":
            view = x.new_zeros(n, c, 2 * h, 3 * w)[..., ::2, ::3]
        elif kind == "transposed":
            order = self.random.choice(((0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0), (0, 3, 1, 2)))
            view = x.new_zeros([x.shape[i] for i in order]).permute([order.index(i) for i in range(4)])
        elif kind == "expanded" and x.numel():
            dim = self.random.randrange(4)
            return x.narrow(dim, 0, 1).expand(x.shape)
        elif kind == "overlapping" and x.numel():
            flat = torch.cat([x.reshape(-1), x.reshape(-1)])
            return flat.as_strided(x.shape, (c * h * w // 2 + 1, max(1, h * w // 2), max(1, w - 1), 1))
        else:
            return x
        return view.copy_(x)

    def vector(self, size: int, positive: bool = False) -> Tensor:
        v = self.normal((size,), torch.float64)
        if positive:
            v = v.abs() + 0.1
        dtype = self.dtype if self.dtype != torch.float64 and self.chance(0.15) else self.wide
        v = v.to(dtype)
        return v.repeat_interleave(2)[::2] if self.chance(0.2) else v


def _gate(d: Draw) -> Case:
    scale = d.random.choice((1, 2, 2, 3, 5, 8, 20, 2**20, 2**31 - 1))
    if scale == 1 and d.chance(0.3):
        shape: tuple[int, ...] = tuple(d.random.randint(0, 6) for _ in range(d.random.randint(0, 5)))
        return Case("attention_gate", {"trunk": d.activation(shape), "mask": d.activation(shape)}, ("trunk", "mask"))
    n, c, h, w = d.shape()
    mask = d.laid_out((d.normal((n, c, -(-h // scale), -(-w // scale)), torch.float64) * 8).to(d.dtype))
    arguments = {"trunk": d.activation((n, c, h, w)), "mask": mask, "scale_factor": scale}
    return Case(
        "attention_gate", arguments | {"interpolation": d.random.choice(("nearest", "bilinear"))}, ("trunk", "mask")
    )


def _conv_gate(d: Draw) -> Case:
    scale, c_in = d.random.choice((1, 2, 2, 3, 8, 2**20)), d.channels()
    n, c, h, w = d.shape()
    x = d.laid_out((d.normal((n, c_in, -(-h // scale), -(-w // scale)), torch.float64) * 2).to(d.dtype))
    arguments = {
        "trunk": d.activation((n, c, h, w)),
        "x": x,
        "weight": d.laid_out((d.normal((c, c_in, 1, 1), torch.float64) * 2 / c_in**0.5).to(d.dtype)),
        "bias": d.normal((c,), d.dtype) if d.chance(0.6) else None,
        "scale_factor": scale,
    }
    return Case("conv_attention_gate", arguments, ("trunk", "x", "weight", "bias"))


def _pool(d: Draw) -> Case:
    ceil_mode = d.chance(0.6)
    return Case("max_pool2d", {"x": d.activation(d.shape(1 if ceil_mode else 2)), "ceil_mode": ceil_mode}, ("x",))


def _upsample(d: Draw) -> Case:
    n, c, h, w = d.shape()
    size = (2 * h - d.random.randint(0, 1), 2 * w - d.random.randint(0, 1))
    skip = d.activation((n, c, *size)) if d.chance(0.6) else None
    given = size if d.chance(0.5) else None
    return Case("upsample_add", {"lower": d.activation((n, c, h, w)), "skip": skip, "size": given}, ("lower", "skip"))


def _norm(d: Draw, x: Tensor, prefix: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Batch normalisation's arguments, and which of them it changes."""
    c = x.shape[1]
    training, momentum = d.chance(0.7), d.random.choice((0.1, 0.1, 0.9, 0.0, 1.0, None))
    if x.numel() == c and c:  # one value a channel: no training
        training = False
    arguments: dict[str, Any] = {
        f"{prefix}weight": d.vector(c) if d.chance(0.8) else None,
        f"{prefix}bias": d.vector(c) if d.chance(0.8) else None,
        "running_mean": None,
        "running_var": None,
        "training": training,
        "momentum": momentum,
        "eps": d.random.choice((1e-5, 1e-3, 1e-8, 0.5)),
    }
    if not training or d.chance(0.8):
        mean, var = d.vector(c), d.vector(c, positive=True)
        arguments |= {"running_mean": mean, "running_var": var.to(mean.dtype)}
        if momentum is None or d.chance(0.6):
            arguments["num_batches_tracked"] = torch.tensor(d.random.randint(0, 9))
    changed = tuple(k for k in ("running_mean", "running_var", "num_batches_tracked") if arguments.get(k) is not None)
    return arguments, changed if training else ()


def _bn_relu(d: Draw) -> Case:
    n, c, h, w = d.shape()
    if d.chance(0.03):
        h = 0
    x = d.activation((n, c, h, w))
    arguments, changed = _norm(d, x, "")
    return Case("bn_relu", {"x": x, **arguments}, ("x", "weight", "bias"), changed)


def _convolution(d: Draw) -> tuple[tuple[int, int, int, int], Tensor, Tensor | None, Any, Any, Tensor | None]:
    """Shape of x, weight, bias, stride, padding and residual of a convolution."""
    k = d.random.choice(((1, 1), (1, 1), (3, 3), (3, 3), (2, 3), (5, 1)))
    stride = d.random.choice((1, 1, 1, 2, 2, 3, (1, 2), (2, 1), 2**31 - 1))
    padding = d.random.choice((0, 0, 1, 1, 2, (1, 0)))
    n, ci, h, w = d.shape()
    h, w = max(h, k[0]), max(w, k[1])
    co = d.channels()
    weight = d.laid_out((d.normal((co, ci, *k), torch.float64) / (ci * k[0] * k[1]) ** 0.5).to(d.dtype))
    bias = d.normal((co,), d.dtype) if d.chance(0.6) else None
    s, p = (v if isinstance(v, tuple) else (v, v) for v in (stride, padding))
    size = [(v + 2 * p[i] - k[i]) // s[i] + 1 for i, v in enumerate((h, w))]
    residual = d.laid_out(d.normal((n, co, *size), d.dtype)) if d.chance(0.4) else None
    return (n, ci, h, w), weight, bias, stride, padding, residual


def _bn_relu_conv(d: Draw) -> Case:
    shape, weight, bias, stride, padding, residual = _convolution(d)
    x = d.activation(shape)
    arguments, changed = _norm(d, x, "bn_")
    arguments |= {"x": x, "weight": weight, "bias": bias, "stride": stride, "padding": padding, "residual": residual}
    return Case("bn_relu_conv2d", arguments, ("x", "bn_weight", "bn_bias", "weight", "bias", "residual"), changed)


def _conv(d: Draw) -> Case:
    shape, weight, bias, stride, padding, _ = _convolution(d)
    x = d.activation(shape)
    if stride == 2**31 - 1 or (weight.shape[1] < 8 and weight.shape[2:] == (1, 1)):
        stride = 1  # else PyTorch's own ends the process: docs/upstream.md
    arguments = {"x": x, "weight": weight, "bias": bias, "stride": stride, "padding": padding}
    return Case("conv2d", arguments, ("x", "weight", "bias"))


def _chained(d: Draw) -> Case:
    """Two chained units, the statistics of the second taken by the first."""
    shape, weight, bias, _, _, _ = _convolution(d)
    n, ci, h, w = shape
    n = max(n, 2)
    co, k = weight.shape[0], weight.shape[2:]
    x = d.activation((n, ci, h + 2, w + 2))
    arguments: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, "padding": (int(k[0] > 2), int(k[1] > 2))}
    arguments |= {
        "weight2": (d.normal((4, co, 1, 1), torch.float64) / co**0.5).to(d.dtype),
        "momentum": d.random.choice((0.1, None)),
    }
    for name, size in (("", ci), ("2", co)):
        arguments |= {f"gamma{name}": d.normal((size,), d.wide), f"beta{name}": d.normal((size,), d.wide)}
        arguments |= {f"mean{name}": d.normal((size,), d.wide), f"var{name}": d.normal((size,), d.wide).abs() + 0.1}
    # The first bias has no gradient but rounding: the second normalisation takes it away.
    leaves = ("x", "weight", "weight2", "gamma", "beta", "gamma2", "beta2")
    return Case("chained_bn_relu_conv2d", arguments, leaves, ("mean", "var", "mean2", "var2"))


def _unit(
    weight: Tensor, bias: Tensor | None, padding: Any, norm: list[Tensor], momentum: float | None
) -> tuple[nn.BatchNorm2d, nn.Conv2d]:
    """Modules that hold the tensors themselves, so that gradients reach them."""
    gamma, beta, mean, var = norm
    bn, conv = nn.BatchNorm2d(len(gamma), momentum=momentum), nn.Conv2d(1, 1, 1)
    conv.stride, conv.padding = (1, 1), padding
    for module, tensors in ((bn, {"weight": gamma, "bias": beta}), (conv, {"weight": weight, "bias": bias})):
        for name, value in tensors.items():
            module._parameters[name] = value  # type: ignore[assignment]
    bn._buffers.update(running_mean=mean, running_var=var)
    return bn, conv


def chained(x, weight, bias, padding, weight2, momentum, gamma, beta, mean, var, gamma2, beta2, mean2, var2) -> Tensor:
    bn, conv = _unit(weight, bias, padding, [gamma, beta, mean, var], momentum)
    bn2, conv2 = _unit(weight2, None, (0, 0), [gamma2, beta2, mean2, var2], momentum)
    h = ops.chained_bn_relu_conv2d(x, bn, conv, next_bn=bn2)
    out = ops.chained_bn_relu_conv2d(h.out, bn2, conv2, statistics=h.statistics).out
    return out + h.identity.mean()


def chained_plain(
    x, weight, bias, padding, weight2, momentum, gamma, beta, mean, var, gamma2, beta2, mean2, var2, noise=None
) -> Tensor:
    """``noise(t)`` moves what lies between the two by a rounding."""
    batches = [torch.tensor(0), torch.tensor(0)]
    options: dict[str, Any] = {"training": True, "momentum": momentum}
    first = {"padding": padding, "num_batches_tracked": batches[0], **options}
    h = ops.bn_relu_conv2d_ref(x, gamma, beta, mean, var, weight, bias, **first)
    if noise is not None:
        h.register_hook(noise)
        h = noise(h)
    second = {"num_batches_tracked": batches[1], **options}
    return ops.bn_relu_conv2d_ref(h, gamma2, beta2, mean2, var2, weight2, None, **second) + x.mean()


MAKERS: dict[str, Callable[[Draw], Case]] = {
    "attention_gate": _gate,
    "conv_attention_gate": _conv_gate,
    "max_pool2d": _pool,
    "upsample_add": _upsample,
    "bn_relu": _bn_relu,
    "bn_relu_conv2d": _bn_relu_conv,
    "chained_bn_relu_conv2d": _chained,
    "conv2d": _conv,
}


def make(seed: str, op: str | None = None) -> tuple[Case, Draw]:
    """The case of ``seed``, of any op or of one."""
    d = Draw(seed)
    names = list(MAKERS)
    case = MAKERS[op or d.random.choices(names, (2, 2, 1, 1, 4, 5, 1, 2))[0]](d)
    case.special = d.special
    return case, d
