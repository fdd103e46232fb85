from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import InvalidInput
from forescale.engine.backend import ProcessExit, ProcessSpec
from forescale.engine.bootstrap import request
from forescale.engine.channel import ChannelServer
from forescale.engine.local import LocalBackend
from forescale.engine.wire import Message

DEADLINE_S = 60.0
ENTRIES = "integration.process_entries"
CPU0 = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0)
CPU1 = Device(name="cpu1", kind=DeviceKind.CPU, memory_bytes=0)


@pytest.fixture
def server() -> Iterator[ChannelServer]:
    with ChannelServer() as server:
        yield server


@pytest.fixture
def backend(server: ChannelServer, tmp_path: Path) -> Iterator[LocalBackend]:
    with LocalBackend(invitation=server.invitation, log_dir=tmp_path / "logs") as backend:
        yield backend


def received(server: ChannelServer, kind: str) -> Message:
    """The next message of that type; others are passed over."""
    while True:
        message = server.receive(DEADLINE_S)
        assert message is not None, f"no {kind} came"
        if message.header["type"] == kind:
            return message


def next_exits(server: ChannelServer, backend: LocalBackend) -> tuple[ProcessExit, ...]:
    """Wait the way a coordinator does: for messages and exits together."""
    while not (exits := backend.exits()):
        if server.poll(DEADLINE_S, backend):
            server.receive(0)
    return exits


def gone(*pids: int) -> bool:
    """Wait until none of the processes is left (a zombie that waits for its parent has ended)."""

    def ended(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    alive = [psutil.Process(pid) for pid in pids if not ended(pid)]
    _, alive = psutil.wait_procs(alive, timeout=DEADLINE_S)
    return all(ended(process.pid) for process in alive)


def test_two_processes_start_together_and_answer(server: ChannelServer, backend: LocalBackend) -> None:
    handles = [
        backend.start(ProcessSpec(entry=f"{ENTRIES}:echo", device=device, config={"about": [1, "x"]}))
        for device in (CPU0, CPU1)
    ]
    hellos = {
        message.sender: message.header["pid"] for message in (received(server, "connected") for _ in "ab")
    }
    assert hellos == {handle.name: handle.pid for handle in handles}
    server.send("cpu1", {"type": "ping"}, [b"payload"])
    answer = received(server, "ping")
    assert answer.sender == "cpu1"
    assert answer.header == {"type": "ping", "device": "cpu1", "about": [1, "x"]}
    assert [bytes(frame) for frame in answer.frames] == [b"payload"]


def test_process_is_pinned_private_and_light(server: ChannelServer, backend: LocalBackend) -> None:
    core = min(os.sched_getaffinity(0))
    device = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0, cores=(core,))
    spec = ProcessSpec(entry=f"{ENTRIES}:describe", device=device, environment={"FLAVOUR": "plum"})
    handle = backend.start(spec)
    told = received(server, "described").header
    assert told["cores"] == [core]
    assert told["environment"]["OMP_NUM_THREADS"] == "1"
    assert told["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert told["environment"]["FLAVOUR"] == "plum"
    assert told["session"] == handle.pid
    assert told["ignores_interrupt"]
    assert told["input"] == ""
    assert not told["has_torch"]
    secret = server.invitation.secret_key
    assert secret not in str(told["environment"])
    assert secret not in str(told["argv"])


def test_unpinned_process_keeps_its_parents_cores(server: ChannelServer, backend: LocalBackend) -> None:
    backend.start(ProcessSpec(entry=f"{ENTRIES}:describe", device=CPU0))
    assert received(server, "described").header["cores"] == sorted(os.sched_getaffinity(0))


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("4,6", "6")])
def test_accelerator_is_the_only_one_visible(
    server: ChannelServer,
    backend: LocalBackend,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    expected: str,
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = Device(name="cuda1", kind=DeviceKind.CUDA, memory_bytes=0, index=1)
    backend.start(ProcessSpec(entry=f"{ENTRIES}:describe", device=device))
    assert received(server, "described").header["environment"]["CUDA_VISIBLE_DEVICES"] == expected


def test_invisible_accelerator_is_refused(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    device = Device(name="cuda0", kind=DeviceKind.CUDA, memory_bytes=0)
    with pytest.raises(InvalidInput, match="cuda0 is accelerator 0"):
        backend.start(ProcessSpec(entry=f"{ENTRIES}:echo", device=device))


def test_sigkill_is_reported_with_the_device(server: ChannelServer, backend: LocalBackend) -> None:
    handle = backend.start(ProcessSpec(entry=f"{ENTRIES}:echo", device=CPU1, name="replica-3"))
    received(server, "connected")
    os.kill(handle.pid, signal.SIGKILL)
    (end,) = next_exits(server, backend)
    assert (end.handle, end.handle.device, end.code, end.signal) == (handle, "cpu1", None, signal.SIGKILL)
    assert end.cause == "killed by SIGKILL (out of memory or by hand)"
    assert backend.exits() == ()


def test_entry_that_raises_tells_why(server: ChannelServer, backend: LocalBackend) -> None:
    backend.start(ProcessSpec(entry=f"{ENTRIES}:fail", device=CPU0, config={"thing": "this"}))
    failed = received(server, "failed")
    assert failed.sender == "cpu0"
    assert failed.header["error"] == "RuntimeError: no luck with this"
    assert "process_entries.py" in failed.header["traceback"]
    (end,) = next_exits(server, backend)
    assert (end.code, end.signal) == (1, None)
    assert "RuntimeError: no luck with this" in end.log_tail
    assert end.cause == "exit code 1; last output: second line"


def test_missing_entry_is_a_failure_not_a_hang(server: ChannelServer, backend: LocalBackend) -> None:
    backend.start(ProcessSpec(entry="no_such_module:entry", device=CPU0))
    assert "no_such_module" in received(server, "failed").header["error"]


def test_cores_that_do_not_exist_are_named(server: ChannelServer, backend: LocalBackend) -> None:
    device = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0, cores=(1023,))
    backend.start(ProcessSpec(entry=f"{ENTRIES}:echo", device=device))
    (end,) = next_exits(server, backend)
    assert "cpu0: cannot run on cores (1023,)" in end.cause


def test_exit_code_and_output_are_kept(server: ChannelServer, backend: LocalBackend) -> None:
    backend.start(ProcessSpec(entry=f"{ENTRIES}:leave", device=CPU0, config={"code": 7}))
    (first,) = next_exits(server, backend)
    assert first.code == 7
    backend.start(ProcessSpec(entry=f"{ENTRIES}:echo", device=CPU0))
    received(server, "connected")
    server.send("cpu0", {"type": "stop"})
    (second,) = next_exits(server, backend)
    assert (second.code, second.log_tail) == (0, ("told to stop",))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
@pytest.mark.parametrize("preload", [(), (ENTRIES,)])
def test_a_full_disk_is_no_reason_to_end(
    server: ChannelServer, backend: LocalBackend, preload: tuple[str, ...]
) -> None:
    backend.start(ProcessSpec(entry=f"{ENTRIES}:print_much", device=CPU0, preload=preload))
    received(server, "printed")
    (end,) = next_exits(server, backend)
    assert end.code == 0


def test_without_room_for_a_log_a_process_starts_all_the_same(
    server: ChannelServer, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", refuse)
    backend.start(ProcessSpec(entry=f"{ENTRIES}:echo", device=CPU0))
    received(server, "connected")


def test_stop_is_not_news_and_harmless_twice(server: ChannelServer, backend: LocalBackend) -> None:
    handle = backend.start(ProcessSpec(entry=f"{ENTRIES}:echo", device=CPU0))
    received(server, "connected")
    end = backend.stop(handle, grace_s=DEADLINE_S)
    assert end.signal == signal.SIGTERM
    assert not psutil.pid_exists(handle.pid)  # reaped, not a zombie
    assert backend.stop(handle, grace_s=0) == end
    assert backend.exits() == ()


def test_name_in_use_is_refused_until_it_is_free(server: ChannelServer, backend: LocalBackend) -> None:
    spec = ProcessSpec(entry=f"{ENTRIES}:echo", device=CPU0)
    handle = backend.start(spec)
    with pytest.raises(ValueError, match="cpu0 is running"):
        backend.start(spec)
    received(server, "connected")
    backend.stop(handle, grace_s=DEADLINE_S)
    again = backend.start(spec)
    assert received(server, "connected").header["pid"] == again.pid
    server.send("cpu0", {"type": "ping"})
    assert received(server, "ping").sender == "cpu0"


def test_stubborn_process_is_killed_with_all_it_started(server: ChannelServer, backend: LocalBackend) -> None:
    handle = backend.start(ProcessSpec(entry=f"{ENTRIES}:stubborn", device=CPU0))
    child = received(server, "stubborn").header["child"]
    assert backend.stop(handle, grace_s=0.05).signal == signal.SIGKILL
    assert gone(handle.pid, child)


def test_what_a_killed_process_had_started_goes_with_it(server: ChannelServer, backend: LocalBackend) -> None:
    handle = backend.start(ProcessSpec(entry=f"{ENTRIES}:stubborn", device=CPU0))
    child = received(server, "stubborn").header["child"]
    os.kill(handle.pid, signal.SIGKILL)
    next_exits(server, backend)
    assert gone(child)


def test_close_ends_everything_and_leaks_nothing(tmp_path: Path) -> None:
    def run_once() -> list[int]:
        with (
            ChannelServer() as server,
            LocalBackend(invitation=server.invitation, log_dir=tmp_path) as backend,
        ):
            handles = [
                backend.start(ProcessSpec(entry=f"{ENTRIES}:echo", device=device)) for device in (CPU0, CPU1)
            ]
            received(server, "connected")
            backend.close()
            backend.close()
            return [handle.pid for handle in handles]

    run_once()  # what libraries open once stays open
    before = psutil.Process().num_fds()
    pids = run_once()
    assert psutil.Process().num_fds() == before
    assert not any(psutil.pid_exists(pid) for pid in pids)


def start_coordinator(tmp_path: Path, mode: str) -> tuple[subprocess.Popen[str], list[int]]:
    script = Path(__file__).with_name("coordinator_script.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    coordinator = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), mode],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert coordinator.stdout is not None
    pids = [int(pid) for pid in coordinator.stdout.readline().split()]
    assert len(pids) == 2
    return coordinator, pids


def kill(coordinator: subprocess.Popen[str]) -> None:
    coordinator.kill()


def terminate(coordinator: subprocess.Popen[str]) -> None:
    coordinator.terminate()


def interrupt_group(coordinator: subprocess.Popen[str]) -> None:
    os.killpg(coordinator.pid, signal.SIGINT)  # what a terminal does for Ctrl-C


@pytest.mark.parametrize(
    ("mode", "end"),
    [
        ("wait", kill),
        ("wait", terminate),
        ("interrupt", interrupt_group),
        ("fork", kill),
        ("fork", terminate),
    ],
)
def test_no_orphans_however_the_coordinator_ends(
    tmp_path: Path, mode: str, end: Callable[[subprocess.Popen[str]], None]
) -> None:
    coordinator, pids = start_coordinator(tmp_path, mode)
    with coordinator:
        end(coordinator)
        coordinator.wait(DEADLINE_S)
    assert gone(*pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
@pytest.mark.parametrize("mode", ["wait", "fork"])
def test_no_orphans_even_if_the_workers_cannot_act(tmp_path: Path, mode: str) -> None:
    coordinator, pids = start_coordinator(tmp_path, mode)
    with coordinator:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        coordinator.kill()
    assert gone(*pids)


def test_vanished_coordinator_is_noticed_on_the_channel(tmp_path: Path) -> None:
    server = ChannelServer()
    with LocalBackend(invitation=server.invitation, log_dir=tmp_path) as backend:
        path = tmp_path / "answer"
        spec = ProcessSpec(entry=f"{ENTRIES}:until_gone", device=CPU0, config={"path": str(path)})
        backend.start(spec)
        received(server, "waiting")
        server.close()
        with ChannelServer() as other:
            (end,) = next_exits(other, backend)
        assert end.code == 1
        assert end.cause == "exit code 1; last output: the coordinator is gone or refused the connection"
        assert path.read_text() == "gone"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes import for themselves")
class TestForked:
    """Processes that are forked from one that has imported what they need."""

    @staticmethod
    def described(server: ChannelServer, backend: LocalBackend, name: str, device: Device = CPU0) -> Any:
        spec = ProcessSpec(entry=f"{ENTRIES}:describe", device=device, name=name, preload=(ENTRIES,))
        backend.start(spec)
        while (message := received(server, "described")).sender != name:
            pass
        return message.header

    def test_they_are_as_private_as_others(self, server: ChannelServer, backend: LocalBackend) -> None:
        core = min(os.sched_getaffinity(0))
        told = self.described(server, backend, "one", replace(CPU0, cores=(core,)))
        other = self.described(server, backend, "two", replace(CPU1, cores=(core,)))
        assert told["imported_by"] == other["imported_by"] != told["pid"]
        assert told["session"] == told["pid"] != other["pid"]
        assert told["cores"] == [core]
        assert told["environment"]["CUDA_VISIBLE_DEVICES"] == ""
        assert (told["input"], told["ignores_interrupt"]) == ("", True)
        assert told["drawn"] != other["drawn"]
        assert psutil.Process(told["pid"]).name() == "one"
        server.send("one", {"type": "stop"})
        (end,) = next_exits(server, backend)
        assert (end.handle.name, end.code, end.log_tail) == ("one", 0, ("told to stop",))

    def test_they_outlive_what_they_were_forked_from(
        self, server: ChannelServer, backend: LocalBackend
    ) -> None:
        first = self.described(server, backend, "first")
        os.kill(first["imported_by"], signal.SIGKILL)
        assert gone(first["imported_by"])
        second = self.described(server, backend, "second")
        assert second["imported_by"] != first["imported_by"]
        os.kill(first["pid"], signal.SIGKILL)
        (end,) = next_exits(server, backend)
        assert (end.handle.name, end.signal) == ("first", signal.SIGKILL)
        assert not psutil.pid_exists(first["pid"])

    def test_one_that_cannot_be_forked_says_why(self, server: ChannelServer, backend: LocalBackend) -> None:
        backend.start(ProcessSpec(entry=f"{ENTRIES}:echo", device=CPU0, preload=("no_such_module",)))
        (end,) = next_exits(server, backend)
        assert end.cause.startswith("the process that cpu0 is to be forked from has ended; see ")

    def test_one_that_is_still_to_be_forked_can_be_stopped(
        self, server: ChannelServer, backend: LocalBackend
    ) -> None:
        handle = backend.start(ProcessSpec(entry=f"{ENTRIES}:echo", device=CPU0, preload=(ENTRIES,)))
        assert backend.stop(handle, grace_s=DEADLINE_S).signal == signal.SIGKILL
        assert backend.exits() == ()


def test_process_ends_when_its_standard_input_does(server: ChannelServer) -> None:
    """The way that works on every system, tried while the parent is alive."""
    spec = ProcessSpec(entry=f"{ENTRIES}:echo", device=CPU0)
    program = [sys.executable, "-c", "from forescale.engine.bootstrap import main; main()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(program, stdin=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        process.stdin.write(request(spec, server.invitation))
        process.stdin.flush()
        received(server, "connected")
        process.stdin.close()
        try:
            assert process.wait(DEADLINE_S) == 1
        finally:
            process.kill()


def test_process_without_a_request_says_so(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from forescale.engine.bootstrap import main; main()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        program, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr == b"the parent process ended before it said what to do\n"
