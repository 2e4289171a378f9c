"""Builds the native CPU library with CMake and puts it into the ibkernels package; the metadata is in pyproject.toml.

An install never fails for want of the library, because everything works without it. What was built, or why nothing was,
is left in ibkernels/_native_build.json, which `python -m ibkernels` reports. Two environment variables rule the build:
IBKERNELS_SKIP_CPP=1 leaves the library out, IBKERNELS_REQUIRE_CPP=1 turns a missing library into an error.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
LIBRARY = "libibkernels_cpu.so"
RECORD = "_native_build.json"


class SkipBuild(Exception):
    """Why this machine does not get the library, as one sentence."""


class BuildNative(build_ext):
    """CMake in place of setuptools' compiler; `editable_mode` (pip install -e) builds into the source tree."""

    def run(self) -> None:
        library, record = self._destinations()
        library.unlink(missing_ok=True)  # one that was built for another torch must not outlive a skipped build
        record.parent.mkdir(parents=True, exist_ok=True)
        try:
            _build(library, record)
        except SkipBuild as reason:
            if os.environ.get("IBKERNELS_REQUIRE_CPP") == "1":
                raise CompileError(f"IBKERNELS_REQUIRE_CPP=1, but the CPU library was not built: {reason}") from None
            record.write_text(json.dumps({"skipped": str(reason)}, indent=2) + "\n")
            print(f"ibkernels: skipped the native CPU library: {reason}", file=sys.stderr)
            self.distribution.ext_modules = []  # the wheel is then pure Python and says so in its name

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._destinations() if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # nothing here is a copy of a source file

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in lists the C++ sources

    def _destinations(self) -> tuple[Path, Path]:
        package = (ROOT if self.editable_mode or self.inplace else Path(self.build_lib)) / "ibkernels"
        return package / LIBRARY, package / RECORD


class NativeWheel(bdist_wheel):
    """The library does not use Python's ABI, so that one wheel per platform serves every Python 3."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def _build(library: Path, record: Path) -> None:
    environment = dict(os.environ)
    # pip runs in a virtual environment without activating it: look for cmake and ninja there first.
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment.get("PATH", os.defpath)])
    cmake = _check_prerequisites(environment["PATH"])
    with tempfile.TemporaryDirectory(prefix="ibkernels-") as build:
        configure = [cmake, "-S", str(ROOT), "-B", build, f"-DPython3_EXECUTABLE={sys.executable}"]
        configure += ["-DIBKERNELS_BUILD_TESTS=OFF"]
        if "CMAKE_GENERATOR" not in environment and shutil.which("ninja", path=environment["PATH"]):
            configure += ["-G", "Ninja"]
        _run(configure, environment, "CMake could not configure the build")
        _run([cmake, "--build", build, "--parallel"], environment, "the compilation failed")
        shutil.copyfile(Path(build) / RECORD, record)
        shutil.copy2(Path(build) / LIBRARY, library)


def _check_prerequisites(path: str) -> str:
    """The cmake executable, or SkipBuild."""
    if os.environ.get("IBKERNELS_SKIP_CPP") == "1":
        raise SkipBuild("IBKERNELS_SKIP_CPP=1 was set when ibft was installed")
    if sys.platform not in ("linux", "darwin"):
        raise SkipBuild(f"it is built on Linux and macOS only, not on {sys.platform}")
    if importlib.util.find_spec("torch") is None:
        raise SkipBuild(
            "torch was absent from the build environment; with torch, cmake and setuptools installed, "
            "`pip install --no-build-isolation` of the source builds it"
        )
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(shlex.split(compiler)[0], path=path) for compiler in compilers):
        raise SkipBuild(f"no C++ compiler was found (looked for {', '.join(compilers)})")
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise SkipBuild("cmake was not found; `pip install cmake` provides it")
    return cmake


def _run(command: list[str], environment: dict[str, str], what_failed: str) -> None:
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, file=sys.stderr)
    if result.returncode != 0:
        # The compiler's first error, or else the text that CMake indents below its own.
        compiler_error = re.search(r"\berror: (.+)", result.stdout)
        complaint = compiler_error or re.search(r"CMake Error.*\n((?:\s+\S.*\n)+)", result.stdout)
        detail = textwrap.shorten(complaint[1], 200) if complaint else "no message"
        raise SkipBuild(f"{what_failed}: {detail} (pip install -v shows the whole log)")


setup(
    ext_modules=[Extension("ibkernels.libibkernels_cpu", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
)
