"""What earlier commands wrote, changed since: one line that names the file and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lpl.base.errors import UserError
from lpl.config import TrainConfig
from lpl.config.files import differences, read_record, write_config
from lpl.config.run_folder import damage, read_finished, read_result, read_rows
from lpl.report.page import as_html, gather
from lpl.report.sources import Inputs, read_inputs

ORIGINALS = Path(__file__).parents[1] / "fuzz" / "originals"
MISSING = object()


@pytest.mark.parametrize(
    ("kind", "path", "value", "told"),
    [
        ("eval", ["metrics"], [], "metrics is a list of 0"),
        ("eval", ["num_samples"], "12", "num_samples is '12'"),
        ("eval", ["options", "against"], "x", "options.against is 'x', not one of images, reconstructions"),
        ("eval", ["spectrum", "samples"], [1.0], "spectrum: its lists are of different lengths"),
        ("eval", ["images", 0, "file"], None, "images[0].file is null, not a text"),
        ("eval", ["points", 1, "metrics"], [], "points[1].metrics is a list of 0"),
        ("eval", ["points", 0, "num_inference_steps"], "4", "points[0].num_inference_steps is '4'"),
        ("check", ["gradients", 0, "t_low"], "x", "gradients[0].t_low is 'x'"),
        ("check", ["layers", 0, "bins"], {}, "layers[0].bins is an object of 0, not a list"),
        ("check", ["suggestion"], 3, "suggestion is 3, not an object or null"),
        ("compare", ["arms"], None, "arms is null"),
        ("compare", ["arms", 0, "name"], 3, "arms[0].name is 3"),
        ("compare", ["arms", 0, "name"], "lpl", "an arm is there twice"),
        ("compare", ["paired", 0, "arm"], "other", "paired has the arm 'other', which is not in arms"),
        ("compare", ["rows", 1, "arm"], "other", "rows has the arm 'other', which is not in arms"),
        ("compare", ["rows", 0, "frechet"], "5", "rows[0].frechet is '5'"),
        ("compare", ["at_best", 0, "recall", "interval"], [1], "at_best[0].recall.interval is a list of 1"),
        ("compare", ["verdicts", 0, "sentence"], None, "verdicts[0].sentence is null"),
        ("compare", ["paired", 0, "interval"], [1], "paired[0].interval is a list of 1, not two numbers or null"),
        ("compare", ["paired", 0, "metric"], "validation/x", "paired[0].metric"),
        ("compare", ["paired", 0, "noise"], MISSING, "paired[0] has no noise"),
    ],
)
def test_a_result_of_other_types(tmp_path: Path, kind: str, path: list[Any], value: Any, told: str) -> None:
    content = json.loads((ORIGINALS / f"{kind}.json").read_text())
    file = tmp_path / f"{kind}.json"
    file.write_text(json.dumps(content))
    assert read_result(file, kind) == content
    *above, last = path
    part = content
    for key in above:
        part = part[key]
    if value is MISSING:
        del part[last]
    else:
        part[last] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_result(file, kind)
    assert str(caught.value).startswith(f"{file}: ")
    assert told in str(caught.value)
    assert str(caught.value).endswith(f"run lpl {kind} again")


def test_the_record_of_a_run(tmp_path: Path) -> None:
    write_config(TrainConfig(), tmp_path, 2)
    file = tmp_path / "config.yaml"
    right = file.read_text()
    assert read_record(file)[1]["processes"] == 2
    for old, new, told in (
        ("train_batch_size: 1", "train_batch_size: x", "train_batch_size is 'x'"),
        ("processes: 2", "processes: []", "environment.processes is a list of 0"),
        ("seed: 0", "seed: [1]", "seed is a list of 1, not a single value"),
        ("seed: 0", "seed: " + "[" * 50_000, "too deep"),
        ("seed: 0", "seed: 2024-13-45", "not YAML"),
    ):
        file.write_text(right.replace(old, new))
        with pytest.raises(UserError) as caught:
            differences(TrainConfig(), tmp_path)
        assert str(file) in str(caught.value)
        assert told in str(caught.value)


@pytest.mark.parametrize("row", ["3", "[]", '{"step": "x", "weights": "raw"}', '{"step": 1}', "[" * 100_000])
def test_rows_of_a_validation(tmp_path: Path, row: str) -> None:
    (tmp_path / "v.jsonl").write_text('{"step": 0, "weights": "raw", "lpl": NaN}\n' + row)
    with pytest.raises(UserError, match=r"v\.jsonl, line 2: is no row of a validation"):
        read_rows(tmp_path / "v.jsonl")


def test_notes_that_cannot_be_believed(tmp_path: Path) -> None:
    """Of a finished run: it has not ended. Of a checkpoint: it is damaged."""
    for content in ('{"step": 3, "weights": "raw"}', "[]", '{"step": -1, "weights": "raw"}', "[" * 100_000, "3"):
        (tmp_path / "finished.json").write_text(content)
        assert (read_finished(tmp_path) is not None) == content.startswith('{"step": 3')
    for content in ("[]", '{"a": 1}', '{"a": {"bytes": "x", "xxh3_128": ""}}', "[" * 100_000):
        (tmp_path / "manifest.json").write_text(content)
        assert damage(tmp_path) == "manifest.json is not what was written"


def test_the_page_keeps_directions_apart(tmp_path: Path) -> None:
    """What turns the direction of writing is shown as an escape; text from right to left stays by itself."""
    content = json.loads((ORIGINALS / "compare.json").read_text())
    content["arms"][1]["name"] = name = "\u05d0\u05d1\u202e\x1b[2J"
    for entry in (entry for key in ("paired", "rows", "at_best", "verdicts") for entry in content[key]):
        entry["arm"] = name if entry["arm"] == "lpl" else entry["arm"]
    content["verdicts"][0]["sentence"] = f"{name} helps."
    content["refused"] = [f"{name}: left out"]
    (tmp_path / "compare.json").write_text(json.dumps(content))
    page = as_html(gather(read_inputs([str(tmp_path)])))
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "<bdi>\u05d0\u05d1\\u202e\\x1b[2J</bdi>" in page
    assert "unicode-bidi: plaintext" in page
    assert "unicode-bidi" in as_html(gather(Inputs()))
