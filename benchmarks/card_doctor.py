"""What OpenVINO and OpenCL show a process, for each thing that a tuning's worker is and a plain process is not: a line each.

    python -m benchmarks.card_doctor

On 2026-11-27 no worker of 20 tunings found OpenVINO's GPU on a machine where plain processes did: PoCL, once it is loaded, sets
OCL_ICD_FILENAMES=libpocl.so.2 in the environment, and who inherits that is shown no other driver. Workers do not any more. `card_session`
runs this outside of lanes, and then in all lanes at once: where the line of a way lacks a GPU and "plain" has it, what that way adds is the
cause. How a worker starts is taken apart only where the whole of it finds no GPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from aivmm.probes import worker
from aivmm.runtime.remedies import opencl_shows

_LIMIT_S = 40.0
_HERE = (sys.executable, "-m", "benchmarks.card_doctor")
_LAB = "from aivmm.probes.lab import Lab; lab = Lab(); t, a = lab.discover({}); print(*t, sep=chr(10)); print(*a, sep=chr(10)); lab.close()"
_USED = "import openvino; openvino.Core().available_devices"
_STEPS = ("pipes", "dies with its parent", "says where it ends", "is the first to go", "imports")


def look() -> str:
    """Return what this process is shown, and what about it might be the reason, in one line."""
    before = _environment()
    import openvino

    found = openvino.Core().available_devices
    changed = {name: value for name, value in _environment().items() if before.get(name) != value}
    maps = Path("/proc/self/maps").read_text().splitlines()
    library = next((line.split()[-1] for line in maps if "libOpenCL" in line), "no libOpenCL")
    said = {
        "OpenVINO": ", ".join(found),
        "OpenCL": f"{opencl_shows() or 'no library'} by {library}; contexts {contexts()}",
        "cards": os.environ.get("CUDA_VISIBLE_DEVICES", "all"),
        "cores": str(len(os.sched_getaffinity(0))),
        "limits": _limits(),
        "set while loading": ", ".join(f"{name}={value}" for name, value in changed.items()) or "nothing",
    }
    return " | ".join(f"{name}: {value}" for name, value in said.items())


def contexts(library: str = "libOpenCL.so.1") -> str:
    """Return the code that OpenCL answers when it is to make a context on each of its GPUs (0 is success)."""
    try:
        opencl = ctypes.CDLL(library)
    except OSError:
        return "none"
    opencl.clCreateContext.restype = ctypes.c_void_p
    count, codes = ctypes.c_uint(), []
    if opencl.clGetPlatformIDs(0, None, ctypes.byref(count)) or not count.value:
        return "none"
    platforms = (ctypes.c_void_p * count.value)()
    opencl.clGetPlatformIDs(count.value, platforms, None)
    for platform in platforms:
        some = (ctypes.c_void_p * 16)()
        if opencl.clGetDeviceIDs(ctypes.c_void_p(platform), ctypes.c_uint64(4), 16, some, ctypes.byref(count)):
            continue
        for device in some[: count.value]:
            one, code = (ctypes.c_void_p * 1)(device), ctypes.c_int()
            made = opencl.clCreateContext(None, 1, one, None, None, ctypes.byref(code))
            codes.append(str(code.value))
            if made:
                opencl.clReleaseContext(ctypes.c_void_p(made))
    return " ".join(codes) or "none"


def look_as_worker(steps: int) -> str:
    """Do the first steps that a worker does before it looks for devices; then look."""
    if steps > 0:
        answers = worker._take_over_output()
        worker._take_over_input()
    if steps > 1:
        worker._die_with(os.getppid())
    if steps > 2:
        worker._say_where_we_end()
    if steps > 3:
        worker._be_the_first_to_go()
    if steps > 4:
        import aivmm.probes.operations  # noqa: F401 - what it loads before a runtime is loaded is part of the question
    said = look()
    if steps > 0:
        answers.write(said.encode() + b"\n")
        answers.flush()
        return ""
    return said


def ways() -> Iterator[tuple[str, tuple[str, ...], Mapping[str, str | None]]]:
    """Yield how to be a process: its name, its command, and what is different in its environment (None: without it)."""
    yield "plain", (*_HERE, "look"), {}
    if hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        yield "on all cores", (*_HERE, "wide"), {}
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        yield "with all cards", (*_HERE, "look"), {"CUDA_VISIBLE_DEVICES": None}
    yield "child of one that used OpenCL", (*_HERE, "parent"), {}
    yield "a worker of one that used OpenCL", (sys.executable, "-c", f"{_USED}; {_LAB.format(['openvino'])}"), {}
    yield "started as a worker", (*_HERE, "worker", str(len(_STEPS))), {}
    yield "a worker", (sys.executable, "-c", _LAB.format(["openvino"])), {}
    yield "a worker beside onnxruntime's", (sys.executable, "-c", _LAB.format(["openvino", "onnxruntime"])), {}


def main() -> None:
    """Print a line for each way; take the start of a worker apart where it is what loses the GPU."""
    asked = sys.argv[1:]
    if asked:
        if asked[0] == "wide":
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        if asked[0] == "parent":
            look()
            print(subprocess.run((*_HERE, "look"), capture_output=True, text=True, timeout=_LIMIT_S).stdout.strip())
            return
        print(look_as_worker(int(asked[1])) if asked[0] == "worker" else look(), flush=True)
        os._exit(0)  # drivers hang in their destructors
    found = {name: _told(name, command, changes) for name, command, changes in ways()}
    if _has_gpu(found["plain"]) and not _has_gpu(found["started as a worker"]):
        for count, step in enumerate(_STEPS):
            _told(f"a worker's start, before it {step}", (*_HERE, "worker", str(count)), {})
    without = [name for name, said in found.items() if not _has_gpu(said)]
    print(f"no GPU is shown to: {', '.join(without)}" if without else "every way is shown a GPU", flush=True)


def _told(name: str, command: tuple[str, ...], changes: Mapping[str, str | None]) -> str:
    environment = {**os.environ, **{key: value for key, value in changes.items() if value is not None}}
    for key, value in changes.items():
        if value is None:
            environment.pop(key, None)
    try:
        ran = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            env=environment,
            start_new_session="worker" in command,
        )
        said = " ".join(ran.stdout.split()) or f"exit {ran.returncode}: {ran.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired:
        said = f"no answer within {_LIMIT_S:.0f} s"
    print(f"{name}: {said}", flush=True)
    return said


def _has_gpu(said: str) -> bool:
    """Say whether OpenVINO was shown one: by its own list, or as a target that is not absent."""
    devices = said.partition(" | ")[0] if said.startswith("OpenVINO: ") else said
    return "GPU.0" in devices or "CPU, GPU" in devices


def _environment() -> dict[str, str]:
    """Return the environment as native code has it: what libraries set in there is passed on to children, and is not in `os.environ`."""
    names = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    found, index = {}, 0
    while names[index]:
        name, _, value = names[index].decode(errors="replace").partition("=")
        found[name] = value
        index += 1
    return found


def _limits() -> str:
    import resource

    asked = {"memory": resource.RLIMIT_AS, "locked": resource.RLIMIT_MEMLOCK, "files": resource.RLIMIT_NOFILE}
    return ", ".join(f"{name} {'any' if (soft := resource.getrlimit(each)[0]) < 0 else soft}" for name, each in asked.items())


if __name__ == "__main__":
    main()
