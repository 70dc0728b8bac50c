import copy
import logging

import pytest
import torch
from torch import nn

from lpl import HookTaps, LatentPerceptualLoss
from lpl.diffusion.latent_space import LatentSpace
from lpl.perceptual import distance, strips
from lpl.perceptual.distance import NORM_TYPES
from lpl.perceptual.feature_maps import mask_at
from lpl.perceptual.frozen import Plain
from lpl.perceptual.textbook import lpl_of_features

STRIDES = (8, 4, 2, 1, 1)
HOOKS = ["decoder.mid_block", *(f"decoder.up_blocks.{i}" for i in range(4))]


def own_stages(vae):
    """The stages of an AutoencoderKL, as its user would write them."""
    decoder = vae.decoder
    return [nn.Sequential(vae.post_quant_conv, decoder.conv_in, decoder.mid_block).eval(), *decoder.up_blocks]


def hooks(vae, names=HOOKS, **options):
    example = torch.zeros(1, 4, 2, 2, dtype=next(vae.parameters()).dtype)
    return HookTaps(vae, names, lambda z: vae.decode(z).sample, example, **options)


def gradient_of(loss_fn, pred, target, mask=None):
    out = loss_fn(pred, target, mask)
    weights = torch.tensor([1.0, -2.0])[: len(pred)]
    return out, torch.autograd.grad((weights * out.per_sample).sum(), pred)[0]


def assert_same(one, other, tolerance=1e-5):
    torch.testing.assert_close(one[0].per_sample, other[0].per_sample, rtol=tolerance, atol=0)
    assert (one[1] - other[1]).norm() < tolerance * other[1].norm()
    assert float(other[1].norm()) > 0


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_stages_and_hooks_equal_the_walk(vae, random_latents, norm_type):
    """Also in several chunks, with a mask, of chosen taps, and of weights by the maps' sizes."""
    pred, target = random_latents(vae)
    space = LatentSpace.from_config(vae.config)
    mask = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"norm_type": norm_type, "latent_space": space, "chunk": 1}
    expected = gradient_of(LatentPerceptualLoss(vae, **options), pred, target, mask)
    stages = LatentPerceptualLoss(stages=own_stages(vae), strides=STRIDES, **options)
    assert_same(gradient_of(stages, pred, target, mask), expected)
    assert_same(gradient_of(LatentPerceptualLoss(hooks(vae), **options), pred, target, mask), expected)

    plain = options | {"remove_outliers": False}
    expected = gradient_of(LatentPerceptualLoss(vae, **plain), pred, target)
    by_size = LatentPerceptualLoss(stages=own_stages(vae), **plain)
    assert_same(gradient_of(by_size, pred, target), expected)
    assert by_size.weights == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 8]


def test_frozen_operations_are_used_where_modules_match_and_the_log_says_so(vae, caplog):
    with caplog.at_level(logging.INFO, logger="lpl"):
        loss_fn = LatentPerceptualLoss(stages=own_stages(vae), strides=STRIDES)
    assert "stage_1: 3 of 3 operations are frozen ones" in caplog.text
    plain = [sum(isinstance(o, Plain) for o in segment.operations) for segment in loss_fn.segments]
    assert plain == [1, 0, 0, 0, 0, 0]  # the middle block, as a whole


def patched(module):
    """Computes twice the module's output."""
    own = module.forward
    module.forward = lambda *x: 2 * own(*x)


CHANGES = {
    "hook": lambda module: module.register_forward_hook(lambda m, x, y: 2 * y),
    "hook before": lambda module: module.register_forward_pre_hook(lambda m, x: (x[0] + 1, *x[1:])),
    "gradient hook": lambda module: module.register_full_backward_hook(lambda m, x, y: (2 * x[0], *x[1:])),
    "forward": patched,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("number", range(4))
def test_modules_that_something_listens_to_or_replaces_run_as_they_are(change, number):
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1)).eval()
    pred = torch.randn(2, 4, 5, 6).requires_grad_()
    change(stage[number])
    frozen, plain = (LatentPerceptualLoss(stages=[s], strides=(1,)) for s in (stage, lambda x: stage(x)))
    assert_same(gradient_of(frozen, pred, pred.detach() ** 2), gradient_of(plain, pred, pred.detach() ** 2))
    assert {Plain} < {type(operation) for operation in frozen.segments[0].operations}  # the others are frozen ones


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    ("name", "stage"), [("decoder.conv_in", 0), ("decoder.up_blocks.1.resnets.0.norm1", 2), ("decoder.up_blocks.1", 2)]
)
def test_a_vae_that_was_changed_is_walked_as_it_is(vae, random_latents, change, name, stage, caplog):
    pred, target = random_latents(vae)
    vae = copy.deepcopy(vae)
    change(vae.get_submodule(name))
    with caplog.at_level(logging.INFO, logger="lpl"):
        frozen, plain = LatentPerceptualLoss(vae), LatentPerceptualLoss(vae)
    plain.segments = plain.clip_segments
    assert_same(gradient_of(frozen, pred, target), gradient_of(plain, pred, target))
    assert f"{frozen.taps[stage].name} has no frozen operations" in caplog.text


@pytest.mark.parametrize("bias", [True, False])
def test_frozen_operations_of_plain_modules_are_exact(bias):
    torch.manual_seed(0)
    modules = [
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=bias), nn.Identity(), nn.GroupNorm(2, 8), nn.SiLU()),
        nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1, bias=bias), nn.Tanh()),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, 3, padding=1, bias=bias)),
        nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        ),
    ]
    stages = [module.double().eval() for module in modules]
    latents = [torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(2)]
    frozen = LatentPerceptualLoss(stages=stages, strides=(4, 4, 2, 1), dtype=torch.float64)
    operations = [[type(o).__name__ for o in [segment.head, *segment.operations]] for segment in frozen.segments]
    assert operations == [
        ["Identity", "Convolution", "Plain", "Plain"],
        ["Identity", "NormSiLUConvolution", "Plain"],
        ["Identity"],
        ["Upsampling", "Plain"],
        ["Identity"],
    ]
    plain = LatentPerceptualLoss(
        stages=[lambda x, s=s: s(x) for s in stages], strides=(4, 4, 2, 1), dtype=torch.float64
    )
    pred = latents[0].requires_grad_()
    assert_same(gradient_of(frozen, pred, latents[1]), gradient_of(plain, pred, latents[1]), 1e-12)


def convolutions(axes, dtype=torch.float64):
    """A decoder of 1 to 3 axes of space: strides 4, 2 and 1."""
    torch.manual_seed(axes)
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    stages = [
        nn.Sequential(convolution(3, 6, 3, padding=1), nn.SiLU()),
        nn.Sequential(nn.Upsample(scale_factor=2), convolution(6, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.SiLU()),
        nn.Sequential(nn.Upsample(scale_factor=2), convolution(5, 4, 3, padding=1), nn.Tanh()),
    ]
    return nn.Sequential(*stages).to(dtype).eval()


def spaces_of(axes):
    return {1: (7,), 2: (4, 3), 3: (3, 2, 4)}[axes]


@pytest.mark.parametrize(("strip_bytes", "masked"), [(2**23, False), (64, True)])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_maps_of_any_space_equal_the_definition(monkeypatch, axes, norm_type, masked, strip_bytes):
    """Norms, order statistics, windows and masks; in one strip and in many; by stages and by hooks; mse and l1."""
    monkeypatch.setitem(strips.STRIP_BYTES, "cpu", strip_bytes)
    model = convolutions(axes)
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(2, 3, *spaces_of(axes), generator=generator, dtype=torch.float64) for _ in range(2))
    pred.requires_grad_()
    mask = torch.rand(2, 1, *spaces_of(axes), generator=generator, dtype=torch.float64) if masked else None
    maps = []
    for latents in (pred, target):
        maps.append([latents := stage(latents) for stage in model])
    insides = None if mask is None else [mask_at(mask, features) for features in maps[1]]
    loss_type = "l1" if masked else "mse"
    expected = lpl_of_features(*maps, (4, 2, 1), norm_type, loss_type, True, True, insides)
    expected_gradient = torch.autograd.grad((torch.tensor([1.0, -2.0]) * expected).sum(), pred)[0]
    options = {"norm_type": norm_type, "loss_type": loss_type, "dtype": torch.float64}
    taps = HookTaps(model, ["0", "1", "2"], model, torch.zeros(1, 3, *[2] * axes, dtype=torch.float64))
    for loss_fn in (
        LatentPerceptualLoss(stages=model, strides=(4, 2, 1), **options),
        LatentPerceptualLoss(taps, **options),
    ):
        out, gradient = gradient_of(loss_fn, pred, target, mask)
        torch.testing.assert_close(out.per_sample, expected, rtol=1e-9, atol=0)
        assert (gradient - expected_gradient).norm() < 1e-9 * expected_gradient.norm()


@pytest.mark.parametrize(("axes", "step"), [(1, 10), (2, 3), (3, 2)])
def test_order_statistics_of_large_maps_are_of_a_grid_of_enough_values(monkeypatch, axes, step):
    monkeypatch.setattr(distance, "SAMPLE", 100)
    y = torch.randn(1, 1, *{1: (1000,), 2: (30, 31), 3: (10, 10, 9)}[axes], generator=torch.Generator().manual_seed(0))
    grid = y[(..., *[slice(None, None, step)] * axes)].flatten()
    assert len(grid) >= 100
    std = torch.zeros(1, 1, *[1] * axes)
    low, high = distance.inlier_range(y, std)
    n = len(grid)
    assert low.item() == grid.kthvalue(max(1, n * 2 // 100)).values
    assert high.item() == grid.kthvalue(n * 98 // 100).values


def test_a_stage_may_carry_more_than_its_map():
    """A transformer on tokens, whose first one is no part of the map, equals plain autograd."""
    torch.manual_seed(0)
    first, second = (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval() for _ in range(2))
    extra = torch.randn(1, 1, 8, dtype=torch.float64)

    def split(tokens):
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 2)), tokens[:, :1]

    def join(state):
        return torch.cat([state[1], state[0].flatten(2).transpose(1, 2)], 1)

    stages = [
        lambda z: split(first(torch.cat([extra.expand(len(z), -1, -1), z.flatten(2).transpose(1, 2)], 1))),
        lambda state: split(second(join(state))),
    ]
    pred, target = (torch.randn(2, 8, 3, 2, dtype=torch.float64) for _ in range(2))
    pred.requires_grad_()
    maps = [[(state := stages[0](z))[0], stages[1](state)[0]] for z in (pred, target)]
    expected = lpl_of_features(*maps, (16, 16), "own", "mse", True, True, None)
    for checkpointing in (False, True):
        options = {"dtype": torch.float64, "checkpointing": checkpointing}
        out = LatentPerceptualLoss(stages=stages, strides=(16, 16), **options)(pred, target).per_sample
        torch.testing.assert_close(out, expected)
        expected_gradient, gradient = (
            torch.autograd.grad(v.sum(), pred, retain_graph=True)[0] for v in (expected, out)
        )
        torch.testing.assert_close(gradient, expected_gradient)


def test_map_and_what_is_carried_may_be_one_tensor():
    """Their gradients are then one tensor too, to which the distance's must be added once."""
    pred, target = (torch.randn(1, 2, 3, 3, dtype=torch.float64) for _ in range(2))
    stages = [lambda z: (2 * z, z), lambda state: state[0] + state[1]]
    plain = [lambda z: 2 * z, lambda x: 1.5 * x]
    found = [
        gradient_of(
            LatentPerceptualLoss(stages=s, strides=(4, 4), dtype=torch.float64, norm_type="shared"),
            pred.requires_grad_(),
            target,
        )
        for s in (stages, plain)
    ]
    assert_same(found[0], found[1], 1e-12)


# Chosen taps and weights.


def test_chosen_taps_are_those_of_the_whole(vae, random_latents):
    pred, target = random_latents(vae)
    whole = LatentPerceptualLoss(vae)(pred, target)
    for decoder in (vae, hooks(vae)):
        names = ("up_0", "up_2") if decoder is vae else (HOOKS[1], HOOKS[3])
        loss_fn = LatentPerceptualLoss(
            decoder, taps=names[::-1], layer_weights={names[0]: 3, names[1]: 0.5},
            latent_space=LatentSpace.from_config(vae.config),
        )  # fmt: skip
        out, gradient = gradient_of(loss_fn, pred, target)
        assert list(out.per_layer) == list(names)
        expected = (3 * whole.per_layer["up_0"] + 0.5 * whole.per_layer["up_2"]) / 2
        torch.testing.assert_close(out.per_sample.detach(), expected)
        small = 1e-3 * torch.randn(pred.shape, generator=torch.Generator().manual_seed(0))
        numeric = loss_fn(pred + small, target).per_sample - loss_fn(pred - small, target).per_sample
        along = (torch.tensor([1.0, -2.0]) * numeric.detach()).sum() / 2
        assert float((gradient * small).sum()) == pytest.approx(float(along), rel=0.02)
    assert LatentPerceptualLoss(vae, taps=("up_0", "up_2")).weights == [1 / 2, 1 / 8]
    assert LatentPerceptualLoss(vae, num_blocks=1, layer_weights=(2, 1)).weights == [2, 1]


# What is refused, and what it says.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "pass a VAE or stages=, one of them"),
        ({"stages": []}, "stages is 0 of list: pass a list of callables"),
        ({"stages": [1]}, "pass a list of callables"),
        (
            {"stages": [torch.tanh]},
            "outlier masks follow the strides of stage_0: pass strides=.*or remove_outliers=False",
        ),
        ({"stages": [torch.tanh], "strides": (1, 2)}, "pass 1 positive numbers"),
        ({"stages": [torch.tanh], "strides": (0,)}, "pass 1 positive numbers"),
        ({"stages": [nn.Dropout()], "strides": (1,)}, r"Dropout, is in training mode: call \.eval\(\)"),
        (
            {"stages": [nn.Conv2d(1, 1, 1).half().eval()], "strides": (1,)},
            "weights are float16.*pass its dtype= or cast it",
        ),
        ({"stages": [torch.tanh], "strides": (1,), "crop": 8}, "crop cuts a window.*leave it out"),
        ({"stages": [torch.tanh], "strides": (1,), "taps": ["up_0"]}, "name one or more of stage_0, each once"),
        ({"stages": [torch.tanh], "strides": (1,), "taps": "stage_0"}, "name one or more of stage_0"),
        ({"stages": [torch.tanh], "strides": (1,), "taps": ["stage_0"], "num_blocks": 1}, "pass one of them"),
        (
            {"stages": [torch.tanh], "strides": (1,), "layer_weights": (1, 2)},
            "pass 1 numbers of 0 or more, for stage_0",
        ),
        ({"stages": [torch.tanh], "strides": (1,), "layer_weights": (0,)}, "pass 1 numbers of 0 or more"),
        ({"stages": [torch.tanh], "strides": (1,), "layer_weights": {"mid": 1}}, "pass one for each of stage_0"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        LatentPerceptualLoss(**options)


def test_vae_and_stages_exclude_each_other(vae):
    with pytest.raises(ValueError, match="not both"):
        LatentPerceptualLoss(vae, stages=[torch.tanh])
    with pytest.raises(ValueError, match="strides go with stages="):
        LatentPerceptualLoss(vae, strides=(1,))
    with pytest.raises(ValueError, match="checkpointing recomputes stages"):
        LatentPerceptualLoss(hooks(vae), checkpointing=True)


def test_detached_features_are_refused():
    """Fails where the loss logs well and trains nothing."""
    latents = torch.randn(1, 2, 4, 4).requires_grad_()
    with pytest.raises(ValueError, match=r"stage_1 gives features without a graph.*detach"):
        LatentPerceptualLoss(stages=[torch.tanh, torch.detach], strides=(1, 1))(latents, latents.detach())


def test_a_decode_that_detaches_later_is_refused(vae, random_latents):
    taps, (pred, target) = hooks(vae), random_latents(vae)
    loss_fn = LatentPerceptualLoss(taps)
    assert loss_fn(pred, target).gradient is not None
    taps.decode = torch.no_grad()(vae.decode)
    assert loss_fn(pred.detach(), target).gradient is None
    with pytest.raises(ValueError, match=r"decoder\.mid_block.*: features without a graph"):
        loss_fn(pred, target)


def test_tokens_are_no_map():
    """(B, N, D) would be a map of N channels; what is not compared may be tokens."""
    embed = nn.Conv2d(4, 6, 1).eval().requires_grad_(False)
    stages = [lambda z: embed(z).flatten(2).transpose(1, 2), lambda x: x.transpose(1, 2).unflatten(2, (8, 8))]
    pred = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    message = r"\(1, 64, 6\) for latents \(1, 4, 8, 8\), .*unflatten.*to_map="
    with pytest.raises(ValueError, match="stage_0 gives " + message):
        LatentPerceptualLoss(stages=stages, strides=(1, 1))(pred, pred.detach())
    compared = LatentPerceptualLoss(stages=stages, strides=(1, 1), taps=("stage_1",))
    assert float(compared(pred, 2 * pred.detach()).per_sample.detach()) > 0
    module = nn.Sequential(embed, nn.Flatten(2)).eval()
    with pytest.raises(ValueError, match=r"1 gives \(1, 6, 64\) for latents"):
        HookTaps(module, ["1"], module, pred.detach())


def test_latents_and_masks_of_other_axes_are_refused():
    deep = LatentPerceptualLoss(stages=[lambda z: torch.stack([z, z], 2)], strides=(1,))
    latents = torch.randn(1, 2, 4, 4)
    assert float(deep(latents, latents).per_sample) == 0
    with pytest.raises(ValueError, match="they have other axes of space; leave the mask out"):
        deep(latents, latents, torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"pass two \(B, C, w\) or \(B, C, h, w\) or \(B, C, d, h, w\)"):
        deep(latents[0, 0], latents[0, 0])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.unused = (
            nn.Conv2d(2, 4, 1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 1, 1),
            nn.Conv2d(1, 1, 1),
        )

    def forward(self, z):
        return self.c(torch.relu_(self.b(torch.tanh(self.a(z)))))


@pytest.mark.parametrize(
    ("names", "change", "words"),
    [
        (["a", "x"], None, "names .'x'.: pass names of model.named_modules"),
        ([], None, "pass names of model.named_modules"),
        (["c", "a"], None, "names in the order they run are a, c: pass them in that order"),
        (["a", "unused"], None, "unused: not run by decode"),
        (["b"], None, "b: its output is changed in place by a later module: name that one"),
        (["a"], "train", "decode runs a Conv2d in training mode: call .eval.. on the decoder"),
        (["a"], "no_grad", "a: features without a graph.*no_grad"),
        (["a"], "twice", "a runs twice in a decode"),
    ],
)
def test_wrong_hooks(names, change, words):
    model = Decoder().eval()
    decode = {"no_grad": torch.no_grad()(model), "twice": lambda z: model(model(z).expand(-1, 2, -1, -1))}.get(
        change, model
    )
    if change == "train":
        model.train()
    with pytest.raises(ValueError, match=words):
        HookTaps(model, names, decode, torch.zeros(1, 2, 3, 3))
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_stop_behind_the_last_tap_and_switch_off_what_cuts_decoding_up(vae):
    """Slicing and checkpointing are as before after the call; nothing behind the last name runs."""
    own = copy.deepcopy(vae)
    own.enable_slicing()
    taps = hooks(own, HOOKS[:2])
    ran = []
    own.decoder.up_blocks[2].register_forward_hook(lambda *_: ran.append(1))
    latents = torch.randn(2, 4, 4, 4).requires_grad_()
    loss_fn = LatentPerceptualLoss(taps, latent_space=LatentSpace.identity())
    gradient_of(loss_fn, latents, latents.detach())
    assert not ran
    assert own.use_slicing
    assert [tap.stride for tap in loss_fn.taps] == [8, 4]


def test_hooks_freeze_nothing():
    """The model that they listen to may be the one that is trained, its denoiser in training mode."""
    whole = nn.Module()
    whole.denoiser, whole.decoder = nn.Conv2d(2, 2, 1), Decoder().eval()
    loss_fn = LatentPerceptualLoss(HookTaps(whole, ["decoder.a", "decoder.c"], whole.decoder, torch.zeros(1, 2, 3, 3)))
    latents = torch.randn(1, 2, 3, 3)
    loss_fn(whole.denoiser(latents), latents).per_sample.sum().backward()
    assert all(p.grad is not None for p in whole.denoiser.parameters())
    assert all(p.grad is None for p in whole.decoder.parameters())


def test_random_depth_of_hooks(vae):
    loss_fn = LatentPerceptualLoss(hooks(vae), random_depth=True)
    latents = torch.randn(1, 4, 4, 4)
    assert list(loss_fn(latents, latents, depth=2).per_layer) == HOOKS[:2]


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (lambda z: None, "stage_0 gives a NoneType"),
        (lambda z: {"a": z}, "stage_0 gives a dict"),
        (lambda z: z.flatten(1), r"stage_0 gives \(1, 64\)"),
        (lambda z: z.mean(0, keepdim=True), "stage_0 makes 1 samples of 2"),
    ],
)
def test_a_stage_that_gives_no_map_is_named(stage, said):
    latents = torch.randn(2, 4, 4, 4)
    with pytest.raises(ValueError, match=said):
        LatentPerceptualLoss(stages=[stage], strides=(1,))(latents, latents + 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strides": 2}, "strides 2"),
        ({"strides": (float("nan"),)}, "strides"),
        ({"strides": (1,), "taps": 1}, "taps 1"),
        ({"strides": (1,), "taps": (["stage_0"],)}, "taps"),
        ({"strides": (1,), "layer_weights": 1.0}, "layer_weights"),
        ({"strides": (1,), "layer_weights": ("a",)}, "layer_weights"),
        ({"strides": (1,), "latent_space": 0.18}, "latent_space is a float"),
    ],
)
def test_options_of_another_type_say_what_to_pass(options, said):
    with pytest.raises(ValueError, match=f"{said}.*pass|{said}.*name one"):
        LatentPerceptualLoss(stages=[nn.Tanh().eval()], **options)


def test_a_part_in_training_mode_is_an_error(vae):
    stage = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5)).eval()
    stage[1].train()
    with pytest.raises(ValueError, match="training mode"):
        LatentPerceptualLoss(stages=[stage], strides=(1,))
    other = copy.deepcopy(vae).eval()
    loss_fn = LatentPerceptualLoss(other)
    other.decoder.mid_block.train()
    with pytest.raises(ValueError, match="training mode"):
        loss_fn(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4))


def test_hooks_take_a_module_a_function_and_latents(vae):
    with pytest.raises(ValueError, match="example is a NoneType"):
        HookTaps(vae, HOOKS, vae.decode, None)
    with pytest.raises(ValueError, match=r"decode must be a function of \(raw_latents\), not None"):
        HookTaps(vae, HOOKS, None, torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="mid_block gives a NoneType"):
        hooks(vae, to_map=lambda output: None)
