"""Files of prompts: what validation images take `lpl eval` takes, and the other way round."""

import logging
from pathlib import Path

import pytest

from lpl.base.errors import UserError
from lpl.base.text import Prompt, read_prompts
from lpl.config import LoggingConfig
from lpl.config.model_commands import EvalConfig
from lpl.evaluation.planning import _prompts as eval_prompts
from lpl.training.preflight import validation_prompts

ODD = "one\u2028two\x85three\x0bfour\x0cfive"


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_bytes("\r\n".join(lines).encode(encoding))
    return path


@pytest.mark.parametrize(
    ("name", "lines", "expected"),
    [
        ("p.txt", ("a fox", "", f"  {ODD} "), [Prompt("a fox"), Prompt(ODD)]),
        ("P.TXT", ("a fox",), [Prompt("a fox")]),
        ("p.jsonl", (f'{{"prompt": "{ODD[:3]}\u2028x"}}', ""), [Prompt("one\u2028x")]),
        (
            "p.jsonl",
            ('{"prompt": "a", "negative_prompt": "b", "seed": 3}', '{"prompt": "", "seed": null}'),
            [Prompt("a", "b", 3), Prompt("")],
        ),
        (
            "metadata.jsonl",
            ('{"file_name": "a.png", "text": "a cat"}', '{"text": ["first", "second"], "tags": []}'),
            [Prompt("a cat"), Prompt("first")],
        ),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le"])
def test_both_take_the_same_files(
    tmp_path: Path, name: str, lines: tuple[str, ...], expected: list[Prompt], encoding: str
) -> None:
    file = write(tmp_path / name, *lines, encoding=encoding)
    assert read_prompts(file) == expected
    assert validation_prompts(LoggingConfig(validation_prompts=str(file))) == expected
    options = EvalConfig(output_dir="x", reference_dir="y", pretrained_model_name_or_path="z", prompts=str(file))
    assert eval_prompts(options, tmp_path, []) == [prompt.text for prompt in expected]


def test_what_only_validation_images_use_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "p.jsonl", '{"prompt": "a", "seed": 3}', '{"prompt": "b", "negative_prompt": "c"}')
    options = EvalConfig(output_dir="x", reference_dir="y", pretrained_model_name_or_path="z", prompts=str(file))
    with caplog.at_level(logging.WARNING, "lpl"):
        assert eval_prompts(options, tmp_path, []) == ["a", "b"]
    assert "negative_prompt and seed of 2 rows" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "a", r"expected \.txt"),
        ("p.txt", "\n \n", "no prompt in it"),
        ("p.jsonl", '{"prompt": "a"}\nno json', "line 2: not JSON"),
        ("p.jsonl", '{"caption": "a"}', 'line 1: no "prompt" and no "text" in it; its keys: caption'),
        ("p.jsonl", '{"prompt": "a", "negativ_prompt": "b"}', "line 1: unknown key negativ_prompt"),
        ("p.jsonl", '{"prompt": "a", "text": "b"}', "line 1: unknown key text"),
        ("p.jsonl", '{"prompt": 3}', "line 1: prompts must be strings"),
        ("p.jsonl", '{"text": 3}', 'line 1: "text" is neither'),
        ("p.jsonl", '{"text": "a", "seed": -1}', "line 1: seed must be a whole number"),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"^--prompts .*{message}"):
        read_prompts(tmp_path / name)
