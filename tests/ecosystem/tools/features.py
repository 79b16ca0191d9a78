"""Tools that look at what passes between a network's layers."""

from __future__ import annotations

from typing import Any

import torch
from ecosystem.harness import Case, group, step, trained, trained_network
from torch import Tensor, nn

tool = group("Hooks, features and explanations")


def stages(case: Case) -> list[str]:
    """The model's own children, from the first to the last."""
    return [name for name, _ in case.model.named_children()]


@tool("forward hooks on every child", on=trained)
def forward_hooks(case: Case) -> Any:
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            seen[name] = out.detach().clone()

        return hook

    for name, module in case.model.named_modules():
        module.register_forward_hook(note(name))
    out = step(case)
    return [out, dict(sorted(seen.items()))]


@tool("forward pre-hooks on every child", on=trained)
def forward_pre_hooks(case: Case) -> Any:
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            seen[name] = args[0].detach().clone()

        return hook

    for name, module in case.model.named_modules():
        module.register_forward_pre_hook(note(name))
    return [step(case), dict(sorted(seen.items()))]


@tool("a forward hook that changes the output of one inner convolution", needs=nn.Conv2d, on=trained)
def changing_hook(case: Case) -> Any:
    conv = list(case.named(nn.Conv2d).values())[-1]
    conv.register_forward_hook(lambda module, args, out: out * 2)
    return step(case)


@tool("full backward hooks on every convolution and batch normalisation", on=trained)
def backward_hooks(case: Case) -> Any:
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, before: Any, after: Any) -> None:
            seen[name] = [before[0].clone(), after[0].clone()]

        return hook

    for name, module in case.model.named_modules():
        if type(module) in (nn.Conv2d, nn.BatchNorm2d):
            module.register_full_backward_hook(note(name))
    return [step(case), dict(sorted(seen.items()))]


@tool("global hooks (`register_module_forward_hook`)", on=trained)
def global_hooks(case: Case) -> Any:
    seen: list[str] = []
    kinds = (nn.Conv2d, nn.BatchNorm2d)

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if type(module) in kinds:
            seen.append(type(module).__name__)

    with torch.nn.modules.module.register_module_forward_hook(hook):
        found = step(case)
    return [found, sorted(seen)]


@tool("`forward` of one inner convolution replaced on the object", needs=nn.Conv2d, on=trained)
def replaced_forward(case: Case) -> Any:
    conv = next(iter(case.named(nn.Conv2d).values()))
    plain = conv.forward
    conv.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    return step(case)


@tool("torchvision's `create_feature_extractor`", on=lambda s: bool(list(s.twin().named_children())))
def torchvision_features(case: Case) -> Any:
    from torchvision.models.feature_extraction import create_feature_extractor

    wanted = stages(case)[1:3] or stages(case)
    if case.subject.folded:
        wanted = ["bn2", "fc"]
    extractor = create_feature_extractor(case.model.eval(), [name for name in wanted if name != "gate"])
    return extractor(*case.batch())


@tool("timm's `FeatureHookNet`", on=trained_network)
def timm_hooks(case: Case) -> Any:
    from timm.models._features import FeatureHookNet

    names = ("stage1", "stage2.0.conv1", "stage2.0.conv2", "stage3")
    case.model.feature_info = [  # type: ignore[assignment]
        {"num_chs": 8, "reduction": 2, "module": name} for name in names
    ]
    return FeatureHookNet(case.model.train(), out_indices=(0, 1, 2, 3))(*case.batch())


@tool("timm's `FeatureGraphNet`", on=trained_network)
def timm_graph(case: Case) -> Any:
    from timm.models._features_fx import FeatureGraphNet

    case.model.feature_info = [  # type: ignore[assignment]
        {"num_chs": 8, "reduction": 2, "module": name} for name in ("stage1", "stage2", "stage3")
    ]
    return FeatureGraphNet(case.model.eval(), out_indices=(0, 1, 2))(*case.batch())


TIPS = {"folded": 2e-2}  # in float32 one of so many pixels tips a ReLU


@tool("captum's `Saliency` and `IntegratedGradients`", tolerance=TIPS)
def saliency(case: Case) -> Any:
    from captum.attr import IntegratedGradients, Saliency

    case.model.eval()
    inputs = tuple(x.requires_grad_() for x in case.batch())
    target = 3 if case.model(*inputs).dim() == 2 else (3, 1, 1)
    found = [Saliency(case.model).attribute(inputs, target=target)]
    found.append(IntegratedGradients(case.model).attribute(inputs, target=target, n_steps=4))
    return found


@tool("captum's `LayerGradCam` and `LayerActivation` on an inner convolution", needs=nn.Conv2d, on=trained)
def grad_cam(case: Case) -> Any:
    from captum.attr import LayerActivation, LayerGradCam

    case.model.eval()
    names = list(case.named(nn.Conv2d))
    conv = case.named(nn.Conv2d)[names[len(names) // 2]]
    target = 3 if case.model(*case.batch()).dim() == 2 else (3, 1, 1)
    cam = LayerGradCam(case.model, conv).attribute(case.batch(), target=target)
    return [cam, LayerActivation(case.model, conv).attribute(case.batch())]
