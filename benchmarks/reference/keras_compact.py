"""The compact network in Keras 3, which the report's authors used: a second reference, on any backend of Keras.

KERAS_BACKEND=torch (or tensorflow, jax) chooses the backend before Keras is imported; ``pip install keras`` gets it.

Padding, and momentum and epsilon of the batch normalisations, are PyTorch's. Layers are named after the submodules of
``reference.networks.ran_compact``, with _ for each dot, so weights carry over by name.
"""

from collections.abc import Mapping

import keras
from keras import layers
from torch import Tensor

from .networks import wide


def conv(x: keras.KerasTensor, filters: int, size: int, stride: int, name: str) -> keras.KerasTensor:
    # padding="same" would pad a strided convolution below and to the right only
    if size > 1:
        x = layers.ZeroPadding2D(size // 2)(x)
    return layers.Conv2D(filters, size, stride, name=name)(x)


def bn_relu(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return layers.ReLU()(layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x))


def residual_unit(x: keras.KerasTensor, filters: int, mid: int, stride: int, name: str) -> keras.KerasTensor:
    identity = x
    if x.shape[-1] != filters or stride != 1:
        identity = conv(x, filters, 1, stride, f"{name}_shortcut")
    for i, (width, size, step) in enumerate([(mid, 1, 1), (mid, 3, stride), (filters, 1, 1)], 1):
        x = conv(bn_relu(x, f"{name}_conv{i}_bn"), width, size, step, f"{name}_conv{i}_conv")
    return layers.Add()([x, identity])


def attention_module(x: keras.KerasTensor, depth: int, name: str) -> keras.KerasTensor:
    """``(1 + sigmoid(mask)) * trunk`` between two residual units, all of the input's width."""
    filters = x.shape[-1]

    def unit(x: keras.KerasTensor, place: str) -> keras.KerasTensor:
        return residual_unit(x, filters, filters, 1, f"{name}_{place}")

    x = unit(x, "pre_0")
    trunk = unit(unit(x, "trunk_0"), "trunk_1")
    mask = x
    for level in range(depth):
        mask = unit(layers.MaxPooling2D(2)(mask), f"mask_down_{level}_0")
    for level in reversed(range(depth)):
        mask = layers.UpSampling2D(2)(unit(mask, f"mask_up_{level}_0"))
    for i in (1, 2):
        mask = conv(mask, filters, 1, 1, f"{name}_mask_conv{i}")
    gate = layers.Activation("sigmoid")(mask)
    return unit(layers.Add()([trunk, layers.Multiply()([gate, trunk])]), "post_0")


def ran_compact(dropout: float = 0.5, l2: float = 1e-3, width: float = 1.0) -> keras.Model:
    """Class probabilities (N, 10) of images (N, 32, 32, 3); the penalty on the dense layer is part of the loss.

    >>> model = ran_compact(width=0.125)
    >>> model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", ["accuracy"])
    >>> model.output_shape
    (None, 10)
    """
    c0, c1, c2, c3, mid = (wide(channels, width) for channels in (32, 128, 256, 1024, 64))
    inputs = keras.Input((32, 32, 3))
    x = bn_relu(conv(inputs, c0, 5, 1, "conv1"), "bn1")
    x = residual_unit(layers.MaxPooling2D(2)(x), c1, c0, 1, "stage1_0")
    x = residual_unit(attention_module(x, 2, "stage1_1"), c2, mid, 2, "stage2_0")
    x = residual_unit(attention_module(x, 1, "stage2_1"), c3, mid, 2, "stage3_0")
    for i in (1, 2):
        x = residual_unit(x, c3, mid, 1, f"stage3_{i}")
    x = layers.Flatten()(layers.AveragePooling2D(4)(bn_relu(x, "bn2")))
    penalty = keras.regularizers.L2(l2)
    outputs = layers.Dense(10, "softmax", kernel_regularizer=penalty, name="fc")(layers.Dropout(dropout)(x))
    return keras.Model(inputs, outputs, name="ran_compact")


def load_state_dict(model: keras.Model, state: Mapping[str, Tensor]) -> None:
    """Give ``model`` the weights of ``reference.networks.ran_compact`` or ``ran_ext.models.ran_compact``.

    Raises:
        KeyError: an entry is missing.
        ValueError: an entry has another shape, so the networks' widths differ.
    """
    for layer in model.layers:
        if layer.weights:
            statistics = ["running_mean", "running_var"] if isinstance(layer, layers.BatchNormalization) else []
            keys = [f"{layer.name.replace('_', '.')}.{entry}" for entry in ["weight", "bias", *statistics]]
            weight, *others = (state[key].numpy(force=True) for key in keys)
            # PyTorch keeps (out, in, height, width), Keras (height, width, in, out)
            layer.set_weights([weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T, *others])
