"""Which choices stand beside the one asked for, and which is the cheapest that fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lpl.analysis.alternatives import HEADROOM, cheapest, fits, neighbours, savings, smallest
from lpl.analysis.needs import estimate
from lpl.config import TrainConfig
from lpl.config.command_line import parse_train
from lpl.data import filling
from lpl.training.rehearsal import Rehearsal


@pytest.fixture(scope="module")
def rehearsal(plan_of: Any) -> Iterator[Rehearsal]:
    """Of a tiny model, and one crop at a time through its encoder: else filling the cache would be the peak."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "ENCODE_IMAGES", 1)
        yield Rehearsal(plan_of)


def options(*flags: str) -> TrainConfig:
    return parse_train(["--resolution=64", *flags])


def room(peak: int) -> int:
    """The least memory that a peak fits."""
    return int(peak / (1 - HEADROOM)) + 1


def test_a_choice_fits_if_it_leaves_some_memory() -> None:
    assert fits(95, 100)
    assert not fits(96, 100)


@pytest.mark.parametrize("flags", ["", "--no_use_lpl", "--gradient_checkpointing --mixed_precision=bf16 --rank=4",
                                   "--use_ema --use_8bit_adam --lpl_dtype=bfloat16 --train_batch_size=4",
                                   "--optimizer=prodigy --use_ema --ema_device=cpu", "--optimizer=schedulefree_adamw",
                                   "--mixed_precision=bf16 --weights_dtype=bfloat16 --fused_backward_pass "
                                   "--max_grad_norm=0",
                                   "--optimizer=torch.optim.SGD --optimizer_args=momentum=0.9"])  # fmt: skip
def test_each_neighbour_is_what_its_flags_say(flags: str) -> None:
    config = options(*flags.split())
    changes = neighbours(config)
    names = [change.flags for change in changes]
    assert len(set(names)) == len(names) >= 7
    for change in changes:
        argv = [*flags.split(), *change.flags.split()]
        if change.flags == "without --rank":
            argv = [flag for flag in flags.split() if not flag.startswith("--rank")]
        assert change.apply(config) == options(*argv) != config


@pytest.mark.parametrize("flags", ["", "--rank=16 --gradient_checkpointing", "--train_batch_size=4 --use_ema",
                                   "--use_ema --use_8bit_adam", "--optimizer=adafactor --use_ema --final_weights=ema",
                                   "--mixed_precision=bf16 --weights_dtype=bfloat16 --fused_backward_pass "
                                   "--max_grad_norm=0",
                                   "--optimizer=torch.optim.SGD --optimizer_args=momentum=0.9"])  # fmt: skip
def test_each_saving_is_what_its_flags_say(flags: str) -> None:
    config = options(*flags.split())
    for saving in savings(config):
        assert saving.apply(config) == options(*flags.split(), *saving.flags.split()) != config


def test_nothing_is_saved_twice() -> None:
    names = [saving.flags for saving in savings(options("--gradient_checkpointing"))]
    assert "--gradient_checkpointing" not in names
    assert "--lpl_checkpointing true" not in names  # auto follows already
    names = [saving.flags for saving in savings(options("--no_use_lpl"))]
    assert not [name for name in names if "lpl" in name]
    assert [s.flags for s in savings(options("--train_batch_size=4", "--gradient_accumulation_steps=2"))].count(
        "--train_batch_size 1 --gradient_accumulation_steps 8"
    ) == 1


def test_cheapest_changes_as_little_as_it_can(rehearsal: Rehearsal) -> None:
    config = options("--train_batch_size=2")
    asked = estimate(config, rehearsal)
    found = cheapest(config, room(asked.peak), rehearsal)
    assert found is not None
    assert (found.flags, found.needs) == ("", asked)

    memory = room(asked.peak) - 2
    found = cheapest(config, memory, rehearsal)
    assert found is not None
    assert fits(found.needs.peak, memory)
    costs = {saving.flags: saving.cost for saving in savings(config)}
    cheaper = [flags for flags, cost in costs.items() if cost < sum(c for f, c in costs.items() if f in found.flags)]
    for flags in cheaper:
        (saving,) = (s for s in savings(config) if s.flags == flags)
        assert not fits(estimate(saving.apply(config), rehearsal).peak, memory), flags


@pytest.mark.slow
def test_the_smallest_is_below_all_others_and_nothing_fits_below_it(rehearsal: Rehearsal) -> None:
    config = options("--use_ema", "--mixed_precision=bf16", "--gradient_checkpointing", "--lpl_dtype=bfloat16")
    least = smallest(config, rehearsal)
    assert "--no_use_lpl" in least.flags
    assert "--lpl" not in least.flags
    for change in savings(config):
        assert estimate(change.apply(config), rehearsal).peak >= least.needs.peak, change.flags
    assert cheapest(config, room(least.needs.peak), rehearsal) is not None
    assert cheapest(config, least.needs.peak // 2, rehearsal) is None


@pytest.mark.slow
def test_half_precision_is_no_saving_where_its_copies_of_the_weights_cost_more(rehearsal: Rehearsal) -> None:
    fixed = ("--rank 16", "--no_use_lpl", "--mixed_precision bf16 --weights_dtype bfloat16")
    config = parse_train(["--resolution=16", "--no_use_lpl", "--gradient_accumulation_steps=2"])
    least = smallest(config, rehearsal, fixed=fixed)
    assert least.flags == "--gradient_checkpointing --optimizer adafactor"


@pytest.mark.slow
def test_what_is_fixed_stays(rehearsal: Rehearsal) -> None:
    config, fixed = options("--mixed_precision=bf16", "--lpl_dtype=bfloat16"), ("--rank 16", "--no_use_lpl")
    least = smallest(config, rehearsal, fixed=fixed)
    assert not set(fixed) & {f"--{flag.strip()}" for flag in least.flags.split("--")}
    assert least.needs.trained == least.needs.base
    assert least.needs.lpl > 0
    assert cheapest(config, least.needs.peak // 2, rehearsal, fixed=fixed) is None


def test_several_processes_need_more(rehearsal: Rehearsal) -> None:
    config: Any = options()
    memory = room(estimate(config, rehearsal).peak)
    found = cheapest(config, memory, rehearsal, processes=2)
    assert found is None or found.flags != ""


def test_largest_batch_has_neighbours_within_the_bounds() -> None:
    config = parse_train(["--resolution=64", "--train_batch_size=65536", "--gradient_accumulation_steps=100"])
    assert "--train_batch_size 1" in [change.flags for change in neighbours(config)]
    for change in (*neighbours(config), *savings(config)):
        assert change.apply(config).run.train_batch_size <= 2**16
