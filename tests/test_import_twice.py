"""The package may be imported again: after a purge, by a reload, in a fork, from a second copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ran_ext

FOLDER = Path(ran_ext.__file__).parent
START = """
import importlib, multiprocessing, os, sys, torch, warnings
from torch.utils.flop_counter import FlopCounterMode
from torch._subclasses import FakeTensorMode
import ran_ext

def names():
    return [name for name in sys.modules if name.split(".")[0] == "ran_ext"]

def purge():
    for name in names():
        del sys.modules[name]

def works():
    torch.manual_seed(0)
    native = ran_ext._backend._C is not None
    model, x = ran_ext.models.ran_compact(width=0.125, dropout=0.0), torch.randn(2, 3, 12, 12)
    model(x).sum().backward()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    if native:
        with FakeTensorMode() as mode:
            assert torch.ops.ran_ext.max_pool2d(mode.from_tensor(x))[0].shape == (2, 3, 6, 6)
    return counter.get_total_flops(), model(x).sum().item(), native

first, old = works(), ran_ext
"""
PURGED = """
model, x = ran_ext.nn.ResidualUnit(8, 8, 8), torch.randn(2, 8, 5, 5)
wanted = model(x)
for _ in range(2):
    purge()
    import ran_ext
    assert ran_ext is not old
    assert works() == first, (works(), first)
torch.testing.assert_close(model(x), wanted)  # an object of before
ours = ran_ext.nn.ResidualUnit(8, 8, 8)
ours.load_state_dict(model.state_dict())
torch.testing.assert_close(ours(x), wanted)
"""
RELOADED = """
for name in sorted(names(), key=lambda name: -name.count(".")):
    if not name.endswith("__main__"):
        importlib.reload(sys.modules[name])
assert works() == first, (works(), first)
importlib.reload(ran_ext)
assert works() == first
"""
FORKED = """
torch.set_num_threads(1)
def child(queue):
    purge()
    globals()["ran_ext"] = importlib.import_module("ran_ext")
    queue.put(works())
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
process = context.Process(target=child, args=(queue,))
process.start()
assert queue.get() == first
process.join()
assert process.exitcode == 0
"""
SECOND_COPY = """
purge()
os.chdir(sys.argv[1])  # which python -c looks in first
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import ran_ext
assert ran_ext.__file__.startswith(sys.argv[1])
if first[-1]:
    assert any("another copy of ran_ext was imported in this process before" in str(w.message) for w in said)
flops, out, native = works()
assert not native
assert flops == first[0]
assert abs(out - first[1]) < 1e-3
"""


def run(script: str, *args: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", START + script, *args], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.parametrize("script", [PURGED, RELOADED, FORKED], ids=["purge", "reload", "fork"])
def test_imported_again(script):
    done = run(script)
    assert done.returncode == 0, done.stderr


def test_a_second_copy_in_the_process_runs_plain_pytorch_and_says_so(tmp_path):
    """Registering its ops over the first copy's would end the process."""
    shutil.copytree(FOLDER, tmp_path / "ran_ext", ignore=shutil.ignore_patterns("__pycache__", "sample"))
    done = run(SECOND_COPY, str(tmp_path))
    assert done.returncode == 0, done.stderr
