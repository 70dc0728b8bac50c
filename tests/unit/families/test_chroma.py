"""Chroma beyond the contract: which tokens count, and that they do so in recomputed blocks; layers of a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaPipeline
from peft import LoraConfig
from tiny_models import tiny_chroma

from lpl.config import ModelConfig
from lpl.data.store import padded
from lpl.families import load_family
from lpl.families.chroma import LORA_TARGETS
from lpl.families.sampling import load_for_sampling

CPU = torch.device("cpu")
CAPTIONS = ["", "a red fox", "a hare in a field " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_chroma(tmp_path_factory.mktemp("chroma") / "model"))


@pytest.fixture(scope="module")
def family(folder: Path) -> Any:
    return load_family(ModelConfig(str(folder)), CPU, torch.float32)


def batch_of(family: Any, captions: list[str]) -> dict[str, torch.Tensor]:
    return {name: padded(list(rows)) for name, rows in family.encode_text(captions).items()}


def test_a_caption_is_its_tokens_and_one_of_padding_as_the_pipeline_encodes_them(folder: Path, family: Any) -> None:
    pipeline = ChromaPipeline.from_pretrained(folder)
    with torch.no_grad():
        theirs, mask = pipeline._get_t5_prompt_embeds(CAPTIONS)
    found = family.encode_text(CAPTIONS)
    ids = pipeline.tokenizer(CAPTIONS).input_ids
    assert found["lengths"].tolist() == [min(len(row) + 1, 512) for row in ids] == mask.sum(1).tolist()
    assert found["lengths"].tolist()[::2] == [2, 512]
    for n, count in enumerate(found["lengths"].tolist()):
        torch.testing.assert_close(found["prompt_embeds"][n][:count], theirs[n, :count], rtol=1e-4, atol=1e-5)
        assert not found["prompt_embeds"][n][count:].any()


def test_recomputed_blocks_read_the_tokens_that_others_read(family: Any) -> None:
    """Captions of several lengths: output and gradients with --gradient_checkpointing are those without."""
    text, denoiser = batch_of(family, CAPTIONS[:2]), family.denoiser
    found = []
    for recomputes in (False, True):
        (denoiser.enable_gradient_checkpointing if recomputes else denoiser.disable_gradient_checkpointing)()
        noisy = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(0)).requires_grad_()
        output = family.denoise(denoiser.train(), noisy, torch.tensor([0.3, 0.6]), text, {})
        output.square().sum().backward()
        found.append((output.detach(), noisy.grad))
        assert denoiser.gradient_checkpointing == recomputes
    denoiser.disable_gradient_checkpointing()
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


def test_samples_read_no_more_padding_than_that(folder: Path) -> None:
    """What the pipeline is given after the tokens that count does not matter, alone or beside a longer caption."""
    sampler = load_for_sampling(ModelConfig(str(folder)), torch.float32, CPU)

    def draw(captions: list[str]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(n) for n, _ in enumerate(captions)]
        return sampler.pipeline(
            captions, generator=generators, num_inference_steps=2, height=16, width=16, output_type="latent"
        ).images

    before = draw(["a red fox", "a hare in a long field"])

    def spoil(_: Any, __: Any, given: Any, output: Any) -> None:
        counts = given["attention_mask"].sum(1)
        for row, count in zip(output[0], counts.tolist(), strict=True):
            row[count + 1 :] = 7.0

    hook = sampler.pipeline.text_encoder.register_forward_hook(spoil, with_kwargs=True)
    after = draw(["a red fox", "a hare in a long field"])
    hook.remove()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_lora_reaches_every_matrix_of_the_blocks(family: Any) -> None:
    denoiser = family.denoiser
    linear = {name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {name for name in linear if "transformer_blocks" in name}
    assert len(blocks) == 8 + 4 + 2 * 5
    denoiser.add_adapter(LoraConfig(r=1, target_modules=list(LORA_TARGETS["all"])))
    assert {name for name, module in denoiser.named_modules() if hasattr(module, "lora_A")} == blocks
