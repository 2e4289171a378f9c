"""The nn.Module faces: parameters and their initialisation, modes, options, serialisation, and a small training run."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ibkernels
from ibkernels import BottleneckHead, VariationalBottleneck

H, K, R, V = 12, 5, 3, 17
ENCODERS = {"linear": {}, "lora": {"encoder": "lora", "encoder_rank": R}}
each_encoder = pytest.mark.parametrize("encoder", ENCODERS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_layer(encoder: str = "linear", **options) -> VariationalBottleneck:
    return VariationalBottleneck(H, K, **ENCODERS[encoder], **options)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_names_and_shapes_of_the_state_dict():
    shared = {"bias": (2 * K,), "up_weight": (H, K), "up_bias": (H,)}
    assert shapes_of(make_layer("linear")) == {"weight": (2 * K, H), **shared}
    assert shapes_of(make_layer("lora")) == {"lora_a": (R, H), "lora_b": (2 * K, R), **shared}
    assert shapes_of(make_layer("linear", bias=False)) == {"weight": (2 * K, H), "up_weight": (H, K)}
    assert shapes_of(BottleneckHead(H, K)) == {"up_weight": (H, K), "up_bias": (H,)}
    assert shapes_of(BottleneckHead(H, K, bias=False)) == {"up_weight": (H, K)}
    assert all(parameter.requires_grad for parameter in make_layer("lora").parameters())


def uniform_within(tensor: Tensor, bound: float) -> bool:
    """Whether the values fill ±bound: variance bound^2 / 3, to five standard errors."""
    variance = bound**2 / 3
    standard_error = variance * math.sqrt(0.8 / tensor.numel())  # Var(x^2) = 0.8 Var(x)^2 for a uniform x
    return bool(tensor.abs().max() <= bound) and abs(tensor.square().mean().item() - variance) < 5 * standard_error


def test_initialisation_is_that_of_linear_layers():
    hidden_size, width = 300, 64
    layer = VariationalBottleneck(hidden_size, width)
    assert uniform_within(layer.weight, hidden_size**-0.5)
    assert uniform_within(layer.bias, hidden_size**-0.5)
    for module in (layer, BottleneckHead(hidden_size, width), VariationalBottleneck(300, width, **ENCODERS["lora"])):
        assert uniform_within(module.up_weight, width**-0.5)
        assert uniform_within(module.up_bias, width**-0.5)


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_the_lora_product_starts_with_the_variance_of_a_linear_layer(rank):
    hidden_size = 256
    products = []
    for _ in range(40):
        layer = VariationalBottleneck(hidden_size, 64, encoder="lora", encoder_rank=rank)
        assert uniform_within(layer.lora_a, hidden_size**-0.5)
        products.append(layer.lora_b.detach() @ layer.lora_a.detach())
    assert torch.stack(products).square().mean().item() == pytest.approx(1 / (3 * hidden_size), rel=0.04)


@each_encoder
def test_reset_parameters_follows_its_generator(encoder):
    first, second = make_layer(encoder), make_layer(encoder)
    assert not torch.equal(first.up_weight, second.up_weight)
    for layer in (first, second):
        layer.reset_parameters(torch.Generator().manual_seed(4))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    heads = [BottleneckHead(H, K) for _ in range(2)]
    for head in heads:
        head.reset_parameters(torch.Generator().manual_seed(4))
    assert torch.equal(heads[0].up_weight, heads[1].up_weight)


@each_encoder
def test_device_and_dtype(encoder):
    for module in (make_layer(encoder, device="meta", dtype=torch.bfloat16), BottleneckHead(H, K, device="meta")):
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    layer = make_layer(encoder, dtype=torch.float64)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    z, kl = layer.to(torch.bfloat16)(torch.randn(3, H, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16 and kl.dtype == torch.float32


# ---- forward ---------------------------------------------------------------------------------------------------------


@each_encoder
def test_forward_is_the_op_on_the_layers_parameters_and_options(encoder):
    layer, hidden = make_layer(encoder, logvar_range=(-0.1, 0.1), kl_reduction="sum"), torch.randn(2, 3, H)
    weight = layer.weight if encoder == "linear" else (layer.lora_a, layer.lora_b)
    rng, rows = torch.tensor([5, 6]), torch.arange(6).view(2, 3) * 9
    options = {"logvar_range": (-0.1, 0.1), "kl_reduction": "sum"}
    expected = ibkernels.variational_bottleneck(hidden, weight, layer.bias, rng, rows=rows, **options)
    assert all(map(torch.equal, layer(hidden, rng=rng, rows=rows), expected))
    mu, logvar = layer.encode(hidden)
    assert all(map(torch.equal, (mu, logvar), ibkernels.encode(hidden, weight, layer.bias, logvar_range=(-0.1, 0.1))))
    assert logvar.abs().max() <= 0.1


def test_noise_is_drawn_in_training_only():
    layer, hidden, rng = make_layer(), torch.randn(4, H), torch.tensor([5, 6])
    mean, _ = layer.encode(hidden)
    assert not torch.equal(layer(hidden)[0], layer(hidden)[0])
    torch.manual_seed(1)
    drawn = layer(hidden)[0]
    torch.manual_seed(1)
    assert torch.equal(layer(hidden)[0], drawn)
    assert torch.equal(layer(hidden, rng=rng)[0], layer(hidden, rng=rng)[0])
    assert not torch.equal(layer(hidden, rng=rng)[0], mean)

    state = torch.get_rng_state()
    layer.eval()
    assert torch.equal(layer(hidden)[0], mean)
    assert torch.equal(layer(hidden, rng=rng)[0], mean)
    layer.train()
    layer.sample = False
    assert torch.equal(layer(hidden)[0], mean)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn


@each_encoder
@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_gets_a_gradient(encoder, bias):
    layer, head_weight = make_layer(encoder, bias=bias), torch.randn(V, H)
    z, kl = layer(torch.randn(7, H))
    (layer.cross_entropy(z, head_weight, torch.arange(7)) + kl.mean()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_cross_entropy_flattens_and_passes_its_options_on():
    layer, head = make_layer(), BottleneckHead(H, K)
    z, head_weight, labels = torch.randn(2, 3, K), torch.randn(V, H), torch.tensor([[1, -100, 3], [4, 5, 16]])
    head.load_state_dict({name: getattr(layer, name) for name in ("up_weight", "up_bias")})
    flat = z.view(6, K), layer.up_weight, layer.up_bias, head_weight, labels.view(6)
    biased = {"num_items": 10, "absorb": True, "bias": torch.randn(V)}
    for options in ({}, {"reduction": "none", "softcap": 2.0}, biased):
        expected = ibkernels.bottleneck_cross_entropy(*flat, **options)
        assert torch.equal(layer.cross_entropy(z, head_weight, labels, **options), expected)
        assert torch.equal(head(z, head_weight, labels, **options), expected)
    loss, stats = head(z, head_weight, labels, return_stats=True)
    assert loss.shape == () and isinstance(stats, ibkernels.CrossEntropyStats)
    logits = F.linear(F.linear(z, layer.up_weight, layer.up_bias), head_weight).view(6, V)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels.view(6)))


# ---- copies, text, errors --------------------------------------------------------------------------------------------


@each_encoder
def test_copies_behave_alike(encoder):
    layer, hidden, rng = make_layer(encoder, kl_reduction="sum"), torch.randn(4, H), torch.tensor([1, 2])
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = make_layer(encoder, kl_reduction="sum")
    loaded.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), loaded):
        assert all(map(torch.equal, other(hidden, rng=rng), layer(hidden, rng=rng)))
        assert repr(other) == repr(layer)
        with torch.no_grad():
            next(other.parameters()).zero_()  # its own memory
        assert not torch.equal(next(layer.parameters()), next(other.parameters()))


def test_printed_form():
    assert repr(make_layer()) == "VariationalBottleneck(12, 5, encoder=linear, kl_reduction=mean, sample=True)"
    lora = make_layer("lora", kl_reduction="sum", sample=False)
    expected = "VariationalBottleneck(12, 5, encoder=lora, encoder_rank=3, kl_reduction=sum, sample=False)"
    assert repr(lora) == expected
    assert repr(BottleneckHead(H, K, bias=False)) == "BottleneckHead(12, 5, bias=False)"


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1)])
def test_labels_that_do_not_lie_as_z_does_are_refused(shape):
    head_weight, labels = torch.randn(V, H), torch.zeros(shape, dtype=torch.int64)
    for module in (make_layer().cross_entropy, BottleneckHead(H, K)):
        with pytest.raises(ValueError, match=r"labels has shape .*; labels must be \(2, 3\)"):
            module(torch.randn(2, 3, K), head_weight, labels)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; it must be a positive integer"),
        ({"bottleneck_dim": -1}, "bottleneck_dim is -1"),
        ({"bottleneck_dim": 2.5}, "bottleneck_dim is 2.5"),
        ({"encoder": "mlp"}, "encoder is 'mlp'; it must be one of linear, lora"),
        ({"encoder": "lora"}, "encoder_rank is None with encoder 'lora'"),
        ({"encoder_rank": 4}, "encoder_rank is 4 with encoder 'linear'"),
        ({"encoder": "lora", "encoder_rank": 0}, "encoder_rank is 0"),
        ({"kl_reduction": "max"}, "kl_reduction is 'max'"),
        ({"logvar_range": (4.0, -4.0)}, "logvar_range is"),
    ],
)
def test_errors_name_the_argument(changed, message):
    with pytest.raises(ValueError, match=message):
        VariationalBottleneck(**{"hidden_size": H, "bottleneck_dim": K, **changed})
    if changed.keys() <= {"hidden_size", "bottleneck_dim"}:
        with pytest.raises(ValueError, match=message):
            BottleneckHead(**{"hidden_size": H, "bottleneck_dim": K, **changed})


# ---- convergence -----------------------------------------------------------------------------------------------------


def train(encoder: str, fused: bool, steps: int = 100) -> list[float]:
    """The losses of a small network with the bottleneck beside its head, by the ops or by the formulas."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Embedding(V, H), nn.Linear(H, H), nn.Tanh())
    layer, head = make_layer(encoder), nn.Linear(H, V)
    optimizer = torch.optim.Adam([*trunk.parameters(), *layer.parameters(), *head.parameters()], lr=1e-2)
    inputs = torch.randint(0, V, (64,))
    labels = torch.where(torch.arange(64) % 5 == 0, -100, (inputs * 3 + 1) % V)
    losses = []
    for index in range(steps):
        hidden, rng = trunk(inputs), torch.tensor([77, index])
        if fused:
            z, kl = layer(hidden, rng=rng)
            ce = ibkernels.linear_cross_entropy(hidden, head.weight, labels, bias=head.bias)
            ce_ib = layer.cross_entropy(z, head.weight, labels, absorb=True)
        else:
            encoder_weight = layer.weight if encoder == "linear" else layer.lora_b @ layer.lora_a
            mu, raw_logvar = F.linear(hidden, encoder_weight, layer.bias).chunk(2, dim=-1)
            logvar = raw_logvar.clamp(-4, 4)
            z = mu + torch.exp(logvar / 2) * ibkernels.noise(rng, torch.arange(64), K)
            kl = (0.5 * (mu**2 + torch.exp(logvar) - 1 - logvar)).mean(dim=1)
            ce = F.cross_entropy(head(hidden), labels)
            ce_ib = F.cross_entropy(F.linear(F.linear(z, layer.up_weight, layer.up_bias), head.weight), labels)
        loss = ce + 0.2 * (kl.mean() + 0.5 * ce_ib)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@each_encoder
def test_training_with_the_ops_ends_where_training_with_the_formulas_does(encoder):
    fused, eager = train(encoder, fused=True), train(encoder, fused=False)
    assert fused[-1] < 0.35 * fused[0]  # it learns
    assert fused[-1] == pytest.approx(eager[-1], abs=1e-4)
    assert fused[:10] == pytest.approx(eager[:10], abs=1e-5)
