"""Several processes of a script, as torchrun starts them; an error that the user can fix comes as its one line.

    python -m support.launch --nproc_per_node=8 train.py config/selective_124m.py

Takes all options of torchrun, which adds 40 lines to each error.
"""
import logging
import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main():
    args = sys.argv[1:]
    if not any(arg.startswith(('--standalone', '--rdzv', '--master')) for arg in args):
        args = ['--standalone', *args]
    os.environ.setdefault('OMP_NUM_THREADS', '1')               # as torchrun sets it, with a warning of four lines
    logging.getLogger('torch.distributed').setLevel(logging.CRITICAL)       # the processes speak for themselves
    try:
        run.run(run.parse_args(args))
    except ChildFailedError as e:
        sys.exit(max(1, e.get_first_failure()[1].exitcode))     # below 0 for a process that was killed
    except (SignalException, KeyboardInterrupt):
        sys.exit(130)
    except (ValueError, AssertionError, RuntimeError) as e:         # of its own options
        sys.exit(f'launch.py: {e or "--nproc_per_node must be 1 or more"}; --help has the options')


if __name__ == '__main__':
    main()
