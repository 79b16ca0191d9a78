"""When a run will end: announced within half a minute, on a terminal or not, from the steps so far."""

import functools
import io
import re
import time

import pytest
import torch

from ran_ext.data import CIFAR10
from ran_ext.train import Config, Progress, fit, loop, report


class Clock:
    """Stands for the time module: its seconds are set by hand."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(report.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(report.time, "time", lambda: 1_800_000_000.0)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def after_steps(clock, bar, first, others, count):
    """The first step, then others until ``count`` are done; each shown."""
    for step in range(count):
        clock.now += others if step else first
        bar.advance()
        bar.show("epoch 1/2", 1.0, 0.5, 8.0)


def test_the_end_is_announced_once_from_the_steps_after_the_first(clock):
    log = io.StringIO()
    bar = Progress(101, file=log, overhead=0.5)
    bar.begin()
    after_steps(clock, bar, 6.0, 2.0, 3)  # 10 s: 98 steps of 2 s are left, and half as much again
    bar.close()
    end = time.strftime("%H:%M", time.localtime(1_800_000_000 + 294))
    lines = log.getvalue().splitlines()
    assert lines[0] == f"expected end: {end}, in 4:54"
    assert lines[1].endswith(f"8 images/s, 4:54 left, ends {end}")
    after_steps(clock, bar, 2.0, 2.0, 7)
    assert log.getvalue().count("expected end") == 1


def test_what_was_measured_is_not_added_again(clock):
    bar = Progress(10, file=io.StringIO(), overhead=0.5)
    bar.begin()
    after_steps(clock, bar, 1.0, 1.0, 5)
    assert bar.seconds_left == 7.5
    bar.overhead = 0.0
    assert bar.seconds_left == 5.0


def test_a_resumed_run_counts_its_own_steps(clock):
    log = io.StringIO()
    bar = Progress(100, done=90, file=log, may_stop=True)
    bar.begin()
    after_steps(clock, bar, 12.0, 1.0, 1)  # after one step, that one is all there is
    assert re.match(r"expected end: \d\d:\d\d, in 1:48, or earlier where the accuracy stops growing\n", log.getvalue())
    bar.close()


def test_a_first_step_that_does_not_end_is_reported_meanwhile():
    log = io.StringIO()
    bar = Progress(100, file=log, announce_after=0.02)
    bar.begin()
    deadline = time.monotonic() + 20
    while not log.getvalue().endswith("\n") and time.monotonic() < deadline:
        time.sleep(0.01)
    bar.close()
    assert re.match(
        r"the first of 100 steps is not through after \d+ s: at this rate the run takes over \d+:\d\d and ends after ",
        log.getvalue(),
    )


def test_a_quiet_run_starts_no_thread():
    bar = Progress(100, enabled=False, announce_after=0.0)
    bar.begin()
    assert bar.waiting is None


def test_another_day_has_its_date(monkeypatch):
    noon = time.mktime((2027, 3, 1, 12, 0, 0, 0, 0, -1))
    monkeypatch.setattr(report.time, "time", lambda: noon)
    assert report.clock(3600) == "13:00"
    assert report.clock(13 * 3600) == "2027-03-02 01:00"


def test_fit_announces_its_end_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "Progress", functools.partial(Progress, log_interval=0.0, announce_after=0.0))
    images = CIFAR10.sample("train").subset(torch.arange(16))
    config = Config(model_options={"width": 0.125}, batch_size=8, epochs=2, patience=0, select="last")
    fit(config.create_model(), images, None, config, tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if "not through" not in line]
    assert lines[0].startswith("expected end: ")  # before the first epoch has ended
    assert lines[1].startswith("epoch 1/2, 25 %")
    assert sum("expected end" in line for line in lines) == 1
