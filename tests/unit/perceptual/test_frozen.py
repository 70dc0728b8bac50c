"""The decoder's operations against plain autograd: values, gradients, layouts, precisions, what they keep."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from tiny_models import randomize

from benchmarks.saved_bytes import count_saved_bytes
from lpl.perceptual import convolution, strips
from lpl.perceptual import winograd as ways
from lpl.perceptual.convolution import Convolution, Upsampling
from lpl.perceptual.frozen import Attention, Identity, Plain, Resnet, differentiable


def resnet(width_in, width_out):
    return ResnetBlock2D(in_channels=width_in, out_channels=width_out, temb_channels=None, groups=4, eps=1e-6)


def attention():
    return DiffusersAttention(
        8, heads=2, dim_head=4, norm_num_groups=4, residual_connection=True, bias=True, eps=1e-6,
        _from_deprecated_attn_block=True,
    )  # fmt: skip


MODULES = {
    "convolution": lambda: torch.nn.Conv2d(8, 12, 3, padding=1),
    "convolution without bias": lambda: torch.nn.Conv2d(8, 12, 3, padding=1, bias=False),
    "pointwise convolution": lambda: torch.nn.Conv2d(8, 12, 1),
    "resnet": lambda: resnet(8, 8),
    "resnet with a shortcut": lambda: resnet(8, 12),
    "upsampling": lambda: Upsample2D(8, use_conv=True),
    "attention": attention,
}


def build(name, dtype=torch.float64):
    """A module with random weights, and the operation on it."""
    torch.manual_seed(0)
    module = randomize(MODULES[name]()).to(dtype).eval().requires_grad_(False)
    if "convolution" in name:
        return module, Convolution(module)
    if name == "upsampling":
        return module, Upsampling(module.conv)
    return module, Attention(module) if name == "attention" else Resnet(module)


def run_module(module, x):
    return module(x, None) if isinstance(module, ResnetBlock2D) else module(x)


def random_map(dtype=torch.float64, batch=2, size=(6, 5), layout=torch.contiguous_format):
    x = torch.randn(batch, 8, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    return x.to(dtype).contiguous(memory_format=layout).requires_grad_()


def compare(module, operation, x, tolerance):
    """Values and gradients against the module's own under autograd, relative to their norms."""
    y, expected = differentiable(operation)(x), run_module(module, x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    grads = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, expected)]
    for ours, theirs in ((y, expected), grads):
        assert ours.dtype == theirs.dtype == x.dtype
        assert (ours.double() - theirs.double()).norm() <= tolerance * theirs.double().norm()


@pytest.mark.parametrize("strip", [1, 2**23])
@pytest.mark.parametrize("name", MODULES)
def test_gradcheck_in_double_precision(monkeypatch, name, strip):
    """By differences; whole and in strips of two rows."""
    monkeypatch.setattr(strips, "STRIP_BYTES", {"cpu": strip})
    _, operation = build(name)
    assert torch.autograd.gradcheck(differentiable(operation), random_map(), fast_mode=False)


@pytest.mark.parametrize("strip", [1, 2**23])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODULES)
def test_equals_autograd_in_double_precision(monkeypatch, name, batch, layout, strip):
    monkeypatch.setattr(strips, "STRIP_BYTES", {"cpu": strip})
    for size in ((6, 5), (1, 4), (7, 2)):
        compare(*build(name), random_map(batch=batch, size=size, layout=layout), 1e-12)


@pytest.fixture(params=["columns", "both axes"])
def winograd(monkeypatch, request):
    """Every 3 x 3 convolution takes Winograd's way, however small; where it can on both axes, a few rows at a time."""
    monkeypatch.setattr(convolution, "WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr(convolution, "WINOGRAD_CELLS", 1)
    monkeypatch.setattr(convolution, "SMALL_CELLS", 0)
    monkeypatch.setattr(ways, "PART_BYTES", 1)
    monkeypatch.setattr(ways, "MATRIX_CELLS", 1)
    monkeypatch.setattr(ways, "MATRIX_CHANNELS", 1 if request.param == "both axes" else 10**6)


@pytest.mark.parametrize("strip", [1, 2**23])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "name", ["convolution", "convolution without bias", "resnet", "resnet with a shortcut", "upsampling"]
)
def test_winograd_equals_autograd(monkeypatch, winograd, name, layout, strip):
    """Also for maps of an odd number of rows, whose last row is convolved directly."""
    monkeypatch.setattr(strips, "STRIP_BYTES", {"cpu": strip})
    for size in ((6, 5), (2, 4), (1, 3), (7, 2)):
        compare(*build(name), random_map(size=size, layout=layout), 1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("small", [0, 10**6])
@pytest.mark.parametrize("name", ["convolution", "resnet with a shortcut", "upsampling"])
def test_weights_as_they_are_and_transposed_give_the_same_gradient(monkeypatch, name, small, layout):
    monkeypatch.setattr(convolution, "SMALL_CELLS", small)
    module, operation = build(name)
    compare(module.to(memory_format=layout), operation, random_map(size=(6, 4)), 1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_transposed_weights_are_the_same_in_either_layout(size):
    weight, grad = torch.randn(5, 7, size, size), torch.randn(1, 5, 4, 4)
    plain, last = (
        convolution.transposed(weight.contiguous(memory_format=layout), grad)
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["convolution", "resnet", "upsampling"])
def test_winograd_is_as_near_the_truth_as_the_direct_sum(winograd, name):
    module, operation = build(name, torch.float32)
    exact = copy.deepcopy(module).double()
    x = random_map(torch.float32, size=(64, 32))
    truth = x.detach().double().requires_grad_()
    outputs = [differentiable(operation)(x), run_module(module, x), run_module(exact, truth)]
    grads = [torch.autograd.grad(y.square().sum(), at)[0] for y, at in zip(outputs, (x, x, truth), strict=True)]
    for ours, theirs, right in (outputs, grads):
        assert (ours.double() - right).norm() <= 1.5 * (theirs.double() - right).norm()


def test_winograd_saves_products_where_it_pays():
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    for width, size, dtype in ((64, 64, torch.float32), (64, 16, torch.float32), (64, 64, torch.bfloat16)):
        module = torch.nn.Conv2d(width, 64, 3, padding=1).to(dtype)
        x = torch.randn(1, width, size, size, dtype=dtype)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            Convolution(module).forward(x, keep=False)
        flops[size, dtype] = counter.get_total_flops() / (2 * 9 * width * 64 * size * size)
    module, x = torch.nn.Conv2d(256, 256, 3, padding=1), torch.randn(1, 256, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Convolution(module).forward(x.contiguous(memory_format=torch.channels_last), keep=False)
    flops[256] = counter.get_total_flops() / (2 * 9 * 256 * 256 * 64 * 64)
    upsampling, x = Upsampling(torch.nn.Conv2d(64, 64, 3, padding=1)), torch.randn(1, 64, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        upsampling.forward(x, keep=False)
    assert counter.get_total_flops() / (2 * 9 * 64 * 64 * 128 * 128) == pytest.approx(16 / 36 * 3 / 4, rel=0.06)
    assert flops[64, torch.float32] == pytest.approx(2 / 3, rel=0.01)
    assert flops[256] == pytest.approx(4 / 9)
    assert flops[16, torch.float32] == flops[64, torch.bfloat16] == 1


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MODULES)
def test_equals_autograd_in_every_precision(name, layout, dtype, tolerance):
    compare(*build(name, dtype), random_map(dtype, size=(12, 10), layout=layout), tolerance)


@pytest.mark.parametrize("name", MODULES)
def test_half_precision_is_as_near_the_truth_as_autograd(name):
    """The error against float64 is that of plain autograd in bfloat16, or 1.5 times it where weights are folded."""
    exact, _ = build(name)
    module, operation = build(name, torch.bfloat16)
    exact.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    x = random_map(torch.bfloat16, size=(16, 16))
    truth = x.detach().double().requires_grad_()
    values = [differentiable(operation)(x), run_module(module, x), run_module(exact, truth)]
    grads = [torch.autograd.grad(v.sum() + (v * v).sum(), s)[0] for v, s in zip(values, (x, x, truth), strict=True)]
    for ours, theirs, right in (values, grads):
        assert (ours.double() - right).norm() <= 1.5 * (theirs.double() - right).norm() + 1e-12


@pytest.mark.parametrize("name", MODULES)
def test_autocast_changes_no_bit(name):
    _, operation = build(name, torch.float32)
    x = random_map(torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = differentiable(operation)(x)
            results += [y, torch.autograd.grad(y.square().sum(), x)[0]]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("name", MODULES)
def test_under_torch_compile(name):
    """Traced by dynamo and differentiated by AOTAutograd: the same values and gradients."""
    torch.compiler.reset()
    _, operation = build(name, torch.float32)
    x = random_map(torch.float32)
    results = []
    for function in (differentiable(operation), torch.compile(differentiable(operation), backend="aot_eager")):
        y = function(x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    torch.testing.assert_close(results[1], results[0])


KEPT = {
    "convolution": 0,
    "pointwise convolution": 0,
    "upsampling": 0,
    "resnet": 2,
    "resnet with a shortcut": 2.5,
    "attention": 1,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name):
    """In maps of the input's size: a convolution nothing, a norm with its SiLU the input and four numbers a channel."""
    _, operation = build(name, torch.float32)
    x = random_map(torch.float32, size=(32, 32))
    saved = count_saved_bytes(lambda: differentiable(operation)(x), [])
    statistics = 4 * 2 * 2 * (8 + 12) * 4
    assert saved == pytest.approx(KEPT[name] * x.nbytes, abs=statistics)


@pytest.mark.parametrize("strip", [1, 2**23])
@pytest.mark.parametrize("name", MODULES)
def test_layout_is_kept(monkeypatch, name, strip):
    """Fails where a map changes its layout on the way: what follows would copy it at every step."""
    monkeypatch.setattr(strips, "STRIP_BYTES", {"cpu": strip})
    _, operation = build(name)
    x = random_map(size=(8, 6), layout=torch.channels_last)
    y, saved = operation.forward(x.detach(), keep=True)
    grad = operation.backward(saved, torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_mean_that_dwarfs_the_deviation():
    """Fails where a variance is E[x^2] - E[x]^2, or the gradient's sums cancel: float32 has 7 digits."""
    module, operation = build("resnet", torch.float32)
    x = (random_map(torch.float32, size=(64, 64)).detach() * 0.1 + 100).requires_grad_()
    exact = copy.deepcopy(module).double()
    truth = x.detach().double().requires_grad_()
    grads = [
        torch.autograd.grad(y.square().sum(), at)[0].double()
        for y, at in ((differentiable(operation)(x), x), (module(x, None), x), (exact(truth, None), truth))
    ]
    ours, theirs = ((g - grads[2]).norm() / grads[2].norm() for g in grads[:2])
    assert ours < 2 * theirs + 1e-6


def test_upsampling_takes_16_of_36_multiplications():
    from torch.utils.flop_counter import FlopCounterMode

    module, operation = build("upsampling", torch.float32)
    x = random_map(torch.float32, size=(64, 64))
    flops = []
    for run in (lambda: operation.forward(x, False), lambda: module(x)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        flops.append(counter.get_total_flops())
    assert flops[0] / flops[1] == pytest.approx(16 / 36, rel=0.04)


def test_plain_and_identity():
    module, _ = build("resnet")
    x = random_map()
    y, saved = Plain(lambda z: module(z, None)).forward(x, keep=True)
    assert not y.requires_grad
    grad = Plain(lambda z: module(z, None)).backward(saved, torch.ones_like(y))
    torch.testing.assert_close(grad, torch.autograd.grad(module(x, None).sum(), x)[0])
    assert saved == []
    assert Identity().forward(x, keep=True) == (x, [])
    assert Identity().backward([], x) is x


@pytest.mark.parametrize(("device", "queries"), [("cpu", 512), ("cuda", 8192)])
def test_queries_of_a_large_map_in_a_strip(device, queries):
    """Of 1024 pixels, one head: 512 on a GPU are a few blocks, for more than a hundred multiprocessors."""
    keys = SimpleNamespace(device=torch.device(device), element_size=lambda: 4, shape=(1, 1, 128 * 128, 512))
    assert Attention._queries(None, keys) == queries
