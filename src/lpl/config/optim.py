"""Options: optimizer, learning rate, average of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lpl.base.errors import require
from lpl.base.text import parse_keywords
from lpl.config.checks import Needs, Options, option

OPTIMI = "optimi."
"""Prefix of the classes of the package optimi, which step parameter by parameter and use compensated summation."""
WARMUP_STEPS = 500
"""Optimizer steps of warm-up where none are given, of schedules that have one."""
ONE_BY_ONE = ("adamw", "adamw8bit", "adafactor")
"""Optimizers in which a parameter's step depends on nothing but that parameter."""
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "schedulefree_adamw")
WITH_BETAS = tuple(name for name in OPTIMIZERS if name != "adafactor")
BETAS = Needs(f"--optimizer {', '.join(WITH_BETAS)}", lambda config: config.optim.optimizer_name in WITH_BETAS)
NAMED = Needs(
    "an --optimizer with a name (--optimizer_args weight_decay=... is for others)",
    lambda config: config.optim.optimizer_name in OPTIMIZERS,
)
WARM_UP = Needs("a schedule with warm-up (constant_with_warmup)", lambda config: config.optim.warms_up)


@dataclass(frozen=True)
class OptimConfig(Options):
    """Optimizer and schedule."""

    learning_rate: float | None = option(None, above=0, elsewhere=("unet_lr", "lr"), main=True)
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
    ] = option("constant", elsewhere=("lr_scheduler_type",))
    """Learning-rate schedule, stepped once per optimizer step."""
    lr_num_cycles: int = option(1, most=10**6, elsewhere=("lr_scheduler_num_cycles",))
    """Restarts of cosine_with_restarts."""
    lr_power: float = option(1.0, elsewhere=("lr_scheduler_power",))
    """Power of polynomial."""
    lr_step_rules: str | None = None
    """Rules of piecewise_constant: `1:10,0.1:20,0.01` is 1 x to step 10, 0.1 x to step 20, then 0.01 x."""
    lr_warmup_steps: int | None = option(None, least=0, needs=WARM_UP)
    """Optimizer steps of warm-up; unset: 500, or 0 for the constant schedules, which have none."""
    use_8bit_adam: bool = False
    """AdamW of bitsandbytes with 8-bit state; the same as --optimizer adamw8bit."""
    adam_beta1: float = option(0.9, least=0, below=1, needs=BETAS, elsewhere=("optimizer_beta1",))
    """Decay of the first moment."""
    adam_beta2: float = option(0.999, least=0, below=1, needs=BETAS, elsewhere=("optimizer_beta2",))
    """Decay of the second moment."""
    adam_weight_decay: float = option(1e-2, least=0, needs=NAMED)
    """Decoupled weight decay."""
    adam_epsilon: float = option(1e-8, above=0, needs=BETAS)
    """Term added to the denominator."""
    max_grad_norm: float = option(1.0, least=0)
    """Clip the gradient's norm to this; 0: do not clip."""
    use_ema: bool = False
    """Keep an exponential moving average of the weights; see --final_weights."""
    ema_decay: float = option(0.9999, above=0, below=1, needs="use_ema")
    """Decay of the average (reached after a warm-up)."""
    optimizer: str = option("adamw", elsewhere=("optimizer_type",))
    """adamw, adamw8bit (bitsandbytes), adafactor (transformers), prodigy (prodigyopt), schedulefree_adamw
    (schedulefree), or package.Class: any torch.optim.Optimizer that needs gradients only."""
    optimizer_args: str | None = option(None, may_be_empty=True, elsewhere=("optimizer_config",))
    """Keywords of the optimizer that no flag sets: `d_coef=2.0, safeguard_warmup=True`; literal values."""
    decay_all: bool = False
    """Decay biases and the weights of norms (tensors of one dimension) too, as the diffusers scripts do."""
    ema_warmup: bool = option(False, needs="use_ema")
    """Let the average's decay grow as 1 - (1 + t/ema_inv_gamma)^-ema_power instead of (1 + t)/(10 + t)."""
    ema_inv_gamma: float = option(1.0, above=0, needs="ema_warmup")
    """Of --ema_warmup: the higher, the later the decay grows."""
    ema_power: float = option(2 / 3, above=0, needs="ema_warmup")
    """Of --ema_warmup: 2/3 reaches 0.999 after 31,600 updates, 3/4 after 10,000."""
    ema_min_decay: float = option(0.0, least=0, needs="use_ema")
    """The average's decay is never below this, once updates have begun."""
    ema_update_after_step: int = option(0, least=0, needs="use_ema")
    """Updates during which the average only follows the weights."""
    ema_update_every: int = option(1, least=1, needs="use_ema", elsewhere=("ema_update_interval",))
    """Optimizer steps between updates of the average; the decay is that of an update."""
    ema_device: Literal["same", "cpu"] = option("same", free=True, needs="use_ema", elsewhere=("ema_cpu_only",))
    """Where the average is kept: on the device of the weights, or on the CPU, which costs a transfer at each update."""
    final_weights: Literal["auto", "raw", "ema"] = "auto"
    """Which weights are validated and saved as the result; auto: the average with --use_ema, else the raw ones."""
    weights_dtype: Literal["float32", "bfloat16"] = option("float32", elsewhere=("full_bf16",))
    """Precision of the trained weights and their gradients. bfloat16 halves both; updates are computed in float32 and
    rounded at random to one of the two neighbours, which loses nothing on average (optimizers of optimi keep instead
    what rounding leaves over). Needs --mixed_precision bf16 and adamw, adamw8bit, adafactor or optimi.Class."""
    fused_backward_pass: bool = option(False, elsewhere=("optimizer_release_gradients", "fuse_optimizer"))
    """Step each weight in the backward pass, as soon as its gradient is there, and free that gradient: they never exist
    all at once. Needs --max_grad_norm 0, one micro-batch a step, one process, and an optimizer that --weights_dtype
    bfloat16 takes."""
    text_encoder_lr: float | None = option(None, above=0, needs="train_text_encoder")
    """Peak learning rate of the text encoders, with --train_text_encoder; unset: --learning_rate's."""
    text_encoder_2_lr: float | None = option(None, above=0, needs="train_text_encoder", by_model=True)
    """Peak learning rate of the second text encoder (CLIP-G); unset: --text_encoder_lr's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_optimizer()
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
        require(
            self.ema_min_decay <= self.ema_decay,
            f"--ema_min_decay must lie in 0..{self.ema_decay} (--ema_decay), not {self.ema_min_decay}",
        )
        require(
            self.final_weights != "ema" or self.use_ema,
            "--final_weights ema needs --use_ema: there is no average without it",
        )
        for name in ("text_encoder_lr", "text_encoder_2_lr"):
            rate = getattr(self, name)
            require(
                self.optimizer != "prodigy" or rate in (None, self.learning_rate or 1.0),
                f"--{name} {rate} with --optimizer prodigy, which finds one rate for all that is trained: drop it",
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
    def is_optimi(self) -> bool:
        """Whether the optimizer is one of optimi's."""
        return self.optimizer_name.startswith(OPTIMI)

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded stochastically after each step."""
        return self.weights_dtype == "bfloat16" and not self.is_optimi

    @property
    def _is_scheduled(self) -> bool:
        return self.lr_scheduler not in ("constant", "piecewise_constant")

    @property
    def warms_up(self) -> bool:
        """Whether warm-up steps can act."""
        return self._is_scheduled or self.optimizer_name == "schedulefree_adamw"

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of warm-up; 0 where none can act."""
        usual = WARMUP_STEPS if self._is_scheduled else 0
        return 0 if not self.warms_up else usual if self.lr_warmup_steps is None else self.lr_warmup_steps

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


def _are_step_rules(text: str) -> bool:
    *rules, last = text.split(",")
    try:
        pairs = [(float(factor), int(step)) for factor, step in (rule.split(":") for rule in rules)]
        return len(pairs) == len(rules) and float(last) >= 0
    except ValueError:
        return False
