"""`python -m ibkernels.aot`: compiles every shipped Triton configuration for named GPUs, without one, and reports.

    python -m ibkernels.aot [--arch sm_80 sm_90 sm_100 gfx942] [--canonical] [--json report.json]

Registers, spilled bytes, shared memory and matrix instructions are facts of the compiled kernel; nothing is timed.
Exits with 1 when a shipped configuration spills (more than 32 bytes, or anything in a loop), needs more shared memory
or tensor memory than the chip has, or multiplies half-precision matrices without the chip's own matrix instructions.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

# Compiled code is what is wanted here, whatever the environment says of interpreting it.
os.environ.pop("TRITON_INTERPRET", None)


class Chip(NamedTuple):
    """What a target compiles for, its shared memory a program, and its matrix instruction in the assembly."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    matrix: str


# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (the opt-in maximum of a
# thread block); 64 KiB of LDS on CDNA 3. sm_89 and sm_120 stand for the workstation cards, sm_86 included.
CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 163 * 1024, "mma.sync"),
    "sm_89": Chip("cuda", 89, 32, 99 * 1024, "mma.sync"),
    "sm_90": Chip("cuda", 90, 32, 227 * 1024, "wgmma.mma_async"),
    "sm_100": Chip("cuda", 100, 32, 227 * 1024, "tcgen05.mma"),
    "sm_120": Chip("cuda", 120, 32, 99 * 1024, "mma.sync"),
    "gfx942": Chip("hip", "gfx942", 64, 64 * 1024, "v_mfma"),
}
SPILL_LIMIT = 32  # bytes, outside of every loop
TENSOR_MEMORY_COLUMNS = 512  # of sm_100: PTX ISA, "Tensor Memory"


class Kernel(NamedTuple):
    """How a kernel is compiled: its module, its arguments' types ("T": the compute dtype), and what is constant."""

    module: str
    name: str
    types: dict[str, str]
    flags: dict[str, Any]
    widths: tuple[int, ...]  # one for every row of the table of configurations
    variants: dict[str, dict[str, Any]]  # other flags that calls have, by name
    multiplies: bool = True


_BOTTLENECK = {"rng": "*i64", "rows": "*i64", **dict.fromkeys(("kl_scale", "logvar_min", "logvar_max"), "fp32")}
_SIZES = dict.fromkeys(
    (
        *("N", "H", "K", "R", "V", "D", "columns", "stride", "stride_n", "grad_stride"),
        *("rows_per_split", "columns_per_split"),
    ),
    "i32",
)
# Arguments that a launch has only with a flag: None without it.
_ONLY_WITH = {
    **{"bias": "HAS_BIAS", "rng": "SAMPLE", "rows": "HAS_ROWS", "grad_z": "HAS_Z", "grad_kl": "HAS_KL"},
    **{"grad_hidden": "NEEDS_HIDDEN", "grad_a": "NEEDS_A", "grad_bias": "NEEDS_BIAS", "pull": "PULL", "grad_x": "PULL"},
    **{"logit_sum": "SMOOTH", "weight_sum": "SMOOTH", "weighted_sum": "STATS", "best": "STATS", "grad": "GRAD"},
}
_NOISE = {"SAMPLE": True, "HAS_ROWS": True}
_BACKWARD = {"HAS_Z": True, "HAS_KL": True, **_NOISE}
_LORA_BACKWARD = {
    **{"grad_z": "*T", "grad_kl": "*fp32", "t": "*T", "lora_b": "*T", "bias": "*fp32"},
    **{**_BOTTLENECK, **_SIZES},
}
_HEAD = {
    **{"x": "*T", "weight": "*T", "bias": "*fp32", "labels": "*i64", "upstream": "*fp32", "losses": "*fp32"},
    **dict.fromkeys(("peak", "total", "pull", "lse", "peaks", "factors", "owns", "entropy"), "*fp32"),
    **dict.fromkeys(("logit_sum", "weighted_sum", "weight_sum"), "*fp32"),
    **{"best": "*i32", "correct": "*u1", "ignore_index": "i32", "S": "i32"},
    **dict.fromkeys(("label_smoothing", "z_loss", "softcap", "logit_scale"), "fp32"),
    **_SIZES,
}
_PLAIN_HEAD = {"HAS_BIAS": True, "SMOOTH": False}
_WITH_GRADIENT = {**_PLAIN_HEAD, "STATS": False, "PULL": True}
_SUMS = {"without a bias": {"HAS_BIAS": False}, "evaluation": {"PULL": False}}
_OPTIONS = {"every option": {"SMOOTH": True}}
# `odd`: sizes that are no multiple of 16, which loads of whole vectors ask for; those of the others are.
_RAGGED = {"ragged H": {"EVEN_H": False}}
_ODD_RANK = {"odd R": {"odd": ("R",)}}

_LINEAR = Kernel(
    "bottleneck_linear",
    "bottleneck_linear_fwd_kernel",
    {"hidden": "*T", "weight": "*T", "bias": "*fp32", "z": "*T", "mu": "*T", "raw_logvar": "*fp32", "kl": "*fp32"}
    | _BOTTLENECK
    | _SIZES,
    {"HAS_BIAS": True, **_NOISE, "SAVE": True, "EVEN_H": True},
    (64, 256),
    _RAGGED,
)

KERNELS = {
    "bottleneck_linear_fwd": _LINEAR,
    "bottleneck_linear_fwd_half": _LINEAR._replace(widths=(256,)),
    "bottleneck_linear_bwd": Kernel(
        "bottleneck_linear",
        "bottleneck_linear_bwd_kernel",
        {"grad_z": "*T", "grad_kl": "*fp32", "mu": "*T", "raw_logvar": "*fp32", "grad": "*T"} | _BOTTLENECK | _SIZES,
        _BACKWARD,
        (256,),
        {},
        multiplies=False,
    ),
    "bottleneck_lora_fwd": Kernel(
        "bottleneck_lora",
        "bottleneck_lora_fwd_kernel",
        {"hidden": "*T", "lora_a": "*T", "lora_b": "*T", "bias": "*fp32", "z": "*T", "t": "*T", "kl": "*fp32"}
        | _BOTTLENECK
        | _SIZES,
        {"HAS_BIAS": True, **_NOISE, "SAVE": True, "EVEN_H": True},
        (32, 64, 128),
        {**_RAGGED, **_ODD_RANK},
    ),
    "bottleneck_lora_bwd_t": Kernel(
        "bottleneck_lora_bwd",
        "bottleneck_lora_bwd_t_kernel",
        {**_LORA_BACKWARD, "grad_t": "*T"},
        {"HAS_BIAS": True, **_BACKWARD},
        (32, 64, 128),
        _ODD_RANK,
    ),
    "bottleneck_lora_bwd_b": Kernel(
        "bottleneck_lora_bwd",
        "bottleneck_lora_bwd_b_kernel",
        {**_LORA_BACKWARD, "grad_b": "*fp32", "grad_bias": "*fp32"},
        {"HAS_BIAS": True, **_BACKWARD},
        (32, 64, 128),
        _ODD_RANK,
    ),
    "bottleneck_lora_bwd_hidden": Kernel(
        "bottleneck_lora_bwd",
        "bottleneck_lora_bwd_hidden_kernel",
        {
            **{"grad_t": "*T", "hidden": "*T", "lora_a": "*T", "grad_hidden": "*T", "grad_a": "*fp32"},
            **_SIZES,
        },
        {"NEEDS_HIDDEN": True, "NEEDS_A": True, "EVEN_H": True},
        (32, 64, 128),
        {**_RAGGED, "hidden alone": {"NEEDS_A": False}, "A alone": {"NEEDS_HIDDEN": False}},
    ),
    "cross_entropy_fwd": Kernel(
        "cross_entropy", "cross_entropy_fwd_kernel", _HEAD, _WITH_GRADIENT, (64, 128, 256, 512), _SUMS
    ),
    "cross_entropy_fwd_stats": Kernel(
        "cross_entropy",
        "cross_entropy_fwd_kernel",
        _HEAD,
        {**_WITH_GRADIENT, "STATS": True},
        (64, 128, 256, 512),
        {**_SUMS, **_OPTIONS},
    ),
    "cross_entropy_finish": Kernel(
        "cross_entropy",
        "cross_entropy_finish_kernel",
        {**_HEAD, "grad_x": "*T"},
        {**_WITH_GRADIENT, "STATS": True},
        (256, 512),
        {**_SUMS, **_OPTIONS},
        multiplies=False,
    ),
    "cross_entropy_bwd_weight": Kernel(
        "cross_entropy",
        "cross_entropy_bwd_weight_kernel",
        {**_HEAD, "grad_weight": "*fp32", "grad_bias": "*fp32"},
        {**_PLAIN_HEAD, "NEEDS_BIAS": True},
        (64, 128, 256, 512),
        {"without a bias": {"HAS_BIAS": False, "NEEDS_BIAS": False}, **_OPTIONS},
    ),
    "softmax_grad": Kernel(
        "wide_cross_entropy",
        "softmax_grad_kernel",
        {**_HEAD, "logits": "*fp32", "grad": "*T"},
        {"HAS_BIAS": False, "SOFTCAP": False, "SMOOTH": False, "STATS": True, "GRAD": True},
        (4096,),
        {
            "every option": {"HAS_BIAS": True, "SOFTCAP": True, "SMOOTH": True},
            "evaluation": {"GRAD": False},
            "odd V": {"odd": ("V",)},
        },
        multiplies=False,
    ),
}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}  # tf32: float32 whose products are in that precision
_CANONICAL = {
    "bottleneck_linear_fwd": 256,
    "cross_entropy_fwd": 256,
    "cross_entropy_fwd_stats": 256,
    "cross_entropy_bwd_weight": 256,
}


class Job(NamedTuple):
    """One compilation."""

    kernel: str
    arch: str
    dtype: str
    width: int
    variant: str = ""


def jobs(archs: Sequence[str], canonical: bool) -> list[Job]:
    """Every shipped configuration for the chips, in bfloat16 with other options too; `canonical`: one a kernel."""
    from ibkernels.gpu import configs

    found = []
    for arch in archs:
        for name, kernel in KERNELS.items():
            for dtype in ("bf16",) if canonical else DTYPES:
                widths = (_CANONICAL.get(name, kernel.widths[0]),) if canonical else kernel.widths
                variants = ("", *kernel.variants) if dtype == "bf16" and not canonical else ("",)
                limit = configs.widest(name, DTYPES[dtype], arch) if kernel.multiplies or dtype != "tf32" else 0
                found += [
                    Job(name, arch, dtype, width, variant) for width in widths if width <= limit for variant in variants
                ]
    return found


def compile_job(job: Job) -> dict[str, Any]:
    """Compiles one configuration; a row of the report. `faults` lists what must not ship."""
    from ibkernels.gpu import configs

    chip = CHIPS[job.arch]
    config = configs.lookup(job.kernel, DTYPES[job.dtype], job.width, job.arch)
    row: dict[str, Any] = {**job._asdict(), "config": config.sizes}
    try:
        compiled = compiled_kernel(job, config)
    except Exception as error:  # of many kinds: the compiler's, the assembler's, out of resources
        return {**row, "faults": [f"does not compile: {' '.join(str(error).split())[:200]}"]}
    assembly = compiled.asm["ptx" if chip.backend == "cuda" else "amdgcn"]
    resources = _cuda_resources(compiled.asm["cubin"]) if chip.backend == "cuda" else _hip_resources(assembly)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    row |= {**resources, "shared_bytes": compiled.metadata.shared, "tensor_memory_columns": tensor_memory}
    row["mma"] = assembly.count(chip.matrix)
    return {**row, "faults": _faults(row, chip, KERNELS[job.kernel].multiplies)}


def compiled_kernel(job: Job, config: Any) -> Any:
    """What triton.compile gives for the job's kernel in a configuration of `configs`."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ibkernels.gpu.configs import COMPILER

    kernel, chip = KERNELS[job.kernel], CHIPS[job.arch]
    function = getattr(importlib.import_module(f"ibkernels.gpu.{kernel.module}"), kernel.name)
    flags = {"odd": (), **kernel.flags, **kernel.variants.get(job.variant, {})}
    constants: dict[str, Any] = {
        **flags,
        **config.blocks,
        "PRECISION": "tf32" if job.dtype == "tf32" else "ieee",
        **dict.fromkeys(("BD", "BR"), max(16, triton.next_power_of_2(job.width))),
    }
    names = [parameter.name for parameter in function.params]
    element = "fp32" if job.dtype == "tf32" else job.dtype
    signature = {
        name: kernel.types[name].replace("T", element)
        if name in kernel.types and flags.get(_ONLY_WITH.get(name, ""), True)
        else "constexpr"
        for name in names
    }
    constants = {name: constants.get(name) for name in names if signature[name] == "constexpr"}
    aligned = [  # as at run time: N is any number
        i
        for i, parameter in enumerate(function.params)
        if signature[parameter.name].startswith("*")
        or (parameter.name in _SIZES and parameter.name not in flags["odd"] and not parameter.do_not_specialize)
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = GPUTarget(chip.backend, chip.arch, chip.warp_size)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **COMPILER}
    return triton.compile(source, target, options)


def _faults(row: dict[str, Any], chip: Chip, multiplies: bool) -> list[str]:
    faults = []
    if row["spill_bytes"] > SPILL_LIMIT or row["spills_in_loops"]:
        faults.append(f"spills {row['spill_bytes']} bytes, {row['spills_in_loops']} accesses of them in loops")
    if row["shared_bytes"] > chip.shared_bytes:
        faults.append(f"needs {row['shared_bytes']} bytes of shared memory of {chip.shared_bytes}")
    if row["tensor_memory_columns"] > TENSOR_MEMORY_COLUMNS:
        faults.append(f"needs {row['tensor_memory_columns']} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}")
    if multiplies and row["dtype"] in ("bf16", "fp16") and not row["mma"]:
        faults.append(f"has no {chip.matrix}")
    return faults


def _cuda_resources(cubin: bytes) -> dict[str, int]:
    """By the tools that triton ships: registers, bytes of local memory, and accesses to them inside loops."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found is not None, usage
        registers, stack, local = map(int, found.groups())
        in_loops = 0
        if stack + local:
            sass = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
            in_loops = _local_accesses_in_loops(sass)
    return {"registers": registers, "spill_bytes": stack + local, "spills_in_loops": in_loops}


def _local_accesses_in_loops(sass: str) -> int:
    """Loads and stores of local memory between a label and a later branch back to it."""
    labels: dict[str, int] = {}
    accesses: list[int] = []
    loops: list[tuple[int, int]] = []
    for number, line in enumerate(sass.splitlines()):
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = number
        elif re.search(r"\b(LDL|STL)\b", line):
            accesses.append(number)
        elif (branch := re.search(r"\bBRA\b.*?`\((\.L_x_\w+)\)", line)) and branch[1] in labels:
            loops.append((labels[branch[1]], number))
    # The compiler ends a kernel with a branch to itself, which encloses nothing.
    return sum(any(start <= access <= end for start, end in loops) for access in accesses)


def _hip_resources(assembly: str) -> dict[str, int]:
    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    spilled = 4 * metadata("vgpr_spill_count")  # a lane's; where they are, the metadata does not say
    return {"registers": metadata("vgpr_count"), "spill_bytes": spilled, "spills_in_loops": 0}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if a configuration must not ship."""
    parser = argparse.ArgumentParser(prog="python -m ibkernels.aot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", default=list(CHIPS), choices=list(CHIPS), metavar="ARCH")
    parser.add_argument("--canonical", action="store_true", help="one shape of each kernel, in bfloat16")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    arguments = parser.parse_args(argv)
    with ProcessPoolExecutor(arguments.processes) as pool:
        rows = list(pool.map(compile_job, jobs(arguments.arch, arguments.canonical)))
    head = f"{'kernel':26}{'variant':16}{'arch':8}{'dtype':6}{'width':>6}{'regs':>6}{'spill':>6}{'shared':>8}{'mma':>5}"
    print(f"{head}  config")
    for row in rows:
        config = " ".join(f"{name}={value}" for name, value in row["config"].items())
        numbers = [row.get(name, "-") for name in ("registers", "spill_bytes", "shared_bytes", "mma")]
        print(
            f"{row['kernel']:26}{row['variant']:16}{row['arch']:8}{row['dtype']:6}{row['width']:6}"
            f"{numbers[0]:>6}{numbers[1]:>6}{numbers[2]:>8}{numbers[3]:>5}  {config}"
        )
        for fault in row["faults"]:
            print(f"    fault: {fault}")
    faulty = sum(bool(row["faults"]) for row in rows)
    print(f"{len(rows)} configurations, {faulty} of them with faults")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
