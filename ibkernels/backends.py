"""Which backend serves which op on which device and dtype, and why; `python -m ibkernels` prints it.

Chosen per call from the tensor itself. `backend=` of an op, or else IBKERNELS_BACKEND, overrides; an impossible choice
is an error that carries the reason.
"""

import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

OPS = ("variational_bottleneck", "encode", "linear_cross_entropy", "bottleneck_cross_entropy", "noise")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CPP_FLOATS = (torch.float32, torch.bfloat16)
_TRITON_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """`refusal(op, device_type, dtype)` is None when the backend serves that call, or else the reason why not."""

    name: str
    refusal: Callable[[str, str, torch.dtype], str | None]
    load: Callable[[], ModuleType]


class Selection(NamedTuple):
    """The backend that serves a call, and why it and not one before it in the order of preference."""

    backend: Backend
    reason: str


class NativeLibrary(NamedTuple):
    """Whether the C++ library is loaded, and the sentence that explains it."""

    loaded: bool
    reason: str


def select(op: str, device_type: str, dtype: torch.dtype, requested: str = "") -> Selection:
    """The backend for one call; `requested` ("" for none) wins over IBKERNELS_BACKEND.

    Raises ValueError for an unknown backend, or for one that cannot serve the call.
    """
    return _select(op, device_type, dtype, requested, os.environ.get("IBKERNELS_BACKEND", ""))


def implementation(op: str, tensor: torch.Tensor, requested: str) -> ModuleType:
    """The module that implements `op` for a call on `tensor`'s device and dtype."""
    return select(op, tensor.device.type, tensor.dtype, requested).backend.load()


@functools.cache
def native_library() -> NativeLibrary:
    """Loads the C++ library once, if the installation built one for this torch."""
    if os.environ.get("IBKERNELS_SKIP_CPP") == "1":
        return NativeLibrary(False, "IBKERNELS_SKIP_CPP=1 is set")
    folder = Path(__file__).parent
    try:
        build = json.loads((folder / "_native_build.json").read_text())
    except FileNotFoundError:
        return NativeLibrary(False, "not built: this is a source tree without `pip install --no-build-isolation -e .`")
    except ValueError as error:
        return NativeLibrary(False, f"_native_build.json cannot be read: {error}; reinstall ibft")
    if "skipped" in build:
        return NativeLibrary(False, f"not built: {build['skipped']}")
    if missing := {"library", "torch", "compiler"} - build.keys():
        return NativeLibrary(False, f"_native_build.json cannot be read: no {', '.join(sorted(missing))} in it")
    running = torch.__version__.split("+")[0]
    if build["torch"].split("+")[0] != running:
        # The C++ ABI of torch changes between versions: loading would crash rather than fail.
        return NativeLibrary(False, f"built for torch {build['torch']}, but torch {running} is running; reinstall ibft")
    try:
        torch.ops.load_library(folder / build["library"])
    except OSError as error:
        return NativeLibrary(False, f"{build['library']} does not load: {error}")
    built = f"built for torch {build['torch']} by {build['compiler']}"
    return NativeLibrary(True, f"{build['library']}, {built}; {torch.ops.ibkernels_cpu.instruction_set()} kernels")


def report() -> str:
    """The table that `python -m ibkernels` prints."""
    native = native_library()
    lines = [
        f"torch {torch.__version__}, {_accelerator()}",
        f"native library: {'loaded' if native.loaded else 'absent'} ({native.reason})",
        "",
        f"{'op':26}{'device':8}{'dtype':10}{'backend':11}reason",
    ]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for op in OPS:
        for device in devices:
            for dtype in (torch.float32,) if op == "noise" else FLOATS:
                try:
                    choice = select(op, device, dtype)
                    backend, reason = choice.backend.name, choice.reason
                except ValueError as error:
                    backend, reason = "none", str(error)
                lines.append(f"{op:26}{device:8}{str(dtype).removeprefix('torch.'):10}{backend:11}{reason}")
    return "\n".join(lines)


@functools.cache
def _select(op: str, device_type: str, dtype: torch.dtype, requested: str, environment: str) -> Selection:
    name, source = (requested, f"backend={requested!r}") if requested else (environment, "IBKERNELS_BACKEND")
    if name:
        by_name = {backend.name: backend for backend in _BACKENDS}
        if name not in by_name:
            raise ValueError(f"{source} names the backend {name!r}; there are: {', '.join(by_name)}.")
        refusal = by_name[name].refusal(op, device_type, dtype)
        if refusal is not None:
            raise ValueError(f"{source} asks for the backend {name!r}, which cannot serve {op}: {refusal}.")
        return Selection(by_name[name], f"asked for by {source}")
    refusals: list[str] = []
    for backend in _preference(device_type):
        refusal = backend.refusal(op, device_type, dtype)
        if refusal is None:
            return Selection(backend, "; ".join(refusals) or "first choice here")
        refusals.append(f"{backend.name}: {refusal}")
    raise ValueError(f"no backend serves {op} on {device_type} in {dtype}: {'; '.join(refusals)}.")


def _reference_refusal(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    return None if dtype in FLOATS else f"it takes {', '.join(str(float_) for float_ in FLOATS)}, not {dtype}"


def _cpp_refusal(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"it serves the CPU, not {device_type}"
    if op == "encode":
        return "it has no kernel for this op, which is a library GEMM and a clamp"
    if dtype not in _CPP_FLOATS:
        return f"it takes {' and '.join(str(float_) for float_ in _CPP_FLOATS)}, not {dtype}"
    native = native_library()
    return None if native.loaded else f"the native library is absent ({native.reason})"


def _triton_refusal(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type not in ("cuda", "cpu") or (device_type == "cpu" and not interpreted):
        return f"it serves GPUs, not {device_type} (but for debugging, under TRITON_INTERPRET=1)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in _TRITON_FLOATS:
        return f"it takes {', '.join(str(float_) for float_ in _TRITON_FLOATS)}, not {dtype}"
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter does not round to torch.bfloat16 as a GPU does"
    return None


def _preference(device_type: str) -> tuple[Backend, ...]:
    """The order in which backends are asked; on a CPU Triton runs in its interpreter, and only where asked for."""
    return tuple(backend for backend in _BACKENDS if device_type != "cpu" or backend.name != "triton")


def _load_reference() -> ModuleType:
    from ibkernels import reference

    return reference


def _load_cpp() -> ModuleType:
    from ibkernels import native

    return native


def _load_triton() -> ModuleType:
    from ibkernels import gpu

    return gpu


def _accelerator() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


# In the order of preference.
_BACKENDS = (
    Backend("triton", _triton_refusal, _load_triton),
    Backend("cpp", _cpp_refusal, _load_cpp),
    Backend("reference", _reference_refusal, _load_reference),
)
