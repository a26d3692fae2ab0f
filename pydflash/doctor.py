"""What was built, what this machine has, and what to do where the two differ."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from pydflash import __version__, machine
from pydflash.errors import PydflashError

__all__ = ["Report", "examine"]


@dataclass
class Report:
    """``facts``: (what, found) in reading order. ``problems``: each with its remedy."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def fact(self, what: str, found: object) -> None:
        self.facts.append((what, str(found)))


def examine() -> Report:
    """Look at the build and the machine; opens the devices, loads no model."""
    report = Report()
    report.fact("pydflash", __version__)
    report.fact("Python", f"{platform.python_version()} on {platform.platform()}")
    _machine(report)
    try:
        from pydflash._ffi import build_info
    except ImportError as error:
        report.problems.append(f"the native extension does not load: {error}; install the package again with pip")
        return report
    except PydflashError as error:
        report.problems.append(str(error))
        return report
    info = build_info()
    report.fact("ggml", info["ggml"])
    report.fact("built with CUDA", f"{info['cuda']}: {info['why']}")
    if info["cuda"] == "ON":
        report.fact("CUDA toolkit, GPU architectures", f"{info['nvcc']}, {info['architectures']}")
        report.fact("CUDA kernels of ggml's", info["kernels"])
    report.fact("built for this processor only", info["native"])
    _devices(report, built=info["cuda"] == "ON")
    return report


def _machine(report: Report) -> None:
    """What the system lets this process use, known without native code."""
    found = machine.processors()
    quota = "" if found.quota is None else f", a cgroup's quota of {found.quota:.2g}"
    report.fact("processors", f"{found.allowed} by affinity{quota}: {found.usable} threads unless told otherwise")
    memory = machine.memory()
    if memory is not None:
        report.fact("memory", _memory(memory))
    asked = os.environ.get("PYDFLASH_THREADS", "")
    if asked.isdecimal() and int(asked) > found.usable:
        report.problems.append(
            f"PYDFLASH_THREADS is {asked}, and {found.usable} can run at once; they wait for one another at every "
            f"operation, so that more are many times slower: set it to {found.usable} or less"
        )


def _devices(report: Report, built: bool) -> None:
    from pydflash.native import Backend, cuda_device_count

    try:
        with Backend("cpu", 1) as cpu:
            report.fact("CPU", cpu.description)
        count = cuda_device_count()
    except PydflashError as error:
        report.problems.append(str(error))
        return
    report.fact("CUDA devices", count)
    for index in range(count):
        try:
            with Backend(f"cuda:{index}") as gpu:
                report.fact(gpu.name, f"{gpu.description}, {_memory(gpu.memory())}")
        except PydflashError as error:
            report.problems.append(str(error))
    if built and not count:
        try:
            Backend("cuda").close()
        except PydflashError as error:
            report.problems.append(f"this build has CUDA, but no device can be used: {error}")
    elif not built and _nvidia_gpu():
        report.problems.append(
            "there is an NVIDIA GPU, but this build is for the CPU only; install a CUDA toolkit (nvcc), then run"
            " PYDFLASH_CUDA=ON pip install --force-reinstall --no-deps . in the checkout"
        )


def _nvidia_gpu() -> bool:
    """A GPU as the driver shows it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def _memory(free_and_total: tuple[int, int]) -> str:
    free, total = (n / 2**30 for n in free_and_total)
    return f"{free:.1f} of {total:.1f} GiB free"
