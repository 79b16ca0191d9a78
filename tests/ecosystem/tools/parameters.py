"""Tools that rewrite weights, or decide which of them learn."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from ecosystem.harness import Case, clone, evaluated, group, parametrised, train, trained
from torch import nn
from torch.nn.utils import parametrizations, prune

tool = group("Weights: pruning, normalisation, adapters, freezing")


@tool("`torch.nn.utils.prune`: `l1_unstructured` on every convolution", needs=nn.Conv2d, on=trained)
def pruning(case: Case) -> Any:
    convs = case.named(nn.Conv2d).values()
    case.model.to(memory_format=torch.contiguous_format)  # torch's own pruning fails on channels_last weights
    for conv in convs:
        prune.l1_unstructured(conv, "weight", amount=0.4)
    pruned = train(case)
    for conv in convs:
        prune.remove(conv, "weight")
    return [pruned, train(case)]


@tool("the same, `global_unstructured`, and a pruned checkpoint loaded", needs=nn.Conv2d, on=trained)
def pruned_checkpoint(case: Case) -> Any:
    case.model.to(memory_format=torch.contiguous_format)
    other = clone(case)
    for one, amount in ((case, 0.7), (other, 0.0)):
        weights = [(conv, "weight") for conv in one.named(nn.Conv2d).values()]
        prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)
    train(case)
    other.model.load_state_dict(case.model.state_dict())
    return [evaluated(other), train(other)]


@tool("`torch.nn.utils.weight_norm` (hooks)", needs=nn.Conv2d, on=trained)
def weight_norm_hook(case: Case) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and met all the same
        for conv in case.named(nn.Conv2d).values():
            nn.utils.weight_norm(conv)
    normed = train(case)
    for conv in case.named(nn.Conv2d).values():
        nn.utils.remove_weight_norm(conv)
    return [normed, train(case)]


@tool("`torch.nn.utils.parametrizations.weight_norm`", needs=nn.Conv2d, on=trained)
def weight_norm(case: Case) -> Any:
    for conv in case.named(nn.Conv2d).values():
        parametrizations.weight_norm(conv)
    return train(case)


@tool("`torch.nn.utils.spectral_norm` (hooks)", needs=nn.Conv2d, on=trained)
def spectral_norm_hook(case: Case) -> Any:
    for conv in case.named(nn.Conv2d).values():
        nn.utils.spectral_norm(conv)
    return train(case)


@tool("`torch.nn.utils.parametrizations.spectral_norm`", needs=nn.Conv2d, on=trained)
def spectral_norm(case: Case) -> Any:
    for conv in case.named(nn.Conv2d).values():
        parametrizations.spectral_norm(conv)
    return train(case)


@tool("`peft`: LoRA on every convolution, then merged", needs=nn.Conv2d, on=trained)
def lora(case: Case) -> Any:
    from peft import LoraConfig, get_peft_model

    names = "|".join(map(re.escape, case.named(nn.Conv2d)))
    config = LoraConfig(r=2, lora_alpha=1, target_modules=names, init_lora_weights=False)
    tuned = get_peft_model(case.model, config)
    adapted = train(case, tuned)
    assert any("lora" in name and p.grad is not None for name, p in tuned.named_parameters())
    case.model = tuned.merge_and_unload()
    return [adapted, evaluated(case)]


@tool("every second parameter frozen (`requires_grad_(False)`)", on=parametrised)
def frozen(case: Case) -> Any:
    for parameter in list(case.model.parameters())[::2]:
        parameter.requires_grad_(False)
    return train(case)


@tool("`torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`", on=parametrised)
def clipping(case: Case) -> Any:
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01)
    norms = []

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_value_(case.model.parameters(), 0.1)
        norms.append(nn.utils.clip_grad_norm_(case.model.parameters(), 0.5, foreach=True))

    optimizer.register_step_pre_hook(clip)
    return {"trained": train(case, optimizer=optimizer), "norms": torch.stack(norms)}


@tool("optimizers: `AdamW(fused=True)`", on=parametrised)
def fused_optimizer(case: Case) -> Any:
    # A large eps: Adam makes unit steps of gradients that are pure rounding.
    return train(case, optimizer=torch.optim.AdamW(case.model.parameters(), lr=1e-3, eps=1e-2, fused=True))


@tool("optimizers: `SGD(foreach=True)`, `RMSprop(foreach=True)`", on=parametrised)
def foreach_optimizers(case: Case) -> Any:
    parameters = list(case.model.parameters())
    sgd = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=True)
    rmsprop = torch.optim.RMSprop(parameters, lr=1e-3, eps=1e-1, foreach=True)
    return [train(case, optimizer=sgd), train(case, optimizer=rmsprop)]


@tool("`torch.optim.swa_utils`: `AveragedModel` (EMA of buffers too)", on=parametrised)
def averaged(case: Case) -> Any:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    average = AveragedModel(case.model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01)
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(case.model))
    return [train(case, optimizer=optimizer), evaluated(Case(average, case.subject, case.folder))]


@tool("`torch.optim.swa_utils.update_bn`", needs=nn.BatchNorm2d, on=trained)
def updated_bn(case: Case) -> Any:
    from torch.optim.swa_utils import AveragedModel, update_bn

    average = AveragedModel(case.model)
    for _number in range(2):
        train(case, steps=1)
        average.update_parameters(case.model)
    update_bn([case.batch(number)[0] for number in range(3)], average)
    return evaluated(Case(average, case.subject, case.folder))
