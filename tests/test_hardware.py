"""Which dtype a machine trains in: what it has in hardware, what `auto` stands for, and a word about a slow one."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from ran_ext import _hardware
from ran_ext.data import CIFAR10
from ran_ext.train import PRESETS, Config, Ranks, fit, load_checkpoint, resolve_dtype
from ran_ext.train.state import conv_seconds, slow_dtype

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


@pytest.fixture
def processor(monkeypatch):
    """Pretends a processor: what torch would say of it."""

    def pretend(onednn=True, avx512_bf16=False, amx=False, machine="x86_64", **limits):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn is not None)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(_hardware.platform, "machine", lambda: machine)
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in limits.items():
            monkeypatch.setenv(name, value)

    return pretend


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx": True}, True),
        ({}, False),  # AVX-512 without BF16: oneDNN takes bfloat16, and emulates it
        ({"onednn": False, "avx512_bf16": True}, False),  # ONEDNN_MAX_CPU_ISA=AVX2, as torch reports it
        ({"onednn": None, "avx512_bf16": True}, False),  # torch without oneDNN
        ({"avx512_bf16": True, "ONEDNN_MAX_CPU_ISA": "avx512_core"}, False),
        ({"avx512_bf16": True, "DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, False),
        ({"avx512_bf16": True, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        ({"avx512_bf16": True, "ATEN_CPU_CAPABILITY": "avx2"}, True),  # the convolutions are oneDNN's all the same
        ({"machine": "aarch64"}, True),
        ({"machine": "aarch64", "onednn": False}, False),
    ],
)
def test_a_cpu_multiplies_bfloat16_where_its_convolutions_do(processor, facts, expected):
    processor(**facts)
    assert _hardware.multiplies_bfloat16("cpu") is expected
    assert resolve_dtype(Config(), ALONE).dtype == ("bfloat16" if expected else "float32")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_multiplies_bfloat16_from_sm_80_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _hardware.multiplies_bfloat16("cuda") is expected


def test_the_presets_ask_for_no_dtype_of_one_machine():
    assert {config.dtype for config in PRESETS.values()} == {"auto"}
    with pytest.raises(ValueError, match="dtype must be resolved for a device"):
        _ = Config().torch_dtype


def test_one_process_without_bfloat16_decides_for_all(processor):
    class Two(Ranks):
        def any(self, flag):
            return True  # the other process lacks it

    processor(avx512_bf16=True)
    assert resolve_dtype(Config(), Two(0, 2, CPU)).dtype == "float32"
    assert resolve_dtype(Config(dtype="bfloat16"), Two(0, 2, CPU)).dtype == "bfloat16"  # asked for


def test_the_environments_limits_reach_info():
    """As on a processor with AVX2 alone; `info` says which kernels run, and that bfloat16 is none of theirs."""
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    path = os.pathsep.join(filter(None, sys.path))
    code = "import sys, ran_ext; assert 'ran_ext.train' not in sys.modules; ran_ext.info(); ran_ext.train.Config()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **limits, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert rows["bfloat16"].startswith("cpu: emulated, slower than float32")
    if "native" in done.stdout and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "native (avx2 kernels)" in done.stdout


def test_the_package_has_no_other_names_of_itself():
    import ran_ext

    assert ran_ext.train.fit is fit
    with pytest.raises(AttributeError, match="module 'ran_ext' has no attribute 'trian'"):
        _ = ran_ext.trian


def bfloat16_takes(monkeypatch, seconds):
    """Where float32 takes 0.05 s."""
    times = {torch.bfloat16: seconds, torch.float32: 0.05}
    monkeypatch.setattr("ran_ext.train.state.conv_seconds", lambda kind, device: times[kind])


def test_a_slow_dtype_is_said_with_what_it_costs(processor, monkeypatch):
    processor()
    bfloat16_takes(monkeypatch, 0.6)
    said = slow_dtype("bfloat16", CPU)
    assert "takes 12.0 times as long as in float32 (measured just now)" in said
    assert "--dtype auto" in said
    assert slow_dtype("float32", CPU) == ""
    bfloat16_takes(monkeypatch, 0.05)
    assert slow_dtype("bfloat16", CPU) == ""
    processor(avx512_bf16=True)
    assert slow_dtype("bfloat16", CPU) == ""


def test_what_it_costs_is_measured_and_draws_no_numbers():
    before = torch.get_rng_state()
    assert 0 < conv_seconds(torch.float32, CPU) < 10
    assert torch.equal(before, torch.get_rng_state())


def test_float16_needs_cuda():
    with pytest.raises(ValueError, match="dtype float16 needs CUDA, got device cpu; choose auto"):
        resolve_dtype(Config(dtype="float16"), ALONE)


def test_a_resumed_run_keeps_its_dtype_on_another_machine_and_says_so(processor, monkeypatch, tmp_path, capsys):
    images = CIFAR10.sample("train").subset(torch.arange(16))
    config = Config(model_options={"width": 0.125}, batch_size=8, epochs=1, patience=0, select="last")

    def run(epochs, **options):
        torch.manual_seed(0)
        recipe = dataclasses.replace(config, epochs=epochs, schedule="constant")
        return fit(recipe.create_model(), images, None, recipe, tmp_path, ranks=ALONE, **options)

    processor(avx512_bf16=True)
    assert run(1).config.dtype == "bfloat16"
    state = load_checkpoint(tmp_path / "last.pt")
    assert (state["config"]["dtype"], state["asked"]) == ("bfloat16", {"dtype": "auto"})
    assert load_checkpoint(tmp_path / "model.pt")["asked"] == {"dtype": "auto"}
    assert "emulated" not in capsys.readouterr().err

    processor()
    bfloat16_takes(monkeypatch, 0.6)
    assert run(1, resume=True).config.dtype == "bfloat16"
    assert "dtype bfloat16 is emulated on this cpu" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "last.pt")["asked"] == {"dtype": "auto"}
    assert run(1).config.dtype == "float32"  # anew
