"""How long the allocator takes for GLM-5's 78 layers, as a ratio to its limit.

``python benchmarks/allocate.py [--limit 2.0]``: config.json of the catalogue, 8 groups of tensors a layer, 13 types,
every expert count down to half. Under the prior (layers of one kind are alike) and with damages that differ by layer as
measured ones do (the prior's times a log-normal factor for each group and type, from a fixed seed). Each row is the
median of 3 runs, everything from the spec to the choice counted. The ratio is of CPU seconds (one thread), which a busy
machine does not change much; exit 1 where one is above the limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np

from reapc.arch import known
from reapc.planner import prior
from reapc.planner.allocate import Allocation, allocate
from reapc.planner.damages import prior_damages, problem_of
from reapc.planner.tensor_groups import LADDER, file_parts

COUNTS = tuple(range(256, 127, -1))
BITS = (2.0, 2.5, 3.0, 3.5, 4.5)


def answer(bits: float, varied: bool) -> Allocation:
    """The allocation of GLM-5 at so many bits for each of its parameters."""
    spec = known.spec("zai-org/GLM-5")
    parts = file_parts(spec)
    damages = prior_damages(parts, spec, LADDER)
    if varied:
        random = np.random.default_rng(0)
        damages = damages * np.exp(random.normal(0, 0.5, (len(parts.groups), 1)))
        damages = damages * np.exp(random.normal(0, 0.05, damages.shape))
    fixed = [prior.pruning_loss(1 - count / spec.num_experts) for count in COUNTS]
    return allocate(problem_of(parts, LADDER, COUNTS, fixed, damages, int(bits / 8 * spec.parameters)))


def main() -> int:
    """Prints a row for each budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=2.0, help="seconds")
    limit = parser.parse_args().limit
    late = 0
    print("| damages | budget | experts | predicted KL | gap | seconds | CPU seconds | of the limit |")
    print("|---|---|---|---|---|---|---|---|")
    for varied in (False, True):
        for bits in BITS:
            walls, cpus = [], []
            for _ in range(3):
                wall, cpu = time.perf_counter(), time.process_time()
                found = answer(bits, varied)
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
            seconds, cpu = statistics.median(walls), statistics.median(cpus)
            late += cpu > limit
            print(
                f"| {'by layer' if varied else 'prior'} | {bits} bits | {found.best.experts} | {found.best.damage:.4f} "
                f"| {found.relative_gap:.1e} | {seconds:.2f} | {cpu:.2f} | {cpu / limit:.2f}x |",
                flush=True,
            )
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
