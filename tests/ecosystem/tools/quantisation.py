"""Quantisation: aware training by fake quantisation, and dense layers in eight bits."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from ecosystem.harness import Case, group, train, trained
from torch import nn

tool = group("Quantisation")


@tool("`torch.ao.quantization.prepare_qat`, eager", needs=nn.Conv2d, on=trained, tolerance=2e-2, single=True)
def aware_training(case: Case) -> Any:
    from torch.ao import quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its deprecation, in favour of torchao
        case.model.train().qconfig = quantization.get_default_qat_qconfig("x86")
        quantization.prepare_qat(case.model, inplace=True)
        return train(case)


@tool("`torch.ao.quantization.quantize_dynamic`", needs=nn.Linear, single=True)
def dynamic(case: Case) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(case.model.eval(), {nn.Linear}, dtype=torch.qint8)
    return quantised(*case.batch())


@tool("`torchao.quantization.quantize_`, 8-bit weights", needs=nn.Linear, single=True)
def weight_only(case: Case) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(case.model.eval(), Int8WeightOnlyConfig())
    with torch.no_grad():
        return case.model(*case.batch())
