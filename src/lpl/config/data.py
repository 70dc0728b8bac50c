"""Options: images, captions, crops and their cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lpl.base.errors import require
from lpl.config.checks import MOST_PIXELS, Facts, Options, option

HELD_OUT = ("diffusion_loss", "lpl")
"""Figures of validation, which are measured on what the run holds out."""


@dataclass(frozen=True)
class DataConfig(Options):
    """Data: images and captions, and how they are cropped and cached."""

    USUALLY: ClassVar[Facts] = Facts(draws=True, defines=HELD_OUT)

    train_data_dir: str | None = option(None, path=True, main=True)
    """An image folder, nested as deep as you like, with metadata.jsonl, or with a .txt caption beside each image."""
    dataset_name: str | None = option(None, path=True, main=True)
    """A data set on the Hub, a local folder that `datasets` reads, or parquet files (a path, * allowed)."""
    dataset_config_name: str | None = option(None, needs="dataset_name")
    """Configuration of that data set."""
    webdataset: str | None = None
    """WebDataset shards: paths or URLs, with {000..099} or (local) *; several joined by ::."""
    streaming: bool = False
    """Read --dataset_name as a stream: nothing is downloaded whole, each image is read once and cached encoded."""
    image_column: str = option("image", needs="dataset_name")
    """Column with the images of --dataset_name."""
    caption_column: str = "text"
    """Column (or key in metadata.jsonl or a shard's .json) with the captions: a string or a list of strings."""
    max_train_samples: int | None = option(None, least=1)
    """Use only the first N samples."""
    max_bad_fraction: float = option(0.01, free=True, least=0, most=1, defines=())
    """Stop if more than this share of the images, and more than 3 (unless this is 0), cannot be used; those are listed
    in bad_files.jsonl."""
    background_color: str = "white"
    """What shows through transparent pixels: a name or #rrggbb."""
    resolution: int | None = option(None, most=MOST_PIXELS, least=8, defines=(*HELD_OUT, "samples"), main=True)
    """Height and width of the training crops, in pixels; unset: what the model was made for (1024 for full size)."""
    buckets: bool = option(False, elsewhere=("enable_bucket",), main=True)
    """Crop to the nearest of a set of aspect ratios with the area of --resolution squared, instead of to a square."""
    bucket_area: int | None = option(None, most=MOST_PIXELS**2, least=64, needs="buckets")
    """Area of every bucket in pixels; unset: --resolution squared."""
    bucket_step: int = option(
        64, most=MOST_PIXELS, least=1, needs="buckets", elsewhere=("bucket_reso_steps", "aspect_bucket_alignment")
    )
    """Sides of buckets are multiples of this many pixels."""
    bucket_max_aspect: float = option(2.0, most=100.0, least=1, needs="buckets")
    """No bucket is longer than this many times its short side."""
    center_crop: bool = False
    """Crop the centre; off: a random crop."""
    crop_variants: int = option(1, most=10_000, least=1, defines=())
    """How many different random crops of each image to cache; each draw takes one of them."""
    random_flip: bool = option(False, defines=(), elsewhere=("flip_aug",), preset_unless=("instance_prompt",))
    """Mirror images at random, anew at each draw (both versions are cached)."""
    image_interpolation_mode: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = option(
        "lanczos", elsewhere=("resize_interpolation",)
    )
    """How images are resized; always antialiased but for nearest."""
    caption_choice: Literal["random", "first"] = option("random", defines=())
    """Of several captions: one at random at each draw, or always the first."""
    shuffle_caption: bool = False
    """Shuffle the tags of a caption; the text cache holds --caption_variants orders of each."""
    keep_tokens: int = option(0, least=0, needs="shuffle_caption")
    """This many tags at the beginning stay in their places."""
    caption_separator: str = option(",", needs="shuffle_caption")
    """What separates tags."""
    caption_variants: int = option(8, most=10_000, least=1, needs="shuffle_caption", defines=())
    """How many orders of its tags a caption is cached in; draw n takes order n modulo this."""
    caption_prefix: str | None = option(None, may_be_empty=True, elsewhere=("prepend_instance_prompt",))
    """Trigger words: put before every caption that is not dropped."""
    proportion_empty_prompts: float = option(
        0.0, least=0, most=1, defines=(), elsewhere=("caption_dropout_rate", "caption_dropout_probability")
    )
    """Share of draws whose caption is dropped, drawn anew each time."""
    repeats: str | None = option(None, defines=(), elsewhere=("dataset_repeats",))
    """How often an epoch draws the images of a folder: `dogs=10,cats=2.5`, `balanced` (every folder equally often), or
    `names` (a folder named 10_dogs: ten times)."""
    reg_data_dir: str | None = option(None, path=True, defines=())
    """An image folder of regularisation images, drawn along with the others."""
    prior_loss_weight: float = option(1.0, least=0, needs="reg_data_dir", defines=())
    """Weight of the regularisation images' loss, LPL included."""
    latent_cache_dir: str | None = option(
        None, path=True, free=True, defines=(), elsewhere=("cache_dir_vae", "cache_dir_text")
    )
    """Where latents and text embeddings are cached; unset: a folder of the user's cache, shared by all runs."""
    cache_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision in which latents and text embeddings are cached; the 16-bit ones halve the space."""
    rehash: bool = option(False, free=True, defines=())
    """Read every image again, even if its path, size and time of change are as before."""
    dataloader_num_workers: int | Literal["auto"] = option(
        "auto", most=1024, free=True, least=0, defines=(), elsewhere=("max_data_loader_n_workers", "max_workers")
    )
    """Threads that read, decode and crop images while the cache is filled; auto: one a core, eight at most."""
    validation_samples: int = option(0, least=0, elsewhere=("num_eval_images", "validation_split"))
    """Hold this many images out of training, chosen by their content, and measure both losses on them."""
    validation_data_dir: str | None = option(None, path=True, free=True)
    """An image folder to measure both losses on instead; training images that are also in it are not trained on."""
    masked_loss: Literal["none", "alpha", "files"] = option("none", elsewhere=("alpha_mask",))
    """Train, LPL included, on what a mask marks in white: the image's opacity (alpha), or files: x-masklabel.png beside
    x.jpg, a file in --mask_dir, a row's --mask_column, x.mask.png in a shard. Images without a mask count whole."""
    mask_dir: str | None = option(None, path=True, needs="masked_loss=files & train_data_dir")
    """Where the masks of --train_data_dir are, under the same relative path as the image (any image format)."""
    mask_column: str | None = option(None, needs="masked_loss=files & dataset_name")
    """Column with the masks of --dataset_name."""
    unmasked_weight: float = option(0.0, least=0, most=1, needs="masked_loss")
    """Weight of what the mask leaves out, 0 to 1: a mask's value m counts as m + (1 - m) times this."""
    instance_prompt: str | None = option(None, main=True)
    """Caption of every image that has none of its own (not of --reg_data_dir's)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.center_crop and self.crop_variants > 1),
            "--crop_variants needs random crops: drop --center_crop or --crop_variants",
        )
        given = [
            f"--{name}" for name in ("train_data_dir", "dataset_name", "webdataset") if getattr(self, name) is not None
        ]
        require(len(given) <= 1, f"{' and '.join(given)} are all given: choose one")
        require(
            not self.streaming or self.dataset_name is not None or not given,
            "--streaming reads --dataset_name; WebDataset URLs are streamed anyway: drop it",
        )
        require(
            not self.validation_samples or self.validation_data_dir is None,
            f"--validation_samples {self.validation_samples} and --validation_data_dir {self.validation_data_dir} are "
            "both given: choose one",
        )
        require(
            self.instance_prompt is None or self.instance_prompt.strip() != "",
            "--instance_prompt is empty: give the caption of the images that have none",
        )
        require(self.caption_separator != "", "--caption_separator must not be empty")
        require(
            self.masked_loss != "files" or self.dataset_name is None or self.mask_column is not None,
            "--masked_loss files: name the column of --dataset_name that holds the masks with --mask_column",
        )

    @property
    def holds_out(self) -> bool:
        """Whether there are images to validate on."""
        return self.validation_samples > 0 or self.validation_data_dir is not None

    @property
    def crop_size(self) -> int:
        """The resolution, once the model's own has taken the place of an unset one."""
        assert self.resolution is not None
        return self.resolution
