"""Calls that a user gets wrong: valid ones of fuzz_cases.py with one argument replaced. For fuzz_ops.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fuzz_cases import Case, Draw, make
from torch import Tensor

NAN, INF = float("nan"), float("inf")
WHOLE = [-1, 0, 1.5, None, "2", NAN, [1], (1, 2, 3), [], {}, b"1", np.int64(2), np.float32(1.5), True, torch.tensor(2)]
HUGE = [2**20, 2**31, 2**32, 2**33, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), -(2**70)]
PAIRS = [
    (1,),
    (0, 1),
    (1, 0),
    (1.5, 2),
    ("1", 1),
    (None, None),
    np.array([1, 2]),
    torch.Size([1, 1]),
    "11",
    (2**62, 1),
    [1, 1],
]
NUMBERS = [
    None,
    "0.1",
    NAN,
    INF,
    -INF,
    -1.0,
    0.0,
    0,
    1e308,
    np.float32(0.1),
    np.float64(0.1),
    torch.tensor(0.1),
    1 + 2j,
    [],
    2**70,
]
FLAGS = ["yes", None, 1, 2, np.bool_(True), torch.tensor(True), [], 0.5]
COUNTS = [3, 3.0, None, torch.tensor(0.0), torch.tensor([1, 2]), torch.tensor(1, device="meta"), [1]]

BY_NAME: dict[str, list[Any]] = {
    "scale_factor": WHOLE + HUGE,
    "stride": WHOLE + HUGE + PAIRS,
    "padding": WHOLE + [v for v in HUGE if v > 2**40 or v < 0] + PAIRS,  # a few GiB of padding are no mistake
    "size": WHOLE + HUGE + PAIRS,
    "momentum": NUMBERS,
    "eps": NUMBERS,
    "training": FLAGS,
    "ceil_mode": FLAGS,
    "interpolation": ["bicubic", "Bilinear", b"bilinear", "", None, 1, True, [], ("nearest",)],
    "num_batches_tracked": COUNTS,
}


def wrong_tensor(d: Draw, t: Tensor) -> Any:
    """Something else in the place of ``t``."""
    plain = t.detach()
    kinds = {
        "none": lambda: None,
        "list": plain.tolist,
        "numpy": lambda: plain.float().numpy(),
        "number": lambda: 1.0,
        "int": plain.int,
        "bool": plain.bool,
        "complex": lambda: plain.to(torch.complex64),
        "float8": lambda: plain.to(torch.float8_e4m3fn),
        "meta": lambda: plain.to("meta"),
        "sparse": plain.to_sparse,
        "mkldnn": lambda: plain.float().contiguous().to_mkldnn(),
        "nested": lambda: torch.nested.nested_tensor([plain.float()]),
        "jagged": lambda: torch.nested.nested_tensor([plain.float().reshape(-1)], layout=torch.jagged),
        "other dtype": lambda: plain.to(torch.float64 if t.dtype == torch.float32 else torch.float32),
        "flat": lambda: plain.reshape(-1),
        "one more": lambda: torch.cat([plain, plain.narrow(t.dim() - 1, 0, 1)], t.dim() - 1),
        "unsqueezed": lambda: plain[None],
        "scalar": lambda: plain.sum(),
        "swapped": lambda: plain.transpose(0, 1) if t.dim() > 1 else plain,
        "empty": lambda: plain[:0],
    }
    for _ in range(20):
        try:
            return kinds[d.random.choice(list(kinds))]()
        except (RuntimeError, TypeError, NotImplementedError, IndexError):  # no such tensor of this one
            continue
    return None


def make_wrong(seed: str) -> tuple[Case, str]:
    """A case with one argument replaced, and the name of it."""
    names = ("attention_gate", "conv_attention_gate", "max_pool2d", "upsample_add", "bn_relu", "bn_relu_conv2d")
    d = Draw(seed + "/wrong")
    case, _ = make(seed, d.random.choice(names))
    case.arguments.setdefault("num_batches_tracked", None) if case.op.startswith("bn") else None
    name = d.random.choice(list(case.arguments))
    if name in BY_NAME:
        value = d.random.choice(BY_NAME[name])
    else:
        given = case.arguments[name]
        value = wrong_tensor(d, torch.randn(3) if given is None else given)
    case.arguments[name] = value
    return case, name


def direct(seed: str) -> tuple[str, list[Any]]:
    """A compiled op by itself, and arguments of which some are wrong: it may refuse as it likes, but must not crash."""
    d = Draw(seed + "/direct")
    n, c, h, w = d.shape()
    x = d.activation((n, c, h, w))
    huge = lambda: d.random.choice([*HUGE, -1, 0, 1, 2, 3])  # noqa: E731
    wrong = lambda t: wrong_tensor(d, t) if d.chance(0.3) else t  # noqa: E731
    vector = lambda: None if d.chance(0.3) else wrong(d.vector(c, True))  # noqa: E731
    kept = [[], [d.vector(c), d.vector(c)], [wrong(d.vector(c)), wrong(d.vector(c)), wrong(torch.tensor(1))]]
    pair = lambda: d.random.choice([[huge(), huge()], [1, 1], [huge()], [1, 1, 1], [2, 2]])  # noqa: E731
    low = d.normal((n, c, 1, 1), d.dtype)
    weight = d.normal((d.channels(), c, *d.random.choice(((1, 1), (3, 3)))), d.dtype)
    running, momentum = d.random.choice(kept), d.random.choice([None, 0.1, NAN])
    norm = [vector(), vector(), vector(), vector()]
    calls: dict[str, list[Any]] = {
        "attention_gate": [wrong(x), wrong(low), huge(), d.chance(0.5)],
        "attention_gate_backward": [wrong(x), x, wrong(low), huge(), d.chance(0.5)],
        "conv_attention_gate": [wrong(x), wrong(low), wrong(weight), vector(), huge()],
        "max_pool2d": [wrong(x)],
        "max_pool2d_backward": [x, torch.zeros(x.shape, dtype=torch.uint8) + 3, huge(), huge()],
        "upsample_add": [wrong(low), None if d.chance(0.5) else wrong(x), huge(), huge()],
        "upsample_add_backward": [wrong(x)],
        "batch_norm_stats": [wrong(x), running, momentum],
        "bn_relu": [wrong(x), *norm, d.chance(0.5), running, momentum, d.random.choice([1e-5, 0.0, -1.0, NAN])],
        "bn_relu_backward": [wrong(x), x, *norm[:2], norm[2], norm[3], 1e-5, d.chance(0.5)],
        "bn_act": [wrong(x), *norm[:2], norm[2], norm[3], 1e-5, d.random.choice(["silu", "none", "mish"]), NAN, 6.0],
        "bn_act_backward": [wrong(x), x, *norm, 1e-5, d.chance(0.5), "silu", 0.0, 0.0, [d.chance(0.5)] * 3],
        "bn_relu_backward_reduce": [x, wrong(x), *norm, 1e-5],
        "bn_relu_backward_apply": [x, wrong(x), *norm, 1e-5, vector(), vector(), d.random.choice([0.0, NAN, 8.0])],
        "bn_relu_conv2d": [
            *[wrong(x), *norm, d.chance(0.5), running, momentum, 1e-5, wrong(weight), vector()],
            *[
                None if d.chance(0.7) else wrong(x),
                pair(),
                pair(),
                d.chance(0.5),
                d.random.choice(kept),
                momentum,
                d.chance(0.5),
            ],
        ],
        "bn_relu_conv2d_backward": [
            *[
                wrong(x),
                x,
                *norm,
                wrong(weight),
                pair(),
                pair(),
                1e-5,
                d.chance(0.5),
                [True] * 3,
                None if d.chance(0.5) else wrong(x),
            ],
        ],
        "conv3x3_supported": [wrong(x), wrong(weight)],
        "conv3x3_pack": [wrong(weight), wrong(x)],
        "conv3x3_packed": [wrong(x), d.normal((9000,), d.dtype), wrong(d.normal((32,), d.dtype)), None, True],
    }
    name = d.random.choice(list(calls))
    return name, calls[name]
