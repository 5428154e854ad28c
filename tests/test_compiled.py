"""Triton compiles the kernels of kernels/gpu.py for GPUs that are not here.

    python tests/test_compiled.py 80 64 votes,forward,columns,tile

does it for sm_80 (an A100; 90 is an H100) and heads of 64, and prints a line for each kernel: its
tile, the registers of a thread, the bytes of shared memory, the bytes of a thread's stack (what did
not fit into registers), and how many instructions of its inner loop (over tiles; in `tile` over the
heads) use the stack. No GPU is needed: Triton brings the assembler.
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
    env = {**os.environ, 'PYTHONPATH': ROOT, 'TRITON_INTERPRET': '0'}
    command = [sys.executable, __file__, capability, D, names]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    _, *rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == names.split(',')
    for row in rows:
        registers, shared, _, stack_use = map(int, row[5:])
        assert 0 < registers <= 255
        assert shared <= 99 * 1024  # the least that GPUs since sm_80 have
        assert stack_use <= 2, f'the loop of {row[0]} does not stay in registers'


def compile_kernel(kernel, D, capability, tile):
    """A kernel as it is launched for a T that is a multiple of 16."""
    options = {name: tile[name] for name in ('num_warps', 'num_stages')}
    constants = {**tile, 'D': D, 'G': gpu.G, 'MEMORY': True}
    signature, constexprs, attributes = {}, {}, {}
    for n, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
            constexprs[n,] = constants[name]
            continue
        signature[name] = TYPES.get(name, '*fp32')
        if name not in ('H', 'tau'):
            attributes[n,] = [['tt.divisibility', 16]]
    source = triton.compiler.ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


def disassemble(compiled, program, option):
    """What one of Triton's programs says of the machine code."""
    folder = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin')
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(compiled.asm['cubin'])
        f.flush()
        command = [os.path.join(folder, program), option, f.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inner_loop(code):
    """The names of the instructions of the shortest loop with matrix products; [] without one.

    The shortest has neither masks nor another loop in it.
    """
    labels, instructions, found = {}, [], []
    for line in code.splitlines():
        if label := re.match(r'\s*(\.L_x_\d+):', line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r'\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)([^;]*);', line):
            instructions.append(instruction[1])
            target = re.search(r'\.L_x_\d+', instruction[2])
            if instruction[1] == 'BRA' and target and target[0] in labels:  # backwards
                loop = instructions[labels[target[0]] :]
                if 'HMMA' in loop or 'HGMMA' in loop:
                    found.append(loop)
    return min(found, key=len, default=[])


def main(capability, D, names):
    print('kernel     sm    D    R    N  registers   shared  stack  stack use')
    for name in names.split(','):
        kernel = getattr(gpu, name + '_kernel')
        tile = gpu.tiles(int(D), DTYPE)[kernel]
        compiled = compile_kernel(kernel, int(D), int(capability), tile)
        usage = disassemble(compiled, 'cuobjdump', '-res-usage')
        registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
        loop = inner_loop(disassemble(compiled, 'nvdisasm', '-c'))
        stack_use = loop.count('LDL') + loop.count('STL')
        print(
            f'{name:8} {capability:>4} {D:>4} {tile["R"]:>4} {tile["N"]:>4} {registers:>10} '
            f'{compiled.metadata.shared:>8} {stack:>6} {stack_use:>10}',
            flush=True,
        )


if __name__ == '__main__':
    sys.path.insert(0, ROOT)
    from kernels import gpu

    main(*sys.argv[1:])
