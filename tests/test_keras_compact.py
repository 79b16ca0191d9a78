"""The Keras twin of the compact network: the report's parameter counts, and the reference's outputs and loss."""

import doctest
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.reference import networks


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The module, on Keras's PyTorch backend; Keras's settings go to a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        pytest.importorskip("keras", minversion="3", reason="the Keras twin needs Keras 3: pip install keras")
        from benchmarks.reference import keras_compact

        yield keras_compact


def trained_weights(network):
    """Weights such as a training leaves: no batch normalisation is the identity."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.1)
    return network.state_dict()


def test_parameters_are_the_reports(twin):
    model = twin.ran_compact()
    assert sum(math.prod(weight.shape) for weight in model.trainable_weights) == 6_810_570
    assert model.count_params() == 6_834_122  # with the running statistics


def test_examples(twin):
    assert doctest.testmod(twin).failed == 0


@pytest.mark.parametrize("width", [0.125, 1.0])
def test_outputs_and_loss_are_the_references(twin, width):
    plain = networks.ran_compact(width=width)
    model = twin.ran_compact(l2=0.1, width=width)
    twin.load_state_dict(model, trained_weights(plain))
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 9, 5])
    with torch.no_grad():
        logits = plain.eval()(images)
        got = model(images.permute(0, 2, 3, 1), training=False)
    torch.testing.assert_close(got.log(), logits.log_softmax(1), rtol=1e-5, atol=1e-5)
    model.compile("adam", "sparse_categorical_crossentropy")
    loss = F.cross_entropy(logits, labels) + 0.1 * plain.fc.weight.square().sum()
    assert model.test_on_batch(images.permute(0, 2, 3, 1), labels) == pytest.approx(loss.item(), rel=1e-5)


def test_weights_of_another_width_are_refused(twin):
    with pytest.raises(ValueError, match="shape"):
        twin.load_state_dict(twin.ran_compact(width=0.125), networks.ran_compact(width=0.25).state_dict())
