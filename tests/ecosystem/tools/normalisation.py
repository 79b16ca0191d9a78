"""Tools that replace or freeze batch normalisations by type."""

from __future__ import annotations

from typing import Any

import torch
from ecosystem.harness import Case, group, train, trained
from torch import nn

tool = group("Batch normalisations replaced or frozen by type")


def replace(model: nn.Module, kind: type[nn.Module], make: Any) -> nn.Module:
    """As the field's own converters go through a model: ``isinstance``, ``named_children``, ``setattr``."""
    if isinstance(model, kind):
        return make(model)  # type: ignore[no-any-return]
    for name, child in model.named_children():
        setattr(model, name, replace(child, kind, make))
    return model


@tool("`nn.SyncBatchNorm.convert_sync_batchnorm`, one process", needs=nn.BatchNorm2d, on=trained)
def synchronised(case: Case) -> Any:
    case.model = nn.SyncBatchNorm.convert_sync_batchnorm(case.model)
    assert case.named(nn.SyncBatchNorm)
    case.model.eval()  # outside of a process group torch's own trains on a GPU only
    return case.model(*case.batch())


@tool("torchvision's `FrozenBatchNorm2d` in place of every `nn.BatchNorm2d`", needs=nn.BatchNorm2d, on=trained)
def frozen_batch_norm(case: Case) -> Any:
    from torchvision.ops import FrozenBatchNorm2d

    def make(bn: nn.BatchNorm2d) -> nn.Module:
        frozen = FrozenBatchNorm2d(bn.num_features, bn.eps)
        frozen.load_state_dict({k: v for k, v in bn.state_dict().items() if k != "num_batches_tracked"})
        return frozen

    case.model = replace(case.model, nn.BatchNorm2d, make)
    return train(case)


@tool("timm's `freeze_batch_norm_2d`", needs=nn.BatchNorm2d, on=trained)
def timm_frozen(case: Case) -> Any:
    from timm.utils.model import freeze_batch_norm_2d

    case.model = freeze_batch_norm_2d(case.model)
    return train(case)


@tool("timm's `convert_splitbn_model`", needs=nn.BatchNorm2d, on=trained)
def split_batch_norm(case: Case) -> Any:
    from timm.layers import convert_splitbn_model

    case.model = convert_splitbn_model(case.model, 2)
    return train(case)


@tool("`nn.GroupNorm` in place of every `nn.BatchNorm2d`", needs=nn.BatchNorm2d, on=trained)
def group_norm(case: Case) -> Any:
    case.model = replace(
        case.model, nn.BatchNorm2d, lambda bn: nn.GroupNorm(4, bn.num_features, dtype=case.subject.dtype)
    )
    return train(case)


@tool("`nn.InstanceNorm2d` in place of every `nn.BatchNorm2d`", needs=nn.BatchNorm2d, on=trained)
def instance_norm(case: Case) -> Any:
    case.model = replace(
        case.model, nn.BatchNorm2d, lambda bn: nn.InstanceNorm2d(bn.num_features, affine=True, dtype=case.subject.dtype)
    )
    return train(case) if case.subject.name in ("BNReLU", "BNReLUConv2d") else case.model.eval()(*case.batch())


@tool("every `nn.BatchNorm2d` kept in evaluation while the rest trains", needs=nn.BatchNorm2d, on=trained)
def evaluating_batch_norm(case: Case) -> Any:
    mode = case.model.train

    def train_all_but_bn(on: bool = True) -> nn.Module:
        mode(on)
        for bn in case.named(nn.BatchNorm2d).values():
            bn.eval()
        return case.model

    case.model.train = train_all_but_bn  # type: ignore[method-assign]
    return train(case)


@tool("`torch.func.replace_all_batch_norm_modules_`", needs=nn.BatchNorm2d, on=trained)
def no_running_statistics(case: Case) -> Any:
    torch.func.replace_all_batch_norm_modules_(case.model)
    return train(case)


@tool(
    "`momentum=None` (a cumulative average) and other `eps` set on every `nn.BatchNorm2d`",
    needs=nn.BatchNorm2d,
    on=trained,
)
def cumulative(case: Case) -> Any:
    for bn in case.named(nn.BatchNorm2d).values():
        bn.momentum, bn.eps = None, 1e-3  # type: ignore[assignment]
    return train(case)
