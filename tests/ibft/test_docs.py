"""Every block of code in the README and in docs/ runs, page by page, its placeholder paths replaced by real ones."""

import ast
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

from ibft.cli import main
from ibft.lab.tasks import generate_tasks, write_jsonl
from ibft.lab.tiny import build_llama, build_tokenizer, save_base

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


def test_the_messages_that_troubleshooting_quotes_exist() -> None:
    """Four words in a row of each are in a string of ours; the rest may be values."""
    sources = [path.read_text() for package in ("ibft", "ibkernels") for path in (ROOT / package).rglob("*.py")]
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)))
    ours = "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    titles = "\n".join(re.findall(r"^\*\*.*\*\*.*$", page, flags=re.MULTILINE))
    messages = re.findall(r"(?<!`)`([^`]+)`(?!`)", titles)
    assert len(messages) > 20
    for message in messages:
        words = message.split()
        runs = [" ".join(words[start : start + 4]) for start in range(max(1, len(words) - 3))]
        assert message.startswith(OF_OTHERS) or any(run in ours for run in runs), message


def test_the_readme_has_what_these_tests_look_for() -> None:
    found = blocks(PAGES[0])
    assert sum(language == "python" for language, _ in found) == 3
    assert sum(len(commands(code)) for language, code in found if language == "bash") == 2
