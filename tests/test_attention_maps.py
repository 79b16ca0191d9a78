"""What the attention looks at is found in whatever a model comes in, and an empty answer is an error."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ran_ext import explain
from ran_ext._attention_maps import attention_maps, depths, has_attention
from ran_ext._explain import layers
from ran_ext.models import create_model
from ran_ext.nn import AttentionGate, AttentionModule


def network(**options):
    return create_model("ran_compact", width=0.125, **options)


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 1), AttentionModule(8, 1))


def compiled_inside(model):
    model[1] = torch.compile(model[1], backend="eager")
    return model


def compiled_in_place(model):
    model[1].compile(backend="eager")
    return model


def called_before(wrap):
    """A graph that exists before there are hooks."""

    def wrapped(model):
        outer = wrap(model)
        with torch.no_grad():
            outer.eval()(torch.randn(2, 3, 9, 9))
        return outer

    return wrapped


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compile, called": called_before(lambda model: torch.compile(model, backend="eager")),
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "a part compiled": called_before(compiled_inside),
    "a part compiled in place": called_before(compiled_in_place),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_maps_are_those_of_the_model_inside(name):
    model, x = small(), torch.randn(2, 3, 9, 9)
    expected, halvings = attention_maps(model, x), depths(model)
    wrapped = WRAPPERS[name](model)
    found = attention_maps(wrapped, x)
    inside = [key.replace("_orig_mod.", "") for key in found]
    assert (inside, list(depths(wrapped).values())) == (list(expected), list(halvings.values()))
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert_close(one.mask, other.mask)
        assert_close(one.product, other.product)


@pytest.mark.parametrize("model", [nn.Flatten(), network(attention=False)], ids=["Flatten", "no attention"])
def test_no_gates_is_an_error(model):
    assert not has_attention(model)
    with pytest.raises(ValueError, match=rf"attention_maps: model, a {type(model).__name__}, has no .*AttentionGate"):
        attention_maps(model, torch.randn(2, 3, 20, 20))


def test_gates_that_are_not_called_are_an_error():
    model = nn.Flatten()
    model.gate = AttentionGate()
    with pytest.raises(ValueError, match="attention_maps: model, a Flatten, calls none of its AttentionGate modules"):
        attention_maps(model, torch.randn(2, 3))


def test_every_module_keeps_its_mode():
    model = network().train()
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in frozen:
        module.eval()
    before = [module.training for module in model.modules()]
    attention_maps(model, torch.randn(2, 3, 20, 20))
    assert [module.training for module in model.modules()] == before
    with pytest.raises((TypeError, RuntimeError), match=r"dtype|type"):
        attention_maps(model.double(), torch.randn(2, 3, 20, 20))
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["compile", "both", "a part compiled", "a part compiled in place"])
def test_explain_lists_the_model_inside(name):
    model, x = small().eval(), torch.randn(2, 3, 9, 9)
    expected = layers(model, x)
    found = layers(WRAPPERS[name](model), x)
    for one, other in zip(found, expected, strict=True):
        assert (one.name.replace("_orig_mod.", ""), one.op, one.x) == (other.name, other.op, other.x)


def test_nothing_to_explain_is_an_error():
    with pytest.raises(ValueError, match="explain: model, a Linear, calls no convolution"):
        explain(nn.Linear(2, 2), torch.ones(1, 2))
