"""A CUDA graph's stand-in on the CPU: it records the ops that torch dispatches and runs them again.

As strict as a graph: the recording changes nothing, Python numbers and branches stay as they were then, all memory is
the recording's, and reading a value back to Python is found out.
"""

from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ran_ext import _tracing


class CpuGraph:
    """What :class:`ran_ext.train.CudaGraph` is on CUDA."""

    def warm_up(self, function):
        with Tape() as tape:
            result = function()
        return result, tape.waits

    def capture(self, function):
        random_state = torch.get_rng_state()
        with Tape() as tape:
            result = function()
        tape.undo()
        torch.set_rng_state(random_state)
        if tape.waits:
            raise RuntimeError(f"{tape.waits[0]} in a capture")

        def replay():
            tape.replay()
            return result

        return replay


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops, self.waits = [], []
        self.made, self.before = set(), {}
        # As a graph does, it holds the kernels that run without it; modules show a mode PyTorch's own ops instead.
        self.unnoticed = mock.patch.object(_tracing, "_len_torch_dispatch_stack", return_value=0)

    def __enter__(self):
        self.unnoticed.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.unnoticed.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is torch.ops.aten._local_scalar_dense.default:
            self.waits.append("item()")
        for tensor in written(op, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made and storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()
        result = op(*args, **kwargs)
        self.ops.append((op, args, kwargs, result))
        self.made |= {tensor.untyped_storage().data_ptr() for tensor in fresh(op, result)}
        return result

    def undo(self):
        for storage, content in self.before.values():
            storage.copy_(content)

    def replay(self):
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for op, args, kwargs, recorded in self.ops:
                again = op(*args, **kwargs)
                for mine, new in zip(fresh(op, recorded), fresh(op, again), strict=True):
                    mine.copy_(new)


def written(op, args, kwargs):
    """The arguments that ``op`` changes."""
    values = [(argument, value) for argument, value in zip(op._schema.arguments, args, strict=False)]
    values += [(argument, kwargs[argument.name]) for argument in op._schema.arguments if argument.name in kwargs]
    changed = [value for argument, value in values if argument.alias_info and argument.alias_info.is_write]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, torch.Tensor)]


def fresh(op, result):
    """The tensors of the result that are neither an argument nor a view of one."""
    values = result if isinstance(result, tuple) and len(op._schema.returns) > 1 else (result,)
    own = [value for slot, value in zip(op._schema.returns, values, strict=False) if slot.alias_info is None]
    return [leaf for leaf in tree_leaves(own) if isinstance(leaf, torch.Tensor)]
