"""The choice of a backend: what is chosen, why, what an override may ask for, and every state of the native library."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ibkernels
from ibkernels import backends

RUNNING = torch.__version__.split("+")[0]
RECORD = {"library": "libibkernels_cpu.so", "torch": RUNNING, "compiler": "GNU 12.2.0"}
RNG, ROWS = torch.tensor([1, 2]), torch.arange(3)


def forget() -> None:
    """Choices and the library's state are remembered for the process."""
    backends.native_library.cache_clear()
    backends._select.cache_clear()


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`installation(record, library)`: as if ibkernels had been installed with these files beside it."""

    def pretend(record: dict[str, str] | str | None, library: bytes | None = None) -> None:
        if record is not None:
            text = record if isinstance(record, str) else json.dumps(record)
            (tmp_path / "_native_build.json").write_text(text)
        if library is not None:
            (tmp_path / RECORD["library"]).write_bytes(library)
        monkeypatch.delenv("IBKERNELS_SKIP_CPP", raising=False)
        monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
        forget()

    yield pretend
    forget()


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "dtype"), [(op, dtype) for op in backends.OPS if op != "encode" for dtype in (torch.float32, torch.bfloat16)]
)
def test_the_native_library_serves_a_cpu_where_it_is_loaded(op, dtype):
    if op == "noise" and dtype != torch.float32:
        pytest.skip("noise is float32")
    native = backends.native_library()
    choice = backends.select(op, "cpu", dtype)
    assert choice.backend.name == ("cpp" if native.loaded else "reference")
    absent = f"cpp: the native library is absent ({native.reason})"
    assert choice.reason == ("first choice here" if native.loaded else absent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("op", [op for op in backends.OPS if op not in ("noise", "encode")])
def test_the_reference_serves_other_dtypes_and_says_why(op, dtype):
    choice = backends.select(op, "cpu", dtype)
    assert choice.backend.name == "reference"
    assert choice.reason == f"cpp: it takes torch.float32 and torch.bfloat16, not {dtype}"


@pytest.mark.parametrize("dtype", backends.FLOATS, ids=str)
def test_the_reference_serves_encode_and_says_why(dtype):
    choice = backends.select("encode", "cpu", dtype)
    assert choice.backend.name == "reference"
    assert choice.reason == "cpp: it has no kernel for this op, which is a library GEMM and a clamp"


def test_the_native_library_is_there_where_it_must_be():
    if os.environ.get("IBKERNELS_REQUIRE_CPP") != "1":
        pytest.skip("IBKERNELS_REQUIRE_CPP=1 is not set")
    native = backends.native_library()
    assert native.loaded, native.reason


def test_other_devices_are_told_apart():
    reason = backends.select("noise", "mps", torch.float32).reason
    assert reason.startswith("triton: it serves GPUs, not mps") and "cpp: it serves the CPU, not mps" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", backends.OPS)
def test_triton_is_the_first_choice_on_a_gpu(op, dtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._select.cache_clear()
    assert backends.select(op, "cuda", dtype) == (backends._BACKENDS[0], "first choice here")
    assert backends.select(op, "cuda", torch.float64).backend.name == "reference"


def test_on_a_cpu_triton_is_interpreted_and_only_where_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends._select.cache_clear()
    assert backends.select("encode", "cpu", torch.float32).backend.name == "reference"
    assert backends.select("encode", "cpu", torch.float32, "triton").backend.name == "triton"
    with pytest.raises(ValueError, match="does not round to"):
        backends.select("encode", "cpu", torch.bfloat16, "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    backends._select.cache_clear()
    with pytest.raises(ValueError, match="it serves GPUs, not cpu"):
        backends.select("encode", "cpu", torch.float32, "triton")
    backends._select.cache_clear()


def test_without_triton_a_gpu_gets_the_reference(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    choice = backends.select("encode", "cuda", torch.float16, "")
    backends._select.cache_clear()
    assert choice.backend.name == "reference" and "triton: triton is not installed" in choice.reason


def test_a_dtype_that_nothing_serves_is_an_error_with_every_reason():
    with pytest.raises(ValueError, match=r"no backend serves encode on cpu in torch\.int8: cpp: .*; reference: "):
        backends.select("encode", "cpu", torch.int8)


def test_backends_draw_the_same_noise():
    if not backends.native_library().loaded:
        pytest.skip("the native library is absent")
    ours = [ibkernels.noise(RNG, ROWS, 40, backend=name) for name in ("cpp", "reference")]
    torch.testing.assert_close(*ours, rtol=0, atol=1e-6)


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_the_environment_overrides_for_each_call(monkeypatch):
    monkeypatch.setenv("IBKERNELS_BACKEND", "reference")
    choice = backends.select("noise", "cpu", torch.float32)
    assert choice.backend.name == "reference"
    assert choice.reason == "asked for by IBKERNELS_BACKEND"
    monkeypatch.delenv("IBKERNELS_BACKEND")
    assert backends.select("noise", "cpu", torch.float32).reason != choice.reason


def test_the_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("IBKERNELS_BACKEND", "nonsense")
    choice = backends.select("encode", "cpu", torch.float32, "reference")
    assert choice.backend.name == "reference"
    assert choice.reason == "asked for by backend='reference'"


@pytest.mark.parametrize("through_environment", [True, False])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cpp",
            "the backend 'cpp', which cannot serve {op}: it (takes .*, not torch.float64|has no kernel for this op)",
        ),
        ("turbo", "names the backend 'turbo'; there are: triton, cpp, reference"),
    ],
)
def test_an_impossible_choice_is_an_error_with_the_reason(monkeypatch, through_environment, name, message):
    hidden, weight, labels = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(6, 4), torch.tensor([0, 1])
    if through_environment:
        monkeypatch.setenv("IBKERNELS_BACKEND", name)
    source = "IBKERNELS_BACKEND" if through_environment else f"backend='{name}'"
    options = {} if through_environment else {"backend": name}
    calls = {
        "variational_bottleneck": lambda: ibkernels.variational_bottleneck(hidden, weight, **options),
        "encode": lambda: ibkernels.encode(hidden, weight, **options),
        "linear_cross_entropy": lambda: ibkernels.linear_cross_entropy(hidden, weight, labels, **options),
        "bottleneck_cross_entropy": lambda: ibkernels.bottleneck_cross_entropy(
            hidden[:, :3], weight[:4, :3], None, weight, labels, **options
        ),
    }
    for op, call in calls.items():
        with pytest.raises(ValueError, match=f"^{source} .*{message.format(op=op)}"):
            call()


def test_the_native_library_asked_for_and_absent(installation):
    installation(None)
    with pytest.raises(ValueError, match=r"'cpp'.* noise: the native library is absent \(not built: this is"):
        ibkernels.noise(RNG, ROWS, 4, backend="cpp")
    assert ibkernels.noise(RNG, ROWS, 4).shape == (3, 4)


# ---- the states of the native library --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "library", "reason"),
    [
        (None, None, "not built: this is a source tree without `pip install --no-build-isolation -e .`"),
        ({"skipped": "no C++ compiler was found"}, None, "not built: no C++ compiler was found"),
        ({**RECORD, "torch": "2.4.1"}, b"", f"built for torch 2.4.1, but torch {RUNNING} is running; reinstall ibft"),
        ({**RECORD, "torch": RUNNING + "+cu130"}, b"", "libibkernels_cpu.so does not load: "),
        (RECORD, b"not a library", "libibkernels_cpu.so does not load: "),
        (RECORD, None, "libibkernels_cpu.so does not load: "),
        ('{"library": "libibk', None, "_native_build.json cannot be read: "),
        ("{}", None, "_native_build.json cannot be read: "),
    ],
    ids=["source-tree", "skipped", "other-torch", "local-version", "broken", "missing", "torn-record", "empty-record"],
)
def test_without_the_library_everything_works_and_says_why(installation, record, library, reason):
    installation(record, library)
    native = backends.native_library()
    assert not native.loaded
    assert native.reason.startswith(reason)
    assert f"native library: absent ({reason}" in backends.report()
    assert backends.select("noise", "cpu", torch.float32).backend.name == "reference"
    assert ibkernels.noise(RNG, ROWS, 4).shape == (3, 4)


def test_a_library_that_is_not_wanted_is_not_loaded(installation, monkeypatch):
    installation(RECORD, b"not a library")
    monkeypatch.setenv("IBKERNELS_SKIP_CPP", "1")
    assert backends.native_library() == (False, "IBKERNELS_SKIP_CPP=1 is set")


def test_the_library_is_loaded_once(installation, monkeypatch):
    installation(RECORD)
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(torch.ops.ibkernels_cpu, "instruction_set", lambda: "avx2", raising=False)
    for _ in range(3):
        built = f"libibkernels_cpu.so, built for torch {RUNNING} by GNU 12.2.0; avx2 kernels"
        assert backends.native_library() == (True, built)
    assert [Path(path).name for path in loaded] == ["libibkernels_cpu.so"]


# ---- python -m ibkernels ---------------------------------------------------------------------------------------------


def test_the_report_has_a_line_for_every_op_and_dtype():
    lines = backends.report().splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}, ")
    table = [line.split()[:4] for line in lines[4:] if " cpu " in line]
    float_ops = [op for op in backends.OPS if op != "noise"]
    assert len(table) == len(float_ops) * len(backends.FLOATS) + 1
    assert {tuple(row[:3]) for row in table} >= {(op, "cpu", "bfloat16") for op in float_ops}
    assert all(row[3] in {"cpp", "reference"} for row in table)


@pytest.mark.parametrize("variables", [{"IBKERNELS_SKIP_CPP": "1"}, {"IBKERNELS_BACKEND": "cpp"}], ids=str)
def test_the_command_prints_the_report(variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("IBKERNELS_")}
    command = [sys.executable, "-m", "ibkernels"]
    folder = Path(ibkernels.__file__).parents[1]
    result = subprocess.run(command, env={**kept, **variables}, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    if "IBKERNELS_SKIP_CPP" in variables:
        assert "native library: absent (IBKERNELS_SKIP_CPP=1 is set)" in result.stdout
        assert "cpu     float32   reference  cpp: the native library is absent" in result.stdout
    else:
        reason = "none       IBKERNELS_BACKEND asks for the backend 'cpp', which cannot serve encode: it has no kernel"
        assert reason in result.stdout
