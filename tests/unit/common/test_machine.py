"""A process may fill what its machine has, or what Linux lets its control group have."""

from __future__ import annotations

from pathlib import Path

import pytest

from hopescale.common.machine import machine_memory

WHOLE = machine_memory(Path("nowhere"))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("group", "limits", "expected"),
    [
        ("0::/", {}, WHOLE),
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "4096"}, 4096),
        ("0::/job/step", {"job/step/memory.max": "1024", "job/memory.max": "4096"}, 1024),
        ("0::/seen/outside", {"memory.max": "2048"}, 2048),
        ("0::/job", {"job/memory.max": str(2**62)}, WHOLE),
        ("0::/job", {"job/memory.max": "damaged"}, WHOLE),
        ("5:cpu:/x\n4:memory:/a/b", {"memory/a/b/memory.limit_in_bytes": "512", "x/memory.max": "1"}, 512),
        ("4:cpu,memory:/a/b", {"memory/memory.limit_in_bytes": "256"}, 256),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, WHOLE),
    ],
)
def test_the_least_limit_of_all_groups_around_a_process_holds(
    tmp_path: Path, group: str, limits: dict[str, str], expected: int
):
    write(tmp_path / "proc" / "self" / "cgroup", f"{group}\n")
    for name, text in limits.items():
        write(tmp_path / "sys" / "fs" / "cgroup" / name, f"{text}\n")
    assert machine_memory(tmp_path) == expected
