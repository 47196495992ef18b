"""Small images with a palette, as data URIs: a cell of a heat map is one pixel, the page enlarges it."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np


def encode(pixels: np.ndarray, palette: np.ndarray) -> bytes:
    """A PNG of (height, width) indices into ``palette`` (colours, 3), both uint8 (PNG, third edition, W3C 2025)."""
    height, width = pixels.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row after its filter's number, 0: none
    rows[:, 1:] = pixels

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", np.ascontiguousarray(palette, np.uint8).tobytes()),
            chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            chunk(b"IEND", b""),
        ]
    )


def data_uri(pixels: np.ndarray, palette: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(encode(pixels, palette)).decode()


def ramp(colours: list[tuple[int, int, int]], steps: int) -> np.ndarray:
    """(steps, 3) uint8 colours, linear between those given."""
    places = np.linspace(0, len(colours) - 1, steps)
    channels = [np.interp(places, np.arange(len(colours)), [c[i] for c in colours]) for i in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)
