"""Components in each precision: what overflows is named, what the device lacks is said, distances are as stated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_vae
from torch import Tensor, nn

from lpl.analysis.check import precision
from lpl.perceptual.precision import DTYPES

LATENTS = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def decode(vae: Any, dtype: torch.dtype) -> list[Tensor]:
    return [vae.decode(LATENTS.to(dtype)).sample]


def test_a_decoder_that_overflows_in_float16_is_named_with_its_layer_and_what_to_do() -> None:
    vae = tiny_vae()
    with torch.no_grad():  # a norm follows: the output stays as it was
        vae.decoder.up_blocks[0].resnets[0].conv1.weight.mul_(1e6)
    found = precision.compare(vae, decode)
    assert [found[name]["finite"] for name in ("float32", "bfloat16", "float16")] == [True, True, False]
    assert found["float16"]["first_nonfinite"] == "decoder.up_blocks.0.resnets.0.conv1"
    assert found["float32"]["max_abs"] > precision.FLOAT16_MAX
    assert found["float32"]["relative_error"] == 0
    assert 1e-4 < found["bfloat16"]["relative_error"] < 0.3
    assert next(vae.parameters()).dtype == torch.float32
    assert not any(module._forward_hooks for module in vae.modules())
    (line,) = precision.warnings_of({"vae_decoder": found}, "no", "float16")
    assert line.startswith("vae_decoder is not finite in float16 (first in decoder.up_blocks.0.resnets.0.conv1): ")
    assert "keep --lpl_dtype bfloat16, not float16, which this run asks for" in line


def test_a_sound_decoder_is_finite_in_all() -> None:
    found = precision.compare(tiny_vae(), decode)
    assert all(entry["finite"] for entry in found.values())
    assert found["float16"]["relative_error"] < found["bfloat16"]["relative_error"]
    assert precision.warnings_of({"vae_decoder": found}, "fp16", "float16") == []


class Quarter(nn.Module):
    """x in float32, 1.25 x in bfloat16, no such operation in float16."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            raise RuntimeError("\"quarter\" not implemented for 'Half'")
        return x if x.dtype == torch.float32 else 1.25 * x


def test_relative_error_and_largest_value_are_as_stated_and_a_missing_operation_is_no_failure() -> None:
    values = torch.tensor([3.0, -4.0])
    found = precision.compare(Quarter(), lambda module, dtype: [module(values.to(dtype))])
    assert found["float32"] == {"finite": True, "max_abs": 4.0, "relative_error": 0.0}
    assert found["bfloat16"] == {"finite": True, "max_abs": 5.0, "relative_error": pytest.approx(0.25)}
    assert found["float16"]["finite"] is found["float16"]["max_abs"] is None
    assert "not implemented for 'Half'" in found["float16"]["note"]


def test_what_a_device_without_float16_would_overflow_is_foreseen() -> None:
    found = precision.compare(Quarter(), lambda module, dtype: [module(torch.tensor([1e5]).to(dtype))])
    (line,) = precision.warnings_of({"text_encoder": found}, "no", "float32")
    assert line.startswith("text_encoder has activations of 1e+05, above float16's 65504")


def test_other_errors_are_not_hidden() -> None:
    def run(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        if dtype == torch.bfloat16:
            raise RuntimeError("out of memory")
        return [torch.zeros(1)]

    with pytest.raises(RuntimeError, match="out of memory"):
        precision.compare(nn.Identity(), run)


@pytest.mark.parametrize(
    ("component", "dtype", "mixed", "said"),
    [
        ("denoiser", "float16", "fp16", "train with --mixed_precision bf16, not float16, which this run asks for"),
        ("denoiser", "bfloat16", "no", "train with --mixed_precision no, not bfloat16"),
        ("vae_encoder", "float16", "no", "lpl train runs it in float32"),
        ("vae_encoder", "float32", "no", "--pretrained_vae_model_name_or_path"),
        ("text_encoder", "float32", "no", "--pretrained_model_name_or_path"),
    ],
)
def test_advice(component: str, dtype: str, mixed: str, said: str) -> None:
    good = {"finite": True, "max_abs": 1.0, "relative_error": 0.0}
    found = dict.fromkeys(DTYPES, good) | {dtype: good | {"finite": False}}
    (line,) = precision.warnings_of({component: found}, mixed, "float32")
    assert line.startswith(f"{component} is not finite in {dtype}: ")
    assert said in line


def test_recorded_calls_run_again_in_another_precision() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, ids: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return x * scale + ids, x

    module, calls = Two(), {}
    with precision.recording([module], calls, 3):
        for n in range(2):
            module(torch.full((2,), float(n)), torch.tensor(7), scale=torch.tensor(0.5))
        run = precision.replay(calls[0])
        outputs = run(module, torch.bfloat16)  # while calls are recorded
        assert len(calls[0]) == 3
        assert len(run(module, torch.float32)) == 2
    assert [output.tolist() for output in outputs] == [[7.0, 7.0], [7.5, 7.5]]
    assert outputs[0].dtype == torch.bfloat16
    assert not module._forward_pre_hooks


def test_where_only_one_precision_has_room_it_is_measured_against_none() -> None:
    layer = nn.Linear(4, 4)
    only = (torch.bfloat16, "no room")
    found = precision.compare(layer, lambda own, _: [own(torch.ones(1, 4))], cast=False, only=only)
    nothing = {"finite": None, "max_abs": None, "relative_error": None, "note": "no room"}
    assert found["float32"] == found["float16"] == nothing
    assert found["bfloat16"]["finite"] is True
    assert found["bfloat16"]["relative_error"] is None
