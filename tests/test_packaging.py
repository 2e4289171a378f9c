"""What an installation leaves: metadata, the pinned environment, and the native library with and without a compiler."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Not part of the development environment: each needs a GPU, an account or a long build.
UNPINNED_EXTRAS = {"flash", "liger", "quantized", "wandb"}

# Loads the library of the folder in argv[1] and prints the words at (0, 0) and (3, 17) of the contract's test stream.
LOAD_AND_DRAW = """
import sys, torch
torch.ops.load_library(sys.argv[1] + "/libibkernels_cpu.so")
rng = torch.tensor([0x0123456789abcdef, 0x100000005])
bits = torch.ops.ibkernels_cpu.philox_bits(rng, torch.tensor([0, 3]), 18)
print(f"{bits[0, 0]:08x} {bits[1, 17]:08x}")
"""
EXPECTED_DRAW = "b1b649f8 31a7005a"


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in requirements}


def pinned_requirements() -> list[Requirement]:
    """All that the project asks for directly, but for the extras that the development environment leaves out."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = [line for name, lines in EXTRAS.items() if name not in UNPINNED_EXTRAS for line in lines]
    requirements = [Requirement(line) for line in [*PROJECT["dependencies"], *build, *extras]]
    return [requirement for requirement in requirements if requirement.name != PROJECT["name"]]


def test_the_console_command_is_ibft():
    assert PROJECT["scripts"] == {"ibft": "ibft.cli:main"}


def test_the_extras_of_the_readme_exist():
    assert {"dev", "bench", "plot", "flash", "liger", "deepspeed"} <= set(EXTRAS)


def test_triton_comes_with_torch_and_is_asked_for_by_the_tests_alone():
    """Torch for GPUs pins a version of its own; torch for CPUs brings none, and the tests interpret the kernels."""
    lines = [PROJECT["dependencies"], *(lines for name, lines in EXTRAS.items() if name != "dev")]
    assert "triton" not in {Requirement(line).name for group in lines for line in group}


@pytest.mark.parametrize("package", ["ibkernels", "ibft"])
def test_the_version_is_written_once(package):
    assert getattr(importlib.import_module(package), "__version__", PROJECT["version"]) == PROJECT["version"]
    assert f"[{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("requirement", pinned_requirements(), ids=str)
def test_a_direct_dependency_is_pinned_within_its_range(requirement):
    pin = pins().get(canonicalize_name(requirement.name), "no pin")
    assert pin.startswith("=="), f"constraints.txt has {pin} for {requirement.name}"
    assert requirement.specifier.contains(pin.removeprefix("=="))


def test_pins_are_exact_and_portable():
    for name, specifier in pins().items():
        assert specifier.startswith("==") and "," not in specifier, f"{name} is not pinned to one version"
        assert "+" not in specifier, f"{name} is pinned to a local version, which only one index has"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, so that a build leaves nothing in the checkout."""
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.egg-info", "*.so", "_native_build.json", "__pycache__"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IBKERNELS_")}
    scripts = sysconfig.get_path("scripts")  # cmake and ninja of the environment under test
    return {**inherited, "PATH": os.pathsep.join([scripts, inherited["PATH"]]), **variables}


def pip_install(tree: Path, target: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--target", str(target), str(tree)]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True)


def draw(folder: Path) -> str:
    command = [sys.executable, "-c", LOAD_AND_DRAW, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_an_install_brings_both_packages_and_a_library_that_loads(tree, tmp_path):
    installed = pip_install(tree, tmp_path / "site", IBKERNELS_REQUIRE_CPP="1")
    assert installed.returncode == 0, installed.stdout + installed.stderr

    record = json.loads((tmp_path / "site/ibkernels/_native_build.json").read_text())
    assert set(record) == {"library", "torch", "compiler"}
    assert draw(tmp_path / "site/ibkernels") == EXPECTED_DRAW
    for name in ["ibkernels/py.typed", "ibft/py.typed", "bin/ibft", "ibft/data", "ibkernels/reference/noise.py"]:
        assert (tmp_path / "site" / name).exists(), name
    assert not list((tmp_path / "site").rglob("*.cpp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (
            {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"},
            "no C++ compiler was found (looked for /nonexistent/c++)",
        ),
        ({"CXX": "false"}, "is not able to compile a simple test program"),
        ({"CXXFLAGS": "-Dibkernels=0"}, "the compilation failed: expected"),
        ({"IBKERNELS_SKIP_CPP": "1"}, "IBKERNELS_SKIP_CPP=1 was set"),
    ],
    ids=["no compiler", "broken compiler", "failing compilation", "asked"],
)
def test_an_install_without_the_library_works_and_says_why(tree, tmp_path, variables, reason):
    installed = pip_install(tree, tmp_path / "site", **variables)
    assert installed.returncode == 0, installed.stdout + installed.stderr

    record = json.loads((tmp_path / "site/ibkernels/_native_build.json").read_text())
    assert set(record) == {"skipped"}
    assert reason in record["skipped"]
    assert not list((tmp_path / "site").rglob("*.so"))
    importing = [sys.executable, "-c", "import ibkernels; print(ibkernels.__file__)"]
    env = environment(PYTHONPATH=str(tmp_path / "site"))
    imported = subprocess.run(importing, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert imported.stdout.startswith(str(tmp_path / "site"))


@pytest.mark.slow
def test_requiring_the_library_makes_its_absence_an_error(tree, tmp_path):
    installed = pip_install(tree, tmp_path / "site", IBKERNELS_REQUIRE_CPP="1", CXX="/nonexistent/c++")
    assert installed.returncode != 0
    assert "IBKERNELS_REQUIRE_CPP=1, but the CPU library was not built: no C++ compiler" in installed.stderr


@pytest.mark.slow
def test_an_isolated_build_skips_the_library_and_says_how_to_get_it(tree):
    # -S leaves site-packages out, as an isolated build environment without torch would.
    program = (
        "import sys, runpy; sys.path.append(sys.argv.pop(1)); sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"
    )
    setuptools_only = tree / "isolated"
    setuptools_only.mkdir()
    site = Path(sysconfig.get_path("purelib"))
    for name in ["setuptools", "_distutils_hack"]:
        (setuptools_only / name).symlink_to(site / name)
    command = [sys.executable, "-S", "-c", program, str(setuptools_only), "build_ext", "--build-lib", "out"]
    subprocess.run(command, cwd=tree, env=environment(), capture_output=True, text=True, check=True)

    skipped = json.loads((tree / "out/ibkernels/_native_build.json").read_text())["skipped"]
    assert "torch was absent" in skipped and "--no-build-isolation" in skipped


@pytest.mark.slow
def test_cmake_alone_builds_and_tests_the_library(tree):
    def run(*command: str) -> str:
        result = subprocess.run(
            command, cwd=tree, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    run("cmake", "-S", ".", "-B", "build", f"-DPython3_EXECUTABLE={sys.executable}")
    run("cmake", "--build", "build")
    assert "100% tests passed" in run("ctest", "--test-dir", "build")
    assert draw(tree / "build") == EXPECTED_DRAW
    # The library must run on machines other than the one that built it.
    assert str(sysconfig.get_path("purelib")).encode() not in (tree / "build/libibkernels_cpu.so").read_bytes()


@pytest.mark.slow
def test_a_wheel_is_for_one_platform_exactly_when_it_holds_the_library(tree):
    def wheel(**variables: str) -> tuple[str, list[str]]:
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            "dist",
            ".",
        ]
        subprocess.run(command, cwd=tree, env=environment(**variables), capture_output=True, check=True)
        (path,) = (tree / "dist").glob("*.whl")
        names = zipfile.ZipFile(path).namelist()
        path.unlink()
        return path.name, names

    name, files = wheel(IBKERNELS_REQUIRE_CPP="1")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert name == f"ibft-{PROJECT['version']}-py3-none-{platform}.whl"
    assert {"ibkernels/libibkernels_cpu.so", "ibkernels/_native_build.json", "ibft/py.typed"} <= set(files)
    assert {file.split("/")[0] for file in files} == {"ibkernels", "ibft", f"ibft-{PROJECT['version']}.dist-info"}

    # In the same tree, where the first build left its library: it must not slip into a wheel that says it has none.
    name, files = wheel(IBKERNELS_SKIP_CPP="1")
    assert name == f"ibft-{PROJECT['version']}-py3-none-any.whl"
    assert "ibkernels/_native_build.json" in files
    assert not [file for file in files if file.endswith(".so")]


@pytest.mark.slow
def test_the_sdist_holds_what_the_build_needs(tree):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"], cwd=tree, env=environment(), capture_output=True, check=True
    )
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(file.relative_to(tree)) for file in (tree / "ibkernels/csrc").rglob("*") if file.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "ibft/py.typed"} <= files
    assert not [file for file in files if file.endswith((".so", "_native_build.json"))]
