"""Lists devices by what a plan has to know: memory, arithmetic, and the links between them."""

import re
from dataclasses import dataclass, replace

import torch

from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.device import GIB, host_memory
from gpt_lightning.planning.peak_flops import known_flops, measured_flops, peak_flops
from gpt_lightning.planning.setup import Setup

GB = 10**9


@dataclass(frozen=True)
class Device:
    """Has rates in bytes a second; `link` within a node and `node_link` between nodes are one way.

    `name` is what the driver calls it, by which the table of peak rates finds it.
    """

    name: str
    memory: int
    bandwidth: float
    link: float
    node_link: float
    utilization: float = 0.4
    measured: float | None = None  # operations a second, where no table has them

    def with_links(self, within_gb: float | None, between_gb: float | None) -> "Device":
        link = self.link if within_gb is None else within_gb * GB
        return replace(self, link=link, node_link=self.node_link if between_gb is None else between_gb * GB)

    def peak_flops(self, precision: str) -> float:
        """Returns operations a second; products of float32 are exact, as PyTorch has them unless told."""
        if self.measured is not None:
            return self.measured
        number_format = {"32": "fp32", "16": "fp16", "64": "fp64"}.get(precision[:2], "bf16")
        if (found := known_flops(self.name, number_format)) is None:
            problem = f"trainer.precision={precision}: no rate of {self.name} is known for {number_format}"
            remedy = "choose 16-mixed" if number_format == "bf16" else "choose another precision"
            raise UserError(f"{problem}; {remedy}, or leave device out to measure this machine")
        return found


# Memory as the driver tells it, about; bandwidth and links by the data sheets of NVIDIA (for GeForce its
# white papers) and AMD, compared on 2026-11-30 with what glennklockwood.com/garden/processors,
# techpowerup.com and resellers quote of them. NVLink and Infinity Fabric count one way, half of what sheets
# sum up; devices without them talk by PCIe x16. Between nodes, as clusters of them are built: 400 Gbit/s a
# device for the newest, 200 for A100, 100 for others. The shares of the peak were chosen with the runs of
# docs/planning.md in view.
DEVICES = {
    "b200": Device("B200", 178 * GIB, 8.0e12, 900 * GB, 50 * GB, 0.35),
    "h200": Device("H200", 139 * GIB, 4.8e12, 450 * GB, 50 * GB),
    "h100": Device("H100", 79 * GIB, 3.35e12, 450 * GB, 50 * GB),
    "h100-pcie": Device("H100 PCIe", 79 * GIB, 2.0e12, 64 * GB, 25 * GB),
    "a100": Device("A100", 79 * GIB, 2.039e12, 300 * GB, 25 * GB, 0.5),
    "a100-40gb": Device("A100", 39 * GIB, 1.555e12, 300 * GB, 25 * GB, 0.5),
    "a100-pcie": Device("A100 80GB PCIe", 79 * GIB, 1.935e12, 32 * GB, 25 * GB, 0.5),
    "l40s": Device("L40S", 44 * GIB, 0.864e12, 32 * GB, 12.5 * GB),
    "l4": Device("L4", 22 * GIB, 0.3e12, 32 * GB, 12.5 * GB),
    "a10": Device("A10", 22 * GIB, 0.6e12, 32 * GB, 12.5 * GB),
    "rtx5090": Device("RTX 5090", 31 * GIB, 1.792e12, 64 * GB, 12.5 * GB, 0.5),
    "rtx4090": Device("RTX 4090", 23 * GIB, 1.008e12, 32 * GB, 12.5 * GB, 0.5),
    "rtx3090": Device("RTX 3090", 23 * GIB, 0.936e12, 32 * GB, 12.5 * GB, 0.5),
    "v100": Device("V100-SXM2", 31 * GIB, 0.9e12, 150 * GB, 12.5 * GB),
    "t4": Device("T4", 14 * GIB, 0.32e12, 16 * GB, 12.5 * GB),
    "mi300x": Device("MI300X", 191 * GIB, 5.3e12, 448 * GB, 50 * GB, 0.35),
    "mi325x": Device("MI325X", 255 * GIB, 6.0e12, 448 * GB, 50 * GB, 0.35),
}


# Of processes on a CPU: what an optimizer reads and writes in a second, and what gloo sends.
CPU_BANDWIDTH, GLOO = 20e9, 1.5 * GB


def device_named(name: str) -> Device:
    if (device := DEVICES.get(name.lower())) is None:
        known = ", ".join(DEVICES)
        raise UserError(f"device={name} is unknown; choose one of {known}, or leave it out for this machine")
    return device


def this_device(setup: Setup) -> Device:
    """Describes what this machine has for each of the processes."""
    if setup.on_cpu:
        dtype = torch.bfloat16 if setup.compute_bytes == 2 else torch.float32
        rate = measured_flops(torch.device("cpu"), dtype) / setup.devices
        memory = host_memory() // setup.devices
        return Device("cpu", memory, CPU_BANDWIDTH, GLOO, GLOO, measured=rate)
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    like = [device for device in DEVICES.values() if re.search(rf"\b{device.name}\b", name)]
    described = max(like, key=lambda device: len(device.name), default=DEVICES["l4"])
    rate = peak_flops(torch.device("cuda"), setup.precision)
    return replace(described, name=name, memory=memory, measured=rate)
