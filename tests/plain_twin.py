"""The same modules in plain PyTorch, and two steps of training to compare the two by."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ran_ext import models
from ran_ext.nn import AttentionModule, BNReLU, BNReLUConv2d, ResidualUnit, SoftMaskBranch


class PlainBNReLU(BNReLU):
    def forward(self, x):
        return F.relu(self.bn(x))


class PlainBNReLUConv2d(BNReLUConv2d):
    def forward(self, x):
        return self.conv(F.relu(self.bn(x)))


class PlainResidualUnit(ResidualUnit):
    def forward(self, x):
        return self.conv3(self.conv2(self.conv1(x))) + (x if self.shortcut is None else self.shortcut(x))


class PlainSoftMaskBranch(SoftMaskBranch):
    def forward(self, x):
        assert not len(self.skip)
        sizes = []
        for units in self.down:
            x = units(F.max_pool2d(x, 2, ceil_mode=True))
            sizes.append(x.shape[2:])
        for units, (height, width) in zip([*self.up][:0:-1], sizes[-2::-1], strict=True):
            x = F.interpolate(units(x), scale_factor=2)[:, :, :height, :width]
        return self.conv2(self.conv1(self.up[0](x)))


class PlainAttentionModule(AttentionModule):
    def forward(self, x):
        x = self.pre(x)
        return self.post(self.gate(self.trunk(x), self.mask(x)))


class PlainNetwork(models.cifar.ResidualAttentionNetwork):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.bn2(self.stage3(self.stage2(self.stage1(x)))))
        return self.fc(self.dropout(x.mean((2, 3))))


PLAIN = {
    kind.__base__: kind
    for kind in (
        PlainBNReLU,
        PlainBNReLUConv2d,
        PlainResidualUnit,
        PlainSoftMaskBranch,
        PlainAttentionModule,
        PlainNetwork,
    )
}


def plain_twin(module: nn.Module) -> nn.Module:
    """A copy whose every module calls its children one after the other, as plain PyTorch does."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        part.__class__ = PLAIN.get(type(part), type(part))
    return twin


def two_steps(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs and input gradients of two steps of training, the state after them, and what evaluation then gives."""
    optimizer = torch.optim.SGD([*module.parameters(), torch.zeros(1, requires_grad=True)], 0.1)  # some have none
    found = {}
    for step in range(2):
        leaf = x.detach().clone().requires_grad_()
        out = module(leaf)
        optimizer.zero_grad()
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        found |= {f"out {step}": out, f"x.grad {step}": leaf.grad}
        found |= {f"{name}.grad {step}": p.grad for name, p in module.named_parameters()}
        optimizer.step()
    found |= module.state_dict()
    with torch.no_grad():
        found["evaluation"] = module.eval()(x)
    return {name: None if t is None else t.detach().clone() for name, t in found.items()}


def assert_same_training(ours: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Values, gradients, running statistics and trained weights of the two are the same."""
    found, wanted = two_steps(ours, x), two_steps(plain, x)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
