"""Every attention keeps packed documents apart, with the gradients they have alone."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_kernels import KERNELS, PACKAGES, flash_attn_2
from oracle import KINDS, VOCABULARY, assert_same_gradients, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PreTrainedModel

from ibft import InputError, document_attention
from ibft.architecture import CausalLM
from ibft.cli import main
from ibft.data import Lengths, collate, document_lengths
from ibft.data.encoded import Document
from ibft.document_attention import BY_DOCUMENT, FLASH, VARLEN, varlen_attention
from ibft.document_attention import KERNELS as ATTENTIONS

ROWS = [[7, 1, 5], [9, 2]]  # documents longer and shorter than the windows of 4; the second row is padded
BACKENDS = ["sdpa", "eager", "by document", *KERNELS, *PACKAGES]
# Gemma 2's scores have a softcap, for which sdpa and torch's kernel are refused: test_select_attention.py.
PAIRS = [
    (kind, backend)
    for kind in KINDS
    for backend in BACKENDS
    if kind in ("gpt2-tied", kind.removesuffix("-tied"))
    and (backend in ("eager", "by document", *PACKAGES) or not kind.startswith("gemma2"))
]


def use(backend: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets a model's attention; the kernels are stand-ins, called as on a GPU."""
    if backend in KERNELS:
        monkeypatch.setattr(document_attention, "varlen_attn", KERNELS[backend])
        monkeypatch.setattr(document_attention, "_KERNEL_TAKES_GROUPS", backend == "kernel")
        model.set_attn_implementation(as_on_a_gpu(VARLEN, monkeypatch))
    elif backend in PACKAGES:
        name = "flash_attention_2" if backend == "flash-attn on a CPU" else backend
        model.set_attn_implementation(registered(name, PACKAGES[backend], monkeypatch, gpu=name == backend))
    else:
        model.set_attn_implementation(backend if backend in ("sdpa", "eager") else BY_DOCUMENT)


def as_on_a_gpu(implementation: str, monkeypatch: pytest.MonkeyPatch) -> str:
    call = AttentionInterface._global_mapping[implementation]
    monkeypatch.setitem(AttentionInterface._global_mapping, implementation, partial(call, by_kernel=True))
    return implementation


def registered(name: str, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, gpu: bool = True) -> str:
    """The name under which transformers finds a flash-attn whose kernel is this function; gpu: called as on one."""
    module: Any = ModuleType(FLASH[name])
    module.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTIONS[name], None)
    implementation = document_attention.registered(name)
    return as_on_a_gpu(implementation, monkeypatch) if gpu else implementation


def packed_batch(
    rows: list[list[int]] = ROWS, lengths: Lengths | None = "device"
) -> tuple[list[list[Document]], dict[str, Any]]:
    torch.manual_seed(1)
    bins = [
        [Document(torch.randint(0, VOCABULARY, (size,)).numpy(), [True] * size, row) for size in sizes]  # type: ignore[arg-type]
        for row, sizes in enumerate(rows)
    ]
    return bins, collate(bins, pad_token_id=0, max_length=16, packing="best-fit", lengths=lengths)


def decode(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """As the loop calls it: everything that is no argument of IBModel's own reaches the decoder."""
    own = ("labels", "token_mask", "noise_rows", "label_indices")
    return CausalLM.of(model).decode(**{name: value for name, value in batch.items() if name not in own})


def wanted(backend: str) -> Lengths | None:
    return None if backend in ("sdpa", "eager") else "host" if backend == "by document" else "device"


def documents_alone(model: PreTrainedModel, bins: list[list[Document]]) -> list[list[Tensor]]:
    parts = CausalLM.of(model)
    return [[parts.decode(input_ids=torch.from_numpy(document.tokens)[None])[0] for document in row] for row in bins]


def weighted(hidden: Tensor) -> Tensor:
    """A loss that every position and dimension takes part in differently."""
    return (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden).sin()).sum()


@pytest.mark.parametrize(("kind", "backend"), PAIRS)
def test_packed_documents_are_as_alone_logits_and_gradients(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (bins, batch) = tiny_model(kind), packed_batch(lengths=wanted(backend))
    model.set_attn_implementation("eager")
    alone = documents_alone(model, bins)
    sum(weighted(hidden) for row in alone for hidden in row).backward()  # type: ignore[union-attr]
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    use(backend, model, monkeypatch)
    hidden = decode(model, batch)
    packed = [list(row[: sum(sizes)].split(sizes)) for row, sizes in zip(hidden, ROWS, strict=True)]
    torch.testing.assert_close(packed, [[h.detach() for h in row] for row in alone], rtol=0, atol=1e-6)
    head = model.get_output_embeddings()
    torch.testing.assert_close(head(packed[1][0]), head(alone[1][0]), rtol=0, atol=1e-6)
    sum(weighted(hidden) for row in packed for hidden in row).backward()  # type: ignore[union-attr]
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) > 8
    assert_same_gradients(actual, expected, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_document_holds_changes_no_other_document(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (_, batch) = tiny_model("llama"), packed_batch(lengths=wanted(backend))
    use(backend, model, monkeypatch)
    before = decode(model, batch)
    batch["input_ids"][0, 0] += 1  # the first token of the first document, which all after it could see
    after = decode(model, batch)
    assert (before != after)[0, :7].all(-1).all()
    assert torch.equal(before[0, 7:], after[0, 7:]) and torch.equal(before[1], after[1])
    if backend not in ("sdpa", "eager"):  # the test would see a leak: the row taken for one document
        leaking = decode(model, {**batch, **document_lengths([13, 13], wanted(backend) or "device")})
        assert (leaking != after)[0, 7:].any()


@pytest.mark.parametrize("backend", ["by document", "kernel"])
def test_packed_documents_without_their_lengths_are_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (_, batch) = tiny_model("llama"), packed_batch()
    use(backend, model, monkeypatch)
    parts, ids = CausalLM.of(model), batch["input_ids"]
    with pytest.raises(InputError, match="needs the lengths of packed documents"):
        parts.decode(input_ids=ids, position_ids=batch["position_ids"])
    assert torch.isfinite(parts.decode(input_ids=ids, position_ids=torch.arange(13).expand(2, -1))).all()


@pytest.mark.parametrize("backend", ["sdpa", "by document", "kernel"])
def test_padding_is_a_document_of_its_own(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (_, batch) = tiny_model("mistral"), packed_batch(lengths=wanted(backend))
    use(backend, model, monkeypatch)
    before = decode(model, batch)
    batch["input_ids"][1, 11:] = 5
    after = decode(model, batch)
    assert torch.equal(before[1, :11], after[1, :11]) and torch.isfinite(after).all()


def test_lengths_of_a_batch() -> None:
    _, batch = packed_batch()
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 7, 8, 13, 22, 24, 26]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 9
    bins, _ = packed_batch([[3], [5]])
    padded = collate(bins, pad_token_id=0, max_length=16, packing="none", lengths="device")
    assert padded["cu_seq_lens_q"].tolist() == [0, 3, 5, 10] and "attention_mask" not in padded
    dummy = collate([], pad_token_id=0, max_length=16, packing="best-fit", lengths="device")
    assert dummy["cu_seq_lens_q"].tolist() == [0, 1] and dummy["max_length_q"] == 1
    _, batch = packed_batch(lengths="host")
    assert batch["document_lengths"] == (7, 1, 5, 9, 2, 2) and not any(name.startswith("cu_") for name in batch)


class _Waits(TorchDispatchMode):
    """Counts what would stop the host on a GPU: a value of the device that Python asks for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["varlen", "flash_attention_2", "flash_attention_3"])
def test_no_layer_asks_the_device_for_a_length(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does transformers, which looks at position_ids once per mask for an attention that it knows."""
    model, (_, batch) = tiny_model("mistral"), packed_batch()
    bounds: list[Tensor] = []

    def opaque(query: Tensor, *arguments: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
        given = dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), arguments[2:], strict=False))
        given |= options
        bounds.extend((given["cu_seqlens_q"], given["cu_seqlens_k"]))
        assert type(given["max_seqlen_q"]) is type(given["max_seqlen_k"]) is int
        return query

    def waits(backend: str) -> int:
        model.set_attn_implementation(backend)
        with _Waits() as mode:
            decode(model, batch)
        return mode.count

    assert waits("sdpa") > 0  # transformers looks at position_ids, once
    if kind == "varlen":
        monkeypatch.setattr(document_attention, "varlen_attn", opaque)
        assert waits(as_on_a_gpu(VARLEN, monkeypatch)) == 0
    else:
        assert waits(registered(kind, opaque, monkeypatch)) == 0
    assert len(bounds) == 6 and all(tensor is batch["cu_seq_lens_q"] for tensor in bounds)


@pytest.mark.parametrize("kind", ["varlen", "flash_attention_2"])
def test_the_kernel_leaves_a_compiled_layer_in_one_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (_, batch) = tiny_model("mistral"), packed_batch()
    if kind == "varlen":
        monkeypatch.setattr(document_attention, "varlen_attn", lambda query, *_, **__: query)
        model.set_attn_implementation(as_on_a_gpu(VARLEN, monkeypatch))
    else:
        model.set_attn_implementation(registered(kind, lambda query, *_, **__: query, monkeypatch))
    expected = decode(model, batch)
    for layer in CausalLM.of(model).layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="eager")  # raises where it would break
    torch.testing.assert_close(decode(model, batch), expected)


def test_runs_with_every_attention_learn_the_same(base_folder: Path, tasks_file: Path, tmp_path: Path) -> None:
    found = {}
    for packing in ("best-fit", "none"):
        for name in ("varlen", "sdpa", "eager"):
            out = tmp_path / f"{packing}-{name}"
            command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {out} --packing {packing}"
            small = "--max_length 128 --bottleneck_dim 8 --lora_r 2 --max_steps 3 --lora_dropout 0 --learning_rate 1e-2"
            assert main(f"{command} {small} --attn_implementation {name} --validation_split 4".split()) == 0
            assert json.loads((out / "ibft.json").read_text())["attention"] == name
            records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            found[packing, name] = [record["loss"] for record in records] + [records[-1]["eval_loss"]]
        for name in ("sdpa", "eager"):
            assert found[packing, name] == pytest.approx(found[packing, "varlen"], rel=1e-5)
    assert found["none", "varlen"][0] != found["best-fit", "varlen"][0]  # other documents share a step


def test_values_that_are_narrower_than_keys_are_padded_for_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in models with latent attention."""
    name = registered("flash_attention_2", flash_attn_2, monkeypatch)
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6)
    lengths = document_lengths([2, 3], "device")
    call = AttentionInterface._global_mapping[name]
    output, _ = call(torch.nn.Identity(), query, key, value, None, is_causal=True, **lengths)
    expected, _ = varlen_attention(torch.nn.Identity(), query, key, value, None, is_causal=True, **lengths)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_the_loop_over_documents_needs_no_value_of_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data have none to give. Keys of groups are spread out: see `_by_document`."""
    model, (_, batch) = tiny_model(kind).to("meta"), packed_batch(lengths="host")
    use("by document", model, monkeypatch)
    seen, attend = [], F.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        assert not options["enable_gqa"]
        seen.append((query.shape[1:3], key.shape[1:3]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    hidden = decode(model, {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in batch.items()})
    assert hidden.is_meta and hidden.shape[:2] == (2, 13)
    assert len(seen) == (0 if kind == "gemma2" else 6 * len(CausalLM.of(model).layers))  # six documents
    assert all(query == key for query, key in seen)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_on_scores_in_a_loop_over_documents(softcap: float | None) -> None:
    torch.manual_seed(0)
    sizes, width = (32, 16), 32
    query, key = torch.randn(1, 2, 48, width), torch.randn(1, 1, 48, width)
    value = torch.cat([torch.eye(size, width) for size in sizes])[None, None]  # so that the output is the weights
    call = (torch.nn.Identity(), query, key, value, None)
    options: dict[str, Any] = {"is_causal": True, "softcap": softcap, "document_lengths": sizes}
    weights, _ = varlen_attention(*call, **options)
    dropped, _ = varlen_attention(*call, dropout=0.25, **options)
    seen = weights > 0
    assert (dropped[seen] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(dropped, torch.where(dropped > 0, weights / 0.75, 0))


def test_no_scores_of_a_softcap_are_kept_for_backward_and_dropout_is_the_same_there() -> None:
    query, key, value = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    scores = document_attention._Scores(None, True, 9, 3.0, 0.5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.shape), tensor)[1], lambda t: t):
        torch.manual_seed(0)
        output, _ = varlen_attention(
            torch.nn.Identity(), query, key, value, None, 0.5, sliding_window=9, softcap=3.0, document_lengths=(40,)
        )
    assert kept and not any(shape[-2:] == (40, 40) for shape in kept)
    actual = torch.autograd.grad(weighted(output), (query, key, value))
    torch.manual_seed(0)
    direct = document_attention._with_softcap(query, key, value, scores).transpose(1, 2)
    torch.testing.assert_close(output, direct)
    torch.testing.assert_close(actual, torch.autograd.grad(weighted(direct), (query, key, value)))


def test_dropout_on_scores_is_passed_to_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def function(q: Tensor, *arguments: Any, dropout_p: float = 0.0, **options: Any) -> Tensor:
        given.append(dropout_p)
        return q

    call = AttentionInterface._global_mapping[registered("flash_attention_2", function, monkeypatch)]
    states = torch.randn(1, 2, 5, 8)
    for dropout in (0.25, 0.0):
        call(torch.nn.Identity(), states, states, states, None, dropout, is_causal=True)
    assert given == [0.25, 0.0]


def test_queries_that_a_norm_left_in_float32_are_cast() -> None:
    """Layer norms of queries and keys, as StableLM has them, come out of autocast so."""
    query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8).bfloat16()
    output, _ = varlen_attention(torch.nn.Identity(), query, key, value, None, is_causal=True)
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"softcap": 50.0}, "does not know softcap"),
        ({"s_aux": torch.zeros(2)}, "does not know s_aux"),
        ({"dropout": 0.1}, "does not know attention dropout"),
        ({"is_causal": False, "sliding_window": 2}, "does not know a window of attention in both directions"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "does not know an attention mask"),
        ({"key": torch.zeros(1, 2, 9, 4)}, "does not know a cache of keys"),
    ],
)
def test_what_it_cannot_compute_is_refused(changes: dict[str, Any], sentence: str) -> None:
    states = torch.zeros(1, 2, 3, 4)
    call = {"query": states, "key": states, "value": states, "attention_mask": None, "is_causal": True, **changes}
    with pytest.raises(InputError, match=sentence):
        varlen_attention(torch.nn.Identity(), **call, by_kernel=True)
    if not {"softcap", "dropout"} & changes.keys():
        with pytest.raises(InputError, match=sentence):
            varlen_attention(torch.nn.Identity(), **call, by_kernel=False)


@pytest.mark.parametrize("backend", ["by document", *KERNELS])
def test_attention_in_both_directions_is_within_documents_too(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder's: `CausalLM.check_causal` must see it as it is, to refuse it."""
    model = tiny_model("llama")
    use(backend, model, monkeypatch)
    query, key, value = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    lengths = document_lengths([2, 3], wanted(backend) or "device")
    attend = AttentionInterface._global_mapping[model.config._attn_implementation]
    output, _ = attend(torch.nn.Identity(), query, key, value, None, is_causal=False, **lengths)
    parts = [
        F.scaled_dot_product_attention(*(x[:, :, at] for x in (query, key, value))) for at in (slice(2), slice(2, 5))
    ]
    torch.testing.assert_close(output, torch.cat(parts, dim=2).transpose(1, 2), rtol=0, atol=1e-12)
