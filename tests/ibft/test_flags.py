"""What the flags of all commands have in common: a required one that is not given, and the home folder in a path."""

import dataclasses
import importlib
from dataclasses import dataclass

import pytest

from ibft.errors import InputError
from ibft.flags import NOT_EMPTY, REQUIRED, check_fields, flag, kind_of, parse_flags

PATHS = {
    *("base_model", "model", "adapter", "adapter_config", "training_config", "deepspeed_config"),
    *("dataset", "validation_dataset", "data", "samples", "scores", "memorization_scores"),
    *("output", "output_dir", "plot"),
}


@dataclass(frozen=True, kw_only=True)
class Flags:
    file: str = flag("group", REQUIRED, "a file", NOT_EMPTY, path=True)
    files: list[str] = flag("group", [], "files", verbatim=True, path=True)  # noqa: RUF009
    perhaps: str | None = flag("group", None, "a file or none", path=True)
    name: str = flag("group", "~", "no path")

    def __post_init__(self) -> None:
        check_fields(self)


def test_a_path_begins_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = parse_flags(Flags, ["--file=~/a", "--files", "~/b", "c~"], "program", "words")
    assert config == Flags(file="/home/someone/a", files=["/home/someone/b", "c~"], perhaps=None, name="~")


def test_a_required_flag_that_is_not_given() -> None:
    with pytest.raises(InputError, match=r"^--file must be given\. `program --help` lists the options\.$"):
        parse_flags(Flags, ["--name", "x"], "program", "words")


@pytest.mark.parametrize(
    "place",
    [
        *("config:TrainConfig", "export:ExportConfig", "estimate.cli:EstimateConfig"),
        *("represent.cli:RepresentConfig", "represent.cli:PlotConfig"),
        *(f"memorization.config:{name}Flags" for name in ("Score", "Plot", "Filter")),
        *(f"evaluate.config:{name}Flags" for name in ("Generate", "Run", "Eval", "Doctor", "Plot")),
    ],
)
def test_every_path_of_a_command_may_begin_in_the_home_folder(place: str) -> None:
    module, _, name = place.partition(":")
    cls = getattr(importlib.import_module(f"ibft.{module}"), name)
    texts = [field for field in dataclasses.fields(cls) if kind_of(cls, field.name)[0] in (str, list[str])]
    named = [field for field in texts if field.name in PATHS]
    assert named and all(field.metadata["path"] for field in named)
