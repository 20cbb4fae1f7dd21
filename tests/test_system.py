"""What differs between operating systems is tried by taking it away; container limits, on made-up file trees."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import folder_digest, make_pair, run

from tailorcli import Checkpoint, TailorError, system
from tailorcli.core import chunks
from tailorcli.device import device_errors, free_memory
from tailorcli.errors import CheckpointError, DeviceError, OutputError
from tailorcli.files import ScratchFolder, as_output_error, file_digest, unreadable
from tailorcli.models.running import forward

LINUX_ONLY = ("preadv", "pread", "pwrite", "fdatasync", "posix_fallocate", "O_DIRECTORY", "sysconf")


def take_away_what_windows_lacks(monkeypatch):
    """Once all is imported: other packages look at these names while they are."""
    for name in LINUX_ONLY:
        monkeypatch.delattr(os, name)
    monkeypatch.setitem(sys.modules, "resource", None)  # an import of it fails
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **options: _WithoutBlocks(stat(self, **options)))


class _WithoutBlocks:
    def __init__(self, found):
        self._found = found

    def __getattr__(self, name):
        if name == "st_blocks":
            raise AttributeError(name)
        return getattr(self._found, name)


@pytest.mark.parametrize("missing", [(), ("preadv",), ("preadv", "pread", "pwrite")])
def test_bytes_are_read_and_written_in_place_whatever_the_system_has(tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name)
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    descriptor = system.open_for_writing(file)
    assert system.write_at(descriptor, memoryview(b"abc"), 4) == 3
    system.sync_data(descriptor)
    buffer = bytearray(6)
    with pytest.raises(OSError, match=r"[Bb]ad file descriptor"):  # which a shared file needs
        system.read_at(descriptor, memoryview(buffer), 0)
    os.close(descriptor)
    descriptor = system.open_for_reading(file)
    assert system.read_at(descriptor, memoryview(buffer)[1:], 3) == 5
    assert bytes(buffer) == b"\x003abc7"
    assert system.read_at(descriptor, memoryview(buffer), 10) == 0
    os.close(descriptor)


def test_threads_that_must_move_a_files_position_read_the_right_bytes(tmp_path, monkeypatch):
    for name in ("preadv", "pread"):
        monkeypatch.delattr(os, name)
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 4)
    descriptor, wrong = system.open_for_reading(file), []

    def read(start):
        for _ in range(300):
            buffer = bytearray(16)
            system.read_at(descriptor, memoryview(buffer), start)
            if bytes(buffer) != bytes(range(start, start + 16)):
                wrong.append(start)

    _together(*(lambda start=start: read(start) for start in range(0, 160, 40)))
    os.close(descriptor)
    assert not wrong


def _together(*jobs):
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("refusal", [None, errno.EOPNOTSUPP, errno.EINVAL])
def test_room_is_reserved_where_the_system_cannot_by_writing_zeros(tmp_path, monkeypatch, refusal):
    if refusal is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:

        def refuse(*_):
            raise OSError(refusal, "not here")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(system, "_ZEROS", 1000)
    with (tmp_path / "room").open("wb") as file:
        system.reserve(file, 2500)
    assert (tmp_path / "room").read_bytes() == bytes(2500)


def test_a_full_disk_is_told_when_room_is_reserved(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (tmp_path / "room").open("wb") as file, pytest.raises(OSError, match="No space"):
        system.reserve(file, 10)


def test_the_peak_of_memory_is_in_bytes_everywhere(monkeypatch):
    here = system.peak_memory()
    assert 50 << 20 < here < 50 << 30
    monkeypatch.setattr(sys, "platform", "darwin")
    assert 0.9 < system.peak_memory() * 1024 / here < 2  # what Linux counts in kilobytes macOS counts in bytes
    monkeypatch.setitem(sys.modules, "resource", None)
    assert system.peak_memory() is None


def test_a_system_that_cannot_take_memory_back_is_left_alone(monkeypatch):
    def refuse(_):
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    system.give_back_memory()


def test_the_main_job_runs_where_windows_lacks_what_linux_has(tmp_path, monkeypatch):
    folder = make_pair(tmp_path)
    outputs = [folder / name for name in ("out", "again")]

    def calibrate_and_patch(output):
        stats = folder / "stats"
        data = ("--data", folder / "data.jsonl", "--blockwise", "always", "--overwrite")
        run("calibrate", folder / "tuned", *data, "-o", stats)
        patch = ("patch", folder / "base", folder / "tuned", "--stats", stats, "-o", output)
        run(*patch, "--patch-file", output.with_suffix(".safetensors"), "--max-shard-size", "50kB")

    calibrate_and_patch(outputs[0])
    take_away_what_windows_lacks(monkeypatch)
    calibrate_and_patch(outputs[1])
    assert folder_digest(outputs[0]) == folder_digest(outputs[1])
    run("verify", outputs[1], "--base", folder / "base", "--patch", outputs[1].with_suffix(".safetensors"))


# --- Memory ------------------------------------------------------------------------------------------------------

GIB = 1 << 30


def make_system(root, groups, files):
    """A root folder with /proc/meminfo and /proc/self/cgroup, and the control groups' ``files``."""
    contents = {"proc/meminfo": f"MemTotal: 99999 kB\nMemAvailable: {64 * (GIB >> 10)} kB\n"}
    contents |= {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


V2 = "0::/kube/pod/box\n"
V1 = "12:pids:/box\n5:cpu,memory:/box\n"
CASES = {
    "no groups at all": ("", {}, 64),
    "a limit of its own": (V2, {"kube/pod/box/memory.max": 8 * GIB, "kube/pod/box/memory.current": 2 * GIB}, 6),
    "a tighter limit above it": (
        V2,
        {
            "kube/pod/box/memory.max": 8 * GIB,
            "kube/pod/box/memory.current": 2 * GIB,
            "kube/memory.max": 10 * GIB,
            "kube/memory.current": 9 * GIB,
        },
        1,
    ),
    "no limit": (V2, {"kube/pod/box/memory.max": "max", "kube/pod/box/memory.current": GIB}, 64),
    "cached pages count as free": (
        V2,
        {
            "kube/pod/box/memory.max": 8 * GIB,
            "kube/pod/box/memory.current": 7 * GIB,
            "kube/pod/box/memory.stat": f"anon 5\nactive_file 9\ninactive_file {3 * GIB}\n",
        },
        4,
    ),
    "used up": (V2, {"kube/pod/box/memory.max": GIB, "kube/pod/box/memory.current": 2 * GIB}, 0),
    "in a container, of which the host's path says nothing": (
        "0::/../../kube/box\n",
        {"memory.max": 4 * GIB, "memory.current": GIB},
        3,
    ),
    "a machine with less than the limit": (V2, {"memory.max": 99 * GIB, "memory.current": GIB}, 64),
    "version 1": (
        V1,
        {"memory/box/memory.limit_in_bytes": 5 * GIB, "memory/box/memory.usage_in_bytes": 3 * GIB},
        2,
    ),
    "version 1 without a limit": (
        V1,
        {"memory/box/memory.limit_in_bytes": 2**63 - 4096, "memory/box/memory.usage_in_bytes": 3 * GIB},
        64,
    ),
    "version 1 in a container": (
        "5:memory:/docker/0123\n",
        {
            "memory/memory.limit_in_bytes": 5 * GIB,
            "memory/memory.usage_in_bytes": 3 * GIB,
            "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
        },
        3,
    ),
    "both versions side by side": (
        V2 + V1,
        {"memory/box/memory.limit_in_bytes": 5 * GIB, "memory/box/memory.usage_in_bytes": 3 * GIB},
        2,
    ),
    "files of another kind": ("nonsense\n0::/x\n", {"x/memory.max": "?", "x/memory.current": "!"}, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_a_containers_limit_counts_as_the_machines_memory(tmp_path, case):
    groups, files, expected = CASES[case]
    assert system.available_memory(make_system(tmp_path, groups, files)) == expected * GIB


def test_free_memory_follows_the_system(monkeypatch):
    monkeypatch.setattr("tailorcli.device.available_memory", lambda: 12345)
    assert free_memory(torch.device("cpu")) == 12345
    monkeypatch.undo()
    assert free_memory(torch.device("cpu")) > 1 << 20


def test_free_memory_without_proc_is_half_the_machines_and_untold_without_that_either(tmp_path, monkeypatch):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert system.available_memory(tmp_path) == total // 2
    monkeypatch.delattr(os, "sysconf")
    assert system.available_memory(tmp_path) is None


def test_free_memory_on_windows_is_what_its_kernel_says(tmp_path, monkeypatch):
    class Kernel:
        @staticmethod
        def GlobalMemoryStatusEx(status):  # noqa: N802  # the system's name
            fields = (ctypes.c_uint64 * 8).from_address(ctypes.addressof(status._obj))
            assert ctypes.c_uint32.from_buffer(status._obj).value == 64
            fields[2] = 7 * GIB
            return 1

    class Windows:
        kernel32 = Kernel

    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(ctypes, "windll", Windows, raising=False)
    assert system.available_memory(tmp_path) == 7 * GIB


# --- What runs out -----------------------------------------------------------------------------------------------


def test_a_cpu_without_memory_is_an_error_that_says_what_to_try():
    with pytest.raises(DeviceError, match="this machine ran out of memory") as found, device_errors("less of it"):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert found.value.hint.startswith("pass less of it; or free some memory")
    with pytest.raises(DeviceError, match="MemoryError") as found, device_errors():
        raise MemoryError
    assert "use a machine with more" in found.value.hint


def test_a_gpu_without_memory_is_told_of_smaller_work_before_another_device():
    message = "the device ran out of memory: CUDA"
    with pytest.raises(DeviceError, match=message) as found, device_errors("a smaller --batch-size"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
    assert found.value.hint == "pass a smaller --batch-size; or pass --device cpu"


@pytest.mark.parametrize(
    "message",
    ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA error: out of memory"],
)
def test_a_library_of_the_device_that_finds_no_memory_is_no_fault_of_the_data(message):
    def network(**inputs):
        raise RuntimeError(message)

    with pytest.raises(DeviceError, match="the device ran out of memory") as found, device_errors("less of it"):
        forward(network, {"input_ids": torch.ones(1, 2)})
    assert found.value.hint == "pass less of it; or pass --device cpu"


def test_other_errors_pass_device_errors_as_they_are():
    with pytest.raises(RuntimeError, match="shape") as found, device_errors():
        raise RuntimeError("shape mismatch")
    assert not isinstance(found.value, TailorError)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_few_file_descriptors_are_called_that(number):
    for make, kind in ((unreadable, CheckpointError), (as_output_error, OutputError)):
        error = make(Path("shard"), OSError(number, "Too many open files"))
        assert isinstance(error, kind)
        assert "too many files are open" in error.message
        assert "ulimit -n" in error.hint


def test_a_digest_is_of_the_whole_file(tmp_path):
    import hashlib

    content = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == hashlib.blake2b(content, digest_size=16).hexdigest()


# --- Threads -----------------------------------------------------------------------------------------------------


def open_files():
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files")
def test_a_checkpoint_that_several_threads_read_first_leaks_no_descriptor(tmp_path, monkeypatch):
    folder = make_pair(tmp_path, shard="20kB") / "base"
    opened, start = system.open_for_reading, threading.Barrier(4)

    def slowly(path):
        descriptor = opened(path)
        threading.Event().wait(0.002)  # the others come to open it, too
        return descriptor

    monkeypatch.setattr("tailorcli.checkpoint.folder.open_for_reading", slowly)
    before = open_files()
    with Checkpoint.open(folder) as checkpoint:

        def read_all():
            start.wait()
            for name in checkpoint.tensors:
                checkpoint.read(name)

        _together(*[read_all] * 4)
        assert len(checkpoint.shards) > 2
    assert open_files() == before


def test_calls_that_overlap_leave_torchs_number_of_threads_as_it_was():
    inside, leave, seen = threading.Event(), threading.Event(), []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def first():
            with chunks.one_torch_thread_each() as threads:
                seen.append(threads)
                inside.set()
                leave.wait(10)

        def second():
            inside.wait(10)
            with chunks.one_torch_thread_each() as threads:
                seen.append(threads)
                leave.set()
                one.join()  # the first leaves before the second

        one, two = threading.Thread(target=first), threading.Thread(target=second)
        one.start(), two.start(), two.join()
        _together(lambda: seen.append(torch.get_num_threads()))
        assert seen == [3, 3, 3]
    finally:
        torch.set_num_threads(before)


def test_work_within_a_shared_piece_of_work_does_not_start_threads_again():
    torch_before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with chunks.one_torch_thread_each() as threads:

            def inner():
                with chunks.one_torch_thread_each() as found:
                    return found, torch.get_num_threads()

            assert threads == 2
            assert inner() == (1, 1)
            assert chunks.workers(threads).submit(inner).result() == (1, 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(torch_before)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_starts_its_own_workers():
    code = """
import os, torch
from tailorcli.core import chunks
torch.set_num_threads(2)
assert chunks.side_by_side(lambda n: n + 1, [1, 2, 3]) == [2, 3, 4]
if os.fork() == 0:
    os._exit(chunks.side_by_side(lambda n: n + 1, [1, 2, 3]) != [2, 3, 4])
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("ended_in", ["mkdir", "rmtree"])
def test_a_signal_leaves_no_temporary_folder(monkeypatch, tmp_path, ended_in):
    """Raised as soon as the folder is there, or while it is taken away."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place, done = (Path, Path.mkdir) if ended_in == "mkdir" else (shutil, shutil.rmtree)

    def ended(*given, **how):
        monkeypatch.undo()
        if ended_in == "mkdir":
            done(*given, **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(place, ended_in, ended)
    with pytest.raises(KeyboardInterrupt), ScratchFolder() as folder:
        (folder / "file").write_text("x")
    assert not list(tmp_path.iterdir())


def test_a_temporary_folder_lives_as_long_as_it_is_held(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    held = ScratchFolder()
    (held.path / "file").write_text("x")
    assert held.path.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == [held.path]
    del held
    assert not list(tmp_path.iterdir())
