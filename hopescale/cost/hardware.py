"""Speed and memory of devices, as their vendors state it. Imports no torch and asks no device."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from hopescale.common.machine import machine_memory
from hopescale.config.schema import RunConfig

TERA = 10**12

# Dense bf16 (no sparsity), TFLOP/s, by words of the device's name; the first name whose words all occur is taken.
_PEAK_BF16: dict[float, tuple[str, ...]] = {
    312: ("A100", "A800"),
    165: ("A30",),
    149.7: ("A40",),
    121: ("L4",),
    362: ("L40S",),
    756: ("H100 PCIe", "H800 PCIe"),
    835: ("H100 NVL", "H200 NVL"),
    989: ("H100", "H800", "H200", "GH200"),
    148: ("H20",),
    1750: ("B100",),
    2250: ("B200",),
    2500: ("GB200",),
    383: ("MI250X",),
    1307: ("MI300X", "MI325X"),
}


def peak_bf16_flops(device_name: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a device, or None where it is unknown, a CPU, or a slice of a GPU.

    Its name is the one that the driver gives it, `NVIDIA H100 80GB HBM3`, or a bare `H100`.
    """
    words = set(re.split(r"[\s_-]+", device_name.lower()))
    if "mig" in words:
        return None
    peaks = ((peak * TERA, name) for peak, names in _PEAK_BF16.items() for name in names)
    return next((peak for peak, name in peaks if words.issuperset(name.lower().split())), None)


GIB, GIGA = 2**30, 10**9


@dataclass(frozen=True)
class Device:
    """Device of a rank, for an estimate.

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
        clock: Cycles of a multiprocessor per second.
    """

    name: str
    peak_flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    per_node: int = 8
    call_s: float = 8e-6
    efficiency: float = 0.6
    units: int = 132
    clock: float = 1.755e9


# Memory as the driver reports it. Link and network are those of the usual 8-GPU servers: NVLink, and a network
# adapter of 200 (A100) or 400 Gbit/s for each GPU.
DEVICES: dict[str, Device] = {
    "A100": Device("A100", 312 * TERA, 79.3 * GIB, 2039 * GIGA, 300 * GIGA, 25 * GIGA, units=108, clock=1.41e9),
    "H100": Device("H100", 989 * TERA, 79.2 * GIB, 3350 * GIGA, 450 * GIGA, 50 * GIGA),
    "H200": Device("H200", 989 * TERA, 139.8 * GIB, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
    "B200": Device("B200", 2250 * TERA, 178.4 * GIB, 7700 * GIGA, 900 * GIGA, 50 * GIGA, units=148, clock=1.85e9),
}
CPU_CORE = Device("cpu", 135 * GIGA, 0, 10 * GIGA, 5 * GIGA, 1 * GIGA, call_s=0.0, efficiency=0.65, units=1)
"""A core as measured in docs/performance.md: its fastest products, and the part of it that a Transformer reaches."""


def trained_on(config: RunConfig, device: str) -> RunConfig:
    """Return a config whose `train.device` is that of the plan: `cpu`, or `cuda` for any other name.

    Memory is counted by that: on a GPU kernels keep less than torch's operations do.
    """
    return replace(config, train=replace(config.train, device="cpu" if device == "cpu" else "cuda"))


def planned_device(name: str, ranks: int) -> Device:
    """Return the device of each rank by its name in `DEVICES`, or `cpu`; ranks on the CPU share this machine."""
    if name != "cpu":
        return DEVICES[name]
    cores = max(1, (os.cpu_count() or 1) // ranks)
    memory = machine_memory() / ranks
    return replace(CPU_CORE, peak_flops=cores * CPU_CORE.peak_flops, memory=memory, per_node=ranks)
