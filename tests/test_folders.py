"""Folders of class folders: what is found in them, what is said of odd pictures, and the commands on them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ran_ext.data import DatasetError, Images, PictureFolder, cifar100, open_data, sample
from ran_ext.data.folders import is_folder_of_classes, open_folder
from ran_ext.data.pictures import PictureError
from ran_ext.train import Config, build_normalize, cli, fit, load_checkpoint, load_classes
from ran_ext.train.checkpoint import load_shape
from ran_ext.train.recipe import fit_to_data, split
from scripts import evaluate as evaluate_command

CLASSES = {"airplane": 0, "cat": 3, "ship": 8}


def write(root, count=8, size=(24, 24), classes=CLASSES, mode="RGB", first=0):
    """``count`` pictures of each class, of the embedded images."""
    data = sample("train")
    for name, label in classes.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, index in enumerate((data.labels == label).nonzero().flatten()[first : first + count].tolist()):
            pixels = data.images[index].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).resize(size).convert(mode).save(folder / f"{number:02}.png")
    return root


SMALL = ["--model-option", "width=0.125", "--epochs", "1", "--no-tensorboard", "--device", "cpu"]


def train(*flags):
    return cli.main([*SMALL, *map(str, flags)])


def refused(capsys, *flags):
    assert train(*flags) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


# --- what is found ----------------------------------------------------------------------------------------------------


def test_small_pictures_are_held_in_memory_with_their_classes(tmp_path):
    found = open_data(write(tmp_path))
    assert isinstance(found.train, Images)
    assert found.train.classes == ["airplane", "cat", "ship"]
    assert found.train.images.shape == (24, 3, 24, 24)
    assert found.train.labels.bincount().tolist() == [8, 8, 8]
    assert (found.val, found.test, found.remarks, found.skipped) == (None, None, (), ())
    pixels = np.asarray(Image.open(tmp_path / "cat" / "00.png")).transpose(2, 0, 1)
    assert torch.equal(found.train.images[8], torch.tensor(pixels))


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_parts_have_folders_of_their_own_and_one_numbering(tmp_path, name):
    write(tmp_path / "train")
    write(tmp_path / name, 2, classes={"ship": 8, "cat": 3})
    write(tmp_path / "test", 1)
    found = open_data(tmp_path)
    assert [len(part) for part in (found.train, found.val, found.test)] == [24, 4, 3]
    assert found.val.labels.tolist() == [1, 1, 2, 2]  # not 0 and 1, as folders numbered by themselves would be
    assert found.remarks == (f"{tmp_path / name} has no pictures of airplane: its figures say nothing of them",)


def test_large_pictures_stay_in_their_files(tmp_path):
    found = open_data(write(tmp_path, 2, size=(80, 80)))
    assert isinstance(found.train, PictureFolder)
    image, label = found.train[2]
    assert (image.shape, image.dtype, label) == ((3, 80, 80), torch.uint8, 1)
    half = found.train.subset(torch.tensor([True, False] * 3))
    assert [path.name for path in half.paths] == ["00.png"] * 3
    assert half.labels.tolist() == [0, 1, 2]


def test_sizes_and_modes_that_differ_are_said(tmp_path):
    write(tmp_path, 2, size=(300, 200))
    write(tmp_path, 1, size=(70, 90), mode="L")
    found = open_data(tmp_path)
    assert found.train[0][0].shape == (3, 224, 224)
    assert found.remarks == (
        "the pictures are of 2 sizes, shorter sides of 70 to 200 pixels: of each, the middle square is resized to 224 "
        "pixels",
        "3 of 6 pictures are grey: they are taken as colour pictures",
    )
    assert open_data(tmp_path, size=48).train.images.shape == (6, 3, 48, 48)


def test_grey_pictures_have_one_channel(tmp_path):
    assert open_data(write(tmp_path, mode="L")).train.images.shape == (24, 1, 24, 24)


def test_odd_pictures_are_read_and_named(tmp_path):
    write(tmp_path, 5)
    cat, exif = tmp_path / "cat", Image.Exif()
    upright = Image.open(cat / "00.png")
    upright.convert("CMYK").save(cat / "ink.jpg")
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(cat / "turned.png", exif=exif)
    upright.save(cat / "moving.gif", save_all=True, append_images=[upright.rotate(90)])
    Image.fromarray(np.full((24, 24), 0x0800, np.uint16)).save(cat / "deep.png")
    clear = upright.convert("RGBA")
    clear.putalpha(128)
    clear.save(cat / "clear.png")
    (cat / "notes.txt").write_text("no picture")
    (cat / ".hidden.png").write_text("no picture")
    found = open_folder(tmp_path)
    said = dict(remark.split(": ", 1)[::-1] for remark in found.remarks if remark[0].isdigit())
    assert said == {
        f"CMYK, converted to RGB: {cat / 'ink.jpg'}": "1 picture",
        f"turned as the camera says: {cat / 'turned.png'}": "1 picture",
        f"the first frame of several: {cat / 'moving.gif'}": "1 picture",
        f"greys of more than 8 bits, scaled: {cat / 'deep.png'}": "1 picture",
        f"transparent, on white: {cat / 'clear.png'}": "1 picture",
        "they are taken as colour pictures": "1 of 20 pictures are grey",
    }
    assert f"no pictures by their names, so left alone: {cat / 'notes.txt'}" in found.remarks
    place = {path.name: index for index, path in enumerate(found.train.paths) if path.parent == cat}
    assert torch.equal(found.train[place["turned.png"]][0], found.train[place["00.png"]][0])
    assert found.train[place["deep.png"]][0].unique().tolist() == [8]


def break_some(root):
    (root / "cat" / "text.png").write_text("no picture")
    whole = root / "ship" / "00.png"
    whole.write_bytes(whole.read_bytes()[:300])
    os.mkfifo(root / "ship" / "pipe.jpg")
    (root / "empty").mkdir()


def test_what_cannot_be_read_is_named_or_skipped(tmp_path):
    break_some(write(tmp_path))
    with pytest.raises(PictureError, match=r"cannot read .*text\.png as .* \(and 2 more\), or leave .* --skip-broken"):
        open_folder(tmp_path)
    found = open_folder(tmp_path, skip_broken=True)
    assert len(found.train) == 23
    assert found.train.classes == ["airplane", "cat", "ship"]
    assert [next(name for name in ("text", "00.png", "pipe", "empty") if name in fault) for fault in found.skipped] == [
        "text", "00.png", "pipe", "empty"]  # fmt: skip
    for name in ("cat/text.png", "ship/00.png", "ship/pipe.jpg"):
        (tmp_path / name).unlink()
    with pytest.raises(PictureError, match="class empty has no pictures in"):
        open_folder(tmp_path)


def test_one_class_alone_or_an_unknown_one_is_refused(tmp_path):
    with pytest.raises(PictureError, match=r"has 1 class \(cat\); a network learns to tell two or more"):
        open_folder(write(tmp_path / "one", classes={"cat": 3}))
    write(tmp_path / "two" / "train")
    write(tmp_path / "two" / "val", classes={"cat": 3, "dog": 5})
    with pytest.raises(PictureError, match=r"val has a class dog, which .*train has not"):
        open_folder(tmp_path / "two")
    write(tmp_path / "no" / "val")
    with pytest.raises(PictureError, match="has no folder 'train' beside val"):
        open_folder(tmp_path / "no")


def test_what_is_neither_cifar_nor_pictures_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert not is_folder_of_classes(tmp_path)
    with pytest.raises(DatasetError, match=r"no CIFAR-10 in .*or give a folder of class folders with pictures"):
        open_data(tmp_path)
    with pytest.raises(ValueError, match="--image-size and --skip-broken are for folders of class folders"):
        open_data(tmp_path, size=32)


def test_pictures_that_break_later_are_named_by_a_worker_too(tmp_path):
    found = open_folder(write(tmp_path / "data", 8, size=(80, 80)))
    (tmp_path / "data" / "cat" / "03.png").write_text("no picture any more")
    config = Config(model_options={"width": 0.125, "num_classes": 3}, batch_size=8, epochs=1, patience=0,
                    select="last", augment="none", normalize="per_channel")  # fmt: skip
    few = build_normalize(found.train.subset(torch.arange(4)), config)
    for workers in (0, 1):
        with pytest.raises(PictureError) as caught:
            fit(config.create_model(), found.train, None, config, tmp_path / f"{workers}", normalize=few,
                workers=workers, quiet=True)  # fmt: skip
        assert str(caught.value).startswith(f"cannot read {tmp_path / 'data' / 'cat' / '03.png'} as a picture")
        assert "\n" not in str(caught.value)


# --- CIFAR-100 --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hundred(tmp_path, monkeypatch):
    """Files of CIFAR-100's form with two training images and one test image a class."""
    monkeypatch.setattr(cifar100, "COUNTS", {"train": 200, "test": 100})
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split_name, count in (("train", 200), ("test", 100)):
        fine = np.arange(count) % 100
        records = np.concatenate([(fine // 5)[:, None], fine[:, None], generator.integers(256, size=(count, 3072))], 1)
        (folder / f"{split_name}.bin").write_bytes(records.astype(np.uint8).tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(f"thing_{label:02}" for label in range(100)) + "\n")
    return tmp_path


def test_cifar100_is_read_with_its_hundred_names(hundred):
    found = open_data(hundred)
    assert repr(found.train) == "CIFAR100(200 images 3x32x32, 100 classes)"
    assert found.test.labels.tolist() == list(range(100))
    assert found.train.classes[7] == "thing_07"
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        cifar100.CIFAR100(hundred, "val")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "short by 1: a cut download or copy"),
        (lambda path: path.write_bytes(path.read_bytes()[:1] + b"\x05" + path.read_bytes()[2:]), "altered"),
        (lambda path: path.with_name("fine_label_names.txt").write_text("one\n"), "all named in fine_label_names.txt"),
        (lambda path: path.unlink(), "no CIFAR-10 in"),
    ],
)
def test_altered_files_of_cifar100_are_refused(hundred, change, said):
    change(hundred / "cifar-100-binary" / "train.bin")
    with pytest.raises(DatasetError, match=said):
        open_data(hundred)


def test_the_command_trains_on_cifar100(hundred, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ("--data", hundred, "--out", out, "--batch-size", 50)
    assert "count must be 0, or from 100, one of each class, to 100" in refused(capsys, *flags, "--quiet")
    assert train(*flags, "--val-images", 100, "--quiet") == 0
    assert load_checkpoint(out / "model.pt")["config"]["model_options"] == {"width": 0.125, "num_classes": 100}
    assert len(load_classes(out / "model.pt")) == 100
    assert json.loads((out / "result.json").read_text())["test"]["top5"] <= 1


# --- the recipe that follows from the data ----------------------------------------------------------------------------


def test_what_the_user_has_not_decided_follows_from_the_data(tmp_path):
    found = open_data(write(tmp_path, 20))
    config = fit_to_data(Config(batch_size=32, normalize="per_channel"), found, (), "DIR")
    assert config.model_options == {"num_classes": 3}
    assert (config.val_images, config.batch_size, config.augment) == (12, 8, "light")
    assert [len(part) for part in split(found, config)[:2]] == [48, 12]
    config = fit_to_data(Config(batch_size=32, augment="report"), found, ("batch_size", "augment"), "DIR")
    assert (config.val_images, config.batch_size, config.augment) == (12, 32, "report")
    large = fit_to_data(Config(), open_data(tmp_path, size=96), (), "DIR")
    assert large.augment == "crop"
    for wrong in ({"num_classes": 4}, {"in_channels": 1}):
        with pytest.raises(ValueError, match=r"--model-option (num_classes|in_channels) must be 3, the .* of DIR, got"):
            fit_to_data(Config(model_options=wrong), found, (), "DIR")
    with pytest.raises(ValueError, match="--protocol report validates on test pictures, and DIR has none"):
        fit_to_data(Config(protocol="report"), found, (), "DIR")
    write(tmp_path / "parts" / "train")
    write(tmp_path / "parts" / "val")
    parts = open_data(tmp_path / "parts")
    assert fit_to_data(Config(), parts, (), "DIR").val_images == 0
    with pytest.raises(ValueError, match=r"--val-images must be 0, got 5: DIR has validation pictures"):
        fit_to_data(Config(val_images=5), parts, ("val_images",), "DIR")


def test_crop_needs_torchvision_and_pictures_in_files(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ValueError, match=r"augment 'crop' needs torchvision: pip install 'ran_ext\[images\]'"):
        open_folder(write(tmp_path), size=96).train.cropped()
    config = Config(augment="crop", select="last", patience=0, batch_size=8)
    with pytest.raises(ValueError, match="augment 'crop' is of a PictureFolder, got CIFAR10"):
        fit(config.create_model(), sample("test"), None, config, tmp_path / "run", quiet=True)


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of pictures with a broken one, and a run on it."""
    root = tmp_path_factory.mktemp("folder")
    write(root / "data")
    (root / "data" / "cat" / "broken.png").write_text("no picture")
    assert train("--data", root / "data", "--out", root / "run", "--skip-broken") == 0
    return root


def test_a_run_keeps_classes_shape_and_what_it_left_out(trained):
    out = trained / "run"
    assert load_classes(out / "model.pt") == ["airplane", "cat", "ship"]
    assert load_shape(out / "model.pt") == [3, 24, 24]
    result = json.loads((out / "result.json").read_text())
    assert result["data"]["skipped"][0].startswith(f"cannot read {trained / 'data' / 'cat' / 'broken.png'}")
    assert (result["data"]["training"], result["data"]["validation"], result["data"]["test"]) == (19, 5, 0)
    assert result["test"] is None


def test_a_run_resumes_with_its_size_and_what_it_skips(trained, tmp_path, capsys):
    data, out = write(tmp_path / "data", 6, size=(40, 32)), tmp_path / "run"
    (data / "cat" / "broken.png").write_text("no picture")
    assert train("--data", data, "--out", out, "--skip-broken", "--image-size", 20, "--quiet") == 0
    capsys.readouterr()
    assert "leave --image-size out" in refused(capsys, "--resume", "--out", out, "--image-size", 24)
    assert cli.main(["--resume", "--out", str(out), "--device", "cpu", "--no-tensorboard"]) == 0
    said = capsys.readouterr()
    assert "3 classes, 3x20x20" in said.out
    assert f"left out, 1 in all:\n  cannot read {data / 'cat' / 'broken.png'}" in said.err


def test_the_command_refuses_in_one_sentence(trained, tmp_path, capsys):
    data = trained / "data"
    run = ("--out", tmp_path / "run", "--quiet")
    assert "broken.png" in refused(capsys, "--data", data, *run)
    skip = ("--data", data, "--skip-broken", *run)
    assert "num_classes must be 3, the classes of" in refused(capsys, *skip, "--model-option", "num_classes=5")
    assert "--image-size must be from 1 to 4096, got 0" in refused(capsys, *skip, "--image-size", "0")
    assert "--workers must be at least 0, got -1" in refused(capsys, *skip, "--workers", "-1")
    assert "count must be 0, or from 3" in refused(capsys, *skip, "--val-images", "2")
    assert "are for folders of pictures" in refused(capsys, "--data", "sample", "--image-size", "9", *run)


def test_grey_pictures_train_with_tensorboard_too(tmp_path):
    data = write(tmp_path / "data", 4, mode="L")
    assert (
        cli.main([*SMALL[:4], "--device", "cpu", "--data", str(data), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    )
    assert load_shape(tmp_path / "run" / "model.pt") == [1, 24, 24]
    assert (tmp_path / "run" / "tensorboard" / "test").is_dir()


def test_ctrl_c_stops_a_run_whose_workers_read_pictures(tmp_path):
    data, out = write(tmp_path / "data", 12, size=(80, 80)), tmp_path / "run"
    flags = [
        *SMALL[:2],
        "--epochs",
        "50",
        "--augment",
        "light",
        "--workers",
        "2",
        "--no-tensorboard",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "ran_ext", "train", "--data", str(data), "--out", str(out), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # the workers too, as a terminal does
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130, errors
    assert errors.count("stopping after this step") == 1
    assert "Traceback" not in errors
    assert load_checkpoint(out / "last.pt")["epoch"] >= 1


def evaluated(trained, *flags):
    return evaluate_command.main([*map(str, flags), "--checkpoint", str(trained / "run")])


def test_evaluation_tells_of_each_class_and_writes_csv(trained, tmp_path, capsys):
    flags = ("--data", trained / "data", "--skip-broken")
    files = ("--predictions", tmp_path / "p.csv", "--confusion", tmp_path / "c.csv")
    assert evaluated(trained, *flags, *files) == 0
    said = capsys.readouterr()
    assert "top-1 0." in said.out
    assert "by class: airplane " in said.out
    assert "images by true class (row) and predicted class (column):" in said.out
    assert "left out: cannot read" in said.err
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert len(rows) == 24
    assert rows[0]["image"] == str(trained / "data" / "airplane" / "00.png")
    right = sum(row["true class"] == row["class 1"] for row in rows)
    table = list(csv.reader((tmp_path / "c.csv").open()))
    assert sum(int(table[place][place]) for place in (1, 2, 3)) == right
    assert f"plain:    {right / 24:.4f}" in said.out


def test_evaluation_numbers_classes_as_the_network_does(trained, tmp_path, capsys):
    write(tmp_path / "some", 4, classes={"ship": 8})  # alone it would be class 0
    assert evaluated(trained, "--data", tmp_path / "some") == 0
    assert "airplane nan, cat nan, ship" in capsys.readouterr().out
    write(tmp_path / "other", 4, classes={"dog": 5})
    assert evaluated(trained, "--data", tmp_path / "other") == 1
    assert "has a class dog, and the network knows airplane, cat, ship" in capsys.readouterr().err
    assert evaluated(trained, "--data", "sample") == 1
    assert "the network knows the classes airplane, cat, ship, and sample has airplane" in capsys.readouterr().err
