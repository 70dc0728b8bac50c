"""Colour profiles written byte by byte, and what their colours are in sRGB, computed with numpy alone."""

from __future__ import annotations

import struct

import numpy as np

# Columns: XYZ (D50) of red, green and blue at full.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
D50 = np.array([0.9642, 1.0, 0.8249])
ADOBE_GAMMA = 563 / 256
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)

INKS = {
    (0, 0, 0): (100, 0, 0), (1, 0, 0): (60, -25, -30), (0, 1, 0): (50, 50, 0), (0, 0, 1): (88, -5, 60),
    (1, 1, 0): (40, 20, -30), (1, 0, 1): (55, -35, 25), (0, 1, 1): (48, 45, 30), (1, 1, 1): (30, 0, 0),
}  # fmt: skip
"""L*a*b* of overprints of cyan, magenta and yellow in the CMYK profile; with black, all are black."""


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    table, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + b"\0" * (-len(value) % 4)
    head = struct.pack(">II", start + len(body), 0) + b"\x04\x20\0\0" + kind + space + pcs
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + _fixed(*D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _gamma(value: float) -> bytes:
    return b"curv" + struct.pack(">IIH", 0, 1, round(value * 256))


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _matrix_profile(columns: np.ndarray, curve: bytes) -> bytes:
    tags = {b"wtpt": _xyz(D50)}
    for n, name in enumerate((b"r", b"g", b"b")):
        tags[name + b"XYZ"], tags[name + b"TRC"] = _xyz(columns[:, n]), curve
    return _profile(b"RGB ", tags)


_PARAMETRIC = b"para" + struct.pack(">IHH", 0, 3, 0) + _fixed(*SRGB_CURVE)
ADOBE_PROFILE = _matrix_profile(ADOBE, _gamma(ADOBE_GAMMA))
P3_PROFILE = _matrix_profile(P3, _PARAMETRIC)
SRGB_PROFILE = _matrix_profile(SRGB, _PARAMETRIC)
NEARLY_SRGB_PROFILE = _matrix_profile(SRGB * [1.006, 1, 1], _PARAMETRIC)
_FAINT = b"curv" + struct.pack(">IIHH", 0, 2, 3000, 65535)
FAINT_PROFILE = _matrix_profile(SRGB, _FAINT)
"""Linear, with a black of 4.6 % light."""
GREY_PROFILE = _profile(b"GRAY", {b"wtpt": _xyz(D50), b"kTRC": _gamma(1.0)})


def _cmyk_profile() -> bytes:
    corners = b""
    for n in range(16):
        c, m, y, k = (n >> 3) & 1, (n >> 2) & 1, (n >> 1) & 1, n & 1
        lightness, a, b = (0, 0, 0) if k else INKS[c, m, y]
        corners += bytes([round(lightness * 2.55), a + 128, b + 128])
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + corners + ramp * 3
    return _profile(b"CMYK", {b"wtpt": _xyz(D50), b"A2B0": lut}, b"prtr", b"Lab ")


CMYK_PROFILE = _cmyk_profile()


def srgb_encoded(linear: np.ndarray) -> np.ndarray:
    """Linear light, clipped to 0..1, to sRGB levels 0..255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def _from_xyz(xyz: np.ndarray) -> np.ndarray:
    return srgb_encoded(xyz @ np.linalg.inv(SRGB).T)


def from_adobe(pixels: np.ndarray) -> np.ndarray:
    """Levels 0..255 (..., 3) of ADOBE_PROFILE in sRGB."""
    return _from_xyz((pixels / 255) ** ADOBE_GAMMA @ ADOBE.T)


def from_p3(pixels: np.ndarray) -> np.ndarray:
    """Levels 0..255 (..., 3) of P3_PROFILE in sRGB."""
    value = pixels / 255
    return _from_xyz(np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4) @ P3.T)


def from_linear_grey(levels: np.ndarray) -> np.ndarray:
    """Levels 0..255 (...) of GREY_PROFILE in sRGB, (..., 3)."""
    return np.repeat(srgb_encoded(levels / 255)[..., None], 3, -1)


def from_lab(lab: np.ndarray) -> np.ndarray:
    """L* 0..100, a*, b* (D50) in sRGB."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    return _from_xyz(np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * D50)
