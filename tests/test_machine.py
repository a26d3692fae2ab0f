"""Processors and memory are what cgroups and limits leave of them, in whatever layout they are mounted."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pydflash.machine import Processors, memory, processors

ALLOWED = len(os.sched_getaffinity(0))
GIB = 1 << 30
MEMINFO = {"proc/meminfo": "MemTotal:  67108864 kB\nMemFree:  1024 kB\nMemAvailable:  33554432 kB\n"}  # 64 and 32 GiB
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "33 25 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "34 25 0:31 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
)
PATHS_V1 = "5:memory:/docker/c1\n4:cpu,cpuacct:/docker/c1\n0::/\n"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(own: str, **files: str) -> dict[str, str]:
    """A version 2 tree; the keys of ``files`` are paths with '__' for '/' and '-' for '.'."""
    named = {f"sys/fs/cgroup/{k.replace('__', '/').replace('-', '.')}": text for k, text in files.items()}
    return {"proc/self/cgroup": f"0::{own}\n", "proc/self/mountinfo": V2, **named}


QUOTAS: dict[str, tuple[Mapping[str, str], float | None]] = {
    "nothing is mounted": ({}, None),
    "v2": (v2("/a/b", **{"a__b__cpu-max": "150000 100000\n"}), 1.5),
    "v2, of the parent": (v2("/a/b", **{"a__b__cpu-max": "max 100000\n", "a__cpu-max": "100000 100000\n"}), 1.0),
    "v2, the parent's is lower": (v2("/a/b", **{"a__b__cpu-max": "300000 100000", "a__cpu-max": "50000 100000"}), 0.5),
    "v2, the child's is lower": (v2("/a/b", **{"a__b__cpu-max": "50000 100000", "a__cpu-max": "300000 100000"}), 0.5),
    "v2, none": (v2("/a", **{"a__cpu-max": "max 100000\n"}), None),
    "v2, a container that sees its own cgroup as the root": (v2("/", **{"cpu-max": "200000 100000\n"}), 2.0),
    "v2, a container whose path is the host's": (v2("/kubepods/pod7/c1", **{"cpu-max": "200000 100000\n"}), 2.0),
    "v2, a path outside of the namespace": (v2("/../../other", **{"cpu-max": "200000 100000\n"}), 2.0),
    "v2, mountinfo unreadable": ({"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1.0),
    "v2, garbage": (v2("/a", **{"a__cpu-max": "lots\n", "cpu-max": "100000\n"}), None),
    "v2, a period of zero": (v2("/a", **{"a__cpu-max": "100000 0\n"}), None),
    "v2, nothing in the file": (v2("/a", **{"a__cpu-max": ""}), None),
    "v2, mounted elsewhere": (
        {
            "proc/self/cgroup": "0::/a\n",
            "proc/self/mountinfo": "30 23 0:26 / /my\\040cgroups rw - cgroup2 none rw\n",
            "my cgroups/a/cpu.max": "100000 100000\n",
        },
        1.0,
    ),
    "v1": (
        {
            "proc/self/cgroup": PATHS_V1,
            "proc/self/mountinfo": V1,
            "sys/fs/cgroup/cpu,cpuacct/docker/c1/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/c1/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "v1, a container whose path is the host's": (
        {
            "proc/self/cgroup": PATHS_V1,
            "proc/self/mountinfo": V1.replace(" / /sys", " /docker/c1 /sys"),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        1.0,
    ),
    "v1, a group within that container": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/c1/inner\n",
            "proc/self/mountinfo": V1.replace(" / /sys", " /docker/c1 /sys"),
            "sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_period_us": "100000\n",
        },
        1.0,
    ),
    "v1, none": (
        {
            "proc/self/cgroup": PATHS_V1,
            "proc/self/mountinfo": V1,
            "sys/fs/cgroup/cpu,cpuacct/docker/c1/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/c1/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "another group's mount": (
        {
            "proc/self/cgroup": "0::/a\n",
            "proc/self/mountinfo": "30 23 0:26 /b /mnt/b rw - cgroup2 none rw\n",
            "mnt/b/cpu.max": "100000 100000\n",
        },
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUOTAS)
def test_the_quota_is_the_lowest_on_the_way_up(tmp_path: Path, case: str) -> None:
    files, quota = QUOTAS[case]
    assert processors(tree(tmp_path, files)) == Processors(ALLOWED, quota)


@pytest.mark.parametrize(
    ("allowed", "quota", "usable"), [(8, None, 8), (8, 2.0, 2), (8, 1.5, 2), (8, 0.1, 1), (2, 16.0, 2), (1, 1.0, 1)]
)
def test_threads_are_those_that_can_run_at_once(allowed: int, quota: float | None, usable: int) -> None:
    assert Processors(allowed, quota).usable == usable


MEMORIES: dict[str, tuple[Mapping[str, str], tuple[int, int]]] = {
    "no limit": ({}, (32 * GIB, 64 * GIB)),
    "v2": (v2("/a", **{"a__memory-max": f"{8 * GIB}\n", "a__memory-current": f"{3 * GIB}\n"}), (5 * GIB, 8 * GIB)),
    "v2, page cache is free": (
        v2("/a", **{
            "a__memory-max": f"{8 * GIB}\n",
            "a__memory-current": f"{7 * GIB}\n",
            "a__memory-stat": f"anon {GIB}\ninactive_file {4 * GIB}\nactive_file 5\n",
        }),
        (5 * GIB, 8 * GIB),
    ),
    "v2, max": (v2("/a", **{"a__memory-max": "max\n", "a__memory-current": "4096\n"}), (32 * GIB, 64 * GIB)),
    "v2, the parent is fuller": (
        v2("/a/b", **{
            "a__b__memory-max": f"{8 * GIB}\n", "a__b__memory-current": "0\n",
            "a__memory-max": f"{16 * GIB}\n", "a__memory-current": f"{15 * GIB}\n",
        }),
        (GIB, 8 * GIB),
    ),
    "v2, over its limit": (
        v2("/a", **{"a__memory-max": f"{GIB}\n", "a__memory-current": f"{2 * GIB}\n"}), (0, GIB)
    ),
    "v2, a limit above what there is": (
        v2("/a", **{"a__memory-max": f"{500 * GIB}\n", "a__memory-current": "0\n"}), (32 * GIB, 64 * GIB)
    ),
    "v2, garbage": (v2("/a", **{"a__memory-max": "\x00\n", "a__memory-current": "x\n"}), (32 * GIB, 64 * GIB)),
    "v1": (
        {
            "proc/self/cgroup": PATHS_V1,
            "proc/self/mountinfo": V1,
            "sys/fs/cgroup/memory/docker/c1/memory.limit_in_bytes": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory/docker/c1/memory.usage_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/docker/c1/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{30 * GIB}\n",
        },
        (2 * GIB, 4 * GIB),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MEMORIES)
def test_free_memory_is_the_least_that_any_limit_leaves(tmp_path: Path, case: str) -> None:
    files, expected = MEMORIES[case]
    assert memory(tree(tmp_path, MEMINFO | files)) == expected


def test_a_system_that_does_not_tell_is_not_guessed_at(tmp_path: Path) -> None:
    assert memory(tmp_path) is None


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_this_process_counts(limit: str) -> None:
    program = (
        "import resource; from pydflash.machine import memory; before = memory();"
        f"resource.setrlimit(resource.{limit}, (300 << 20,) * 2); after = memory();"
        "print(before.free > 300 << 20 > after.free > 0, after.total == 300 << 20)"
    )
    assert resource.getrlimit(getattr(resource, limit))[0] == resource.RLIM_INFINITY, "the test's own limit"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "True"]
