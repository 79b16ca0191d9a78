"""What is packed of a weight is packed anew when the weight changes, however it is changed."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ran_ext._kept import Kept
from ran_ext.inference import FoldedConv2d, fold_for_inference
from ran_ext.nn import ResidualUnit


def plain(conv, x):
    out = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
    return F.relu(out) if conv.relu else out


def add(conv):
    conv.weight.add_(1)


def write_where_a_view_is(conv):
    conv.weight[0].zero_()


def optimise(conv):
    conv.weight.grad = torch.ones_like(conv.weight)
    torch.optim.SGD([conv.weight], lr=0.5).step()


def load(conv):
    conv.load_state_dict({key: torch.randn_like(value) for key, value in conv.state_dict().items()})


def assign(conv):
    conv.load_state_dict({key: torch.randn_like(value) for key, value in conv.state_dict().items()}, assign=True)


def replace(conv):
    conv.weight = nn.Parameter(torch.randn_like(conv.weight), requires_grad=False)


def put_other_memory(conv):
    for _ in range(3):  # the allocator likes to give an address again
        conv.weight.data = torch.randn_like(conv.weight)


def swap(conv):
    torch.utils.swap_tensors(conv.weight, nn.Parameter(torch.randn_like(conv.weight), requires_grad=False))


def convert_there_and_back(conv):
    conv.double()
    conv.weight.mul_(2)
    conv.float()


def in_inference_mode(conv):
    with torch.inference_mode():
        conv.weight.add_(1)


CHANGES = [add, write_where_a_view_is, optimise, load, assign, replace, put_other_memory, swap, convert_there_and_back,
           in_inference_mode]  # fmt: skip


def made(kernel):
    """A folded convolution that has packed its weight, and an input that it packs it for."""
    conv = nn.Conv2d(32, 96, kernel, padding=kernel // 2)
    folded = FoldedConv2d(conv, conv.weight.double(), conv.bias.double(), True, torch.float32).requires_grad_(False)
    x = torch.randn(2, 32, 9, 8).to(memory_format=torch.channels_last)
    assert_close(folded(x), plain(folded, x), rtol=1e-4, atol=1e-4)
    assert folded._packed._made or any(panels._made for panels in folded._panels.values())
    return folded, x


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_weight_is_seen(change, kernel):
    folded, x = made(kernel)
    before = folded(x)
    with torch.no_grad():
        change(folded)
    after = folded(x)
    assert_close(after, plain(folded, x), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("kernel", [1, 3])
def test_functional_call_takes_its_own_weights(kernel):
    folded, x = made(kernel)
    before = folded(x)
    other = {"weight": torch.randn_like(folded.weight), "bias": torch.randn_like(folded.bias)}
    for _ in range(2):
        found = torch.func.functional_call(folded, other, (x,))
        expected = F.relu(F.conv2d(x, other["weight"], other["bias"], padding=kernel // 2))
        assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert_close(folded(x), before)


def test_functional_call_of_an_alias_made_anew_for_each_call():
    """Each has a count of changes of its own, which starts at 0, and the last one's address may be free again."""
    folded, x = made(3)
    weight = torch.randn_like(folded.weight)
    for _ in range(4):
        weight.mul_(-2)
        found = torch.func.functional_call(folded, {"weight": weight.data}, (x,))
        assert_close(found, F.relu(F.conv2d(x, weight, folded.bias, padding=1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [1, 3])
def test_functional_call_of_weights_with_a_gradient(kernel):
    folded, x = made(kernel)
    weight = torch.randn_like(folded.weight).requires_grad_()
    (found,) = torch.autograd.grad(torch.func.functional_call(folded, {"weight": weight}, (x,)).sum(), weight)
    (expected,) = torch.autograd.grad(F.relu(F.conv2d(x, weight, folded.bias, padding=kernel // 2)).sum(), weight)
    assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_network_of_weights_made_in_inference_mode():
    with torch.inference_mode():
        unit, x = ResidualUnit(16, 32, 8).eval(), torch.randn(2, 16, 7, 7).to(memory_format=torch.channels_last)
        folded = fold_for_inference(unit)
        assert_close(folded(x), unit(x), rtol=1e-4, atol=1e-4)
    assert not folded.conv1.weight.is_inference()


def test_the_same_weight_is_packed_once():
    kept, weight, made = Kept(), torch.ones(3), []
    for _ in range(3):
        kept(weight, lambda: made.append(weight.sum().item()))
    assert made == [3.0]
    with torch.inference_mode():
        weightless = torch.ones(3)
        for _ in range(2):
            kept(weightless, lambda: made.append(0.0))
    assert made == [3.0, 0.0, 0.0]


def test_copies_and_pickles_keep_nothing():
    folded, x = made(3)
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    for twin in (copy.deepcopy(folded), copy.copy(folded), torch.load(file, weights_only=False)):
        with torch.no_grad():
            twin.weight.data = twin.weight.data * 2
        assert_close(twin(x), plain(twin, x), rtol=1e-4, atol=1e-4)
    assert not any(panels._made for panels in copy.deepcopy(folded)._panels.values())
