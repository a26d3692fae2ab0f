"""The devices that every operation is tested on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pydflash.native import Backend, cuda_device_count


@pytest.fixture(scope="session")
def cpu() -> Iterator[Backend]:
    with Backend("cpu", threads=1) as backend:
        yield backend


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The CPU always, and the first CUDA device where there is one."""
    if request.param == "cuda" and not cuda_device_count():
        pytest.skip("no CUDA device, or a build without CUDA")
    with Backend(request.param, threads=None if request.param == "cuda" else 1) as device:
        yield device


@pytest.fixture(scope="session")
def cuda() -> Iterator[Backend]:
    """The first CUDA device; the test is skipped without one."""
    if not cuda_device_count():
        pytest.skip("no CUDA device, or a build without CUDA")
    with Backend("cuda") as device:
        yield device
