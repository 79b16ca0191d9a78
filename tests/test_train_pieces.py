"""The pieces of the loop, each against what it stands for."""

import io
import math
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ran_ext._attention_maps import attention_masks
from ran_ext.data import CIFAR10, CLASSES, Normalize
from ran_ext.models import create_model
from ran_ext.train import (
    CheckpointError,
    Config,
    ExponentialMovingAverage,
    Progress,
    StepHistory,
    TrainStep,
    evaluate,
    load_checkpoint,
    save_checkpoint,
)
from ran_ext.train.system import OutOfMemoryError, out_of_memory_explained


@pytest.fixture(scope="module")
def images():
    return CIFAR10.sample("test").subset(torch.arange(30))


def small(**options):
    torch.manual_seed(0)
    return create_model("ran_compact", width=0.125, **options)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 12, 12, generator=generator), torch.arange(4)


def test_step_is_the_textbook_step():
    ours, theirs = small(dropout=0.0), small(dropout=0.0)
    step = TrainStep(
        ours, torch.optim.SGD(ours.parameters(), lr=0.1), l2=0.01, penalty=ours.l2_penalty, label_smoothing=0.1
    )
    images, labels = batch()
    loss, correct = step(images, labels)
    logits = theirs(images)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    (expected + 0.01 * theirs.fc.weight.square().sum()).backward()
    assert loss.item() == expected.item()
    assert not loss.requires_grad
    assert correct.item() == (logits.argmax(1) == labels).sum().item()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Rounded as often as SGD's own: once, on a processor that multiplies and adds in one instruction.
        torch.testing.assert_close(mine, other.detach().add(other.grad, alpha=-0.1), rtol=0, atol=1e-7)


def test_mixup_weighs_two_images_and_their_losses():
    ours, theirs = small(dropout=0.0), small(dropout=0.0)
    images, labels = batch()
    torch.manual_seed(5)
    step = TrainStep(ours, torch.optim.SGD(ours.parameters(), lr=0.1), label_smoothing=0.1, mix=True)
    loss, right = step(images, labels)
    torch.manual_seed(5)
    share = torch.rand(4)
    mixed = share.view(4, 1, 1, 1) * images + (1 - share).view(4, 1, 1, 1) * images.flip(0)
    logits = theirs(mixed)
    own, partners = (
        F.cross_entropy(logits, target, label_smoothing=0.1, reduction="none") for target in (labels, labels.flip(0))
    )
    assert loss.item() == pytest.approx((share * own + (1 - share) * partners).mean().item(), rel=1e-5)
    hits = [(logits.argmax(1) == target).float() for target in (labels, labels.flip(0))]
    assert right.item() == pytest.approx((share * hits[0] + (1 - share) * hits[1]).sum().item(), abs=1e-6)


def test_step_in_bfloat16_keeps_float32_weights_and_loss():
    model = small()
    loss, _ = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), dtype=torch.bfloat16)(*batch())
    assert loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    full, _ = TrainStep(small(), torch.optim.SGD(model.parameters(), lr=0.1))(*batch())
    assert loss.item() == pytest.approx(full.item(), rel=0.2)
    assert loss.item() != full.item()


def test_history_reads_what_was_recorded_though_the_memory_is_reused():
    history = StepHistory(steps=3, batch_size=4, device="cpu")
    loss, correct = torch.zeros(()), torch.zeros(())
    for step in range(3):  # as a captured step does, which returns the same memory each time
        loss.fill_(step)
        correct.fill_(step + 1)
        history.record(loss, correct)
    assert history.read(1) == [(1.0, 0.5), (2.0, 0.75)]
    assert history.mean() == (1.0, 0.5)


def test_moving_average_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema, expected = ExponentialMovingAverage(model, decay=0.3), 0.0
    for step in range(8):
        nn.init.constant_(model.weight, step)
        ema.update(model)
        keep = min(0.3, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
    assert ema.average.weight.item() == pytest.approx(expected, rel=1e-5)
    assert not ema.average.weight.requires_grad


def test_evaluate_counts_as_a_plain_loop_does(images):
    model, normalize = small().train(), Normalize.per_pixel(images)
    found = evaluate(model, images, normalize, batch_size=7)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = model(normalize(images.images))
    assert found.loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    for true, predicted in zip(images.labels.tolist(), logits.argmax(1).tolist(), strict=True):
        confusion[true, predicted] += 1
    assert torch.equal(found.confusion, confusion)
    assert found.accuracy == confusion.trace().item() / 30
    per_class = [found.confusion[c, c].item() / max(1, found.confusion[c].sum().item()) for c in range(10)]
    assert found.per_class == pytest.approx(per_class)


def test_mirrored_evaluation_averages_the_logits(images):
    model, normalize = small().eval(), Normalize.per_pixel(images)
    x = normalize(images.images)
    with torch.no_grad():
        logits = (model(x) + model(x.flip(3))) / 2
    found = evaluate(model, images, normalize, batch_size=7, mirror=True)
    assert found.loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    assert found.loss != evaluate(model, images, normalize).loss


def test_a_class_without_images_is_null_in_json(images):
    only = images.subset(images.labels == 3)
    found = evaluate(small(), only, Normalize.per_pixel(images))
    assert math.isnan(found.per_class[0])
    assert [share is None for share in found.to_dict()["per_class"]] == [name != "cat" for name in CLASSES]


def test_evaluate_refuses_an_empty_set(images):
    with pytest.raises(ValueError, match="evaluate: dataset must hold an image"):
        evaluate(small(), images.subset(torch.arange(0)), Normalize.per_pixel(images))


def test_masks_are_the_gates_inputs_averaged(images):
    model = small().train()
    inputs = Normalize.per_pixel(images)(images.images[:2])
    masks = attention_masks(model, inputs)
    assert model.training
    assert list(masks) == ["stage1.1.gate", "stage2.1.gate"]
    model.eval()
    kept = []
    handle = model.stage1[1].gate.register_forward_hook(lambda module, args, out: kept.append(args[1]))
    model(inputs)
    handle.remove()
    expected = kept[0].sigmoid().mean(1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(masks["stage1.1.gate"], expected.detach())
    assert not model.stage1[1].gate._forward_pre_hooks


def test_checkpoint_round_trip_keeps_layout_and_is_whole_or_absent(tmp_path):
    weight = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "a.pt", {"weight": weight, "rows": [{"epoch": 1}]})
    state = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(state["weight"], weight)
    assert state["weight"].is_contiguous(memory_format=torch.channels_last)
    assert state["rows"] == [{"epoch": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("damage", ["short", "flipped", "garbage", "empty", "foreign"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, damage):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weight": torch.randn(1000)})
    data = bytearray(path.read_bytes())
    if damage == "short":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1  # in the weights, where torch.load itself sees nothing
        path.write_bytes(data)
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        path.write_bytes(b"no checkpoint" if damage == "garbage" else b"")
    with pytest.raises(CheckpointError, match=r"last\.pt") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (tmp_path.joinpath("harm").write_text, ("done",))

    torch.save({"format": 1, "x": Harmful()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "harm").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, full_disk):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    full_disk(True)
    with pytest.raises(CheckpointError, match="the disk is full; free some space") as caught:
        save_checkpoint(path, {"epoch": 2})
    assert "\n" not in str(caught.value)
    assert load_checkpoint(path)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    full_disk(False)
    save_checkpoint(path, {"epoch": 3})  # the failed attempt has left nothing in the way
    assert load_checkpoint(path)["epoch"] == 3


def test_the_cpu_allocators_failure_is_explained():
    cpu = torch.device("cpu")
    with pytest.raises(OutOfMemoryError, match="on cpu with batch size 8; train"), out_of_memory_explained(cpu, 8):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_explained(cpu, 8):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_progress_in_a_log_is_a_line_now_and_then():
    log = io.StringIO()
    progress = Progress(100, done=40, file=log, log_interval=0.0)
    for _ in range(20):
        progress.advance()
    progress.show("epoch 6/10", 1.5, 0.25, 90.0)
    progress.close()
    assert log.getvalue().startswith("epoch 6/10, 60 %: loss 1.500, accuracy 0.250, 90 images/s, 0:00 left")
    quiet = io.StringIO()
    progress = Progress(100, file=quiet, log_interval=1000.0)
    progress.advance()
    progress.show("epoch 1/10", 1.5, 0.25, 90.0)
    assert quiet.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    progress = Progress(10, file=screen, interval=0.0)
    progress.advance()
    progress.show("epoch 1/2", 2.0, 0.125, 64.0)
    progress.line("epoch 1/2: done")
    progress.close()
    assert "\r" in screen.getvalue()
    assert "loss 2.000, accuracy 0.125, 64 images/s" in screen.getvalue()
    assert "epoch 1/2: done\n" in screen.getvalue()


def test_config_builds_the_model_of_its_options():
    assert (
        Config(model="ran_paper", model_options={"num_classes": 7, "width": 0.125}).create_model().fc.out_features == 7
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_freed_memory_is_kept():
    program = """if True:
        import resource, sys, torch
        from ran_ext.train.system import keep_freed_memory
        if sys.argv[1] == "kept":
            assert keep_freed_memory()
        for _ in range(6):  # the first may lie at two places in turn
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    faults = {
        how: int(subprocess.run([sys.executable, "-c", program, how], check=True, capture_output=True).stdout)
        for how in ("kept", "as it was")
    }
    assert faults["kept"] < 100 < faults["as it was"], faults
