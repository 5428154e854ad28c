"""Where a model runs: devices, dtypes, threads, signals, and the processes of torchrun."""

import contextlib
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from support.settings import UserError, one_line

DTYPES = ('auto', 'float32', 'bfloat16', 'float16')


def pick_device(name='auto'):
    """'auto' is cuda, then mps, then cpu. Raises UserError for a device that is not there."""
    if name == 'auto':
        if torch.cuda.is_available():
            return 'cuda'
        return 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name).item()
    except Exception as e:  # whatever torch makes of a name
        raise UserError(f'device {name!r} cannot be used here: {one_line(e, 150)}') from None
    return name


def pick_dtype(name, device):
    """'auto' is bfloat16 on a GPU that has it, float16 on an older GPU, and float32 elsewhere."""
    if name != 'auto':
        return name
    if 'cuda' not in device:
        return 'float32'
    return 'bfloat16' if torch.cuda.is_bf16_supported(False) else 'float16'


def autocast(device, dtype):
    """The context in which a model runs in dtype; float32 needs none."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device_type=torch.device(device).type, dtype=getattr(torch, dtype))


def threads_for_generation(model):
    """Let small models generate with one thread, as a token is too little work to share out.

    Threads then only wait for each other, for a long time where another process is busy.
    """
    if model.config.n_embd < 512:
        torch.set_num_threads(1)


def catch_signals(say):
    """Let Ctrl-C, SIGTERM and a closed terminal end a run after its step; a second one at once.

    Returns a list, which is empty until one of them comes.
    """
    caught = []

    def on_signal(number, _):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        say('\nfinishing the step ...')

    # a terminal sends SIGHUP as it closes, which nohup ignores
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    return caught


class Processes:
    """The processes that train together: those that torchrun started, or this one alone.

    rank is the number of this process, world how many there are; the master is process 0.
    """

    def __init__(self):
        self.rank = int(os.environ.get('RANK', 0))
        self.world = int(os.environ.get('WORLD_SIZE', 1))
        self.master = self.rank == 0

    def start(self, device):
        """Connect the processes; returns the device of this one."""
        if self.world == 1:
            return device
        if device == 'cuda':
            device = pick_device(f'cuda:{os.environ["LOCAL_RANK"]}')
            torch.cuda.set_device(device)
        backend = 'nccl' if 'cuda' in device else 'gloo'
        # the others wait while the master downloads what is missing
        dist.init_process_group(backend, timeout=timedelta(hours=2))
        return device

    def stop(self):
        """Disconnect; the others wait for the master, which may still be saving."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def say(self, text):
        """Print, in the master alone."""
        if self.master:
            try:
                print(text, flush=True)
            except RuntimeError:  # a signal came while it printed
                pass
            except OSError:  # a closed terminal, or a full disk: what is in the buffer goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def after_master(self, function, *args):
        """Call function(*args) in each process, first in the master, then in the others."""
        if not self.master:
            dist.barrier()
        result = function(*args)
        if self.master and self.world > 1:
            dist.barrier()
        return result

    def mean(self, *values):
        """The means of numbers over all processes, as a list. Waits for the device."""
        values = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            if dist.get_backend() == 'nccl':
                values = values.cuda()
            dist.all_reduce(values)
        return (values / self.world).tolist()
