"""The flags of `ibft eval`, command by command."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ibft.errors import InputError
from ibft.evaluate.problems import TASKS
from ibft.evaluate.walls import Limits
from ibft.flags import AT_LEAST_1, NOT_EMPTY, NOT_NEGATIVE, POSITIVE, REQUIRED, Check, check_fields, flag

_TASK = f"{', '.join(TASKS)}, or a file of JSON lines with task_id, prompt and tests"
_ABOVE_0_TO_1: Check = (lambda v: 0 < v <= 1, "greater than 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class _Flags:
    """Checked when made."""

    def __post_init__(self) -> None:
        check_fields(self)

    def part(self, kind: type[_Flags]) -> Any:
        """The fields that another of these classes has too, as that class."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})


@dataclass(frozen=True, kw_only=True)
class TaskFlags(_Flags):
    """Which problems."""

    task: str = flag("task", REQUIRED, _TASK, NOT_EMPTY)
    data: str | None = flag(
        "task", None, "the task's file, a folder that holds it, or a data set on the Hub", NOT_EMPTY, path=True
    )
    split: Literal["all", "test", "train", "validation", "prompt"] = flag(
        "task", "all", "of mbpp, the only one divided"
    )


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(TaskFlags):
    """`ibft eval generate`."""

    model: str | None = flag(
        "model",
        None,
        "Hub name or folder; for --endpoint, its name there; not given: the one the adapter names",
        NOT_EMPTY,
        path=True,
    )
    adapter: str | None = flag(
        "model", None, "folder that `ibft train` wrote, or a checkpoint in it", NOT_EMPTY, path=True
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "model", "auto", "of the model; auto: bfloat16 on a GPU that has it, else float32"
    )
    use_cpu: bool = flag("model", False, "leave a GPU alone")
    output: str = flag(
        "output", REQUIRED, "folder for samples.jsonl; a command that was stopped goes on there", NOT_EMPTY, path=True
    )
    overwrite: bool = flag("output", False, "make the samples in the output folder anew")
    num_samples: int = flag("sampling", 10, "of each problem at each temperature", AT_LEAST_1)
    temperature: list[float] = flag(  # noqa: RUF009
        "sampling", [0.2], "one or several; 0 takes the most probable token", NOT_NEGATIVE
    )
    top_p: float = flag("sampling", 0.95, "share of the probability that is sampled from", _ABOVE_0_TO_1)
    top_k: int = flag("sampling", 0, "most probable tokens that are sampled from; 0: all", NOT_NEGATIVE)
    max_new_tokens: int | None = flag("sampling", None, "at most; not given: the task's", AT_LEAST_1)
    stop: list[str] = flag(  # noqa: RUF009
        "sampling", [], "texts that end an answer, \\n for a new line; not given: the task's; none: none", verbatim=True
    )
    seed: int = flag("sampling", 0, "from which each sample's own follows", NOT_NEGATIVE)
    batch_size: int = flag("sampling", 16, "samples made at a time", AT_LEAST_1)
    limit: int | None = flag("sampling", None, "only the first N problems", AT_LEAST_1)
    prompt_format: Literal["auto", "plain", "text", "chat"] = flag(
        "prompt", "auto", "auto: what the adapter was trained with, else plain, for a base model to continue"
    )
    question: str | None = flag(
        "prompt", None, "in place of the task's; {prompt} and {description} are filled in", NOT_EMPTY
    )
    endpoint: str | None = flag(
        "server", None, "address of an OpenAI-compatible API: http://localhost:8000/v1", NOT_EMPTY
    )
    concurrency: int = flag("server", 32, "requests at a time", AT_LEAST_1)
    retries: int = flag("server", 8, "tries of a request after the first", NOT_NEGATIVE)
    request_timeout: float = flag("server", 600.0, "seconds without a byte from the server", POSITIVE)
    debug: bool = flag("output", False, "show the traceback of an error")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and self.adapter is None:
            raise InputError("--model must be given, or an --adapter that names its base model.")
        if self.endpoint is not None and self.model is None:
            raise InputError("--model must be given with --endpoint: the name that the server knows the model by.")
        if not self.temperature:
            raise InputError("--temperature takes one number or several, not none.")
        if len(set(self.temperature)) < len(self.temperature):
            raise InputError(f"--temperature names one twice: {', '.join(f'{value:g}' for value in self.temperature)}.")
        if 0 in self.temperature and self.num_samples > 1:
            raise InputError(
                f"--temperature 0 gives the same completion each time, so {self.num_samples} samples tell no more than "
                "one; use --num_samples 1."
            )


@dataclass(frozen=True, kw_only=True)
class SandboxFlags(_Flags):
    """What executed code may take."""

    workers: int | None = flag("sandbox", None, "samples judged at a time; not given: one for each core", AT_LEAST_1)
    wall_seconds: float = flag("sandbox", Limits.wall_seconds, "of each program", POSITIVE)
    cpu_seconds: float = flag("sandbox", Limits.cpu_seconds, "of each program", POSITIVE)
    memory_mib: int = flag("sandbox", Limits.memory_mib, "of each program, compilers included", AT_LEAST_1)
    allow_unsafe: bool = flag("sandbox", False, "where no sandbox works, run the samples with limits alone")
    debug: bool = flag("output", False, "show the traceback of an error")


@dataclass(frozen=True, kw_only=True)
class JudgeFlags(SandboxFlags):
    """How samples are assembled and judged."""

    completion_format: Literal["auto", "body", "full"] = flag(
        "verdict", "auto", "whether completions continue the prompt or replace it; auto: what each looks like"
    )
    header: Literal["dataset", "model"] = flag("verdict", "dataset", "whose module header a full Verilog design gets")
    rule: Literal["strict", "v1"] = flag("verdict", "strict", "of Verilog; v1: as VerilogEval v1 judged")
    subset: bool = flag("verdict", False, "samples that are not there do not count as failed")


@dataclass(frozen=True, kw_only=True)
class RunFlags(JudgeFlags, TaskFlags):
    """`ibft eval run`."""

    samples: str = flag("task", REQUIRED, "file of JSON lines with task_id and completion", NOT_EMPTY, path=True)
    output: str = flag(
        "output", REQUIRED, "folder for the results; a run that was stopped goes on there", NOT_EMPTY, path=True
    )
    extract_again: bool = flag("verdict", False, "take the code from each line's raw text anew")


@dataclass(frozen=True, kw_only=True)
class EvalFlags(JudgeFlags, GenerateFlags):
    """`ibft eval TASK`."""

    output: str = flag("output", "", "folder for samples and results; not given: evaluation/TASK/MODEL", path=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output:
            names = [Path(name).name for name in (self.model, self.adapter) if name is not None]
            task = self.task if self.task in TASKS else Path(self.task).name.partition(".")[0]
            object.__setattr__(self, "output", str(Path("evaluation", task, "+".join(names))))


@dataclass(frozen=True, kw_only=True)
class DoctorFlags(SandboxFlags):
    """`ibft eval doctor`."""

    data: str | None = flag(
        "task", None, "a folder with the tasks' files; without TASK: those whose file is there", NOT_EMPTY, path=True
    )
    json: bool = flag("output", False, "print one JSON object, and nothing else, on stdout")


@dataclass(frozen=True, kw_only=True)
class ReportFlags(_Flags):
    """`ibft eval report` and `ibft eval compare`."""

    json: bool = flag("output", False, "print one JSON object, and nothing else, on stdout")
    k: list[float] = flag(  # noqa: RUF009
        "output", [], "of Pass@k, with every m; not given: 1, 5 and 10, as far as the samples allow"
    )
    seed: int = flag("output", 0, "of the bootstrap", NOT_NEGATIVE)
    debug: bool = flag("output", False, "show the traceback of an error")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bad := [k for k in self.k if k < 1 or not float(k).is_integer()]:
            raise InputError(f"--k takes whole numbers of at least 1, not {bad[0]:g}.")

    @property
    def ks(self) -> list[int] | None:
        return sorted({int(k) for k in self.k}) or None


@dataclass(frozen=True, kw_only=True)
class PlotFlags(ReportFlags):
    """`ibft eval report`."""

    plot: str | None = flag(
        "output",
        None,
        "file for Pass@k^(m) against m, a line for each folder: .png, .svg or .pdf",
        NOT_EMPTY,
        path=True,
    )
