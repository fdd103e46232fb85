from __future__ import annotations

import pytest

from forescale.core.cluster import Device, DeviceKind
from forescale.engine.backend import ProcessBackend, ProcessSpec
from forescale.engine.local import LocalBackend

CPU0 = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0)
_LOCAL_IS_A_BACKEND: type[ProcessBackend] = LocalBackend  # for the type checker


def test_address_is_the_devices_name_unless_given() -> None:
    assert ProcessSpec(entry="a.b:c", device=CPU0).address == "cpu0"
    assert ProcessSpec(entry="a.b:c", device=CPU0, name="replica-1").address == "replica-1"


@pytest.mark.parametrize("entry", ["a.b", "a.b:", ":c", "a.b:c()", "a b:c", "a..b:c"])
def test_entry_of_another_form_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=r"package\.module:function"):
        ProcessSpec(entry=entry, device=CPU0)


@pytest.mark.parametrize("name", ["../x", "a/b", "-x", ".x", "a b", "x" * 101])
def test_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a process"):
        ProcessSpec(entry="a.b:c", device=CPU0, name=name)
