"""What all tests share: reproducible property tests, and no GPU test without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

# No deadline: tests assert no absolute durations. Derandomised: a failure is found again by the same run.
settings.register_profile("forescale", deadline=None, derandomize=True)
settings.load_profile("forescale")


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """A command run in this process sends its log to a stream that ends with its test."""
    yield
    structlog.reset_defaults()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # noqa: PLC0415 - most test runs need no torch to decide what to skip

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
