"""Finds the most matrix arithmetic that a device can do in a second, of which utilization is a share."""

import re
import time

import torch

# Dense rates in TFLOPS by NVIDIA's and AMD's data sheets and architecture white papers (compared as in
# devices.py), which print twice as much where half of the weights are zeros. GeForce: with float32
# accumulation, as PyTorch multiplies. Where a row lacks a format, or a device is missing, it is measured.
_TFLOPS: dict[str, dict[str, float]] = {
    r"GB200": {"bf16": 2500, "fp16": 2500, "tf32": 1250, "fp32": 80},
    r"B200": {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75},
    r"GH200|H[12]00|H800": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},  # SXM
    r"H[12]00 NVL": {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60},
    r"H[18]00 PCIe": {"bf16": 756.5, "fp16": 756.5, "tf32": 378, "fp32": 51.2},
    r"H20": {"bf16": 148, "fp16": 148, "tf32": 74, "fp32": 44},
    r"A[18]00": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    r"A40": {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4},
    r"A30": {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3},
    r"A10": {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2},
    r"L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    r"L40": {"bf16": 181, "fp16": 181, "tf32": 90.5, "fp32": 90.5},
    r"L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    r"RTX 5090": {"bf16": 209.5, "fp16": 209.5, "tf32": 104.8, "fp32": 104.8},
    r"RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    r"RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
    r"RTX 6000 Ada Generation": {"bf16": 364.2, "fp16": 364.2, "tf32": 182.1, "fp32": 91.1},
    r"RTX A6000": {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7},
    r"V100-SXM[23]": {"fp16": 125, "fp32": 15.7},
    r"V100-PCIE": {"fp16": 112, "fp32": 14},
    r"T4": {"fp16": 65, "fp32": 8.1},
    r"MI300X|MI325X": {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4},
}
# A part of a device, and siblings of other rates that bear its name and more.
_OTHER_DEVICE = re.compile(r" (MIG|Laptop|Max-Q|Ti|SUPER|D)\b")
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPES = {**_HALF, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


def peak_flops(device: torch.device, precision: str) -> float:
    """Returns one device's operations a second, in the format that this `precision` multiplies in."""
    number_format = _number_format(device, precision)
    if device.type == "cuda":
        known = known_flops(torch.cuda.get_device_name(device), number_format)
        if known is not None:
            return known
    return measured_flops(device, _DTYPES[number_format])


def known_flops(device_name: str, number_format: str) -> float | None:
    """Looks the device up in the table; None where it does not say."""
    matches = (re.search(rf"\b({pattern})\b", device_name) for pattern in _TFLOPS)
    rows = [(match.end() - match.start(), row) for match, row in zip(matches, _TFLOPS.values()) if match]
    if not rows or _OTHER_DEVICE.search(device_name):
        return None
    longest = max(rows, key=lambda row: row[0])[1]  # "H100 PCIe" is more exact than "H100"
    return longest[number_format] * 1e12 if number_format in longest else None


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Times products of square matrices, as large as the time allows; draws no random numbers.

    Ranks that share a processor have to measure at the same time, to find the share that each will have.
    """
    best, size = 0.0, 128
    end = time.perf_counter() + seconds
    while True:
        matrix = torch.arange(size * size, device=device).remainder(97).div(97).view(size, size).to(dtype)
        took = min(_multiplication_seconds(matrix) for _ in range(3))
        best = max(best, 2 * size**3 / took)
        if 16 * took < seconds and size < 8192:
            size *= 2
        elif time.perf_counter() > end:
            return best


def _multiplication_seconds(matrix: torch.Tensor) -> float:
    torch.get_device_module(matrix.device).synchronize()
    begin = time.perf_counter()
    torch.mm(matrix, matrix)
    torch.get_device_module(matrix.device).synchronize()
    return time.perf_counter() - begin


def _number_format(device: torch.device, precision: str) -> str:
    if precision.startswith("32"):
        fast = device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return "tf32" if fast else "fp32"
    return {"16": "fp16", "64": "fp64"}.get(precision[:2], "bf16")
