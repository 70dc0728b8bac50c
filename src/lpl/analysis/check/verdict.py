"""What a check comes to, in one sentence: whether LPL will act, idle or likely harm, why, and what to change."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from lpl.analysis.check.suggest import INFORMED
from lpl.config import TrainConfig
from lpl.perceptual.defaults import HIGH_SHARE, LOW_SHARE

LEAST_GATED = 0.05
"""Probability of passing the gate."""


class Verdict(NamedTuple):
    """As check.json has it."""

    outcome: Literal["acts", "idles", "harms"]
    verdict: str


def verdict_of(found: dict[str, Any], config: TrainConfig) -> Verdict:
    """The verdict on a run.

    Args:
        found: check.json so far; where pictures were not measured, faults say why.
        config: the options.
    """
    if found["faults"]:
        return _harms(found["faults"][0])
    lpl, gate, p_gate, own = config.lpl, found["gate"], found["p_gate"], found["suggestion"]["own_gate"]
    cosine, share = own["cosine"], found["suggestion"]["own_share"]
    if own["gradient"] == "not finite":
        better = (
            "keep --lpl_dtype float32"
            if lpl.lpl_dtype != "float32"
            else "take another --pretrained_vae_model_name_or_path"
        )
        return _harms(f"it is not finite with --lpl_dtype {lpl.lpl_dtype} within the gate ({gate}); {better}")
    if lpl.lpl_weight == 0:
        return _idles("--lpl_weight is 0; give auto, or a number above 0")
    if p_gate < LEAST_GATED or own["gradient"] == "none":
        return _idles(
            f"{_whole_percent(p_gate)} of the samples pass the gate ({gate}); give a wider one, such as "
            "--lpl_sigma_threshold 3, or draw less noise (--timestep_bias_strategy earlier)"
        )
    if own["gradient"] == "zero":
        return _idles(
            f"its gradient is exactly 0 for all that passes the gate ({gate}), which would stop the run; compare other "
            "layers (--lpl_num_blocks), or look at the masks"
        )
    least = found["suggestion"]["uninformed"]
    if least is not None and least["interval"][0] > INFORMED:
        return _harms(
            f"even where noise is least the model's estimate is as far from the picture as {least['share']:.2f} of one "
            "that knows nothing of it; see that model, VAE and --prediction_type belong together"
        )
    if own["cosine_interval"] is not None and own["cosine_interval"][1] < 0:
        narrower = found["suggestion"]["lpl_t_threshold"]
        change = "drop LPL here (--no_use_lpl)" if narrower is None else f"give --lpl_t_threshold {narrower}"
        return _harms(f"it pulls against the diffusion loss within the gate ({gate}): cosine {cosine:.2f}; {change}")
    auto = lpl.lpl_weight == "auto"
    share = lpl.lpl_target_share if auto else share
    weight = own["lpl_weight"] if auto else float(lpl.lpl_weight)
    flag = "--lpl_target_share" if auto else "--lpl_weight"
    has = f"{flag} {lpl.lpl_target_share if auto else lpl.lpl_weight} gives it {_whole_percent(share)} of the gradient"
    if share < LOW_SHARE:
        return _idles(f"{has}; raise it" + ("" if auto else ", or use auto"))
    if share > HIGH_SHARE:
        return _harms(f"{has}; lower it" + ("" if auto else ", or use auto"))
    return Verdict(
        "acts",
        f"LPL will act: it gets {_whole_percent(share)} of the gradient on {_whole_percent(p_gate)} of the samples, with a weight "
        f"of {'about ' if auto else ''}{weight:.3g}, and {_direction(cosine, own['cosine_interval'])}; nothing needs "
        "to be changed",
    )


def _direction(cosine: float, interval: list[float] | None) -> str:
    told = f"(cosine {cosine:.2f})"
    if interval is not None and interval[0] > 0:
        return f"pulls the same way as the diffusion loss {told}"
    return f"neither follows the diffusion loss nor opposes it, as far as can be told {told}"


def _idles(why: str) -> Verdict:
    return Verdict("idles", f"LPL will idle: {why}")


def _harms(why: str) -> Verdict:
    return Verdict("harms", f"LPL will likely harm: {why}")


def _whole_percent(part: float) -> str:
    return f"{100 * part:.0f} %" if part >= 0.01 else f"{100 * part:.2g} %"
