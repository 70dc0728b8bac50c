"""Decoding of every kind of image file: the right pixels, or a plain reason."""

import io
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from broken_images import bad_images
from image_bytes import flat_jpeg, png, png_chunk, png_header
from odd_file import BACKGROUND, Odd, grey, noise
from odd_images import sound_images
from PIL import Image, PngImagePlugin

from lpl.base.errors import UserError
from lpl.data import decode
from lpl.data.bad_files import BadImageError
from lpl.data.decode import decode_image, parse_color

# pytest puts its own filters of warnings in place of the module's; what users see has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
SOUND, BAD = sound_images(), bad_images()


def check(odd: Odd) -> None:
    assert odd.pixels is not None
    image = decode_image(odd.data, BACKGROUND)
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(float)
    assert pixels.shape == odd.pixels.shape
    assert np.abs(pixels - odd.pixels).max() <= odd.tolerance + 1e-6


def test_there_are_enough_kinds() -> None:
    names = [odd.name for odd in SOUND + BAD]
    assert len(set(names)) == len(names)
    assert len(SOUND) >= 200
    assert len(BAD) >= 120


@pytest.mark.parametrize("odd", SOUND, ids=lambda odd: odd.name)
def test_pixels_are_right(odd: Odd) -> None:
    check(odd)


@pytest.mark.parametrize("odd", BAD, ids=lambda odd: odd.name)
def test_bad_files_have_a_reason(odd: Odd) -> None:
    assert odd.word is not None
    with pytest.raises(BadImageError) as caught:
        decode_image(odd.data)
    reason = caught.value.reason
    assert re.search(odd.word, reason)
    assert str(caught.value) == reason
    assert len(reason) < 200
    assert "\n" not in reason


def test_threads_see_the_same_pixels() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(check, SOUND * 3))) == 3 * len(SOUND)


def test_nothing_reaches_the_terminal(tmp_path: Path) -> None:
    script = tmp_path / "decode_all.py"
    script.write_text(
        "from broken_images import bad_images\nfrom odd_images import sound_images\n"
        "from lpl.data.decode import BadImageError, decode_image\n"
        "for odd in bad_images() + sound_images():\n"
        "    try:\n        decode_image(odd.data)\n    except BadImageError:\n        pass\n"
        "print('done')\n"
    )
    tests, src = Path(__file__).parents[2], Path(decode.__file__).parents[2]
    paths = {"PYTHONPATH": f"{src}:{tests}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=paths, check=True)
    assert result.stdout == "done\n"
    assert result.stderr == ""


def test_background_is_white_unless_said() -> None:
    data = png(np.zeros((2, 2, 4), int), 8, 6)
    assert np.asarray(decode_image(data)).min() == 255
    assert np.asarray(decode_image(data, (1, 2, 3)))[1, 1].tolist() == [1, 2, 3]


def test_size_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decoded)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for width, height in ((13351, 13333), (2, 89_000_001)):
        with pytest.raises(BadImageError, match=f"too large: {width} x {height} pixels, more than 178,000,000"):
            decode_image(png_header(width, height, 1, 0) + png_chunk(b"IDAT", b""))


def test_largest_size_needs_no_leave_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(noise(1, 40, 40, 3), 8, 2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(data).size == (40, 40)


def test_png_without_orientation_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    prepare = PngImagePlugin.PngImageFile.load_prepare
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", lambda self: (loads.append(1), prepare(self))[1])
    decode_image(png(noise(1, 9, 9, 3), 8, 2))
    assert loads == [1]


def test_damage_that_a_jpeg_cannot_tell_is_not_a_crash() -> None:
    data = bytearray(flat_jpeg(noise(5, 6, 6, 1)))
    data[-20] ^= 0x55
    assert decode_image(bytes(data)).size == (48, 48)


def test_avif_that_pillow_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.AvifImagePlugin, "SUPPORTED", False)
    with pytest.raises(BadImageError, match="AVIF, which this Pillow was built without"):
        decode_image(b"\0\0\0\x1cftypavif" + bytes(30))


def test_several_exposures_in_a_jpeg_give_the_first() -> None:
    first, second = (Image.fromarray(np.full((16, 16, 3), level, np.uint8)) for level in (50, 200))
    buffer = io.BytesIO()
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert np.abs(np.asarray(decode_image(buffer.getvalue())) - grey(np.full((16, 16), 50))).max() <= 2


@pytest.mark.parametrize(
    ("text", "color"),
    [("white", (255, 255, 255)), ("#0a141e", (10, 20, 30)), ("Rebeccapurple", (102, 51, 153)), ("#fff", (255,) * 3)],
)
def test_colors_are_read(text: str, color: tuple[int, int, int]) -> None:
    assert parse_color(text) == color


@pytest.mark.parametrize("text", ["", "whit", "#12345", "#11223344", "255,255,255", "none"])
def test_what_is_no_color_is_named(text: str) -> None:
    with pytest.raises(UserError, match=rf"^--background_color '{re.escape(text)}' is no colour: give"):
        parse_color(text)
