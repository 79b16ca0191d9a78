"""Counters of multiplications and parameters: what a paper's table prints."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any
from unittest import mock

import torch
from ecosystem import twins
from ecosystem.harness import SUBJECTS, Case, group, step, trained
from torch import nn
from torch.nn import functional as F

tool = group("Counters of operations")


@tool("`torchinfo.summary`: multiply-adds, parameters", on=trained)
def torchinfo(case: Case) -> Any:
    from torchinfo import summary

    found = summary(case.model.eval(), input_data=list(case.batch()), verbose=0)
    return [found.total_mult_adds, found.total_params, found.trainable_params]


@tool("`thop.profile`: multiply-adds, parameters", on=trained)
def thop(case: Case) -> Any:
    from thop import profile

    return list(profile(case.model.eval(), case.batch(), verbose=False))


def ptflops(case: Case) -> Any:
    from ptflops import get_model_complexity_info

    def inputs(_: Any) -> dict[str, torch.Tensor]:
        names = ("trunk", "mask") if len(case.batch()) == 2 else ("x",)
        return dict(zip(names, case.batch(), strict=True))

    found = []
    for backend in ("pytorch", "aten"):
        with contextlib.redirect_stdout(io.StringIO()):
            found += get_model_complexity_info(
                case.model.eval(),
                (1,),
                input_constructor=inputs,
                as_strings=False,
                print_per_layer_stat=False,
                backend=backend,
            )
    assert all(isinstance(number, (int, float)) for number in found), found
    return found


class Uncounted:
    """torch.nn.functional, into which ptflops puts functions that count, but for two."""

    interpolate, max_pool2d = staticmethod(F.interpolate), staticmethod(F.max_pool2d)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def ptflops_without_resizing(case: Case) -> Any:
    with mock.patch.object(twins, "F", Uncounted()):
        return ptflops(case)


RESIZED = {
    name: "pooling and up-sampling, ops of ran_ext, are not counted: 0.3 % of a network this small"
    for name in SUBJECTS
    if "BN" not in name and name != "ResidualUnit"
}
tool("`ptflops`, both back ends", on=trained, plain=ptflops_without_resizing, remark=RESIZED)(ptflops)


def convolutions(case: Case) -> Case:
    """A folded network has one convolution where a mask has two; so has its twin, to be counted."""
    for mask in case.model.modules():
        if case.subject.folded and isinstance(mask, twins.SoftMaskBranch):
            mask.conv1 = nn.Identity()  # type: ignore[assignment]
    return case


@tool("`fvcore.nn.FlopCountAnalysis`", plain=lambda case: fvcore(convolutions(case)))
def fvcore(case: Case) -> Any:
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, on shapes in Python
        found = FlopCountAnalysis(case.model.eval(), case.batch()).unsupported_ops_warnings(False)
        found = {name: int(number) for name, number in sorted(found.by_operator().items()) if number}
    return {name: found[name] for name in ("conv", "linear")} if case.subject.folded else found


@tool(
    "`torch.utils.flop_counter.FlopCounterMode`: a training step", plain=lambda case: flop_counter(convolutions(case))
)
def flop_counter(case: Case) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step(case)
    return counter.get_total_flops()
