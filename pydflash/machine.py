"""What the operating system lets this process use: processors and memory, by affinity, cgroups and resource limits.

A cgroup counts with all of its ancestors. ``root`` is where the file system begins; tests put trees of their own there.
Sources: cgroups(7), proc(5), the kernel's admin-guide/cgroup-v2 and admin-guide/cgroup-v1/memory.
"""

from __future__ import annotations

import math
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

__all__ = ["Memory", "Processors", "memory", "processors"]

_ROOT = Path("/")
_CGROUPS = "sys/fs/cgroup"  # where they are mounted unless mountinfo says otherwise, too


class Processors(NamedTuple):
    """``allowed`` by affinity; ``quota`` of processor time that a cgroup grants, in processors, None without one."""

    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can run at once: a quota of 1.5 is worth two."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, math.ceil(self.quota)))


class Memory(NamedTuple):
    """Bytes that this process can still allocate and bytes that it could at most, by the tightest limit."""

    free: int
    total: int


def processors(root: Path = _ROOT) -> Processors:
    """The processors that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota_v2(group) for group in _groups(root, "")] + [_quota_v1(group) for group in _groups(root, "cpu")]
    return Processors(allowed, min((quota for quota in quotas if quota is not None), default=None))


def memory(root: Path = _ROOT) -> Memory | None:
    """The memory of this process; None where the system does not tell (no /proc/meminfo)."""
    machine = _sizes(root / "proc/meminfo")
    available, total = machine.get("MemAvailable", machine.get("MemFree")), machine.get("MemTotal")
    if available is None or total is None:
        return None
    found = [Memory(available, total), *_limits(root)]
    for group in _groups(root, ""):
        found += _memory_of(group, "memory.max", "memory.current", "inactive_file")
    for group in _groups(root, "memory"):
        found += _memory_of(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return Memory(min(m.free for m in found), min(m.total for m in found))


# --- cgroups ----------------------------------------------------------------------------------------------------------


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directory of this process's cgroup and of its ancestors; ``controller`` '' is version 2's single hierarchy.

    A container may see its cgroup mounted as the root of the hierarchy while /proc/self/cgroup names the path on the
    host: what does not exist is passed over on the way up to the mount point.
    """
    path = _own_path(root, controller)
    seen: set[Path] = set()
    for mount, top in _mounts(root, controller):
        if not path.is_relative_to(top):
            continue  # the mount of somebody else's cgroup
        inner = path.relative_to(top)
        for part in (inner, *inner.parents):
            directory = mount / part
            if ".." not in part.parts and directory not in seen and directory.is_dir():
                seen.add(directory)
                yield directory


def _own_path(root: Path, controller: str) -> PurePosixPath:
    """Of this process's cgroup within its hierarchy, from lines such as ``4:memory:/a/b`` or ``0::/a/b``."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller in controllers.split(",") and path.startswith("/"):
            return PurePosixPath(path)
    return PurePosixPath("/")


def _mounts(root: Path, controller: str) -> Iterator[tuple[Path, PurePosixPath]]:
    """Mount points of a hierarchy, and which of its cgroups lies there."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mounted, _, file_system = line.partition(" - ")
        _, _, _, top, point, *_ = (*map(_unescaped, mounted.split()), *[""] * 5)
        kind, _, options, *_ = (*file_system.split(), *[""] * 3)
        wanted = kind == "cgroup" and controller in options.split(",") if controller else kind == "cgroup2"
        if wanted and point:
            yield root / point.lstrip("/"), PurePosixPath(top)
    yield root / _CGROUPS / controller, PurePosixPath("/")


def _unescaped(field: str) -> str:
    """A path of mountinfo, where blanks are written in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _quota_v2(group: Path) -> float | None:
    """In processors; ``cpu.max`` holds 'max' or microseconds for each period, and the period."""
    quota, period = (*_text(group / "cpu.max").split(), "", "")[:2]
    return _ratio(_number(quota), _number(period))


def _quota_v1(group: Path) -> float | None:
    """In processors; a quota of -1 is none."""
    return _ratio(_number(_text(group / "cpu.cfs_quota_us")), _number(_text(group / "cpu.cfs_period_us")))


def _ratio(quota: int | None, period: int | None) -> float | None:
    return quota / period if quota and period and quota > 0 and period > 0 else None


def _memory_of(group: Path, limit_name: str, usage_name: str, cache_key: str) -> list[Memory]:
    """What a cgroup leaves free, or nothing when it has no limit. Page cache that nobody waits for counts as free."""
    limit, used = _number(_text(group / limit_name)), _number(_text(group / usage_name))
    if limit is None or limit < 0 or used is None:
        return []
    kept = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    cache = _number(kept.get(cache_key, kept.get("inactive_file", ""))) or 0
    return [Memory(min(limit, max(0, limit - used + cache)), limit)]


# --- this process and this machine ------------------------------------------------------------------------------------


def _limits(root: Path) -> Iterator[Memory]:
    """What ulimit leaves of this process's address space and data."""
    used = _sizes(root / "proc/self/status")
    for which, key in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(which)[0]
        if limit != resource.RLIM_INFINITY and key in used:
            yield Memory(max(0, limit - used[key]), limit)


def _sizes(path: Path) -> dict[str, int]:
    """The lines ``Name:  123 kB`` of a file of /proc, in bytes."""
    return {key: int(kib) << 10 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB$", _text(path), re.MULTILINE)}


def _number(text: str) -> int | None:
    """None for 'max', for nothing and for garbage."""
    return int(text) if re.fullmatch(r"-?\d{1,20}", text.strip(), re.ASCII) else None


def _text(path: Path) -> str:
    """A file's contents; nothing when it is not there or may not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
