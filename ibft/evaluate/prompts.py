"""What a model is asked: the problem as a question, in the format that it was trained with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ibft.errors import InputError
from ibft.evaluate.problems import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["plain", "text", "chat"]


@dataclass(frozen=True)
class PromptFormat:
    """How a question becomes a prompt.

    "plain": as it stands, for a base model to continue. "text": followed by `separator`, as pairs of text are trained
    on. "chat": as a user's message in the tokenizer's chat template. `bos`: whether BOS comes first; None: as the
    tokenizer does by itself.
    """

    kind: Kind
    reason: str  # why this one, for people
    separator: str = ""
    bos: bool | None = None
    end_of_turn: str | None = None  # ends an answer, beside EOS
    template_sha256: str | None = None  # of the chat template trained with

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "separator": self.separator, "bos": self.bos, "end_of_turn": self.end_of_turn}


def choose_format(choice: Literal["auto"] | Kind, record: Mapping[str, Any]) -> PromptFormat:
    """The format that the record of a run (ibft.json, or {}) states, unless `choice` names another kind.

    A kind of the user's choice takes from the record what it says of that kind.
    """
    trained: Mapping[str, Any] = record.get("prompt_format") or {}
    kind: Kind | None = trained.get("kind")
    if choice == "auto" and kind is None:
        return PromptFormat("plain", "no record says what the model was trained with")
    if choice != "auto" and choice != kind:
        return PromptFormat(choice, "--prompt_format", separator="\n" if choice == "text" else "")
    assert kind is not None
    return PromptFormat(
        kind,
        "the adapter was trained with it",
        separator=trained.get("separator") or "",
        bos=trained.get("bos"),
        end_of_turn=trained.get("end_of_turn"),
        template_sha256=trained.get("template_sha256"),
    )


@dataclass(frozen=True)
class Prompter:
    """Problems → prompts as text, and those → tokens. `tokenizer` may be None for plain and text that is not tokenised.

    `question` replaces the task's own: text in which {prompt} and {description} are filled in.
    """

    format: PromptFormat
    tokenizer: PreTrainedTokenizerBase | None
    question: str | None = None

    def __post_init__(self) -> None:
        if self.question is not None and not any(name in self.question for name in ("{prompt}", "{description}")):
            raise InputError("--question must hold {prompt} or {description}, where the problem's own text goes.")

    def text(self, problem: Problem) -> str:
        """The prompt, with the special tokens that the chat template writes and no others."""
        question = self._question(problem)
        if self.format.kind != "chat":
            return question + self.format.separator
        from ibft.data.chat import ChatTemplate, TemplateRefusal

        assert self.tokenizer is not None
        try:
            message = {"role": "user", "content": question}
            return ChatTemplate(self.tokenizer).text([message], generation_prompt=True)
        except TemplateRefusal as error:
            raise InputError(f"problem {problem.task_id!r}: {error}") from error

    def tokens(self, text: str) -> list[int]:
        """A prompt as training would have tokenised it, BOS included."""
        from ibft.data.tokens import tokenize

        assert self.tokenizer is not None
        first = [self.tokenizer.bos_token_id] * (self.format.kind != "chat" and self._puts_bos())
        return first + tokenize(self.tokenizer, [text])[0]

    def for_server(self, text: str) -> str:
        """A prompt for a server that puts BOS before it exactly if the tokenizer does so by itself."""
        if self.tokenizer is None or not (bos := self.tokenizer.bos_token):
            return text
        adds = _adds_bos(self.tokenizer)
        if self.format.kind == "chat":
            return text.removeprefix(bos) if adds else text
        return bos + text if self._puts_bos() and not adds else text

    def notes(self) -> list[str]:
        """What a user should know before generating."""
        if self.format.template_sha256 is None or self.tokenizer is None:
            return []
        now = hashlib.sha256((self.tokenizer.get_chat_template() if self.tokenizer.chat_template else "").encode())
        changed = now.hexdigest() != self.format.template_sha256
        return ["the tokenizer's chat template is not the one that the adapter was trained with."] if changed else []

    def _puts_bos(self) -> bool:
        assert self.tokenizer is not None
        return _adds_bos(self.tokenizer) if self.format.bos is None else self.format.bos

    def _question(self, problem: Problem) -> str:
        if self.question is not None:
            parts = self.question.split("{prompt}")  # so that what is filled in is not searched
            return problem.prompt.join(part.replace("{description}", problem.description) for part in parts)
        return question_of(problem, self.format.kind)


def question_of(problem: Problem, kind: Kind) -> str:
    """The question of a problem where the user gives none."""
    description = problem.description.strip()
    if problem.language == "verilog":
        if kind != "plain" and description:
            return f"{description}\n\nComplete this Verilog module:\n\n{problem.prompt}"
        return "".join(f"// {line}\n" for line in description.splitlines()) + problem.prompt
    if kind != "plain" and problem.tests and description:
        return f"{description}\nThe code must pass these tests:\n\n" + "\n".join(problem.tests)
    if kind == "chat" and problem.entry_point:
        return f"Complete this Python function:\n\n```python\n{problem.prompt.rstrip()}\n```"
    return problem.prompt


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a text by itself."""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
