"""Counters of multiplications and parameters: what a paper's table prints."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
from ecosystem.harness import Case, group, step, trained

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


@tool("`ptflops`, both back ends", on=trained)
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


@tool("`fvcore.nn.FlopCountAnalysis`")
def fvcore(case: Case) -> Any:
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, on shapes in Python
        found = FlopCountAnalysis(case.model.eval(), case.batch()).unsupported_ops_warnings(False)
        return {name: int(number) for name, number in sorted(found.by_operator().items()) if number}


@tool("`torch.utils.flop_counter.FlopCounterMode`: a training step")
def flop_counter(case: Case) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step(case)
    return counter.get_total_flops()
