"""Files of the public PyTorch re-implementation: the same layers built here in plain PyTorch give the same outputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ran_ext import fold_for_inference
from ran_ext.models import load_public

#: Side and padding of the first convolution, its stride, widths, modules a stage, stride of the fourth stage, image.
NETWORKS = {
    "ResidualAttentionModel_56": (7, 2, (8, 16, 24, 32, 40), (1, 1, 1), 2, 224),
    "ResidualAttentionModel_92": (7, 2, (8, 16, 24, 32, 40), (1, 2, 3), 2, 224),
    "ResidualAttentionModel_92_32input": (5, 1, (8, 16, 24, 32, 40), (1, 2, 3), 1, 32),
    "ResidualAttentionModel_92_32input_update": (3, 1, (8, 16, 24, 32, 40), (1, 2, 3), 1, 32),
}


class Block(nn.Module):
    def __init__(self, a, b, stride=1):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(a), nn.Conv2d(a, b // 4, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(b // 4), nn.Conv2d(b // 4, b // 4, 3, stride, 1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(b // 4), nn.Conv2d(b // 4, b, 1, bias=False)
        self.conv4 = nn.Conv2d(a, b, 1, stride, bias=False)
        self.projects = a != b or stride != 1

    def forward(self, x):
        a = F.relu(self.bn1(x))
        h = self.conv3(F.relu(self.bn3(self.conv2(F.relu(self.bn2(self.conv1(a)))))))
        return h + (self.conv4(a) if self.projects else x)


def last_two(c):
    parts = [nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 1, bias=False)]
    parts += [nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 1, bias=False), nn.Sigmoid()]
    return nn.Sequential(*parts)


class Attention(nn.Module):
    """``names``: those of the blocks going down, the last of two; of the blocks going up; of the convolutions."""

    def __init__(self, c, names):
        super().__init__()
        down, up, last = names
        self.names = names
        self.first_residual_blocks = Block(c, c)
        self.trunk_branches = nn.Sequential(Block(c, c), Block(c, c))
        for name in [*down[:-1], *up, *(f"skip{i + 1}_connection_residual_block" for i in range(len(up)))]:
            self.add_module(name, Block(c, c))
        self.add_module(down[-1], nn.Sequential(Block(c, c), Block(c, c)))
        self.add_module(last, last_two(c))
        self.last_blocks = Block(c, c)

    pools = True

    def forward(self, x):
        down, up, last = self.names
        get = self.get_submodule
        x = self.first_residual_blocks(x)
        trunk = self.trunk_branches(x)
        levels = [x]
        for name in down:
            levels.append(get(name)(F.max_pool2d(levels[-1], 3, 2, 1) if self.pools else levels[-1]))
        m = levels.pop()
        for name in up:
            upper = levels.pop()
            skip = get(f"skip{len(levels)}_connection_residual_block")(upper)
            m = get(name)(nn.UpsamplingBilinear2d(size=upper.shape[2:])(m) + upper + skip)
        if self.pools:
            m = nn.UpsamplingBilinear2d(size=trunk.shape[2:])(m) + trunk
        return self.last_blocks((1 + get(last)(m)) * trunk)


class Unpooled(Attention):
    pools = False


def imagenet_names(depth):
    names = [f"softmax{i}_blocks" for i in range(1, 2 * depth + 1)]
    return names[:depth], names[depth:-1], names[-1]


CIFAR = [
    (["down_residual_blocks1", "middle_2r_blocks"], ["up_residual_blocks1"], "conv1_1_blocks"),
    (["middle_2r_blocks"], [], "conv1_1_blocks"),
    (["middle_2r_blocks"], [], "conv1_1_blocks"),
]


class Network(nn.Module):
    def __init__(self, name):
        super().__init__()
        k, stride, widths, modules, last_stride, _ = NETWORKS[name]
        self.kernel, self.modules_ = k, modules
        conv = nn.Conv2d(3, widths[0], k, stride, k // 2, bias=False)
        self.conv1 = nn.Sequential(conv, nn.BatchNorm2d(widths[0]), nn.ReLU())
        for i, count in enumerate(modules, 1):
            self.add_module(f"residual_block{i}", Block(widths[i - 1], widths[i], 2 if i > 1 else 1))
            for j in range(1, count + 1):
                made = Attention(widths[i], imagenet_names(4 - i)) if k == 7 else None
                made = made or (Unpooled if i == 3 else Attention)(widths[i], CIFAR[i - 1])
                self.add_module(f"attention_module{i}" + (f"_{j}" if j > 1 else ""), made)
        self.residual_block4 = Block(widths[3], widths[4], last_stride)
        self.residual_block5, self.residual_block6 = Block(widths[4], widths[4]), Block(widths[4], widths[4])
        self.mpool2 = nn.Sequential(nn.BatchNorm2d(widths[4]), nn.ReLU())
        self.fc = nn.Linear(widths[4], 10)

    def forward(self, x):
        x = self.conv1(x)
        if self.kernel != 3:
            x = F.max_pool2d(x, 3, 2, 1) if self.kernel == 7 else F.max_pool2d(x, 2)
        for i, count in enumerate(self.modules_, 1):
            x = self.get_submodule(f"residual_block{i}")(x)
            for j in range(1, count + 1):
                x = self.get_submodule(f"attention_module{i}" + (f"_{j}" if j > 1 else ""))(x)
        x = self.mpool2(self.residual_block6(self.residual_block5(self.residual_block4(x))))
        return self.fc(F.avg_pool2d(x, x.shape[-1]).flatten(1))


def trained(name):
    """In float64, with statistics of its own."""
    torch.manual_seed(0)
    model = Network(name).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_same(name, tmp_path):
    model, size = trained(name), NETWORKS[name][-1]
    torch.save(model.state_dict(), tmp_path / "model.pkl")
    loaded, x = load_public(tmp_path / "model.pkl"), torch.rand(2, 3, size, size, dtype=torch.float64)
    assert not loaded.training
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(fold_for_inference(loaded, torch.float64)(x), expected)
        assert expected.std() > 1e-3


def test_gradients_are_the_same_and_other_sizes_are_taken(tmp_path):
    name = "ResidualAttentionModel_92_32input_update"
    model = trained(name)
    torch.save(model.state_dict(), tmp_path / "model.pkl")
    loaded, x = load_public(str(tmp_path / "model.pkl")), torch.rand(4, 3, 32, 32, dtype=torch.float64)
    for network in (model, loaded):
        network.train()(x).square().sum().backward()
    torch.testing.assert_close(loaded.fc.weight.grad, model.fc.weight.grad)
    torch.testing.assert_close(loaded.conv1.weight.grad, model.conv1[0].weight.grad, rtol=1e-6, atol=1e-9)
    ours = loaded.stage1[1].skip[0].conv2.conv.weight
    theirs = model.attention_module1.skip1_connection_residual_block.conv2.weight
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    assert loaded.eval()(torch.rand(1, 3, 45, 37, dtype=torch.float64)).shape == (1, 10)


def test_files_of_dataparallel_and_of_pytorch_before_it_counted_batches(tmp_path):
    model = trained("ResidualAttentionModel_56")
    state = {f"module.{key}": t for key, t in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pkl", _use_new_zipfile_serialization=False)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(load_public(tmp_path / "old.pkl")(x), model(x))


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: {}, "is of another network: it has no conv1.0.weight"),
        (
            lambda state: without(state, "attention_module2.softmax3_blocks.bn2.weight"),
            "it has no attention_mod",
        ),
        (lambda state: state | {"attention_module2.extra": torch.ones(1)}, "it has attention_module2.extra"),
        (lambda state: state | {"fc.weight": torch.ones(10, 3)}, r"fc.weight is \[10, 3\], not \[10, 40\]"),
        (
            lambda state: state | {"conv1.0.weight": torch.ones(8, 3, 9, 9)},
            "no conv1.0.weight of 7, 5, 3 pixels",
        ),
        (lambda state: [1, 2], "holds no state_dict but a list"),
        (lambda state: {"model": state}, "holds no state_dict but a dict"),
        (lambda state: {"a": Evil()}, "holds no state_dict: Weights only load failed"),
    ],
)
def test_other_files_are_refused(change, text, tmp_path, capsys):
    path = tmp_path / "model.pkl"
    torch.save(change(trained("ResidualAttentionModel_56").state_dict()), path)
    with pytest.raises(ValueError, match=text) as error:
        load_public(path)
    assert str(path) in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_what_is_no_file_of_torch(tmp_path):
    with pytest.raises(OSError, match="none"):
        load_public(tmp_path / "none")
    with pytest.raises(OSError, match="not a file"):
        load_public(tmp_path)
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ValueError, match="text holds no state_dict"):
        load_public(tmp_path / "text")
