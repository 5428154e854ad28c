"""How lab/bench.py measures: medians of interleaved rounds, and the table that they are printed in."""
import math
import time

import numpy as np
import torch


def synchronize(device):
    if 'cuda' in device:
        torch.cuda.synchronize()


def times(cases, rounds, device, clock='wall'):
    """{name: seconds}, medians of rounds in which the cases take turns, after one to warm up.

    clock: 'wall', or 'cpu', the CPU time of this process, which other work on the machine disturbs less.
    """
    now = {'wall': time.perf_counter, 'cpu': time.process_time}[clock]
    seconds = {name: [] for name in cases}
    for r in range(rounds + 1):
        for name, once in cases.items():
            synchronize(device)
            started = now()
            once()
            synchronize(device)
            seconds[name].append(now() - started)
    return {name: float(np.median(s[1:])) for name, s in seconds.items()}


class Table:
    def __init__(self):
        self.rows = []

    def group(self, part, shape, T, values, unit, **more):
        """values: {case: figure}; the ratio of each is to the first one."""
        first = next(iter(values.values()))
        for name, value in values.items():
            self.add(part=part, shape=shape, T=T, case=name, value=value, unit=unit, ratio=value / first, **more)

    def add(self, **row):
        self.rows.append(row)
        print(f"{row['part']:10} {row['shape']:6} {row['T']:>6} {row['case']:34} {row['value']:12,.2f} {row['unit']:8} "
              f"{row['ratio']:8.2f}x", flush=True)

    def growth(self, part, shape):
        """Exponents of T, one for each case that was measured at two lengths and more."""
        rows = [r for r in self.rows if r['part'] == part and r['shape'] == shape]
        for name in dict.fromkeys(r['case'] for r in rows):
            points = [(math.log(r['T']), math.log(r['value'] / r.get('batch', 1))) for r in rows if r['case'] == name]
            if len({T for T, _ in points}) > 1:
                p = float(np.polyfit(*zip(*points), deg=1)[0])
                self.rows.append(dict(part=part, shape=shape, T='growth', case=name, value=p, unit='exponent'))
                print(f'{part:10} {shape:6} growth {name:34} T^{p:.2f} for each sequence', flush=True)
