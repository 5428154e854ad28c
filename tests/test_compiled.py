"""Triton and ptxas take the kernels of kernels/gpu.py for GPUs that are not here, and their loops stay in registers.

    python tests/test_compiled.py 80 64 votes,forward,columns,tile      sm_80 (an A100; 90 is an H100), heads of 64

prints a line for each kernel: its tile, registers of a thread, bytes of shared memory, bytes of a thread's stack (what did
not fit into registers), and, for its inner loop (over tiles, in `tile` over the heads), its
instructions in one warp, how many of them are tensor core products (on sm_80 all of 16 x 8 x 16; on sm_90 they are
larger), and how many go to the stack. No GPU is needed: Triton brings the assembler.
"""
import collections
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TYPES = {'float32': 'fp32', 'bfloat16': 'bf16', 'float16': 'fp16'}
# what has the type of q, k and v, and what is int32; all other tensors are float32
LIKE_Q = ('q', 'k', 'v', 'y', 'dy', 'dk', 'dv')
INTEGERS = ('lists', 'counts', 'order', 'ends')

try:
    import triton
    from triton.backends.compiler import GPUTarget
except ImportError:
    if os.environ.get('CI'):
        raise
    pytest.skip('triton is not installed', allow_module_level=True)


@pytest.mark.parametrize('capability, D, names', [
    (80, 64, 'forward,columns'), (80, 16, 'tile'), (90, 64, 'votes,forward')])
def test_compiles_for_gpus(capability, D, names):
    """In a process of its own, as these tests run Triton's interpreter; a part of the kernels, as each takes seconds."""
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    done = subprocess.run([sys.executable, __file__, str(capability), str(D), names], capture_output=True, text=True,
                          env={**environment, 'PYTHONPATH': ROOT})
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == names.split(',')
    for row in rows:
        registers, shared, _, _, _, stack_use = map(int, row[5:])
        assert 0 < registers <= 255 and shared <= 99 * 1024     # of all GPUs since sm_80, the least
        assert stack_use <= 2, f'the loop of {row[0]} does not stay in registers'


def compile_kernel(kernel, D, dtype, capability, memory):
    """A kernel as it is launched for a T and strides that are multiples of 16: Triton's compiled kernel."""
    run = dict(gpu.tiles(D, getattr(torch, dtype))[kernel])
    options = {name: run.pop(name) for name in ('num_warps', 'num_stages')}
    constants = dict(run, D=D, G=gpu.G, PRECISION='tf32', MEMORY=memory)
    signature, attributes, constexprs = {}, {}, {}
    for n, name in enumerate(kernel.arg_names):
        aligned = [['tt.divisibility', 16]]
        if name in constants:
            signature[name], constexprs[n,] = 'constexpr', constants[name]
        elif name.endswith('strides'):
            signature[name] = ('i32',) * 3
            attributes.update({(n, dim): aligned for dim in range(3)})
        elif name in ('H', 'T', 'tau'):
            signature[name] = 'fp32' if name == 'tau' else 'i32'
            attributes.update({(n,): aligned} if name == 'T' else {})
        else:
            signature[name], attributes[n,] = '*' + (
                TYPES[dtype] if name in LIKE_Q else 'i32' if name in INTEGERS else 'fp32'), aligned
    source = triton.compiler.ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


def figures(compiled):
    """(registers, bytes of stack, Counter of the instructions of the loop, empty without one) from the machine code."""
    programs = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin')
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(compiled.asm['cubin'])
        f.flush()
        usage, code = (subprocess.run([os.path.join(programs, program), option, f.name], check=True,
                                      capture_output=True, text=True).stdout
                       for program, option in (('cuobjdump', '-res-usage'), ('nvdisasm', '-c')))
    labels, instructions, loops = {}, [], []
    for line in code.splitlines():
        label = re.match(r'\s*(\.L_x_\d+):', line)
        instruction = re.search(r'\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)([^;]*);', line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])
            target = re.search(r'\.L_x_\d+', instruction[2]) if instruction[1] == 'BRA' else None
            if target and target[0] in labels:                  # backwards
                loops.append((labels[target[0]], len(instructions)))
    loops = [collections.Counter(instructions[a:b]) for a, b in loops]
    loops = [loop for loop in loops if products(loop)]          # the shortest has neither masks nor another loop in it
    return (*(int(re.search(rf'{name}:(\d+)', usage)[1]) for name in ('REG', 'STACK')),
            min(loops, key=lambda loop: loop.total(), default=collections.Counter()))


def products(loop):
    return loop['HMMA'] + loop['HGMMA']


def main(capability, D, names, dtype='bfloat16'):
    print(f"{'kernel':8} {'sm':>4} {'D':>4} {'R':>4} {'N':>4} {'registers':>10} {'shared':>8} {'stack':>6} "
          f"{'loop':>6} {'products':>9} {'stack use':>10}")
    for name in names.split(','):
        kernel = getattr(gpu, name + '_kernel')
        tile = gpu.tiles(int(D), getattr(torch, dtype))[kernel]
        compiled = compile_kernel(kernel, int(D), dtype, int(capability), memory=True)
        registers, stack, loop = figures(compiled)
        print(f"{name:8} {capability:>4} {D:>4} {tile['R']:>4} {tile['N']:>4} {registers:>10} "
              f"{compiled.metadata.shared:>8} {stack:>6} {loop.total():>6} {products(loop):>9} "
              f"{loop['LDL'] + loop['STL']:>10}", flush=True)


if __name__ == '__main__':
    sys.path.insert(0, ROOT)
    from kernels import gpu
    main(*sys.argv[1:])
