"""Which rate a device and a precision stand for, and how an unknown one is measured."""

import pytest
import torch

from gpt_lightning.planning import peak_flops as device_peak
from gpt_lightning.planning.devices import DEVICES
from gpt_lightning.planning.peak_flops import known_flops, measured_flops, peak_flops


@pytest.mark.parametrize(
    "name, number_format, tera",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "tf32", 417.5),
        ("NVIDIA H200", "fp32", 66.9),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10", "fp16", 125),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI325X", "bf16", 1307.4),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),  # it has no such units
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("Some Other Device", "bf16", None),
    ],
)
def test_known_devices(name: str, number_format: str, tera: float | None) -> None:
    assert known_flops(name, number_format) == (None if tera is None else pytest.approx(tera * 1e12))


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_of_the_table_has_its_rates(name: str) -> None:
    """And its memory is faster than its links, and these than the network."""
    device = DEVICES[name]
    half, single = device.peak_flops("16-mixed"), known_flops(device.name, "fp32")
    assert single is not None and half >= 1.9 * single
    assert 150e9 < device.bandwidth < 10e12 and device.node_link <= device.link < device.bandwidth


@pytest.mark.parametrize(
    "precision, dtype",
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("16-mixed", torch.float16),
        ("64-true", torch.float64),
    ],
)
def test_the_precision_says_what_is_measured(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_peak, "measured_flops", lambda device, dtype: dtype)
    assert peak_flops(torch.device("cpu"), precision) is dtype


@pytest.mark.parametrize("rate", [1e8, 1e11, 1e13])
def test_the_rate_is_found_in_well_under_a_second(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On devices that reach it with matrices of 512 and more, and a tenth of it with smaller ones."""
    seconds = 0.0

    def multiply(matrix: torch.Tensor) -> float:
        nonlocal seconds
        took = 2 * len(matrix) ** 3 / (rate if len(matrix) >= 512 or rate < 1e9 else rate / 10)
        seconds += took
        return took

    monkeypatch.setattr(device_peak, "_multiplication_seconds", multiply)
    monkeypatch.setattr(device_peak.time, "perf_counter", lambda: seconds)
    assert measured_flops(torch.device("cpu"), torch.float32) == pytest.approx(rate)
    assert seconds < 0.6


def test_measuring_leaves_the_random_state_as_it_was() -> None:
    state = torch.get_rng_state()
    assert measured_flops(torch.device("cpu"), torch.float32, seconds=0.01) > 0
    assert torch.equal(torch.get_rng_state(), state)
