"""Every option of `lpl train`: frozen groups whose field names are the flags and the YAML keys.

No heavy imports here: `lpl --help` and every check of a flag run before torch loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lpl.errors import UserError
from lpl.keywords import parse_keywords


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def free(default: Any) -> Any:
    """A field that changes the trajectory of a run by float rounding at most: a run may be continued with another."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class ModelConfig:
    """Model: what is trained."""

    pretrained_model_name_or_path: str | None = None
    """A diffusers folder, a Hub id, or one .safetensors file."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE than the model's own: a diffusers folder or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    cache_dir: str | None = free(None)
    """Where downloads from the Hub are kept."""
    single_file_config: str | None = free(None)
    """For a .safetensors file without network: a diffusers folder with that model's configs and tokenizers."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the denoiser predicts; unset: what the model's scheduler says. The saved pipeline says the same."""
    clip_skip: int | None = None
    """Take the text encoders' output so many layers before the usual one (diffusers' meaning of clip_skip)."""
    max_token_length: Literal[75, 150, 225] = 75
    """Caption tokens that are used; beyond 75, in chunks of 75 that are encoded one by one and joined."""
    rank: int | None = None
    """Train a LoRA of this rank instead of the whole denoiser."""
    rescale_betas_zero_snr: bool = False
    """Rescale the schedule so that its last timestep is pure noise (zero terminal SNR, for v_prediction or sample); the
    saved pipeline says the same, and samples with trailing timesteps."""
    lora_alpha: float | None = None
    """The LoRA is multiplied by lora_alpha/rank; unset: the rank, so by 1."""
    lora_dropout: float = 0.0
    """Share of the LoRA's inputs that is dropped at each training step."""
    lora_targets: Literal["attention", "attention_mlp", "all"] = "attention"
    """Layers with a LoRA: the attentions' projections; also the transformers' MLPs; or every matrix and convolution of
    the blocks."""
    use_dora: bool = False
    """Train a DoRA: also a magnitude for each output of these layers (slower, more memory)."""

    def __post_init__(self) -> None:
        alpha = self.lora_alpha
        require(alpha is None or 0 < alpha < float("inf"), f"--lora_alpha must be above 0, not {alpha}")
        require(0 <= self.lora_dropout < 1, f"--lora_dropout must lie in 0..1, below 1, not {self.lora_dropout}")
        require(self.rank is None or self.rank >= 1, f"--rank must be at least 1, not {self.rank}")
        require(self.clip_skip is None or self.clip_skip >= 0, f"--clip_skip must be 0 or more, not {self.clip_skip}")

    @property
    def alpha(self) -> float:
        """The LoRA's alpha."""
        assert self.rank is not None
        return self.rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True)
class DataConfig:
    """Data: images and captions, and how they are cropped and cached."""

    train_data_dir: str | None = None
    """An image folder, nested as deep as you like, with metadata.jsonl, or with a .txt caption beside each image."""
    dataset_name: str | None = None
    """A data set on the Hub, a local folder that `datasets` reads, or parquet files (a path, * allowed)."""
    dataset_config_name: str | None = None
    """Configuration of that data set."""
    webdataset: str | None = None
    """WebDataset shards: paths or URLs, with {000..099} or (local) *; several joined by ::."""
    streaming: bool = False
    """Read --dataset_name as a stream: nothing is downloaded whole, each image passes by once and is cached encoded."""
    image_column: str = "image"
    """Column with the images of --dataset_name."""
    caption_column: str = "text"
    """Column (or key in metadata.jsonl or a shard's .json) with the captions: a string or a list of strings."""
    max_train_samples: int | None = None
    """Use only the first N samples."""
    max_bad_fraction: float = free(0.01)
    """Stop if more than this share of the images cannot be used; those are listed in bad_files.jsonl."""
    background_color: str = "white"
    """What shows through transparent pixels: a name or #rrggbb."""
    resolution: int | None = None
    """Height and width of the training crops, in pixels; unset: what the model was made for (1024 for full size)."""
    buckets: bool = False
    """Crop to the nearest of a set of aspect ratios with the area of --resolution squared, instead of to a square."""
    bucket_area: int | None = None
    """Area of every bucket in pixels; unset: --resolution squared."""
    bucket_step: int = 64
    """Sides of buckets are multiples of this many pixels."""
    bucket_max_aspect: float = 2.0
    """No bucket is longer than this many times its short side."""
    center_crop: bool = False
    """Crop the centre; off: a random crop."""
    crop_variants: int = 1
    """How many different random crops of each image to cache; each draw takes one of them."""
    random_flip: bool = False
    """Mirror images at random, freshly at each draw (both are cached)."""
    image_interpolation_mode: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "lanczos"
    """How images are resized; always antialiased but for nearest."""
    caption_choice: Literal["random", "first"] = "random"
    """Of several captions: one at random at each draw, or always the first."""
    shuffle_caption: bool = False
    """Shuffle the tags of a caption; the text cache holds --caption_variants orders of each."""
    keep_tokens: int = 0
    """The first so many tags stay in their places."""
    caption_separator: str = ","
    """What separates tags."""
    caption_variants: int = 8
    """How many orders of its tags a caption is cached in; draw n takes order n modulo this."""
    caption_prefix: str | None = None
    """Trigger words: put before every caption that is not dropped."""
    proportion_empty_prompts: float = 0.0
    """Share of draws whose caption is dropped, drawn anew each time."""
    repeats: str | None = None
    """How often an epoch draws the images of a folder: `dogs=10,cats=2.5`, `balanced` (every folder equally often), or
    `names` (a folder named 10_dogs: ten times)."""
    reg_data_dir: str | None = None
    """An image folder of regularisation images, drawn along with the others."""
    prior_loss_weight: float = 1.0
    """Weight of the regularisation images' loss, LPL included."""
    latent_cache_dir: str | None = free(None)
    """Where latents and text embeddings are cached; unset: a folder of the user's cache, shared by all runs."""
    cache_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision in which latents and text embeddings are cached; the 16-bit ones halve the space."""
    rehash: bool = free(False)
    """Read every image again, also where path, size and time of change are those that were seen before."""
    dataloader_num_workers: int | Literal["auto"] = free("auto")
    """Threads that read, decode and crop images while the cache is filled; auto: one a core, eight at most."""

    def __post_init__(self) -> None:
        require(
            self.resolution is None or self.resolution >= 8,
            f"--resolution must be at least 8 pixels, not {self.resolution}",
        )
        require(
            0 <= self.proportion_empty_prompts <= 1,
            f"--proportion_empty_prompts must lie in 0..1, not {self.proportion_empty_prompts}",
        )
        require(
            self.max_train_samples is None or self.max_train_samples >= 1,
            f"--max_train_samples must be at least 1, not {self.max_train_samples}",
        )
        require(self.crop_variants >= 1, f"--crop_variants must be at least 1, not {self.crop_variants}")
        require(
            not (self.center_crop and self.crop_variants > 1),
            "--crop_variants needs random crops: drop --center_crop or --crop_variants",
        )
        workers = self.dataloader_num_workers
        require(
            workers == "auto" or int(workers) >= 0, f"--dataloader_num_workers must be auto or 0 or more, not {workers}"
        )
        given = [
            f"--{name}" for name in ("train_data_dir", "dataset_name", "webdataset") if getattr(self, name) is not None
        ]
        require(len(given) <= 1, f"{' and '.join(given)} are all given: choose one")
        require(
            not self.streaming or self.dataset_name is not None or not given,
            "--streaming reads --dataset_name; WebDataset URLs are streamed anyway: drop it",
        )
        require(0 <= self.max_bad_fraction <= 1, f"--max_bad_fraction must lie in 0..1, not {self.max_bad_fraction}")
        for name in ("bucket_step", "caption_variants"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        require(
            self.bucket_area is None or self.bucket_area >= 64,
            f"--bucket_area must be at least 64 pixels, not {self.bucket_area}",
        )
        require(self.bucket_max_aspect >= 1, f"--bucket_max_aspect must be at least 1, not {self.bucket_max_aspect}")
        require(self.keep_tokens >= 0, f"--keep_tokens must be 0 or more, not {self.keep_tokens}")
        require(self.caption_separator != "", "--caption_separator must not be empty")
        require(
            0 <= self.prior_loss_weight < float("inf"),
            f"--prior_loss_weight must be 0 or more, not {self.prior_loss_weight}",
        )

    @property
    def crop_size(self) -> int:
        """The resolution, once the model's own has taken the place of an unset one."""
        assert self.resolution is not None
        return self.resolution


@dataclass(frozen=True)
class DiffusionConfig:
    """Diffusion objective: the loss that LPL is added to."""

    snr_gamma: float | None = None
    """Min-SNR weighting of the diffusion loss with this gamma (5 is usual)."""
    noise_offset: float = 0.0
    """Scale of noise added per channel, the same for every pixel."""
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = "none"
    """Which timesteps are drawn more often."""
    timestep_bias_multiplier: float = 1.0
    """How much more often."""
    timestep_bias_portion: float = 0.25
    """Share of the schedule that `earlier` and `later` favour."""
    timestep_bias_begin: int = 0
    """First timestep that `range` favours."""
    timestep_bias_end: int = 1000
    """Timestep before which `range` ends."""
    loss_weighting: Literal["none", "debiased", "p2"] = "none"
    """Weight by noise level instead of --snr_gamma: debiased estimation (1/sqrt(SNR)) or P2 (1/(k + SNR)^gamma)."""
    p2_gamma: float = 1.0
    """Strength of P2 weighting."""
    p2_k: float = 1.0
    """Keeps P2's weight finite where there is all but no signal."""
    loss_type: Literal["mse", "huber"] = "mse"
    """Distance between output and target; huber: pseudo-Huber, which minds outliers less."""
    huber_c: float = 0.1
    """Differences far above this count linearly, far below it squared; with a schedule, at the noisy end."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How the threshold falls from 1 at the first timestep to --huber_c at the last."""
    pyramid_noise_iterations: int = 0
    """Levels of ever coarser noise that are added to the noise (6 to 10 are usual); 0: none."""
    pyramid_noise_discount: float = 0.3
    """Factor from one level to the next, coarser one."""
    timestep_distribution: Literal["uniform", "logit_normal"] = "uniform"
    """How timesteps are drawn; --timestep_bias_strategy multiplies it."""
    logit_mean: float = 0.0
    """Mean of logit_normal, over logit(t / T); below 0: less noise, which LPL's gate passes more often."""
    logit_std: float = 1.0
    """Standard deviation of logit_normal."""
    timestep_sampling: Literal["independent", "stratified"] = "independent"
    """stratified: each step's timesteps cover the distribution evenly, so each step, and each process in it, has nearly
    the same number of samples that pass LPL's gate."""

    def __post_init__(self) -> None:
        require(self.snr_gamma is None or self.snr_gamma > 0, f"--snr_gamma must be positive, not {self.snr_gamma}")
        require(0 <= self.noise_offset < float("inf"), f"--noise_offset must be 0 or more, not {self.noise_offset}")
        require(self.timestep_bias_multiplier >= 0, "--timestep_bias_multiplier must be 0 or more")
        require(0 < self.timestep_bias_portion <= 1, "--timestep_bias_portion must lie in 0..1")
        require(
            self.snr_gamma is None or self.loss_weighting == "none",
            f"--snr_gamma {self.snr_gamma} and --loss_weighting {self.loss_weighting} are two weightings: drop one",
        )
        require(0 <= self.p2_gamma < float("inf"), f"--p2_gamma must be 0 or more, not {self.p2_gamma}")
        require(0 < self.p2_k < float("inf"), f"--p2_k must be positive, not {self.p2_k}")
        require(0 < self.huber_c < float("inf"), f"--huber_c must be positive, not {self.huber_c}")
        require(
            self.huber_c <= 1 or self.huber_schedule == "constant" or self.loss_type == "mse",
            f"--huber_c {self.huber_c}: the threshold falls from 1 to it; give 1 or less, or --huber_schedule constant",
        )
        require(
            self.pyramid_noise_iterations >= 0 and self.pyramid_noise_iterations != 1,
            f"--pyramid_noise_iterations must be 0 or at least 2, not {self.pyramid_noise_iterations}: the first level "
            "is as fine as the noise itself",
        )
        require(
            0 < self.pyramid_noise_discount <= 1,
            f"--pyramid_noise_discount must lie above 0 and be 1 at most, not {self.pyramid_noise_discount}",
        )
        require(
            not (self.noise_offset and self.pyramid_noise_iterations),
            f"--noise_offset {self.noise_offset} and --pyramid_noise_iterations {self.pyramid_noise_iterations} both "
            "make coarse noise: drop one",
        )
        require(abs(self.logit_mean) < float("inf"), f"--logit_mean must be a number, not {self.logit_mean}")
        require(0 < self.logit_std < float("inf"), f"--logit_std must be positive, not {self.logit_std}")
        if self.timestep_bias_strategy == "range":
            require(
                0 <= self.timestep_bias_begin < self.timestep_bias_end,
                f"--timestep_bias_begin {self.timestep_bias_begin} must be 0 or more and lie below "
                f"--timestep_bias_end {self.timestep_bias_end}",
            )


@dataclass(frozen=True)
class LPLConfig:
    """Latent Perceptual Loss."""

    use_lpl: bool = True
    """Off: the plain diffusion objective, bit for bit."""
    lpl_weight: float | Literal["auto"] = "auto"
    """Weight against the diffusion loss; auto: set once from the measured gradient share."""
    lpl_target_share: float = 0.2
    """For auto: LPL's share of the gradient at the denoiser's output, r_lpl/(r_lpl + r_diffusion)."""
    lpl_reduction: Literal["expected", "gated"] = "expected"
    """Divide by batch size times gate probability, or (as the diffusers project does) by the samples that passed."""
    lpl_t_threshold: int | None = None
    """Apply where the timestep is below this; 200 unless another gate is given."""
    lpl_snr_threshold: float | None = None
    """The gate as a signal-to-noise ratio: apply where SNR is at least this."""
    lpl_sigma_threshold: float | None = None
    """The gate as noise/signal: apply where it is at most this (the paper's tau; 3 to 6 did best there)."""
    lpl_loss_type: Literal["mse", "l1"] = "mse"
    """Distance of normalised features."""
    lpl_norm_type: Literal["default", "shared", "batch", "channel", "channel_detached"] = "shared"
    """How features are normalised; weights do not carry over between norms."""
    lpl_pow_law: bool = True
    """Halve a layer's weight each time its resolution doubles."""
    lpl_num_blocks: int = 4
    """Up blocks compared after the middle block; the decoder is never run past the last one."""
    lpl_remove_outliers: bool = True
    """Leave decoder outliers (of the target's features, at strides 1 and 2) out of the distance."""
    lpl_scale: bool = True
    """Multiply each sample's LPL by min(1, g/SNR), g = --snr_gamma or 5."""
    lpl_start: int = 0
    """First optimizer step with LPL."""
    lpl_max_samples: int | None = None
    """At most this many gated samples of a micro-batch go through the decoder; rescaled, so unbiased."""
    lpl_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the decoder in LPL; it never runs under autocast."""
    lpl_checkpointing: Literal["auto", "true", "false"] = free("auto")
    """Recompute the decoder in the backward pass to save memory; auto follows --gradient_checkpointing."""
    lpl_chunk: int | Literal["auto"] = free("auto")
    """Gated samples that go through the decoder at once; auto: as many as fill 256 x 256 pixels, at least one."""
    lpl_channels_last: Literal["auto", "true", "false"] = free("auto")
    """Memory layout of LPL's decoder; auto: channels last on a CPU, where it is faster."""
    lpl_compile: bool = free(False)
    """Fuse LPL's pointwise arithmetic with torch.compile; costs a minute at the start."""
    lpl_crop: int | None = None
    """Compare a random window of this many pixels, cut after the middle block: an approximation, for large images."""
    lpl_random_depth: bool = False
    """Stop each step at a random depth of the decoder, terms divided by the chance of reaching them: unbiased, cheaper,
    noisier."""
    lpl_warmup_steps: int = 0
    """Optimizer steps over which LPL's weight rises linearly, from --lpl_start on; auto measures without this ramp."""

    def __post_init__(self) -> None:
        weight = self.lpl_weight
        require(weight == "auto" or float(weight) >= 0, f"--lpl_weight must be 0 or more, not {weight}")
        require(
            0 < self.lpl_target_share < 1, f"--lpl_target_share must lie between 0 and 1, not {self.lpl_target_share}"
        )
        require(
            weight == "auto" or self.lpl_target_share == LPLConfig.lpl_target_share,
            "--lpl_target_share acts with --lpl_weight auto only: drop one of them",
        )
        gates = {
            "--lpl_t_threshold": self.lpl_t_threshold,
            "--lpl_snr_threshold": self.lpl_snr_threshold,
            "--lpl_sigma_threshold": self.lpl_sigma_threshold,
        }
        given = [f"{name} {value}" for name, value in gates.items() if value is not None]
        require(len(given) <= 1, f"contradictory gates: {', '.join(given)}; give one")
        for name, value in gates.items():
            require(value is None or value > 0, f"{name} must be positive, not {value}: LPL would never apply")
        require(self.lpl_num_blocks >= 0, f"--lpl_num_blocks must be 0 or more, not {self.lpl_num_blocks}")
        require(self.lpl_start >= 0, f"--lpl_start must be 0 or more, not {self.lpl_start}")
        require(self.lpl_warmup_steps >= 0, f"--lpl_warmup_steps must be 0 or more, not {self.lpl_warmup_steps}")
        require(
            self.lpl_max_samples is None or self.lpl_max_samples >= 1,
            f"--lpl_max_samples must be at least 1, not {self.lpl_max_samples}",
        )
        require(
            self.lpl_chunk == "auto" or int(self.lpl_chunk) >= 1,
            f"--lpl_chunk must be auto or at least 1, not {self.lpl_chunk}",
        )
        require(self.lpl_crop is None or self.lpl_crop >= 8, f"--lpl_crop must be at least 8, not {self.lpl_crop}")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    learning_rate: float | None = None
    """Peak learning rate; unset: 1e-5 for full fine-tuning, 1e-4 for LoRA, 1 for prodigy, which finds its own."""
    scale_lr: bool = False
    """Multiply the learning rate by batch size, accumulation and processes."""
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = "constant"
    """Learning-rate schedule, stepped once per optimizer step."""
    lr_num_cycles: int = 1
    """Restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Power of polynomial."""
    lr_step_rules: str | None = None
    """Rules of piecewise_constant: `1:10,0.1:20,0.01` is 1 x to step 10, 0.1 x to step 20, then 0.01 x."""
    lr_warmup_steps: int | None = None
    """Optimizer steps of warm-up; unset: 500, or 0 for the constant schedule, which has none."""
    use_8bit_adam: bool = False
    """AdamW of bitsandbytes with 8-bit state; the same as --optimizer adamw8bit."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """Term added to the denominator."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this."""
    use_ema: bool = False
    """Keep an exponential moving average of the weights; see --final_weights."""
    ema_decay: float = 0.9999
    """Decay of the average (reached after a warm-up)."""
    optimizer: str = "adamw"
    """adamw, adamw8bit (bitsandbytes), adafactor (transformers), prodigy (prodigyopt), schedulefree_adamw
    (schedulefree), or package.Class: any torch.optim.Optimizer that needs gradients only."""
    optimizer_args: str | None = None
    """Keywords of the optimizer that no flag sets: `d_coef=2.0, safeguard_warmup=True`; literal values."""
    decay_all: bool = False
    """Decay biases and the weights of norms (tensors of one dimension) too, as the diffusers scripts do."""
    ema_warmup: bool = False
    """Let the average's decay grow as 1 - (1 + t/ema_inv_gamma)^-ema_power instead of (1 + t)/(10 + t)."""
    ema_inv_gamma: float = 1.0
    """Of --ema_warmup: the higher, the later the decay grows."""
    ema_power: float = 2 / 3
    """Of --ema_warmup: 2/3 reaches 0.999 after 31,600 updates, 3/4 after 10,000."""
    ema_min_decay: float = 0.0
    """The average's decay is never below this, once updates have begun."""
    ema_update_after_step: int = 0
    """Updates during which the average only follows the weights."""
    ema_update_every: int = 1
    """Optimizer steps between updates of the average; the decay is that of an update."""
    ema_device: Literal["same", "cpu"] = free("same")
    """Where the average is kept: on the device of the weights, or on the CPU, which costs a transfer at each update."""
    final_weights: Literal["auto", "raw", "ema"] = "auto"
    """Which weights are validated and saved as the result; auto: the average with --use_ema, else the raw ones."""

    def __post_init__(self) -> None:
        self._check_optimizer()
        rate = self.learning_rate
        require(rate is None or 0 < rate < float("inf"), f"--learning_rate must be positive, not {rate}")
        require(
            self.lr_warmup_steps is None or self.lr_warmup_steps >= 0,
            f"--lr_warmup_steps must be 0 or more, not {self.lr_warmup_steps}",
        )
        for name, owner, default in (
            ("lr_num_cycles", "cosine_with_restarts", 1),
            ("lr_power", "polynomial", 1.0),
            ("lr_step_rules", "piecewise_constant", None),
        ):
            value = getattr(self, name)
            require(
                self.lr_scheduler == owner or value == default,
                f"--{name} {value} acts with --lr_scheduler {owner} only, not {self.lr_scheduler}",
            )
        require(
            self.lr_scheduler != "piecewise_constant" or self.lr_step_rules is not None,
            "--lr_scheduler piecewise_constant needs --lr_step_rules, such as 1:10,0.1:20,0.01",
        )
        require(
            self.lr_step_rules is None or _are_step_rules(self.lr_step_rules),
            f"--lr_step_rules {self.lr_step_rules}: expected rules such as 1:10,0.1:20,0.01",
        )
        require(self.max_grad_norm > 0, f"--max_grad_norm must be positive, not {self.max_grad_norm}")
        require(self.adam_weight_decay >= 0, f"--adam_weight_decay must be 0 or more, not {self.adam_weight_decay}")
        require(self.adam_epsilon > 0, f"--adam_epsilon must be positive, not {self.adam_epsilon}")
        for name, beta in (("--adam_beta1", self.adam_beta1), ("--adam_beta2", self.adam_beta2)):
            require(0 <= beta < 1, f"{name} must lie in 0..1, not {beta}")
        self._check_average()

    def _check_average(self) -> None:
        require(0 < self.ema_decay < 1, f"--ema_decay must lie between 0 and 1, not {self.ema_decay}")
        require(
            0 <= self.ema_min_decay <= self.ema_decay,
            f"--ema_min_decay must lie in 0..{self.ema_decay} (--ema_decay), not {self.ema_min_decay}",
        )
        for name in ("ema_inv_gamma", "ema_power"):
            value = getattr(self, name)
            require(0 < value < float("inf"), f"--{name} must be positive, not {value}")
        require(
            self.ema_update_after_step >= 0,
            f"--ema_update_after_step must be 0 or more, not {self.ema_update_after_step}",
        )
        require(self.ema_update_every >= 1, f"--ema_update_every must be at least 1, not {self.ema_update_every}")
        require(
            self.final_weights != "ema" or self.use_ema,
            "--final_weights ema needs --use_ema: there is no average without it",
        )

    @property
    def optimizer_name(self) -> str:
        """The optimizer, --use_8bit_adam taken into account."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer

    @property
    def optimizer_keywords(self) -> dict[str, Any]:
        """--optimizer_args by keyword."""
        return parse_keywords("optimizer_args", self.optimizer_args)

    @property
    def warms_up(self) -> bool:
        """Whether warm-up steps can act."""
        return self.lr_scheduler != "constant" or self.optimizer_name == "schedulefree_adamw"

    def _check_optimizer(self) -> None:
        name = self.optimizer
        is_class = "." in name and all(part.isidentifier() for part in name.split("."))
        require(
            name in OPTIMIZERS or is_class,
            f"--optimizer {name}: expected one of {', '.join(OPTIMIZERS)}, or package.Class",
        )
        require(
            not self.use_8bit_adam or name in ("adamw", "adamw8bit"),
            f"--use_8bit_adam and --optimizer {name} are both given: choose one",
        )
        _ = self.optimizer_keywords
        require(
            name != "prodigy" or not self.scale_lr,
            "--scale_lr with --optimizer prodigy: it finds its own rate and leaves 1 as it is; drop --scale_lr",
        )
        if name == "schedulefree_adamw":
            self.require_schedule_free()

    def require_schedule_free(self) -> None:
        """Raises UserError for what does not go with an optimizer that averages its weights instead of a schedule."""
        name = f"--optimizer {self.optimizer}"
        require(
            self.lr_scheduler == "constant",
            f"--lr_scheduler {self.lr_scheduler} with {name}, which needs no schedule: use constant "
            "(--lr_warmup_steps goes to schedulefree_adamw itself)",
        )
        require(
            not self.use_ema,
            f"--use_ema with {name}: it keeps an average of its own, which is validated and saved; drop --use_ema",
        )


OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "schedulefree_adamw")


def _are_step_rules(text: str) -> bool:
    *rules, last = text.split(",")
    try:
        pairs = [(float(factor), int(step)) for factor, step in (rule.split(":") for rule in rules)]
        return len(pairs) == len(rules) and float(last) >= 0
    except ValueError:
        return False


@dataclass(frozen=True)
class RunConfig:
    """Run: length, batches, precision, checkpoints."""

    output_dir: str = free("lpl-output")
    """Where the result, checkpoints, samples and config.yaml go."""
    seed: int = 0
    """Seed of every draw: order, crops, flips, noise, timesteps."""
    train_batch_size: int = 1
    """Samples per process and micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    num_train_epochs: int = 100
    """Passes over the data, unless --max_train_steps is given."""
    max_train_steps: int | None = None
    """Optimizer steps in all."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the denoiser's arithmetic; unset: what `accelerate config` says, else no."""
    allow_tf32: bool = False
    """Allow TF32 on NVIDIA GPUs, also in LPL's float32 decoder."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser in the backward pass to save memory."""
    checkpointing_steps: int = free(500)
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = free(None)
    """Keep only this many of the newest checkpoints."""
    resume_from_checkpoint: str | None = free(None)
    """`latest` or a checkpoint folder; without it an unfinished run in --output_dir is continued all the same."""
    dry_run: bool = free(False)
    """Print the plan (parameters, taps, steps, memory) and stop."""
    save_steps: int | None = free(None)
    """Write weights for inference, raw and averaged, to saved-<step> in --output_dir every so many optimizer steps."""
    compile_denoiser: bool = free(False)
    """Run the denoiser through torch.compile in training; costs minutes at the start, once per shape of the images."""
    max_minutes: float | None = free(None)
    """Stop after so many minutes as a signal does: with a checkpoint and exit code 4; the same command continues."""
    on_nonfinite: Literal["stop", "skip"] = free("stop")
    """At a loss or gradient that is not finite: stop before the optimizer step, or leave that step out and go on."""
    max_skips: int = free(10)
    """For skip: stop if more steps than this are left out in a row."""
    allow_changes: bool = free(False)
    """Continue a run though options or data that change its trajectory have changed."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"--seed must lie in 0..{2**32 - 1}, not {self.seed}")
        for name in (
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "checkpointing_steps",
            "max_skips",
        ):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        require(
            self.max_minutes is None or 0 < self.max_minutes < float("inf"),
            f"--max_minutes must be positive, not {self.max_minutes}",
        )
        for name in ("max_train_steps", "checkpoints_total_limit", "save_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class LoggingConfig:
    """Validation images, logs and publishing."""

    validation_prompt: str | None = free(None)
    """Prompt of the validation images; unset: none are made."""
    num_validation_images: int = free(4)
    """Validation images each time."""
    validation_epochs: int = free(1)
    """Epochs between validations."""
    validation_steps: int | None = free(None)
    """Optimizer steps between validations, instead of epochs."""
    report_to: Literal["tensorboard", "wandb", "comet_ml", "all", "none"] = free("tensorboard")
    """Where metrics go."""
    logging_dir: str = free("logs")
    """TensorBoard folder, within --output_dir."""
    log_every: int = free(10)
    """Optimizer steps between logged metrics; the device is not synchronised in between."""
    push_to_hub: bool = free(False)
    """Upload the result with a model card when training ends."""
    hub_model_id: str | None = free(None)
    """Repository to push to; unset: the name of --output_dir."""
    hub_token: str | None = free(None)
    """Token for the push; never written to config.yaml. `hf auth login` is safer."""

    def __post_init__(self) -> None:
        for name in ("num_validation_images", "validation_epochs", "log_every"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        require(self.validation_steps is None or self.validation_steps >= 1, "--validation_steps must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a latent diffusion model with the Latent Perceptual Loss."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    lpl: LPLConfig = field(default_factory=LPLConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate before --scale_lr."""
        if self.optim.learning_rate is not None:
            return self.optim.learning_rate
        if self.optim.optimizer_name == "prodigy":
            return 1.0
        return 1e-5 if self.model.rank is None else 1e-4

    @property
    def lpl_checkpointing(self) -> bool:
        """Whether LPL recomputes the decoder in its backward pass."""
        choice = self.lpl.lpl_checkpointing
        return self.run.gradient_checkpointing if choice == "auto" else choice == "true"

    def num_steps(self, samples: int, processes: int) -> int:
        """Optimizer steps of the run: --max_train_steps, or what --num_train_epochs of so many samples take."""
        run = self.run
        per_step = run.train_batch_size * run.gradient_accumulation_steps * processes
        return run.max_train_steps or -(-run.num_train_epochs * samples // per_step)

    def flat(self) -> dict[str, Any]:
        """Every option by its flag's name."""
        return {f.name: getattr(group, f.name) for group in self.groups() for f in fields(group)}

    def groups(self) -> list[Any]:
        """The groups of options, in order."""
        return [getattr(self, f.name) for f in fields(self)]


def free_options() -> set[str]:
    """Names of the options that do not change a run's trajectory."""
    return {f.name for group in TrainConfig().groups() for f in fields(group) if f.metadata.get("free")}
