"""What the README and docs/ say of the code is so: what can run runs, page by page, and what they name exists.

Python and the commands of ibft run, with the placeholder paths replaced by real ones; `SHOWN` is not run.
"""

import ast
import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trl
from huggingface_hub.utils import disable_progress_bars

from ibft.arguments import SOURCES
from ibft.cli import main
from ibft.config import TrainConfig
from ibft.config_file import read_config_file
from ibft.estimate.cli import EstimateConfig
from ibft.evaluate import config as evaluation
from ibft.export import ExportConfig
from ibft.lab.experiment import LabConfig
from ibft.lab.tasks import generate_tasks, write_jsonl
from ibft.lab.tiny import build_llama, build_tokenizer, save_base
from ibft.memorization import config as memorization
from ibft.represent.cli import PlotConfig, RepresentConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Languages of blocks that are not run: formulas, output, and commands of other programs or of a clone.
SHOWN = {"", "text", "console", "math", "json", "bibtex"}
# The last of a flag counts: what a page trains stays small here.
SMALL = "--max_length 256 --max_steps 2 --per_device_train_batch_size 2 --use_cpu"
# Beginnings of messages that troubleshooting.md quotes from other libraries.
OF_OTHERS = (
    "torch.OutOfMemoryError",
    "DistStoreError",
    "Timed out waiting",
    "We couldn't connect",
    "padding_free=True",
)
# The dataclass whose fields are the flags of a command.
FLAGS: dict[str, type] = {
    "train": TrainConfig,
    "eval": evaluation.EvalFlags,
    "eval generate": evaluation.GenerateFlags,
    "eval run": evaluation.RunFlags,
    "eval report": evaluation.PlotFlags,
    "eval compare": evaluation.ReportFlags,
    "eval doctor": evaluation.DoctorFlags,
    "estimate": EstimateConfig,
    "memorization score": memorization.ScoreFlags,
    "memorization plot": memorization.PlotFlags,
    "memorization filter": memorization.FilterFlags,
    "represent": RepresentConfig,
    "represent plot": PlotConfig,
    "export": ExportConfig,
    "lab": LabConfig,
}
# What the pages name of other programs: pip, torchrun, hf, Docker, `transformers serve`, vLLM, our benchmarks' own.
OTHER_FLAGS = {
    *("no-build-isolation", "no-deps", "version", "help"),
    *("nproc_per_node", "shutdown-timeout", "signals-to-handle", "local-dir", "security-opt", "cap-add"),
    *("device", "port", "enable-lora", "lora-modules", "max-lora-rank", "plots"),
    *("record", "records", "rounds", "threads", "benchmark-quiet"),
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(code: str) -> list[str]:
    """The lines of a bash block that call ibft; others are of pip, make and torchrun."""
    lines = [line.split(" #")[0].strip() for line in code.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("ibft ")]


@pytest.fixture(scope="module")
def documented_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with the depth that the pages speak of (target layer 20), and a chat template."""
    folder = tmp_path_factory.mktemp("docs-base")
    tokenizer = build_tokenizer([f"{t.description}\n{t.program}" for t in generate_tasks(50, seed=1)], vocab_size=400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    save_base(build_llama(tokenizer, hidden_size=16, num_layers=24, num_heads=2), tokenizer, folder)
    return folder


@pytest.fixture
def real_paths(documented_base: Path, test_data: Callable[[str], Path], tmp_path: Path) -> Callable[[str], str]:
    """Replaces path/to/NAME: models and data that exist, and folders to write to that do not."""
    tasks = generate_tasks(24, seed=2)
    write_jsonl(tasks, tmp_path / "data.jsonl")
    pairs = [{"prompt": f"{task.description}\n", "completion": task.program} for task in tasks]
    chats = [
        {"messages": [{"role": "user", "content": t.description}, {"role": "assistant", "content": t.program}]}
        for t in tasks
    ]
    for name, rows in (("pairs.jsonl", pairs), ("chat.jsonl", chats)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elsewhere = {
        "mbpp.jsonl": lambda: test_data("mbpp/mbpp.jsonl"),
        "training_args.json": lambda: test_data("../seed_configs/training_args.json"),
        "adapter_config.json": lambda: test_data("../seed_configs/adapter_config.json"),
        "model": lambda: documented_base,
    }

    def replace(text: str) -> str:
        return re.sub(
            r"path/to/([\w.-]+)",
            lambda match: str(elsewhere[match[1]]() if match[1] in elsewhere else tmp_path / match[1]),
            text,
        )

    return replace


def trained_small(command: str) -> list[str]:
    words = shlex.split(command.removeprefix("ibft "))
    return [*words, *SMALL.split()] if words[0] == "train" else words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, real_paths: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, use_cpu=True))  # trl insists on it where no GPU is
    disable_progress_bars()
    names: dict[str, Any] = {"__name__": page.stem}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(real_paths(code), page.name, "exec"), names)
        elif language == "bash":
            for command in commands(code):
                assert main(trained_small(real_paths(command))) == 0, command
        elif language == "yaml":
            (tmp_path / "run.yaml").write_text(real_paths(code))
            TrainConfig.from_dict(read_config_file(str(tmp_path / "run.yaml"), TrainConfig))
        elif language == "diff":
            before, after = (
                "\n".join(line[1:] for line in code.splitlines() if not line.startswith(sign)) for sign in "+-"
            )
            assert sum(line[:1] in "+-" for line in code.splitlines() if line) <= 3
            for script in (before, after):
                exec(compile(real_paths(script), page.name, "exec"), {})
        else:
            assert language in SHOWN, f"{page.name} has a block of {language!r}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """As GitHub names its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def flags_of(command: str) -> set[str]:
    """The names of a command's flags, as `--name` and `--no_name` give them; all commands' for ""."""
    classes = [kind for name, kind in FLAGS.items() if command in ("", name)]
    names = {
        name for kind in classes for field in dataclasses.fields(kind) for name in (field.name, f"no_{field.name}")
    }
    return names | (set(SOURCES) if command in ("", "train") else set())


def command_of(words: list[str]) -> str:
    """Of ["eval", "run", "--task", ...] "eval run"; with a task in its place "eval"."""
    return next((name for name in (" ".join(words[:2]), words[0]) if name in FLAGS), "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
        known = name.replace("-", "_") in flags_of("") or name in OTHER_FLAGS
        assert known or (name.endswith("_") and any(flag.startswith(name) for flag in flags_of(""))), f"--{name}"
    code = "\n".join(block for language, block in blocks(page) if language not in ("python", "diff"))
    for line in code.replace("\\\n", " ").splitlines():
        line = line.split(" #")[0]
        found = re.search(r"(?:\bibft|-m ibft\.(?=train\b)) ?([a-z].*)", line)
        if found is None or found[1].split()[0] not in {name.split()[0] for name in FLAGS}:
            continue
        command = command_of(found[1].split())
        for name in re.findall(r" --(\w+)", found[1]):
            assert name in flags_of(command), f"ibft {command} has no --{name}: {line}"


def test_the_messages_that_troubleshooting_quotes_are_what_the_code_says() -> None:
    """Word for word from where the quote begins to where it ends, but for values; "..." stands for what is left out."""
    messages = [
        [node.value] if isinstance(node, ast.Constant) else [getattr(part, "value", None) for part in node.values]
        for package in ("ibft", "ibkernels")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    messages = [[part if isinstance(part, str) else None for part in parts] for parts in messages]  # None: a value
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    titles = "\n".join(re.findall(r"^\*\*.*\*\*.*$", page, flags=re.MULTILINE))
    quotes = [quote for quote in re.findall(r"(?<!`)`([^`]+)`(?!`)", titles) if not quote.startswith(OF_OTHERS)]
    assert len(quotes) > 20
    for quote in quotes:
        quote = quote.removeprefix("... ").removesuffix(" ...")
        words = quote.split()
        runs = [" ".join(words[at : at + 3]) for at in range(max(1, len(words) - 2))]
        alike = [parts for parts in messages if any(run in part for part in parts if part for run in runs)]
        assert any(says(parts, quote) for parts in alike), quote


def says(parts: list[str | None], quote: str) -> bool:
    """Whether the quote is a part of a message of texts and values: it begins where that does, or with a word of it."""
    if parts[0] is None and reads(parts, quote):
        return True
    for first, part in enumerate(parts):
        for word in re.finditer(r"\S+", part or ""):
            text = part[word.start() :]
            if text.startswith(quote) or (quote.startswith(text) and reads([text, *parts[first + 1 :]], quote)):
                return True
    return False


def reads(parts: list[str | None], quote: str) -> bool:
    """Whether the quote is how the message begins. It ends with a value of one word, or a word or the end of a text."""
    pattern = ""
    for at, part in enumerate(parts):
        if part is None:
            if at > 0 and parts[at - 1] is not None and re.fullmatch(pattern + r"\S+", quote):
                return True
            pattern += "(?s:.+?)"
            continue
        ends = [end for end in range(1, len(part) + 1) if end == len(part) or re.search(r"\w", part[:end])]
        if re.fullmatch(f"{pattern}(?:{'|'.join(re.escape(part[:end]) for end in ends)})", quote):
            return True
        pattern += re.escape(part)
    return False


def test_the_readme_has_what_these_tests_look_for() -> None:
    found = blocks(PAGES[0])
    assert sum(language == "python" for language, _ in found) == 3
    assert sum(len(commands(code)) for language, code in found if language == "bash") == 2
