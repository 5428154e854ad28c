"""Triton compiles the kernels of kernels/gpu.py for GPUs that are not here.

    python tests/test_compiled.py 80 64 votes,forward,columns,tile

does it for sm_80 (an A100; 90 is an H100) and heads of 64, and prints a line for each kernel: its
tile, the registers of a thread, the bytes of its stack (what did not fit into registers), and the
bytes of shared memory. No GPU is needed: Triton brings the assembler.
"""

import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DTYPE = torch.bfloat16
LIKE_Q = ('q', 'k', 'v', 'y', 'dy', 'dk', 'dv')
TYPES = {'H': 'i32', 'T': 'i32', 'tau': 'fp32', **dict.fromkeys(LIKE_Q, '*bf16')}
TYPES |= dict.fromkeys(('lists', 'counts', 'order', 'ends'), '*i32')  # of all other tensors '*fp32'

try:
    import triton
    from triton.backends.compiler import GPUTarget
except ImportError:
    if os.environ.get('CI'):
        raise
    pytest.skip('triton is not installed', allow_module_level=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    'capability, D, names',
    [('80', '64', 'forward,columns'), ('80', '16', 'tile'), ('90', '64', 'votes,forward')],
)
def test_compiles_for_gpus(capability, D, names):
    """In a process of its own, as the other tests run Triton's interpreter."""
    env = {**os.environ, 'TRITON_INTERPRET': '0'}
    command = [sys.executable, __file__, capability, D, names]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    _, *rows = done.stdout.splitlines()
    for row in rows:
        *_, stack, shared = row.split()
        assert int(shared) <= 99 * 1024  # the least that GPUs since sm_80 have
        assert int(stack) <= 64, f'the loop does not stay in registers: {row}'


def compile_kernel(kernel, D, R, N, capability):
    """A kernel as it is launched for a T that is a multiple of 16."""
    *names, _, _, _ = kernel.arg_names
    constants = {'D': D, 'R': R, 'N': N}
    signature = dict.fromkeys(constants, 'constexpr')
    attributes = {}
    for n, name in enumerate(names):
        signature[name] = TYPES.get(name, '*fp32')
        if name not in ('H', 'tau'):
            attributes[n,] = [['tt.divisibility', 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget('cuda', capability, 32)
    return triton.compile(source, target=target, options={'num_stages': 2})


def main(capability, D, names):
    print('kernel R N registers stack shared')
    for name in names.split(','):
        kernel = getattr(gpu, name + '_kernel')
        R, N = gpu.tiles(int(D), DTYPE)[kernel]
        compiled = compile_kernel(kernel, int(D), R, N, int(capability))
        with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
            f.write(compiled.asm['cubin'])
            f.flush()
            program = f'{os.path.dirname(triton.__file__)}/backends/nvidia/bin/cuobjdump'
            usage = subprocess.check_output([program, '-res-usage', f.name], text=True)
        registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
        print(name, R, N, registers, stack, compiled.metadata.shared)


if __name__ == '__main__':
    sys.path.insert(0, ROOT)
    from kernels import gpu

    main(*sys.argv[1:])
