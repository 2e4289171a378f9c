"""Tiny models, and the objective written out eagerly: what IBModel is held against."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ibft import IBConfig, IBModel
from ibkernels import reference

VOCABULARY, HIDDEN, LAYERS = 101, 32, 3


# What sets each architecture apart, switched on; head width 8, so that GQA, windows and norms have something to do.
_LOCAL = {"sliding_window": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": _LOCAL,
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, **_LOCAL},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, **_LOCAL},
    "phi3": {"pad_token_id": 0},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "starcoder2": {"use_bias": True, "residual_dropout": 0.0, "embedding_dropout": 0.0, **_LOCAL},
    "qwen3_moe": {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_positions": 64},
}
KINDS = [f"{family}{tied}" for family in FAMILIES for tied in ("", "-tied") if family != "gpt2"] + ["gpt2-tied"]


def tiny_model(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model of one of FAMILIES; a kind that ends in "-tied" shares embeddings and head."""
    torch.manual_seed(0)
    family, _, tied = kind.partition("-")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    if family != "gpt2":
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2}
    settings = AutoConfig.for_model(family, **sizes, tie_word_embeddings=bool(tied), **FAMILIES[family])
    experts = {"experts_implementation": "eager"} if "moe" in family else {}  # the default knows no float64
    model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, **experts)
    for parameter in model.parameters():  # weights large enough that every term matters
        parameter.data.normal_(std=0.2) if parameter.dim() > 1 else parameter.data.add_(
            0.1 * torch.randn_like(parameter)
        )
    return with_exact_norms(model.to(dtype)).train()


def with_exact_norms(model: Any) -> Any:
    """Replaces the RMSNorms, which transformers computes in float32 whatever the dtype, by torch's own."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                gemma = type(child).__name__.startswith("Gemma")  # keeps its weight less one, and calls epsilon eps
                eps = child.eps if gemma else child.variance_epsilon
                norm = nn.RMSNorm(child.weight.shape[0], eps=eps, dtype=child.weight.dtype)
                norm.weight = nn.Parameter(1 + child.weight.data) if gemma else child.weight
                setattr(module, name, norm)
    return model


def wrap(model: PreTrainedModel, ib: IBConfig | None, **lora: Any) -> IBModel:
    """IBModel with a LoRA whose B is not zero, so that the adapter does something from the start."""
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    wrapped = IBModel.from_base(model, LoraConfig(**{**settings, **lora}), ib)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    wrapped.to(next(model.parameters()).dtype)
    return wrapped.train()


class EagerTerms(NamedTuple):
    """Sums over tokens, and the counts to divide them by; kl is what is paid, beyond the free bits."""

    ce: Tensor
    kl: Tensor
    ce_ib: Tensor
    num_labels: int
    num_tokens: int

    def loss(self, ib: IBConfig) -> Tensor:
        """The objective, as the paper writes it."""
        kl_count = self.num_labels if ib.kl_tokens == "labels" else self.num_tokens
        ce_ib = self.ce_ib / self.num_labels
        return self.ce / self.num_labels + ib.alpha * (ib.kl_weight * self.kl / kl_count + ib.beta * ce_ib)


def eager_terms(model: IBModel, batch: dict[str, Tensor], rng: Tensor | None) -> EagerTerms:
    """The terms from the formulas alone: full logits, every hidden state, no op of ibkernels but the noise."""
    ib, layer = model.ib_config, model.bottleneck
    assert ib is not None and layer is not None
    output = model.get_base_model()(
        input_ids=batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
        output_hidden_states=True,
        use_cache=False,
    )
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    hidden = output.hidden_states[ib.target_layer]  # [B, T, H]
    weight = layer.lora_b @ layer.lora_a if ib.encoder == "lora" else layer.weight
    mu, logvar = F.linear(hidden, weight, layer.bias).chunk(2, dim=-1)  # [B, T, K]
    logvar = logvar.clamp(*ib.logvar_range)
    z = mu
    if rng is not None:
        rows = batch.get("noise_rows", torch.arange(labels.shape[0] * (labels.shape[1] + 1)))
        eps = reference.noise(rng, rows.reshape(-1), ib.bottleneck_dim, torch.float64).view_as(mu)
        z = mu + torch.exp(logvar / 2) * eps
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar)
    nats = kl.sum(-1)  # [B, T]
    nats = torch.where(nats > ib.free_bits, nats - ib.free_bits, 0 * nats)
    kl = nats / ib.bottleneck_dim if ib.kl_reduction == "mean" else nats
    mask = batch.get("token_mask", torch.ones_like(batch["labels"])).bool()
    chosen = counted if ib.kl_tokens == "labels" else mask
    kl_sum = (kl[:, :-1] if ib.kl_tokens == "labels" else kl)[chosen].sum()
    head = model.get_base_model().get_output_embeddings()
    logits_ib = F.linear(F.linear(z, layer.up_weight, layer.up_bias), head.weight)

    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1][counted], labels[counted], reduction="sum")

    return EagerTerms(
        cross_entropy(output.logits), kl_sum, cross_entropy(logits_ib), int(counted.sum()), int(mask.sum())
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters' gradients, taken away from the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every gradient within `tolerance` of the largest element of its tensor (or of 1, if that is smaller)."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1.0)
        error = (actual[name] - gradient).abs().max().item() / scale
        assert error <= tolerance, f"{name}: {error}"


def random_batch(rows: int = 2, length: int = 11) -> dict[str, Tensor]:
    """Ids and labels; the first half of each row is a prompt, and one label inside is ignored."""
    ids = torch.randint(0, VOCABULARY, (rows, length))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    labels[0, length - 2] = -100
    return {"input_ids": ids, "labels": labels}
