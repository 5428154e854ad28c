"""What the Triton kernels of triton_kernels.py become on NVIDIA GPUs. No GPU is needed: Triton brings the assembler.

    python -m lab.compiled                                          bfloat16, heads of 64 channels, A100 and H100
    python -m lab.compiled --capabilities=80,90,120 --head_sizes=16,32,64,128 --dtype=float32

One line for each kernel: its tile, registers of a thread, bytes of shared memory, bytes of a thread's stack (what did
not fit into registers), and, for its inner loop (over the tiles off the diagonal, in `tile` over the heads), its
instructions in one warp, how many of them are tensor core products (on sm_80 all of 16 x 8 x 16; on sm_90 they are
larger), and how many go to the stack.
"""
import collections
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

import torch

from support import settings
from support.settings import UserError

TYPES = {'float32': 'fp32', 'bfloat16': 'bf16', 'float16': 'fp16'}
# what has the type of q, k and v; all other tensors are float32
LIKE_Q = ('q', 'k', 'v', 'y', 'dy', 'dk', 'dv')


@dataclass
class CompiledConfig:
    capabilities: str = '80,90'     # of GPUs: 80 is an A100, 90 an H100
    head_sizes: str = '64'          # among 16, 32, 64, 128
    dtype: str = 'bfloat16'         # 'bfloat16', 'float16', 'float32'
    kernels: str = 'votes,forward,columns,tile'
    memory: bool = False            # with the memory requirement


def compile_kernel(kernel, D, dtype, capability, memory):
    """A kernel as it is launched for a T and strides that are multiples of 16: Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    from kernels import gpu as triton_kernels
    run = dict(triton_kernels.tiles(D, getattr(torch, dtype))[kernel])
    options = {name: run.pop(name) for name in ('num_warps', 'num_stages')}
    constants = dict(run, D=D, G=triton_kernels.G, PRECISION='tf32', MEMORY=memory)
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
            signature[name], attributes[n,] = '*' + (TYPES[dtype] if name in LIKE_Q else 'fp32'), aligned
    source = triton.compiler.ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


def figures(compiled):
    """(registers, bytes of stack, Counter of the instructions of the loop, empty without one) from the machine code."""
    import triton
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


def main():
    cfg = settings.parse(CompiledConfig)
    try:
        from kernels import gpu as triton_kernels
    except ImportError:
        raise UserError('this needs triton: pip install -r requirements-dev.txt') from None
    if triton_kernels.INTERPRETED:
        raise UserError('with TRITON_INTERPRET set nothing is compiled: unset it')
    if cfg.dtype not in TYPES:
        raise UserError(f'dtype {cfg.dtype!r}: it is one of {", ".join(TYPES)}')
    for name, allowed in (('capabilities', None), ('head_sizes', triton_kernels.HEAD_SIZES),
                          ('kernels', ('votes', 'forward', 'columns', 'tile'))):
        for word in getattr(cfg, name).split(','):
            if not (word.isdigit() if allowed is None else word in map(str, allowed)):
                raise UserError(f"--{name}: {word!r} is not {'a number' if allowed is None else f'one of {allowed}'}")
    print(f"{'kernel':8} {'sm':>4} {'D':>4} {'R':>4} {'N':>4} {'registers':>10} {'shared':>8} {'stack':>6} "
          f"{'loop':>6} {'products':>9} {'stack use':>10}")
    for capability in cfg.capabilities.split(','):
        for D in cfg.head_sizes.split(','):
            for name in cfg.kernels.split(','):
                kernel = getattr(triton_kernels, name + '_kernel')
                tile = triton_kernels.tiles(int(D), getattr(torch, cfg.dtype))[kernel]
                compiled = compile_kernel(kernel, int(D), cfg.dtype, int(capability), cfg.memory)
                registers, stack, loop = figures(compiled)
                print(f"{name:8} {capability:>4} {D:>4} {tile['R']:>4} {tile['N']:>4} {registers:>10} "
                      f"{compiled.metadata.shared:>8} {stack:>6} {loop.total():>6} {products(loop):>9} "
                      f"{loop['LDL'] + loop['STL']:>10}", flush=True)


if __name__ == '__main__':
    settings.run(main)
