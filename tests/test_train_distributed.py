"""Two processes under torchrun against one process with the joint batch."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from ran_ext._lock import FolderLock
from ran_ext.train import load_checkpoint

#: One run of two epochs; dropout is off, as its masks differ from process to process. In float64: in float32 a rounding
#: error may turn a ReLU or a pooling the other way, and ten steps later no weight is near the other run's.
PROGRAM = """
import dataclasses, sys, torch
from ran_ext.data import CIFAR10
from ran_ext.train import Callback, Config, fit, process_group
torch.set_num_threads(1)
class Double(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network.double()
    def forward(self, images):
        return self.network(images.double())
    def l2_penalty(self):
        return self.network.l2_penalty()
config = Config(
    model_options={"width": 0.125}, dropout=0.0, optimizer="nesterov", lr=0.01, batch_size=8, epochs=2,
    augment="report", dtype="float32",
)
train_set = CIFAR10.sample("train").subset(torch.arange(32))
val_set = CIFAR10.sample("test").subset(torch.arange(21))  # an odd number: the shares differ
class Shaken(torch.utils.data.Dataset):
    # not held in memory, and a transform that draws; the network takes each batch in two parts
    def __init__(self, images):
        self.images = images
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        return self.images.images[index] // 2 + torch.randint(9, ()).byte(), int(self.images.labels[index])
if sys.argv[2] == "read":
    train_set, val_set = Shaken(train_set), Shaken(val_set)
    config = dataclasses.replace(config, accumulate=2)
with process_group("cpu") as ranks:
    torch.manual_seed(config.seed)
    result = fit(
        Double(config.create_model()), train_set, val_set, config, sys.argv[1],
        test_set=val_set, ranks=ranks, quiet=True, workers=1,
    )
    if ranks.first:
        torch.save([vars(row) for row in result.figures] + [result.test.confusion], sys.argv[1] + "/figures.pt")
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Runs the program in a folder, in one process or two."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = tmp_path_factory.mktemp("program") / "run.py"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]

    def run(folder, processes, kind="memory"):
        command = [*(torchrun if processes == 2 else [sys.executable]), str(program), str(folder), kind]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="module", params=["memory", "read"])
def runs(request, tmp_path_factory, launch):
    """Folders of the run in one process and in two, of images in memory and of images that are read."""
    folders = {}
    for processes, name in ((1, "one"), (2, "two")):
        folders[name] = tmp_path_factory.mktemp(name)
        done = launch(folders[name], processes, request.param)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


def test_two_processes_train_as_one_with_the_joint_batch(runs):
    one, two = (load_checkpoint(folder / "last.pt") for folder in runs.values())
    assert len(two["rng"]) == 2
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_report_the_figures_of_all_images(runs):
    one, two = (torch.load(folder / "figures.pt", weights_only=True) for folder in runs.values())
    assert one[-1].sum() == two[-1].sum() == 21
    for mine, theirs in zip(one[:-1], two[:-1], strict=True):
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-5), key


def test_the_first_process_alone_writes(runs):
    assert sorted(path.name for path in runs["two"].iterdir()) == ["figures.pt", "last.pt", "model.pt"]


def test_a_folder_in_use_is_refused_by_every_process(tmp_path, launch):
    with FolderLock(tmp_path):
        done = launch(tmp_path, 2)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert done.returncode == 1
    assert done.stderr.count(f"TrainingError: {tmp_path} is in use by another process (process {os.getpid()}") >= 1
    assert "SIGKILL" not in done.stderr
