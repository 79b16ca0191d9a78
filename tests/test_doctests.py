"""Every example in a public docstring runs."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import ran_ext

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(ran_ext.__path__, "ran_ext.")
    if not name.endswith(("._C", ".__main__", "ran_ext.info"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, globs={**vars(module), "torch": torch}, optionflags=doctest.ELLIPSIS)
    assert failed == 0
