"""Samples from a model in this process: transformers' `generate`, in left-padded batches of prompts of like length.

Each sample is drawn with numbers of its own: step t of a sample takes number t of the Philox stream of its seed, and
the token at that place of the cumulated probabilities. So neither the batch size, nor what shares its batch, nor what
was generated before changes a sample's prompt, seed or numbers. It can change its logits in their last bits, because a
matrix product rounds differently for another shape; where a number falls that close to the border between two tokens,
the sample becomes another one, of the same distribution.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ibft.errors import InputError
from ibft.evaluate.extraction import first_stop
from ibft.evaluate.prompts import Prompter
from ibft.evaluate.sampling import Request, SamplesFile, Sampling
from ibft.export import TRAINING_DTYPES, Source
from ibft.loading import cast_weights, fingerprint, load_base_model, resolve_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_locally(
    requests: Sequence[Request],
    model: PreTrainedModel,
    prompter: Prompter,
    sampling: Sampling,
    file: SamplesFile,
    *,
    batch_size: int,
) -> None:
    """Makes the samples and appends each batch to the file as it is done.

    InputError for logits that are not finite, and when the device has too little memory.
    """
    tokenizer = prompter.tokenizer
    assert tokenizer is not None
    tokens = {prompt: prompter.tokens(prompt) for prompt in dict.fromkeys(request.prompt for request in requests)}
    ends = end_tokens(model, tokenizer, prompter.format.end_of_turn)
    # The model's own sampling habits (repetition penalty, top_p, ...) must not mix with what was asked for.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ends, pad_token_id=_pad_token(tokenizer, ends), use_cache=True
    )
    # Longest first, so that too little memory shows at once.
    longest_first = sorted(requests, key=lambda request: -len(tokens[request.prompt]))
    with tqdm(total=len(requests), desc="Generating", unit="sample", disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(longest_first), batch_size):
            batch = longest_first[start : start + batch_size]
            try:
                made = list(
                    _generate_batch(batch, [tokens[request.prompt] for request in batch], model, tokenizer, sampling)
                )
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"The device has too little memory for {len(batch)} samples at once; {len(file)} samples are in "
                    f"{file.path}, and the same command with a smaller --batch_size than {batch_size} goes on."
                ) from error
            for request, (raw, finish_reason) in zip(batch, made, strict=True):
                file.add(request, raw, finish_reason)
            bar.update(len(batch))


def load_model(name: str, adapter: Source | None, dtype: str, device: torch.device) -> tuple[PreTrainedModel, str]:
    """The model with its adapter, ready to generate, and the fingerprint of the base model.

    InputError where it cannot be loaded, or the adapter was trained on another model.
    """
    base = load_base_model(name, "auto", None, device)
    found = fingerprint(base)
    record = adapter.record if adapter is not None else {}
    # A run in 4 bits knows the fingerprint of other weights than are loaded here.
    expected = None if record.get("config", {}).get("load_in_4bit") else record.get("base")
    # The record is of the dtype that training loaded the model in, which need not be that of the file.
    if adapter is not None and expected not in (None, *(fingerprint(base, each) for each in TRAINING_DTYPES)):
        raise InputError(
            f"--model {name!r} is not the model that the adapter {str(adapter.folder)!r} was trained on: its "
            "fingerprint differs from the one in ibft.json."
        )
    base = cast_weights(base, resolve_dtype(dtype, device))
    if adapter is None:
        return base, found
    try:
        model = PeftModel.from_pretrained(base, str(adapter.folder))
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"--adapter {str(adapter.folder)!r} does not fit --model {name!r}: {reason}") from error
    return model.eval().get_base_model(), found


def check_lengths(requests: Sequence[Request], model: PreTrainedModel, prompter: Prompter, max_new_tokens: int) -> None:
    """InputError for an empty prompt, and for one that does not fit into the model together with its answer."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    problems = {request.prompt: request.problem.task_id for request in requests}
    lengths = {prompt: len(prompter.tokens(prompt)) for prompt in problems}
    if empty := [problems[prompt] for prompt, length in lengths.items() if not length]:
        raise InputError(f"The prompt of {empty[0]!r} is empty, and there is no BOS to begin with.")
    longest = max(lengths, key=lengths.__getitem__, default="")
    if positions is not None and longest and lengths[longest] + max_new_tokens > positions:
        room = positions - lengths[longest]
        advice = f"--max_new_tokens can be {room} at most" if room > 0 else "--limit or a shorter --question is needed"
        raise InputError(
            f"The prompt of {problems[longest]!r} has {lengths[longest]} tokens, and {max_new_tokens} more go beyond "
            f"the model's {positions} positions; {advice}."
        )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_of_turn: str | None) -> list[int]:
    """The tokens that end an answer: the model's, the tokenizer's, and the one that a trained turn ends with."""
    known = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    ends.append(tokenizer.eos_token_id)
    if end_of_turn:
        ends.append(tokenizer(end_of_turn, add_special_tokens=False)["input_ids"][-1])
    return sorted({int(end) for end in ends if end is not None})


def _pad_token(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    """Any token will do: what it stands on is masked."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return ends[0] if ends else 0


def _generate_batch(
    requests: Sequence[Request],
    prompts: Sequence[list[int]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> Iterator[tuple[str, str]]:
    """The raw text and finish reason of each request."""
    width = max(map(len, prompts))
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])  # [B, width]
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=sampling.max_new_tokens,
            logits_processor=LogitsProcessorList([SeededSampling(requests, sampling, width, model.device)]),
            stopping_criteria=StoppingCriteriaList([_StopText(tokenizer, sampling.stop, width)]),
        )
    ends = set(model.generation_config.eos_token_id or [])
    for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True):
        end = next((index for index, token in enumerate(row) if token in ends), None)
        text = _continuation(tokenizer, prompt, row if end is None else row[:end])
        at = first_stop(text, sampling.stop)
        if at < len(text):
            stop = next(sequence for sequence in sampling.stop if text.startswith(sequence, at))
            yield text[: at + len(stop)], "stop"
        else:
            yield text, "length" if end is None else "stop"


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """The new tokens as text; decoded after the prompt, since some tokenizers drop the first space of any text."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = decode(prompt), decode(prompt + new)
    return whole[len(before) :] if whole.startswith(before) else decode(new)


class SeededSampling(LogitsProcessor):
    """Draws the next token of each row and leaves it as the only one possible, for greedy `generate` to take.

    Row b at step t takes the smallest token whose cumulated probability exceeds u(seed_b, t). Probabilities are those
    of the logits after temperature, top_k and top_p, in this order; temperature 0 takes the most probable token.
    """

    def __init__(
        self, requests: Sequence[Request], sampling: Sampling, prompt_width: int, device: torch.device | str = "cpu"
    ) -> None:
        numbers = np.stack([uniforms(request.seed, sampling.max_new_tokens) for request in requests])  # [B, steps]
        # No float64 on Apple's GPUs.
        self._dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self._numbers = torch.from_numpy(numbers).to(device=device, dtype=self._dtype)
        temperatures = torch.tensor([request.temperature for request in requests], device=device)[:, None]  # [B, 1]
        self._greedy = temperatures == 0
        self._temperatures = torch.where(self._greedy, 1.0, temperatures)
        self._width = prompt_width
        self._warpers: list[Any] = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        self._warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, T], [B, V] -> [B, V]
        warped = scores.float() / self._temperatures
        for warper in self._warpers:
            warped = warper(input_ids, warped)
        cumulated = warped.softmax(-1).to(self._dtype).cumsum(-1)  # [B, V]
        total = cumulated[:, -1:]
        if not torch.isfinite(total).all():
            raise InputError("The model's logits are not finite; try --dtype float32, or look at how it was trained.")
        number = self._numbers[:, input_ids.shape[1] - self._width, None] * total  # [B, 1]
        below_total = total * (1 - 2 * torch.finfo(self._dtype).eps)  # which rounding may have reached
        drawn = torch.searchsorted(cumulated, torch.minimum(number, below_total), right=True)  # none of probability 0
        token = torch.where(self._greedy, scores.argmax(-1, keepdim=True), drawn)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def uniforms(seed: int, steps: int) -> np.ndarray:
    """[steps] float64 in [0, 1): the first numbers of the seed's Philox stream."""
    return np.random.Generator(np.random.Philox(seed)).random(steps)


class _StopText(StoppingCriteria):
    """Ends a row at its first stop sequence, looked for where the newest token can have completed one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_width: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._width = prompt_width
        # Each of a stop sequence's tokens holds one of its bytes at least.
        self._tail = max((len(sequence.encode()) for sequence in stop), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self._stop:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tail = input_ids[:, max(self._width, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = [any(sequence in text for sequence in self._stop) for text in texts]
        return torch.tensor(found, device=input_ids.device)
