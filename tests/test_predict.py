"""ran-ext-predict: a page that needs nothing beside itself, a table, and sentences for what it cannot do."""

import base64
import csv
import html.parser
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_folders import train, write

from ran_ext import __main__, predict
from ran_ext._attention_maps import attention_masks
from ran_ext.data import sample
from ran_ext.train import load_model, load_normalize


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("predict")
    write(root / "data")
    assert train("--data", root / "data", "--out", root / "run", "--quiet") == 0
    return root


def run(tmp_path, *arguments):
    files = ["--out", tmp_path / "page.html", "--csv", tmp_path / "table.csv", "--device", "cpu"]
    return predict.main([*map(str, [*arguments, *files])])


class Page(html.parser.HTMLParser):
    """The pictures and the texts of a page."""

    def __init__(self, path):
        super().__init__()
        self.pictures, self.texts, self.links = [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [value for name, value in attributes.items() if name in ("href", "src")]
        if tag == "img":
            data = base64.b64decode(attributes["src"].partition(",")[2])
            self.pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_holds_pictures_masks_and_classes(trained, tmp_path, capsys):
    assert run(tmp_path, trained / "data" / "cat", "--checkpoint", trained / "run", "--top", 2) == 0
    page = Page(tmp_path / "page.html")
    assert all(link.startswith("data:image/") for link in page.links)
    assert len(page.pictures) == 8 * 3
    first = np.asarray(Image.open(trained / "data" / "cat" / "00.png"))
    assert np.array_equal(np.asarray(page.pictures[0]), first)
    text = " ".join(page.texts)
    assert "stage1.1, depth 2: 0." in text
    assert "stage2.1, depth 1: 0." in text
    assert str(trained / "data" / "cat" / "07.png") in text

    model, normalize = load_model(trained / "run" / "model.pt"), load_normalize(trained / "run" / "model.pt")
    inputs = normalize(torch.tensor(first).permute(2, 0, 1)[None])
    with torch.no_grad():
        shares = model(inputs).softmax(1)[0]
    row = next(csv.DictReader((tmp_path / "table.csv").open()))
    assert row["class 1"] == ["airplane", "cat", "ship"][int(shares.argmax())]
    assert float(row["probability 1"]) == pytest.approx(float(shares.max()), abs=1e-4)
    assert "class 3" not in row
    assert f"{row['class 1']} {shares.max():.1%}" in capsys.readouterr().out
    mask = attention_masks(model, inputs)["stage1.1.gate"][0]
    drawn = np.asarray(page.pictures[1]).astype(int)
    expected = np.asarray(predict.overlay(torch.tensor(first).permute(2, 0, 1), mask)).astype(int)
    assert abs(drawn - expected).max() <= 2


def test_a_mask_is_dark_where_it_is_least(tmp_path):
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    picture = np.asarray(predict.overlay(torch.full((1, 8, 8), 128, dtype=torch.uint8), mask))
    assert picture[:, :4].max() < picture[:, 4:].min()


def test_the_package_s_own_weights_predict(tmp_path):
    test = sample("test")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(8):
        Image.fromarray(test.images[index].permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    assert run(tmp_path, folder, "--model", "ran_compact", "--pretrained") == 0
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    right = [row["class 1"] == test.classes[label] for row, label in zip(rows, test.labels.tolist(), strict=False)]
    assert sum(right) >= 6
    assert len(rows[0]) == 1 + 2 * 5


def test_large_pictures_are_small_jpegs_and_names_cannot_break_the_page(trained, tmp_path):
    path = tmp_path / "<b>&.png"
    Image.new("RGB", (300, 200), "red").save(path)
    assert run(tmp_path, path, "--checkpoint", trained / "run", "--size", 96) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;.png" in text
    assert text.count("data:image/jpeg") == 3


def test_the_page_shows_the_first_ones_and_the_table_all(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "SHOWN", 3)
    assert run(tmp_path, trained / "data", "--checkpoint", trained / "run") == 0
    page = Page(tmp_path / "page.html")
    assert len(page.pictures) == 3 * 3
    assert "Of 21 more the CSV tells." in " ".join(page.texts)
    assert len(list(csv.DictReader((tmp_path / "table.csv").open()))) == 24


def test_broken_pictures_are_refused_or_listed(trained, tmp_path, capsys):
    folder = write(tmp_path / "mixed", 2) / "cat"
    (folder / "text.png").write_text("no picture")
    os.mkfifo(folder / "pipe.png")
    assert run(tmp_path, folder, "--checkpoint", trained / "run") == 1
    said = capsys.readouterr().err
    assert said.startswith("ran-ext-predict: error: cannot read")
    assert said.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
    assert run(tmp_path, folder, "--checkpoint", trained / "run", "--skip-broken") == 0
    said = capsys.readouterr().err
    assert "left out, 2 in all:" in said
    assert "pipe.png" in said
    assert "text.png" in said
    assert len(list(csv.DictReader((tmp_path / "table.csv").open()))) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["PICTURE", "--checkpoint", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["nowhere.png", "--pretrained"], "there is no picture nowhere.png"),
        (["PICTURE", "--pretrained", "--model", "ran_paper"], "no trained weights of 'ran_paper'"),
        (["PICTURE", "--pretrained", "--size", "2"], "at least 6"),
        (["PICTURE", "--pretrained", "--device", "abacus"], "no device named 'abacus'"),
        (["PICTURE", "--pretrained", "--out", "/dev/null/x.html"], "cannot write /dev/null/x.html"),
        (["EMPTY", "--pretrained"], "holds no pictures"),
        (["TEXT", "--pretrained", "--skip-broken"], "none of the 1 pictures can be read"),
    ],
)
def test_refuses_in_one_sentence(trained, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    places = {"PICTURE": trained / "data" / "cat" / "00.png", "EMPTY": "empty", "TEXT": "text.png"}
    assert predict.main([str(places.get(word, word)) for word in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ran-ext-predict: error: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give either --checkpoint or --pretrained"),
        (["--pretrained", "--checkpoint", "x"], "give either --checkpoint or --pretrained"),
        (["--pretrained", "--top", "0"], "--top must be from 1 to 1000, got 0"),
        (["--pretrained", "--check", "x"], "unrecognized arguments: --check x; did you mean --checkpoint?"),
    ],
)
def test_a_misuse_is_status_2(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["predict", "cat.png", *flags])
    assert stop.value.code == 2
    assert f"ran-ext-predict: error: {said}" in capsys.readouterr().err
