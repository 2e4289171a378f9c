"""Conversations → text by the tokenizer's chat template → tokens, of which only the assistant's are learnt.

A template is a program that may do anything with the messages, so nothing is assumed about its text. An assistant's
turn begins where `add_generation_prompt=True` ends, which is the prompt of inference, and ends with the first special
tokens that the template writes after the content. What a template does otherwise is refused, never guessed.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from ibft.data.tokens import EMPTY, KEPT, SHORTENED, TOO_LONG, Tokenized, columns_of, tokenize
from ibft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
CONTENT = "content-of-the-turn"  # stands for a turn's content, to see what a template writes after it


def conversation_cell(cells: Sequence[Any], where: str) -> str:
    """A checked conversation as JSON text, which is how rows carry it: keys may differ between messages.

    `cells` is one list of messages, or two: a prompt, whose assistant turns are not learnt, and its completion. `where`
    names the row. InputError for anything that is no list of {"role": ..., "content": ...}.
    """
    prompts = [{**_message(value, where), "weight": 0} for part in cells[:-1] for value in _messages(part, where)]
    return json.dumps([*prompts, *(_message(value, where) for value in _messages(cells[-1], where))])


def pair_cell(prompt: str, response: str) -> str:
    """A pair of texts as the conversation of one user message and one assistant message."""
    return json.dumps([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])


def _messages(value: Any, where: str) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    raise InputError(f"{where} holds {_shown(value)}; a conversation is a list of messages.")


def _message(value: Any, where: str) -> Message:
    """A message without the keys that hold nothing, which Arrow adds where other messages have them."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise InputError(f'{where} holds the message {_shown(value)}; one is {{"role": ..., "content": ...}}.')
    message = {name: cell for name, cell in value.items() if cell is not None}
    role, content = message["role"], message.setdefault("content", "")
    if role not in ROLES:
        raise InputError(f"{where} has a message of the role {role!r}; the roles are {', '.join(ROLES)}.")
    if message.pop("tool_calls", None):
        raise InputError(
            f"{where} has a message with tool_calls, which templates write in ways that cannot be learnt safely; put "
            "the call into the content, as the text that the model is to write."
        )
    if not isinstance(content, str):
        raise InputError(f"{where} has a message whose content is {_shown(content)}; it must be text.")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise InputError(f"{where} has a message with half a surrogate pair, which is no Unicode character.")
    if message.get("weight", 1) not in (0, 1):
        raise InputError(f"{where} has a message of weight {message['weight']!r}; 0 (not learnt) and 1 are accepted.")
    return message


class TemplateRefusal(Exception):
    """A conversation that the chat template cannot render, or not so that its turns can be learnt."""


class HistoryRewritten(TemplateRefusal):
    """The template writes an assistant's turn differently once the conversation goes on."""


class Rendered(NamedTuple):
    """A conversation as text up to the end of its last learnt turn, and the (start, end) of each learnt turn in it."""

    text: str
    turns: list[tuple[int, int]]
    ending: str  # what ends the last turn, through special tokens of the template; empty if it writes none


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer. InputError, at construction, if it has none."""

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            name = self.tokenizer.name_or_path or type(self.tokenizer).__name__
            raise InputError(
                f"The tokenizer {name!r} has no chat template, which conversations need. Use the base model's instruct "
                "version, set tokenizer.chat_template and save it with the base model, or use --format text with "
                "pairs of prompt and response."
            )

    @cached_property
    def description(self) -> dict[str, Any]:
        """What a record says of the template (JSON-able): see `EncodedDataset`. InputError if it takes no question."""
        sample = self._sample
        bos, end = self.tokenizer.bos_token, sample.ending.strip()
        return {
            "bos": bool(bos) and sample.text.startswith(bos),
            "eos": not end,
            "end_of_turn": end or self.tokenizer.eos_token,
            "template": "tokenizer's own",
            "template_sha256": hashlib.sha256(self.tokenizer.get_chat_template().encode()).hexdigest(),
        }

    @cached_property
    def _sample(self) -> Rendered:
        """A conversation that stands for all; some templates insist on a system message."""
        turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            return self.render(turn)
        except TemplateRefusal as refusal:
            try:
                return self.render([{"role": "system", "content": "system"}, *turn])
            except TemplateRefusal:
                raise InputError(f"A conversation of one question and one answer: {refusal}") from refusal

    def text(self, messages: list[Message], *, generation_prompt: bool = False) -> str:
        """The messages as the template writes them; TemplateRefusal with its message if it raises an error."""
        messages = [{name: cell for name, cell in message.items() if name != "weight"} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TemplateRefusal(f"the chat template refuses it: {error}") from error
        return str(text)

    def render(self, messages: list[Message]) -> Rendered:
        """A conversation with a learnt turn. TemplateRefusal: it cannot be learnt; HistoryRewritten: not in one piece.

        Each turn is what the model is to write after the prompt that inference builds, so the text up to the turn must
        be that prompt, and the turn must stand in the whole as it stands when it is the last.
        """
        learnt = learnt_turns(messages)
        messages = messages[: learnt[-1] + 1]
        whole = self.text(messages)
        turns = []
        ending = ""
        for index in learnt:
            prompt = self.text(messages[:index], generation_prompt=True)
            so_far = whole if index == learnt[-1] else self.text(messages[: index + 1])
            closing = self._closing(messages[:index], messages[index])
            if not so_far.startswith(prompt):
                raise TemplateRefusal(
                    f"the chat template ends the prompt of inference with {_end(prompt)}, but goes on differently "
                    f"before an answer, with {_end(so_far[: len(prompt)])}; a model would learn to answer a prompt "
                    "that it never gets. Write the reasoning into the answers, as the template does, or use a template "
                    "that writes both alike."
                )
            if not so_far.endswith(closing) or len(so_far) < len(prompt) + len(closing):
                raise TemplateRefusal(f"the end of an answer cannot be found; after another content it is {closing!r}")
            ending = self._ending(closing)
            turn = so_far[len(prompt) : len(so_far) - len(closing)] + ending
            if not whole.startswith(prompt + turn):
                raise HistoryRewritten(
                    "the chat template writes an answer differently once the conversation goes on; give one "
                    "conversation for each answer, which ends with it"
                )
            turns.append((len(prompt), len(prompt) + len(turn)))
        return Rendered(whole[: turns[-1][1]], turns, ending)

    def _closing(self, before: list[Message], turn: Message) -> str:
        """What the template writes after the content of an assistant's turn."""
        text = self.text([*before, {**turn, "content": CONTENT}])
        if CONTENT not in text:
            raise TemplateRefusal("the template does not write the content of an assistant's message")
        return text[text.rindex(CONTENT) + len(CONTENT) :]

    def _ending(self, closing: str) -> str:
        """The start of `closing` through its first special tokens: as many as follow each other, but none after EOS."""
        token, end = self._special.search(closing), 0
        while token is not None:
            end = token.end()
            token = None if token.group() == self.tokenizer.eos_token else self._special.match(closing, end)
        return closing[:end]

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Any token that the tokenizer takes out of the text whole; white space among them ends no turn."""
        tokens = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def learnt_turns(messages: list[Message]) -> list[int]:
    """The indices of the assistant's messages that are learnt: not empty, not of weight 0, and an answer.

    An assistant's message that opens the conversation answers nothing; no prompt would lead to it.
    """
    first = next((index for index, message in enumerate(messages) if message["role"] in ("user", "tool")), None)
    if first is None:
        return []
    return [
        index
        for index, message in enumerate(messages[first:], start=first)
        if message["role"] == "assistant" and message.get("weight", 1) and message["content"].strip()
    ]


def one_for_each_turn(messages: list[Message]) -> list[list[Message]]:
    """The conversation as several, each of which ends with a learnt turn and learns no other."""
    return [
        [*({**message, "weight": 0} for message in messages[:index]), messages[index]]
        for index in learnt_turns(messages)
    ]


@dataclass(frozen=True)
class ChatEncoder:
    """A batch of conversations (JSON text in `messages`) to the columns of FEATURES.

    `names` are those of the datasets, for errors: the rows' `source` (an index into them) and `source_row`.
    An object, so that worker processes can receive it.
    """

    template: ChatTemplate
    max_length: int
    overlong: str
    names: tuple[str, ...]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        conversations = [json.loads(text) for text in batch["messages"]]
        rendered = [
            self._render(messages, batch, row) if learnt_turns(messages) else None
            for row, messages in enumerate(conversations)
        ]
        tokens = iter(self._tokenize([one for one in rendered if one is not None]))
        rows = [
            Tokenized([], [], EMPTY) if one is None else self._fit(messages, next(tokens), batch, row)
            for row, (messages, one) in enumerate(zip(conversations, rendered, strict=True))
        ]
        return columns_of(rows, batch["example_id"])

    def _render(self, messages: list[Message], batch: dict[str, list[Any]], row: int) -> Rendered:
        try:
            return self.template.render(messages)
        except TemplateRefusal as refusal:
            raise InputError(f"{self._where(batch, row)}: {refusal}") from refusal

    def _where(self, batch: dict[str, list[Any]], row: int) -> str:
        return f"{self.names[batch['source'][row]]}, row {batch['source_row'][row]} (counted from 0)"

    def _fit(self, messages: list[Message], whole: Tokenized, batch: dict[str, list[Any]], row: int) -> Tokenized:
        """The row itself, or without as many of its oldest exchanges as it must lose."""
        if len(whole.tokens) <= self.max_length:
            return whole
        shorter = _without_oldest_exchanges(messages) if self.overlong == "shorten" else []

        def encoded(count: int) -> Tokenized:
            return self._tokenize([self._render(shorter[count], batch, row)])[0]

        # Each exchange less is shorter, so the first that fits is found by halving.
        first = bisect.bisect_left(
            range(len(shorter)), True, key=lambda count: len(encoded(count).tokens) <= self.max_length
        )
        if first == len(shorter):
            return Tokenized([], [], TOO_LONG)
        return encoded(first)._replace(outcome=SHORTENED)

    def _tokenize(self, conversations: list[Rendered]) -> list[Tokenized]:
        """Every stretch of text between the ends of turns is tokenised apart: no token straddles one."""
        stretches = []
        for text, turns, _ in conversations:
            cuts = [0, *(cut for turn in turns for cut in turn)]
            stretches += [(text[start:end], start > 0) for start, end in itertools.pairwise(cuts)]
        tokens = iter(self._tokenize_stretches(stretches))
        rows = []
        for _, turns, ending in conversations:
            ids: list[int] = []
            spans: list[int] = []
            for _ in turns:
                ids += next(tokens)
                spans.append(len(ids))
                ids += next(tokens)
                spans.append(len(ids))
            if not ending:  # nothing else would teach the model to stop
                ids.append(self.template.tokenizer.eos_token_id)
                spans[-1] += 1
            rows.append(Tokenized(ids, spans, KEPT))
        return rows

    def _tokenize_stretches(self, stretches: list[tuple[str, bool]]) -> list[list[int]]:
        """SentencePiece puts a space before every text; before one that goes on in a line, that would be wrong."""
        tokenizer = self.template.tokenizer
        if not stretches or not self._adds_space:
            return tokenize(tokenizer, [text for text, _ in stretches]) if stretches else []
        (newline,) = tokenize(tokenizer, ["\n"])
        found = tokenize(tokenizer, ["\n" * goes_on + text for text, goes_on in stretches])
        return [
            ids[len(newline) :] if goes_on and ids[: len(newline)] == newline else ids
            for ids, (_, goes_on) in zip(found, stretches, strict=True)
        ]

    @cached_property
    def _adds_space(self) -> bool:
        newline, letter, both = tokenize(self.template.tokenizer, ["\n", "a", "\na"])
        return both != newline + letter


def _without_oldest_exchanges(messages: list[Message]) -> list[list[Message]]:
    """The conversation without its first 1, 2, ... exchanges; an exchange begins with what a user says after others."""
    learnt = learnt_turns(messages)
    messages = messages[: learnt[-1] + 1]
    first = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
    starts = [
        index
        for index, message in enumerate(messages)
        if index >= first and message["role"] == "user" and (index == first or messages[index - 1]["role"] != "user")
    ]
    return [messages[:first] + messages[start:] for start in starts[1:]]


def _end(text: str) -> str:
    return repr(text[-40:])


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
