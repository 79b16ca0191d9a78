"""For every test: a seed, few threads, and a skip that says why where there is no GPU or no compiled module."""

import collections
import os

import pytest
import torch

from ran_ext import _backend, _files, _measured

# Threads that wait for one another on cores taken by other workers are many times slower than one thread.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(1 if WORKERS > 1 else min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True, scope="session")
def untuned(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was tuned on this machine chooses no path in a test."""
    _measured.file = lambda: tmp_path_factory.getbasetemp() / "no_tuning.json"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_mode_stays_on():
    """Of torch's functions: it would change what the tests after it run on."""
    yield
    assert torch._C._len_torch_function_stack() == 0


@pytest.fixture(autouse=True)
def threads_stay():
    """What a test, or a command that it runs, sets: libraries sum differently with more threads."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def full_disk(monkeypatch):
    """``full_disk(True)``: from now on every write of a checkpoint or a result fails as on a full disk."""
    full = False

    def switch(on: bool) -> None:
        nonlocal full
        full = on

    def open_file(path, mode):
        return open("/dev/full", "wb") if full else open(path, mode)

    monkeypatch.setattr(_files, "open", open_file, raising=False)
    return switch


@pytest.fixture
def native() -> None:
    if _backend._C is None:
        pytest.skip(f"the native backend is missing: {_backend.why_missing}")


#: Where torch's compilers and whole trainings take the time, of code that others cover. Nor are a test's further cases:
#: if coverage followed all, it would take a quarter of the suite's time.
NOT_COVERED = {f"test_{name}" for name in ("tracing", "compiled", "backbones", "reference", "attention_networks")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases = collections.Counter[str]()
    for item in items:
        name = item.nodeid.partition("[")[0]
        cases[name] += 1
        if cases[name] > 1 or item.path.stem in NOT_COVERED:
            item.add_marker("no_cover")
        if item.path.parent.name == "ecosystem":
            item.add_marker("elsewhere")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
