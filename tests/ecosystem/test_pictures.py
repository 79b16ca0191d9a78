"""People's own pictures with torchvision and webdataset: two commands to a trained network, shards on two processes."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="`.ci/ecosystem` makes the environment that has it")
pytest.importorskip("webdataset", reason="`.ci/ecosystem` makes the environment that has it")

import torch
from PIL import Image

from ran_ext.data import open_data, sample
from ran_ext.data.folders import open_folder

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def pictures(root: Path, size: int, count: int = 20) -> Path:
    """``count`` pictures of three classes, of the embedded images, enlarged."""
    data = sample("train")
    for label in (0, 3, 8):
        folder = root / data.classes[label]
        folder.mkdir(parents=True)
        for number, index in enumerate((data.labels == label).nonzero().flatten()[:count].tolist()):
            small = Image.fromarray(data.images[index].permute(1, 2, 0).numpy())
            small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
    return root


def run(*words: object, processes: int = 1) -> str:
    command = [sys.executable, *map(str, words)]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
        command[1:1] = torchrun
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_commands_lead_from_a_folder_to_masks(tmp_path):
    began = time.monotonic()
    data, out = pictures(tmp_path / "data", 64), tmp_path / "run"
    said = run(ROOT / "scripts" / "train_cifar10.py", "--data", data, "--out", out, "--model-option", "width=0.25",
               "--epochs", 10)  # fmt: skip
    assert "48 training, 12 validation, 0 test images, 3 classes, 3x64x64" in said
    page, table = tmp_path / "page.html", tmp_path / "table.csv"
    run("-m", "ran_ext", "predict", data, "--checkpoint", out, "--out", page, "--csv", table)
    assert time.monotonic() - began < 120
    rows = list(csv.DictReader(table.open()))
    right = sum(row["class 1"] == Path(row["image"]).parent.name for row in rows)
    assert len(rows) == 60
    assert right > 30  # by chance 20
    text = page.read_text()
    assert text.count("data:image/png") == 60 * 3
    assert text.count("<figcaption>stage1.1, depth 2") == 60


def test_larger_pictures_are_cropped_by_torchvision_in_workers(tmp_path):
    data = pictures(tmp_path / "data", 96, count=6)
    cropped = open_folder(data).train.cropped()
    torch.manual_seed(0)
    first, second = cropped[0][0], cropped[0][0]
    assert first.shape == (3, 96, 96)
    assert first.dtype == torch.uint8
    assert not torch.equal(first, second)
    assert type(open_data(data).train).__name__ == "PictureFolder"
    small = ("--model-option", "width=0.125", "--epochs", "1", "--workers", "1", "--batch-size", "4", "--quiet")
    files = {}
    for processes in (1, 2):
        out = tmp_path / f"run{processes}"
        run(ROOT / "scripts" / "train_cifar10.py", "--data", data, "--out", out, *small, "--dropout", "0",
            "--dtype", "float32", processes=processes)  # fmt: skip
        files[processes] = json.loads((out / "result.json").read_text())
    one, two = files[1], files[2]
    assert one["config"]["augment"] == "crop"
    assert two["environment"]["processes"] == 2
    # the first step sees the same images and weights; later ones part by rounding, which batch statistics enlarge
    assert two["epochs"][0]["train_loss"] == pytest.approx(one["epochs"][0]["train_loss"], rel=0.05)
    assert two["data"] == one["data"]


#: Full batches, so that the joint batch does not depend on how the shards are dealt out; without augmentation, whose
#: draws go by the place in the batch; in float64.
SHARDS = """
import json, sys, torch, webdataset as wds
from torch.utils.data import DataLoader
from ran_ext.data import Normalize
from ran_ext.train import Config, fit, process_group
pattern, out = sys.argv[1:]
images = 24
class Double(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x.double())
def shards(batch):
    dataset = (
        wds.WebDataset(pattern, shardshuffle=False, nodesplitter=wds.split_by_node)
        .decode("torchrgb8").to_tuple("png", "cls").batched(batch)
    )
    return DataLoader(dataset.with_length(1), batch_size=None, num_workers=1)
config = Config(
    model_options={"num_classes": 3}, batch_size=images, epochs=6, optimizer="nesterov", lr=0.02, weight_decay=0.0,
    schedule="constant", augment="none", normalize="per_channel", patience=0, select="last", dtype="float32",
)
with process_group("cpu") as ranks:
    torch.manual_seed(0)
    model = Double(torch.nn.Conv2d(3, 8, 5, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(),
                   torch.nn.Linear(32, 3)).double()
    share = images // ranks.world_size
    result = fit(model, shards(share), shards(share), config, out, ranks=ranks, quiet=True,
                 normalize=Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    if ranks.first:
        json.dump([vars(row) for row in result.figures], open(out + "/figures.json", "w"))
"""


def test_shards_of_webdataset_train_on_two_processes_as_on_one(tmp_path):
    data = open_folder(pictures(tmp_path / "data", 32, count=8)).train
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for index in range(shard, len(data), 2):
                content = data.paths[index].read_bytes()
                for ending, part in (("png", content), ("cls", str(int(data.labels[index])).encode())):
                    member = tarfile.TarInfo(f"{index:04}.{ending}")
                    member.size = len(part)
                    tar.addfile(member, BytesIO(part))
    (tmp_path / "run.py").write_text(SHARDS)
    figures = {}
    for processes in (1, 2):
        out = tmp_path / f"run{processes}"
        run(tmp_path / "run.py", str(tmp_path / "shard-{0..1}.tar"), out, processes=processes)
        figures[processes] = json.loads((out / "figures.json").read_text())
    assert len(figures[1]) == 6
    for one, two in zip(figures[1], figures[2], strict=True):
        for name in ("train_accuracy", "val_accuracy"):
            assert two[name] == pytest.approx(one[name], abs=1e-12), name
