"""IBModel under the unmodified transformers.Trainer and trl.SFTTrainer: the same steps as our own loop's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from oracle import assert_same_gradients, eager_terms, gradients, random_batch, tiny_model, wrap
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import ibft.run
import ibft.train
from ibft import IBConfig, IBModel, InputError, ObjectiveCallback
from ibft.config import TrainConfig
from ibft.data import collate, load_batches
from ibft.engines import Engine

trl = pytest.importorskip("trl")

STEPS = 3
ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(base_folder: Path, tasks_file: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """The configuration of a short run of our own loop, with no dropout, and a constant learning rate."""

    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            **{"base_model": str(base_folder), "dataset": [str(tasks_file)], "output_dir": str(tmp_path / "ours")},
            **{"max_length": 128, "bottleneck_dim": 16, "target_layer": 1, "alpha": 0.5, "lora_r": 4, "use_cpu": True},
            **{"lora_dropout": 0.0, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-3},
            **{"max_steps": STEPS, "logging_steps": 1, "max_grad_norm": 0.05, "packing": "none"},
            "attn_implementation": "sdpa",  # which a trainer without our collator runs, too
            **changes,
        }
        return TrainConfig(**settings)

    return make


class OwnLoop:
    """A run of ibft.train, and the same model and batches once more for another trainer."""

    def __init__(self, config: TrainConfig) -> None:
        ibft.train.train(config)
        lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
        self.records = [json.loads(line) for line in lines]
        again = ibft.run.set_up(
            TrainConfig(**{**config.to_dict(), "output_dir": config.output_dir + "-again"}), Engine(torch.device("cpu"))
        )
        self.model, self.tokenizer, self.data, self.plan = again.model, again.tokenizer, again.data, again.plan
        self.batches = list(
            load_batches(
                self.data, self.plan, range(STEPS), rank=0, device=again.engine.device, tokenizer=self.tokenizer
            )
        )
        self.micro_batches = [len(again.plan.micro_batches(step, 0)) for step in range(STEPS)]
        for step in range(STEPS):  # what the loop hands over beside the batch
            for batch in self.batches[sum(self.micro_batches[:step]) :][: self.micro_batches[step]]:
                batch["noise_rng"] = torch.tensor([config.seed, step])

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, labels) of every document in the order of the run; packing "none" has one document in a row."""
        for step in range(STEPS):
            for bins in self.plan.micro_batches(step, 0):
                for row in bins:
                    (index,) = row
                    batch = collate([[self.data.document(int(index))]], pad_token_id=0, max_length=128, packing="none")
                    yield batch["input_ids"][0].numpy(), batch["labels"][0].numpy()


class Logged(list[dict[str, float]]):
    """The steps that a trainer logged."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(entry for entry in trainer.state.log_history if "grad_norm" in entry)

    def assert_same_as(self, records: list[dict[str, Any]]) -> None:
        assert len(self) == len(records) == STEPS
        for ours, theirs in zip(records, self, strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-5)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=2e-4)


class Batches(Dataset[dict[str, Tensor]]):
    """Whole batches as samples, which the collator hands on as they are."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batches[index]


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        },
        **{"max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        **{"max_grad_norm": 0.05, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"},
        **{"optim": "adamw_torch_fused", "weight_decay": 0.0},
        **changes,
    }


def hf_trainer(
    model: IBModel, batches: list[dict[str, Tensor]], folder: Path, callbacks: Any = None, **changes: Any
) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(folder, remove_unused_columns=False, **changes)),
        train_dataset=Batches(batches),
        eval_dataset=Batches(batches[:2]),
        data_collator=lambda samples: samples[0],
        callbacks=callbacks,
    )


# ---------------------------------------------------------------------------------------------------------------------
# transformers.Trainer


@pytest.mark.parametrize("packing", ["none", "best-fit"])
@pytest.mark.parametrize(
    ("kl_tokens", "accumulation"), [("all", 1), ("labels", 1), ("labels", 2)], ids=["all", "labels", "labels-x2"]
)
def test_trainer_takes_the_steps_of_our_loop(
    config: Callable[..., TrainConfig], tmp_path: Path, packing: str, kl_tokens: str, accumulation: int
) -> None:
    """With the noise on, which the batches carry."""
    own = OwnLoop(config(packing=packing, kl_tokens=kl_tokens, gradient_accumulation_steps=accumulation))
    trainer = hf_trainer(own.model, own.batches, tmp_path / "hf", gradient_accumulation_steps=accumulation)
    trainer.train()
    Logged(trainer).assert_same_as(own.records)


def test_plain_fine_tuning_too(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    own = OwnLoop(config(method="sft", gradient_accumulation_steps=2))
    trainer = hf_trainer(own.model, own.batches, tmp_path / "hf", gradient_accumulation_steps=2)
    trainer.train()
    Logged(trainer).assert_same_as(own.records)


def test_the_kl_of_all_tokens_is_weighted_by_the_labels_where_trainer_knows_no_more() -> None:
    """Two micro-batches of unlike shares of labels: CE and CE_ib exact, the KL means weighted by label counts."""
    ib = IBConfig(target_layer=2, bottleneck_dim=10, alpha=0.7, beta=0.3)
    model, batches = wrap(tiny_model("llama"), ib), [random_batch(2, 11), random_batch(1, 17)]
    batches[1]["labels"][:, :14] = -100
    rng = torch.tensor([3, 5])
    terms = [eager_terms(model, batch, rng) for batch in batches]
    count = sum(term.num_labels for term in terms)
    expected = sum(
        (term.ce + ib.alpha * (term.kl / term.num_tokens * term.num_labels + ib.beta * term.ce_ib)) / count
        for term in terms
    )
    expected.backward()
    expected_gradients = gradients(model)
    losses = [model(**batch, noise_rng=rng, num_items_in_batch=count).loss for batch in batches]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), expected, rtol=0, atol=1e-9)
    assert_same_gradients(gradients(model), expected_gradients, 1e-9)


def test_trainer_saves_and_resumes_the_bottleneck(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Three steps at a stretch, and one and two with a new process's model between them: the same weights."""
    own = OwnLoop(config())
    initial = {name: p.detach().clone() for name, p in own.model.named_parameters() if p.requires_grad}
    hf_trainer(own.model, own.batches, tmp_path / "hf", save_strategy="steps", save_steps=1).train()
    expected = {name: p.detach().clone() for name, p in own.model.named_parameters() if p.requires_grad}
    checkpoint = tmp_path / "hf" / "checkpoint-1"
    assert {"adapter_model.safetensors", "ib_head.safetensors", "ib_config.json"} <= set(os.listdir(checkpoint))

    for name, parameter in own.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(initial[name])
    hf_trainer(own.model, own.batches, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    for name, parameter in own.model.named_parameters():
        if name in expected:
            assert not torch.equal(parameter, initial[name]) and torch.equal(parameter, expected[name]), name


VARYING = {"alpha_warmup_steps": 2, "ib_rate_target": 0.1, "beta": 0.3}


@pytest.mark.parametrize(("kl_tokens", "accumulation"), [("all", 1), ("labels", 2)], ids=["all", "labels-x2"])
def test_weights_that_vary_go_as_in_our_loop(
    config: Callable[..., TrainConfig], tmp_path: Path, kl_tokens: str, accumulation: int
) -> None:
    """Under Trainer by the callback; a resumed one takes them up from the checkpoint."""
    own = OwnLoop(config(kl_tokens=kl_tokens, gradient_accumulation_steps=accumulation, **VARYING))
    initial = {name: p.detach().clone() for name, p in own.model.named_parameters() if p.requires_grad}
    changes = {"gradient_accumulation_steps": accumulation, "save_strategy": "steps", "save_steps": 1}
    trainer = hf_trainer(own.model, own.batches, tmp_path / "hf", [ObjectiveCallback()], **changes)
    trainer.train()
    Logged(trainer).assert_same_as(own.records)
    weight = own.model.objective.kl_weight.item()
    assert weight != 1 and own.model.objective.alpha == 0.5
    checkpoint = tmp_path / "hf" / "checkpoint-2"
    assert json.loads((checkpoint / "ib_state.json").read_text())["kl_weight"] == pytest.approx(
        own.records[2]["kl_weight"], rel=1e-4
    )

    expected = {name: p.detach().clone() for name, p in own.model.named_parameters() if p.requires_grad}
    for name, parameter in own.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(initial[name])
    own.model.objective = type(own.model.objective)(own.model.ib_config)  # as a new process has it
    resumed = hf_trainer(own.model, own.batches, tmp_path / "resumed", [ObjectiveCallback()], **changes)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert own.model.objective.kl_weight.item() == weight
    for name, parameter in own.model.named_parameters():
        assert name not in expected or torch.equal(parameter, expected[name]), name


def test_the_callback_reads_where_trainer_does_not_load_the_adapter(tmp_path: Path) -> None:
    """As under DeepSpeed and FSDP."""
    before, after = (wrap(tiny_model("llama"), IBConfig(target_layer=2, **VARYING)) for _ in range(2))
    for _ in range(2):
        before.step_objective()
    args, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=2)
    with pytest.raises(InputError, match=r"goes on at step 2, and .*checkpoint-2/ib_state\.json.* is not there"):
        ObjectiveCallback().on_train_begin(args, state, None, model=after)
    (tmp_path / "checkpoint-2").mkdir()
    before.objective.save(tmp_path / "checkpoint-2")
    ObjectiveCallback().on_train_begin(args, state, None, model=after)
    assert (after.objective.steps, after.objective.alpha) == (2, before.objective.alpha)


def test_weights_that_vary_need_the_callback(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Without it alpha would stay 0, and training would be plain fine-tuning."""
    own = OwnLoop(config(**VARYING))
    with pytest.raises(InputError, match=r"callbacks=\[ObjectiveCallback\(\)\]"):
        hf_trainer(own.model, own.batches, tmp_path / "hf").train()


def test_trainer_evaluates_with_the_plain_loss_and_logits_for_whoever_reads_them(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    own = OwnLoop(config())
    batches = own.batches[:2]
    model = own.model.eval()
    with torch.no_grad():
        outputs = [
            model.get_base_model()(**{n: b[n] for n in ("input_ids", "attention_mask", "labels")}) for b in batches
        ]
    expected = sum(output.loss.item() for output in outputs) / 2
    trainer = hf_trainer(model, own.batches, tmp_path / "hf", per_device_eval_batch_size=1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)

    seen = []
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits[0].argmax(-1)
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {"seen": 1.0}
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5) and metrics["eval_seen"] == 1.0
    for row, (output, batch) in enumerate(zip(outputs, batches, strict=True)):
        length = batch["input_ids"].shape[1]
        rows = slice(
            sum(len(b["input_ids"]) for b in batches[:row]), sum(len(b["input_ids"]) for b in batches[: row + 1])
        )
        real = batch["attention_mask"].bool().numpy()  # what stands at padding is read by no one
        np.testing.assert_array_equal(seen[0][rows, :length][real], output.logits.argmax(-1).numpy()[real])


@pytest.mark.parametrize("ib", [True, False])
def test_a_loss_of_the_trainers_own_is_refused(config: Callable[..., TrainConfig], tmp_path: Path, ib: bool) -> None:
    """It would be computed from logits, without the bottleneck's terms; plain fine-tuning has none to lose."""
    own = OwnLoop(config(method="ib" if ib else "sft"))
    trainer = hf_trainer(own.model, own.batches, tmp_path / "hf", label_smoothing_factor=0.1)
    if ib:
        with pytest.raises(InputError, match="IBModel got no labels in training"):
            trainer.train()
    else:
        trainer.train()


def test_data_parallel_is_refused() -> None:
    model = wrap(tiny_model("llama"), IBConfig(target_layer=2, bottleneck_dim=10))
    with pytest.raises(InputError, match=r"torch\.nn\.DataParallel.*torchrun"):
        model._replicate_for_data_parallel()


# ---------------------------------------------------------------------------------------------------------------------
# trl.SFTTrainer


def sft_trainer(own: OwnLoop, folder: Path, accumulation: int = 1, callbacks: Any = None, **changes: Any) -> Any:
    """Its own collator over the documents of the run; rows in a batch as our loop has them."""
    rows = [{"input_ids": tokens.tolist(), "labels": labels.tolist()} for tokens, labels in own.documents()]
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "bf16": False}
    settings |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False}
    return trl.SFTTrainer(
        model=own.model,
        args=trl.SFTConfig(**arguments(folder, **{**settings, **changes})),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[:4]),
        processing_class=own.tokenizer,
        callbacks=callbacks,
    )


def test_weights_that_vary_under_sft_trainer(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    own = OwnLoop(config(sample=False, kl_tokens="labels", gradient_accumulation_steps=2, **VARYING))
    trainer = sft_trainer(own, tmp_path / "trl", 2, [ObjectiveCallback()])
    trainer.train()
    Logged(trainer).assert_same_as(own.records)


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
@pytest.mark.parametrize(("kl_tokens", "accumulation"), [("all", 1), ("labels", 2)], ids=["all", "labels-x2"])
def test_sft_trainer_takes_the_steps_of_our_loop(
    config: Callable[..., TrainConfig],
    tmp_path: Path,
    loss_type: str,
    padding_free: bool,
    kl_tokens: str,
    accumulation: int,
) -> None:
    """Without noise, for which trl's collator has no row ids."""
    own = OwnLoop(config(kl_tokens=kl_tokens, gradient_accumulation_steps=accumulation, sample=False))
    changes = {"padding_free": padding_free, "loss_type": loss_type, "eval_strategy": "steps", "eval_steps": STEPS}
    trainer = sft_trainer(own, tmp_path / "trl", accumulation, **changes)
    trainer.train()
    Logged(trainer).assert_same_as(own.records)
    for entry in Logged(trainer):
        assert entry["entropy"] > 0 and 0 <= entry["mean_token_accuracy"] <= 1
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluation["eval_entropy"] > 0
    model, losses = own.model.eval(), []
    for tokens, labels in list(own.documents())[:4]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(tokens)[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(labels)[1:], reduction="none"))
    counted = torch.cat(losses)
    assert evaluation["eval_loss"] == pytest.approx((counted.sum() / (counted != 0).sum()).item(), rel=1e-4)


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_sft_trainer_in_mixed_precision(config: Callable[..., TrainConfig], tmp_path: Path, loss_type: str) -> None:
    """accelerate rebuilds the outputs there; bfloat16 has three digits."""
    own = OwnLoop(config(sample=False))
    trainer = sft_trainer(own, tmp_path / "trl", bf16=True, loss_type=loss_type)
    trainer.train()
    for ours, theirs in zip(own.records, Logged(trainer), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-2)


def test_dft_is_refused(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    trainer = sft_trainer(OwnLoop(config()), tmp_path / "trl", loss_type="dft")
    with pytest.raises((InputError, ValueError), match=r"dft|compute_loss_func"):  # as trl 1.14 has it
        trainer.train()


@pytest.mark.slow
def test_an_earlier_sft_trainer_that_reads_statistics_and_logits(tmp_path: Path) -> None:
    """trl 1.14: "chunked_nll" reads sums from the output, "nll" its logits. The tests above, with it in place."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "trl==1.14.2"]
    subprocess.run(command, check=True)
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "sft_trainer_takes or mixed",
        __file__,
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
