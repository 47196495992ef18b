"""DeepSeek-V4's table from token to experts (tid2eid), for the experts that are left."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reapc.errors import ReapcError


def remapped(table: NDArray[Any], kept: list[int], values: NDArray[Any], where: str) -> NDArray[Any]:
    """The (vocabulary, top-k) table in the numbers of the ``kept`` experts, in its own dtype.

    An entry that names a dropped expert gets the kept one with the highest of ``values`` (one per original expert; ties
    go to the lower number) that the token does not have yet, whether it had it before or was just given it.
    """
    count = len(values)
    wrong = table[(table < 0) | (table >= count)]
    if wrong.size:
        raise ReapcError(f"{where} names expert {int(wrong[0])}: 0 to {count - 1} expected")
    if table.shape[1] > len(kept):
        raise ReapcError(f"{where}: {table.shape[1]} experts a token, {len(kept)} are kept")
    new = np.full(count, -1, np.int64)
    new[kept] = np.arange(len(kept))
    result = new[table]
    best = np.argsort(-np.asarray(values, np.float64)[kept], kind="stable")  # numbers of the result, best first
    rows = np.flatnonzero((result < 0).any(1))
    found = result[rows]
    has = np.zeros((len(rows), len(kept)), bool)
    for column in found.T:
        there = column >= 0
        has[np.flatnonzero(there), column[there]] = True
    for index in range(table.shape[1]):
        lacking = np.flatnonzero(found[:, index] < 0)
        chosen = best[np.argmin(has[lacking][:, best], axis=1)]
        found[lacking, index] = chosen
        has[lacking, chosen] = True
    result[rows] = found
    numbers: NDArray[Any] = result.astype(table.dtype)
    return numbers
