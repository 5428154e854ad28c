"""Everything but the method: settings, files, checkpoints, devices, downloads, pretrained weights.

Scripts import this package before torch, because OpenMP reads these variables only once. By default
its threads spin while they wait for each other, and beside another busy process training gets 30
times slower. Without any spinning, waking them took a quarter of the speed on a machine of two
cores. So they spin for some microseconds, then sleep.
"""

import os

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('GOMP_SPINCOUNT', '1000')
