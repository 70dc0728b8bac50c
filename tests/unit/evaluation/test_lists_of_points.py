"""Points of guidance and steps: their folders, which is best, and what is no list of them."""

from __future__ import annotations

from typing import Any

import pytest

from lpl.base.errors import UserError
from lpl.config.model_commands import EvalConfig
from lpl.config.points import Point, best_points, edge_line, shown_point


def point(
    scale: float | None, steps: int, value: float | None, name: str = "frechet_efficientnet-lite0"
) -> dict[str, Any]:
    return {"guidance_scale": scale, "num_inference_steps": steps, "metrics": {name: {"value": value}}}


def test_every_point_has_a_folder_of_its_own() -> None:
    names = [Point(scale, 20).folder for scale in (1.0, 1.5, 1.0000001, 7, None)]
    assert names[:2] == ["points/guidance-1-steps-20", "points/guidance-1.5-steps-20"]
    assert names[-1] == "points/steps-20"
    assert len(set(names)) == 5


def test_the_best_guidance_of_each_number_of_steps_and_the_edges_of_the_list() -> None:
    points = [point(g, 20, v) for g, v in ((2, 9.0), (3, 4.0), (5, 5.0))]
    points += [point(g, 4, v) for g, v in ((2, 3.0), (3, 4.0), (5, 5.0))]
    points += [point(g, 8, v) for g, v in ((2, 3.0), (3, 2.0), (5, 1.0))]
    found = {entry["num_inference_steps"]: entry for entry in best_points(points)}
    assert {steps: (e["guidance_scale"], e["edge"]) for steps, e in found.items()} == {
        20: (3, None), 4: (2, "beginning"), 8: (5, "end"),
    }  # fmt: skip
    assert edge_line(7.0, "end") == "best guidance 7 is the end of the list: add a higher one"
    assert edge_line(2.0, "beginning") == "best guidance 2 is the beginning of the list: add a lower one"
    assert shown_point(points, best_points(points)) is points[1]
    [none] = best_points([point(1, 4, 1.0), point(2, 4, 2.0)])
    assert none["edge"] is None  # there is nothing below no guidance
    [alone] = best_points([point(3, 4, 1.0)])
    assert alone["edge"] is None


def test_without_a_distance_everywhere_there_is_no_best() -> None:
    points = [
        point(1, 4, 1.0),
        point(2, 4, None),
        point(1, 8, 1.0, "kernel_efficientnet-lite0"),
        point(1, 9, 1.0, "fid"),
    ]
    assert [(e["num_inference_steps"], e["metric"]) for e in best_points(points)] == [(9, "fid")]
    assert shown_point(points[:2], []) is points[1]


@pytest.mark.parametrize(
    ("scales", "steps", "told"),
    [
        ((), 4, "--guidance_scale is given empty: give a value, or leave it out"),
        ((3.0, 3.0), 4, "--guidance_scale: 3.0 is given twice"),
        ((1.0, float("nan")), 4, "--guidance_scale must be 0 or more, not nan"),
        (None, (4, 0), "--num_inference_steps must lie in 1..10000, not 0"),
        (None, (4, 8, 4), "--num_inference_steps: 4 is given twice"),
    ],
)
def test_lists_that_are_none_are_refused(scales: Any, steps: Any, told: str) -> None:
    with pytest.raises(UserError) as caught:
        EvalConfig("model", reference_dir="real", guidance_scale=scales, num_inference_steps=steps)
    assert str(caught.value) == told
