"""Where a model runs: devices, dtypes, threads, signals, and the processes of torchrun."""
import contextlib
import os
import re
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from support.settings import UserError


def pick_device(name='auto'):
    """'auto' is cuda, then mps, then cpu. Raises UserError for a device that is not there."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if not re.fullmatch('cpu|mps|cuda(:[0-9]{1,3})?', name):
        raise UserError(f"device {name!r}: it is 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'device {name!r} cannot be used here: {str(e).splitlines()[0]}') from None
    return name


def pick_dtype(name, device):
    """'auto' is bfloat16 on a GPU that has it, float16 on an older GPU, and float32 elsewhere."""
    if name == 'auto':
        name = 'float32' if 'cuda' not in device else 'bfloat16' if torch.cuda.is_bf16_supported(False) else 'float16'
    if name not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f"dtype {name!r}: it is 'auto', 'float32', 'bfloat16' or 'float16'")
    return name


def autocast(device, dtype):
    """The context in which a model runs in dtype; float32 needs none."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device_type=torch.device(device).type, dtype=getattr(torch, dtype))


def threads_for_generation(model):
    """Let small models generate with one thread: the work of a token is too small to share out.

    Threads then only wait for each other, for a long time where another process is busy.
    """
    if model.config.n_embd < 512:
        torch.set_num_threads(1)


def mfu(model, tokens_per_second):
    """Model FLOPs utilisation: operations of forward and backward, by the PaLM paper's appendix B, over the GPU's peak.

    The peak is that of dense bfloat16, by NVIDIA's datasheets; an A100's where the GPU is unknown.
    """
    c, name = model.config, torch.cuda.get_device_name()
    operations = 6 * model.num_params() + 12 * c.n_layer * c.n_embd * c.block_size
    peak = 989e12 if any(chip in name for chip in ('H100', 'H200', 'GH200')) else 312e12
    return tokens_per_second * operations / peak


def catch_signals(say):
    """Ctrl-C, SIGTERM and a closed terminal end a run after its step: returns a list, empty until one of them comes.
    A second one ends it at once."""
    caught = []

    def on_signal(number, _):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        say('\nfinishing the step …')
    for name in 'SIGINT', 'SIGTERM', 'SIGHUP':          # Windows has no SIGHUP, which a terminal sends as it closes
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:       # nohup ignores SIGHUP
            signal.signal(number, on_signal)
    return caught


def check_memory(config, tokens, device):
    """Raises UserError if training a GPTConfig with so many tokens at a time takes more memory than the machine has.

    Counts the least that it takes: weights, gradients, two moments, the input of each layer, and logits.
    """
    c = config
    parameters = 12 * c.n_layer * c.n_embd**2 + (c.vocab_size + c.block_size * (not c.rope)) * c.n_embd
    need = 16 * parameters + 4 * tokens * (c.n_layer * c.n_embd + c.vocab_size)
    have = torch.cuda.mem_get_info(device)[1] if 'cuda' in device else \
        os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') if hasattr(os, 'sysconf') else need
    if need > have:
        raise UserError(f'training takes at least {need / 1e9:,.0f} GB of memory, there are {have / 1e9:,.0f}: use a '
                        'smaller model, batch_size or block_size')


class Processes:
    """The processes that train together: those that torchrun started, or this one alone.

    rank is the number of this process, world how many there are; the master is process 0.
    """

    def __init__(self):
        try:
            self.rank, self.world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
            self.local_rank = int(os.environ.get('LOCAL_RANK', self.rank))
        except ValueError:
            raise UserError('RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers, as torchrun sets them') from None
        self.master = self.rank == 0
        if not 0 <= self.rank < self.world or self.world > 1 and 'MASTER_ADDR' not in os.environ:
            raise UserError(f'RANK={self.rank} and WORLD_SIZE={self.world} are set without the rest: start the '
                            'processes with torchrun, or unset the two')

    def start(self, device):
        """Connect the processes; returns the device of this one."""
        if self.world > 1:
            if device == 'cuda':
                if self.local_rank >= torch.cuda.device_count():
                    raise UserError(f'there are {torch.cuda.device_count()} GPUs: use fewer --nproc_per_node')
                device = f'cuda:{self.local_rank}'
                torch.cuda.set_device(device)
            dist.init_process_group('nccl' if 'cuda' in device else 'gloo',
                                    timeout=timedelta(hours=2))     # the master may have much to download
        self.device = device
        return device

    def stop(self):
        """Disconnect; the others wait for the master, which may still be saving."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def after_master(self, function, *args):
        """function(*args) in each process, in the others after the master has finished: what it downloads is there."""
        if not self.master:
            dist.barrier()
        result = function(*args)
        if self.master and self.world > 1:
            dist.barrier()
        return result

    def mean(self, *values):
        """The means of numbers over all processes, as a list."""
        dtype = torch.float32 if self.device == 'mps' else torch.float64
        values = torch.tensor(values, dtype=dtype, device=self.device)
        if self.world > 1:
            dist.all_reduce(values)
        return (values / self.world).tolist()
