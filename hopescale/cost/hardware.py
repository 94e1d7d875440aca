"""Speed and memory of devices, as their vendors state it. Imports no torch and asks no device."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

TERA = 10**12

# Dense bf16 (no sparsity), FLOP/s, by words of the device's name; the first row whose words all occur is taken.
_PEAK_BF16: tuple[tuple[str, float], ...] = (
    ("A100", 312 * TERA),
    ("A800", 312 * TERA),
    ("A30", 165 * TERA),
    ("A40", 149.7 * TERA),
    ("L4", 121 * TERA),
    ("L40S", 362 * TERA),
    ("H100 PCIe", 756 * TERA),
    ("H100 NVL", 835 * TERA),
    ("H100", 989 * TERA),
    ("H800 PCIe", 756 * TERA),
    ("H800", 989 * TERA),
    ("H20", 148 * TERA),
    ("H200 NVL", 835 * TERA),
    ("H200", 989 * TERA),
    ("GH200", 989 * TERA),
    ("B100", 1750 * TERA),
    ("B200", 2250 * TERA),
    ("GB200", 2500 * TERA),
    ("MI250X", 383 * TERA),
    ("MI300X", 1307 * TERA),
    ("MI325X", 1307 * TERA),
)


def peak_bf16_flops(device_name: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a device, or None where it is unknown, a CPU, or a slice of a GPU.

    Args:
        device_name: Name that the driver gives it: `NVIDIA H100 80GB HBM3`, or a bare `H100`.
    """
    words = set(re.split(r"[\s_-]+", device_name.lower()))
    if "mig" in words:
        return None
    return next((peak for name, peak in _PEAK_BF16 if words.issuperset(name.lower().split())), None)


GIB, GIGA = 2**30, 10**9


@dataclass(frozen=True)
class Device:
    """What a rank computes on, for an estimate.

    Attributes:
        name: Name that its vendor gives it.
        peak_flops: Dense bf16 FLOP/s; float32 on a CPU.
        memory: Bytes that a process can have.
        bandwidth: Bytes per second between the device and its memory.
        link: Bytes per second one way to the devices of the same node.
        network: Bytes per second one way to other nodes, for each device.
        per_node: Devices of a node.
        call_s: Seconds between two operations that compute something, at least: calls from Python, views included.
        efficiency: Part of the peak that large products of matrices reach.
        units: Multiprocessors; a program runs on one.
    """

    name: str
    peak_flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    per_node: int = 8
    call_s: float = 8e-6
    efficiency: float = 0.5
    units: int = 132


# Memory as the driver reports it. Link and network are those of the usual 8-GPU servers: NVLink, and a network
# adapter of 200 (A100) or 400 Gbit/s for each GPU.
DEVICES: dict[str, Device] = {
    "A100": Device("A100", 312 * TERA, 79.3 * GIB, 2039 * GIGA, 300 * GIGA, 25 * GIGA, units=108),
    "H100": Device("H100", 989 * TERA, 79.2 * GIB, 3350 * GIGA, 450 * GIGA, 50 * GIGA),
    "H200": Device("H200", 989 * TERA, 139.8 * GIB, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
    "B200": Device("B200", 2250 * TERA, 178.4 * GIB, 7700 * GIGA, 900 * GIGA, 50 * GIGA, units=148),
}
CPU_CORE = Device("cpu", 135 * GIGA, 0, 10 * GIGA, 5 * GIGA, 1 * GIGA, call_s=0.0, efficiency=0.65, units=1)
"""A core as measured in docs/performance.md: its fastest products, and the part of it that a Transformer reaches."""


def planned_device(name: str, ranks: int) -> Device:
    """Return the device of each of `ranks` ranks; ranks on the CPU share this machine.

    Args:
        name: A name of `DEVICES`, or `cpu`.
        ranks: Ranks of the job.
    """
    if name != "cpu":
        return DEVICES[name]
    cores = max(1, (os.cpu_count() or 1) // ranks)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    return replace(CPU_CORE, peak_flops=cores * CPU_CORE.peak_flops, memory=memory, per_node=ranks)
