"""IBModel: a PEFT causal language model with an information bottleneck on one layer's hidden states.

The bottleneck is an auxiliary branch: it shapes the hidden states in training, and at inference nothing of it remains.
"""

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ibft.architecture import CausalLM, LayerTap, able_to_run
from ibft.errors import InputError
from ibft.objective import CONFIG_NAME, STATE_NAME, IBConfig, Objective, active_share, free_nats
from ibft.output import DeferredLogits, IBOutput, fused_head_output
from ibkernels import VariationalBottleneck, linear_cross_entropy

HEAD_NAME = "ib_head.safetensors"
_PREFIX = "bottleneck."
_HUB_ARGUMENTS = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")


class IBModel(PeftModelForCausalLM):
    """A `PeftModelForCausalLM` whose loss is that of information-bottleneck fine-tuning.

    Make one with `from_base` or `from_pretrained`. With `ib=None` it is plain supervised fine-tuning through the same
    memory-lean loss. `bottleneck` (a `VariationalBottleneck`, or None) holds the auxiliary parameters, in float32, and
    `objective` (an `Objective`, or None) the weights of its terms: where they vary, call `step_objective` after each
    optimizer step (Trainer: `callbacks=[ObjectiveCallback()]`).
    """

    bottleneck: VariationalBottleneck | None
    objective: Objective | None

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        *,
        ib: IBConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, PeftModel):
            raise InputError("the base model already carries a PEFT adapter; pass the model that it wraps.")
        if getattr(model, "_hf_peft_config_loaded", False):
            raise InputError(
                "the base model's folder holds an adapter, which transformers has loaded into it; take it out."
            )
        if peft_config.is_prompt_learning:
            raise InputError(
                f"peft_type {peft_config.peft_type} learns a prompt; IB-FT trains adapters in the layers (LoRA)."
            )
        if getattr(peft_config, "alora_invocation_tokens", None):
            raise InputError("alora_invocation_tokens (aLoRA) is not supported: the adapter would not act on the loss.")
        parts = CausalLM.of(model)
        parts.check_router_loss()
        if ib is not None:
            parts.check_layer(ib.target_layer)
        with able_to_run(model):
            parts.check_causal()
            parts.check_logits(model)
        super().__init__(model, peft_config, adapter_name, **kwargs)
        try:
            _check_tuner(self.base_model)
            CausalLM.of(self.get_base_model()).check_head_is_plain()
        except InputError:
            self.base_model.unload()  # the base model is the caller's: give it back as it was
            raise
        self.ib_config = ib
        self.objective = None if ib is None else Objective(ib)
        self.bottleneck = None
        self._tap = LayerTap()
        if ib is None:
            return
        self.bottleneck = VariationalBottleneck(
            parts.head.weight.shape[1],
            ib.bottleneck_dim,
            encoder=ib.encoder,
            encoder_rank=ib.encoder_rank if ib.encoder == "lora" else None,
            sample=ib.sample,
            logvar_range=ib.logvar_range,
            kl_reduction=ib.kl_reduction,
            device=parts.head.weight.device,
            dtype=torch.float32,
        )
        # The topmost hidden state is the decoder's own output, after the final norm: no layer gives it.
        if ib.target_layer < parts.num_layers:
            self._tap.attach(parts.layers[ib.target_layer - 1])

    @classmethod
    def from_base(cls, base_model: nn.Module, peft_config: PeftConfig, ib: IBConfig | None) -> "IBModel":
        """Wraps a loaded causal language model with a fresh adapter and a fresh bottleneck (ib=None: none, SFT).

        Raises:
            InputError: for a model that carries an adapter already, has no plain linear output head, is not causal,
                computes its logits in a way of its own or adds a router's loss; a target layer out of range; an
                adapter on the head, or one that learns a prompt or changes the loss (AdaLoRA, aLoRA).
        """
        return cls(base_model, peft_config, ib=ib)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> "IBModel":
        """Loads adapter and bottleneck (where there is one) from a folder or a Hub repository onto a base model.

        Args:
            model: the base model, without an adapter.
            model_id: what `save_pretrained` wrote: a folder, or the name of a repository.
            is_trainable: whether adapter and bottleneck go on training; otherwise the model is in evaluation mode.
            config: in place of the adapter's own configuration.
            kwargs: PEFT's, and the Hub's (revision, subfolder, token, cache_dir, force_download, local_files_only).

        Raises:
            InputError: as `from_base`; and where a bottleneck's configuration has no weights beside it, or the Hub was
                not reached, so that whether there is one cannot be told.
        """
        hub = {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS}
        file = _locate(str(model_id), CONFIG_NAME, hub)
        config = config or PeftConfig.from_pretrained(str(model_id), **hub)
        config.inference_mode = not is_trainable
        wrapped = cls(model, config, adapter_name, ib=None if file is None else IBConfig.load(file))
        wrapped.load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        return wrapped if is_trainable else wrapped.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        num_items_in_batch: int | Tensor | None = None,
        num_kl_items_in_batch: int | Tensor | None = None,
        token_mask: Tensor | None = None,
        label_indices: Tensor | None = None,
        noise_rng: Tensor | None = None,
        noise_rows: Tensor | None = None,
        return_active_share: bool = False,
        return_stats: bool = True,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Without labels the ordinary model; with labels the loss, for which no logits are in memory.

        Args:
            input_ids, attention_mask, inputs_embeds, position_ids: as the base model takes them, [B, T]. Packed rows:
                position_ids restart with each document, and there is no attention mask.
            labels: int64 [B, T], -100 where not learnt, and on the first token of every document.
            num_items_in_batch: label positions of the whole optimizer step, over micro-batches and ranks, so that the
                losses of a step add up to its mean; None: those of this batch.
            num_kl_items_in_batch: likewise the positions of the KL's mean. Where only num_items_in_batch is known and
                kl_tokens="all", this batch's KL mean is weighted by its share of the labels.
            token_mask: bool [B, T], False at padding; None: the attention mask, or no padding.
            label_indices: int64 [M], flat positions b*T+t whose next token is a label; None: found from labels.
            noise_rng: int64 [2] (seed, offset) of the noise; None: drawn from torch's generator.
            noise_rows: int64 [B, T] row ids of the noise; None: positions in the batch.
            return_active_share: also the bottleneck's share of active dimensions, see `objective.active_share`.
            return_stats: also entropy_sum and num_correct_tokens over the label positions (a little more work on each
                block of logits), and logits for whoever reads them.
            fused_lm_head: answer as trl's fused head does, see `output.fused_head_output`.

        Returns:
            IBOutput. In evaluation mode `loss` is the plain cross-entropy, and no term of the bottleneck is computed.

        Raises:
            InputError: in training with a bottleneck and gradients, for a call without labels, whose caller would
                compute a loss of its own from the logits (Trainer with label_smoothing_factor or compute_loss_func).
        """
        if labels is None:
            if self.training and self.bottleneck is not None and torch.is_grad_enabled():
                raise InputError(
                    "IBModel got no labels in training: a loss computed from its logits would lack the bottleneck's "
                    "terms. Trainer withholds them for label_smoothing_factor and compute_loss_func: train without "
                    "these, or with ib=None."
                )
            return super().forward(
                input_ids, attention_mask, inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs
            )
        parts = CausalLM.of(self.get_base_model())
        parts.check_router_loss(asked=bool(kwargs.get("output_router_logits")))
        bottleneck = self.bottleneck if self.training else None
        with self._tap.armed(bottleneck is not None):
            last = parts.decode(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                **kwargs,
            )  # [B, T, H]

        positions = _label_positions(labels, label_indices)
        num_labels = (positions.targets != -100).sum()
        num_items = _count(num_labels if num_items_in_batch is None else num_items_in_batch, last)
        result = linear_cross_entropy(
            positions.of(last.flatten(0, 1)),
            parts.head.weight,
            positions.targets,
            bias=parts.head.bias,
            softcap=parts.softcap,
            logit_scale=parts.logit_scale,
            num_items=num_items,
            return_stats=return_stats,
        )
        ce, stats = result if isinstance(result, tuple) else (result, None)
        loss, terms = ce, {"ce": ce.detach(), "num_valid_tokens": num_labels}
        if stats is not None:
            terms |= {"entropy_sum": stats.entropy_sum, "num_correct_tokens": stats.num_correct}
            if not torch.compiler.is_compiling():
                terms["logits"] = DeferredLogits(last, parts)
        if bottleneck is not None and self.ib_config is not None and self.objective is not None:
            hidden = self._tapped(last).flatten(0, 1)  # [B*T, H]
            rows = torch.arange(labels.numel(), device=labels.device) if noise_rows is None else noise_rows.reshape(-1)
            mask = _token_mask(token_mask, attention_mask, labels)
            if by_label := self.ib_config.kl_tokens == "labels":  # the other positions are not needed at all
                hidden, rows, mask = positions.of(hidden), positions.of(rows), positions.targets != -100
            z, token_kl = bottleneck(hidden, rng=noise_rng, rows=rows)  # [N, K], [N]
            kl_sum = torch.where(mask, token_kl, 0).sum()
            if torch.is_grad_enabled():
                self.objective.observe(kl_sum, mask.sum(), bottleneck.up_weight)

            def step_mean(total: Tensor) -> Tensor:
                if by_label:
                    return total / num_items
                if num_kl_items_in_batch is not None:
                    return total / _count(num_kl_items_in_batch, last)
                return total / _count(mask.sum(), last) * num_labels / num_items

            kl = penalty = step_mean(kl_sum)
            if self.ib_config.free_bits:
                free = self.ib_config.free_bits / self.ib_config.nats_scale
                penalty = step_mean(torch.where(mask, free_nats(token_kl, free), 0).sum())
            ce_ib = cast(
                Tensor,  # without return_stats
                bottleneck.cross_entropy(
                    z if by_label else positions.of(z), parts.head.weight, positions.targets, num_items=num_items
                ),
            )
            loss = self.objective.loss(ce, penalty, ce_ib)
            terms |= {"kl": kl.detach(), "ce_ib": ce_ib.detach()}
            if return_active_share:
                with torch.no_grad():
                    terms["active_share"] = active_share(bottleneck.encode(hidden[mask])[0])
        output = IBOutput(loss=loss, **terms)
        return fused_head_output(output) if fused_lm_head else output

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes the adapter exactly as PEFT does; beside it the bottleneck, ib_head.safetensors and ib_config.json."""
        state = kwargs.pop("state_dict", None) or self.state_dict()
        # Stripped because PEFT's bias="all" takes every name that has "bias" in it for its own.
        adapter = {name: tensor for name, tensor in state.items() if not name.startswith(_PREFIX)}
        for config in self.peft_config.values():
            if isinstance(config.target_modules, set):  # in an order that changes from one process to the next
                config.target_modules = sorted(config.target_modules)
        super().save_pretrained(str(save_directory), state_dict=adapter, **kwargs)
        if self.ib_config is None or self.objective is None or not kwargs.get("is_main_process", True):
            return
        head = {
            name.removeprefix(_PREFIX): tensor.detach().contiguous()
            for name, tensor in state.items()
            if name.startswith(_PREFIX)
        }
        save_file(head, Path(save_directory) / HEAD_NAME, metadata={"format": "pt"})
        self.ib_config.save(save_directory)
        self.objective.save(save_directory)

    def load_adapter(self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
        """As PEFT's, with the bottleneck's weights, and where the weights of the objective had got to."""
        hub = {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS}
        result = super().load_adapter(str(model_id), adapter_name, is_trainable=is_trainable, **kwargs)
        if self.bottleneck is not None:
            file = _locate(str(model_id), HEAD_NAME, hub)
            if file is None:
                raise InputError(
                    f"{model_id} has no {HEAD_NAME}: it holds a plain adapter, load that with ib=None (SFT)."
                )
            self.bottleneck.load_state_dict(load_file(file))
            self.bottleneck.requires_grad_(is_trainable)
        objective = self.objective
        if objective is not None and objective.varies and (file := _locate(str(model_id), STATE_NAME, hub)) is not None:
            objective.load(file)
        return result

    def step_objective(self) -> None:
        """Moves alpha's warm-up and the adapted KL weight on, after each optimizer step; nothing where they are fixed.

        With an ib_rate_target it is collective: every process of the default group must call it.
        """
        if self.objective is not None:
            self.objective.step()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base model with the adapter merged in, and no trace of the bottleneck."""
        self._detach()
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base model as it was, without adapter and bottleneck."""
        self._detach()
        return self.base_model.unload(*args, **kwargs)

    def _detach(self) -> None:
        self._tap.remove()
        self.bottleneck = self.ib_config = self.objective = None

    def _replicate_for_data_parallel(self) -> Any:
        raise InputError(
            "IBModel does not run under torch.nn.DataParallel, which Trainer takes where one process sees several "
            "GPUs: start the script with torchrun or accelerate launch, or show it one GPU (CUDA_VISIBLE_DEVICES=0)."
        )

    def _tapped(self, last: Tensor) -> Tensor:
        """The target layer's hidden states, those of the top one being `last`; InputError if they take no gradient."""
        hidden = self._tap.take() if self._tap.attached else last
        if hidden is None:
            raise RuntimeError(
                "the target layer did not run; were the decoder's layers replaced after IBModel was made?"
            )
        if torch.is_grad_enabled() and not hidden.requires_grad:
            raise InputError(
                "the tapped hidden states take no gradient, so the bottleneck would shape nothing: no adapter at or "
                "below the target layer is trainable, or reentrant activation checkpointing runs over frozen "
                "embeddings (call enable_input_require_grads(), or use_reentrant=False)."
            )
        return hidden


class _LabelPositions(NamedTuple):
    """The positions whose next token counts, and that token; with indices None all positions, -100 where none does."""

    indices: Tensor | None
    targets: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """[B*T, ...] -> [M, ...]."""
        return tensor if self.indices is None else tensor.index_select(0, self.indices)


def _label_positions(labels: Tensor, indices: Tensor | None) -> _LabelPositions:
    following = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
    if indices is None and labels.device.type == "cpu":
        indices = (following != -100).nonzero()[:, 0]  # on a GPU this would stop the host: all positions are kept
    return _LabelPositions(indices, following if indices is None else following.index_select(0, indices))


def _token_mask(token_mask: Tensor | None, attention_mask: Tensor | None, labels: Tensor) -> Tensor:
    if token_mask is None and attention_mask is not None and attention_mask.shape == labels.shape:
        token_mask = attention_mask
    return (torch.ones_like(labels) if token_mask is None else token_mask).reshape(-1).bool()


def _count(count: int | Tensor, like: Tensor) -> Tensor:
    """A count to divide by: one where there is nothing to count, so that an empty mean is a connected zero."""
    if isinstance(count, Tensor):
        return count.to(like.device).reshape(()).clamp(min=1)
    return torch.full((), max(count, 1), device=like.device)  # filled there: copying a number over stops the host


def _check_tuner(tuner: nn.Module) -> None:
    """Raises InputError where PEFT does more in forward than to run the model, which our loss would pass by."""
    if isinstance(tuner, BaseTuner) and type(tuner).forward is not BaseTuner.forward:
        raise InputError(
            f"{type(tuner).__name__} changes what the model's forward returns (AdaLoRA adds a term to the loss), and "
            "IBModel's loss would leave that out; use LoRA."
        )


def _locate(model_id: str, name: str, hub: dict[str, Any]) -> Path | None:
    """The file of that name in a local folder or a Hub repository; None where it has none."""
    if Path(model_id).is_dir():
        file = Path(model_id) / (hub.get("subfolder") or "") / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(model_id, name, **hub))
    except LocalEntryNotFoundError as error:  # unknown, which must not pass for "there is none"
        raise InputError(
            f"whether {model_id} has a bottleneck cannot be told: {name} is not in the cache, and the Hub was not "
            "reached. Connect, or name a folder that holds the whole repository."
        ) from error
    except EntryNotFoundError:
        return None
