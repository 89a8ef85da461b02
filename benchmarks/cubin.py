"""Compiles a Triton kernel for any GPU, without one, and reads the machine code: instructions, loops, issue slots.

Triton carries ptxas and cuobjdump. What is read is the flow of control as ptxas left it: basic blocks, the loops they
form, and the longest way through them, so blocks that ptxas moves out of line and branches that skip something need no
guesses. Whatever cannot be followed (calls, computed jumps, loops with two entries) is an error, never a number.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Which pipe an instruction goes to, and for how many cycles a warp keeps its scheduler's share of that pipe busy. The
# first that matches counts. Products of matrices are counted, as their cycles depend on the shape. From the throughputs
# in NVIDIA's CUDA C++ Programming Guide; a load or store is one per cycle for four schedulers.
PIPES = (
    (r"[HIDBQO]MMA|[HIQB]GMMA|UTC\w*MMA", "tensor", 1),
    (r"MUFU|F2F\b|I2F\b|F2I\b|I2I\b|FRND|POPC|FLO|BREV|D[AFM]", "special", 8),
    (r"BRA|BRX|EXIT|NOP|BSSY|BSYNC|BAR|DEPBAR|WARPSYNC|WARPGROUP|BREAK|YIELD|RET|CALL|SYNCS|ERRBAR", "control", 1),
    (r"LD|ST|ATOM|RED\b|REDG|CCTL|MEMBAR|SHFL|UBLKCP|UTMA|UBLKRED", "memory", 4),
    (r"U[A-Z]|R2UR|S2UR|REDUX", "uniform", 1),
    (r"IMAD\.(WIDE|HI)|FFMA2|FADD2|FMUL2", "fma", 2),
    (r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2", "fma", 1),
    (r"", "integer", 2),
)
# Where sums and products run at another rate than in the table: sm_80 has 16 lanes for them per scheduler, not 32.
SLOWER = {(80, "fma"): 2}

# For sm_120, cuobjdump adds what an instruction waits for: "&req={3,0} ?trans6".
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*?)(?:\s+[&?][^;]*)?;", re.MULTILINE
)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# Atomics in PTX, where names of files and comments have been taken out.
_ATOMIC = re.compile(r"\b(?:atom|red|multimem\.red)\.[\w.:]+")


class Unreadable(Exception):
    """The machine code has something in it that this module does not follow."""


class Instruction(NamedTuple):
    """One instruction of the machine code."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def spills(self) -> bool:
        return self.opcode.startswith(("LDL", "STL"))

    @property
    def is_product(self) -> bool:
        """An FMA or a product of matrices: what a kernel of this package is for."""
        return self.opcode.startswith("FFMA") or _pipe(self.opcode)[0] == "tensor"


@dataclass(frozen=True)
class Loop:
    """A loop; ``blocks`` are those of the loops inside of it, too."""

    header: int
    latches: frozenset[int]
    blocks: frozenset[int]
    depth: int


@dataclass
class Program:
    """The machine code of one kernel."""

    instructions: list[Instruction]
    _order: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.blocks, self.successors = _blocks(self.instructions)
        self._order = _reverse_postorder(self.successors)
        if len(self.instructions) not in self._order:
            raise Unreadable("the program does not end")

    @cached_property
    def loops(self) -> list[Loop]:
        """All loops, those that hold others before these."""
        dominators = _dominators(self._order, self.successors)
        position = {block: at for at, block in enumerate(self._order)}
        latches: dict[int, set[int]] = {}
        for block in self._order:
            for after in self.successors[block]:
                if after in dominators[block]:
                    latches.setdefault(after, set()).add(block)
                elif position[after] <= position[block]:
                    raise Unreadable(f"a loop at {self.blocks[after][0].address:#x} has two entries")
        bodies = {header: self._body(header, ends) for header, ends in latches.items()}
        loops = [
            Loop(header, frozenset(latches[header]), body, sum(header in other for other in bodies.values()) - 1)
            for header, body in bodies.items()
        ]
        return sorted(loops, key=lambda loop: (loop.depth, position[loop.header]))

    def _body(self, header: int, latches: set[int]) -> frozenset[int]:
        before: dict[int, list[int]] = {block: [] for block in self._order}
        for block in self._order:
            for after in self.successors[block]:
                before[after].append(block)
        body, todo = {header}, list(latches)
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += before[block]
        return frozenset(body)

    def inside(self, loop: Loop) -> list[Loop]:
        """The loops directly inside of a loop."""
        return [other for other in self.loops if other.depth == loop.depth + 1 and other.header in loop.blocks]

    def body(self, loop: Loop) -> list[Instruction]:
        """The instructions of a loop, without those of the loops inside of it."""
        inner = frozenset().union(*(other.blocks for other in self.inside(loop)))
        return [i for block in sorted(loop.blocks - inner) for i in self.blocks[block]]

    def slots(self, trips: Callable[[Loop], float]) -> float:
        """Issue slots of a warp that takes the longest way, where a loop's body is run ``trips(loop)`` times.

        Instructions whose predicate is false take a slot like all others. Of several warps, trips and slots may be
        averages, also below 1 where some skip a loop.
        """
        outermost = [loop for loop in self.loops if loop.depth == 0]
        return self._leaving(frozenset(self._order), 0, outermost, trips)[len(self.instructions)]

    def _leaving(self, region: frozenset[int], entry: int, loops: list[Loop], trips) -> dict[int, int]:
        """Slots on the longest way from the entry of a region to the end of each of its blocks, in one pass."""
        arriving, leaving = {entry: 0}, {}
        of_header = {loop.header: loop for loop in loops}
        looped = frozenset().union(*(loop.blocks for loop in loops))
        for block in self._order:  # without the way back to the entry, each comes after all that lead to it
            if block not in region or (block in looped and block not in of_header):
                continue
            ends = {block: arriving[block] + len(self.blocks[block])}
            if block in of_header:
                loop = of_header[block]
                one_pass = self._leaving(loop.blocks, loop.header, self.inside(loop), trips)
                around = max(one_pass[latch] for latch in loop.latches)
                ends = {
                    b: arriving[block] + around * (trips(loop) - self._ends_pass(loop, b)) + slots
                    for b, slots in one_pass.items()
                    if not loop.blocks.issuperset(self.successors[b])
                }
            leaving |= ends
            for end, slots in ends.items():
                for after in self.successors[end]:
                    if after in region and after != entry:
                        arriving[after] = max(arriving.get(after, 0), slots)
        return leaving

    def _ends_pass(self, loop: Loop, block: int) -> bool:
        """Is a way out of a loop the end of a pass? Else one comes on top of the passes of the loop, to be safe."""
        inside = loop.blocks.intersection(self.successors[block])
        return block in loop.latches or all(b in loop.latches and len(self.blocks[b]) == 1 for b in inside)


def _blocks(instructions: list[Instruction]) -> tuple[dict[int, list[Instruction]], dict[int, list[int]]]:
    """Basic blocks by the number of their first instruction, and where each may go on; an empty one is the end."""
    instructions = _without_traps(instructions)
    # In loops, ptxas may jump with CALL.REL.NOINC; it is a call only where something returns.
    jumping = ("BRA",) if any(i.opcode.startswith("RET") for i in instructions) else ("BRA", "CALL.REL.NOINC")
    jumps = {at: _jump(i, len(instructions), jumping) for at, i in enumerate(instructions)}
    starts = {0} | {target for target, _ in jumps.values() if target is not None}
    starts |= {at + 1 for at, (target, falls) in jumps.items() if target is not None or not falls}
    starts = sorted(starts | {len(instructions)})
    blocks, successors = {starts[-1]: []}, {starts[-1]: []}
    for start, end in itertools.pairwise(starts):
        target, falls = jumps[end - 1]
        blocks[start] = instructions[start:end]
        successors[start] = [to for to in (target, end if falls else None) if to is not None]
    return blocks, successors


def _without_traps(instructions: list[Instruction]) -> list[Instruction]:
    """Calls of what only stops the program, which sm_100 has where tensor memory is taken, as instructions like others.

    What is called, from BPT.TRAP to the return, becomes an end that nothing leads to.
    """
    traps, at = set(), 0
    found = list(instructions)
    while at < len(found):
        if found[at].opcode.startswith("BPT.TRAP"):
            end = next((to for to in range(at, min(at + 4, len(found))) if found[to].opcode.startswith("RET")), None)
            if end is not None:
                traps.add(f"{found[at].address:#x}")
                found[end] = found[end]._replace(predicate="", opcode="EXIT", operands="")
        at += 1
    calls = re.compile(r"CALL\.REL\.NOINC$")
    return [i._replace(opcode="TRAP") if calls.match(i.opcode) and i.operands.strip() in traps else i for i in found]


def _jump(instruction: Instruction, count: int, jumping: tuple[str, ...]) -> tuple[int | None, bool]:
    """The number of the instruction that may come next instead of the one below, and whether that one may."""
    opcode, operands = instruction.opcode, instruction.operands
    certain = instruction.predicate in ("", "@PT", "@UPT")
    if opcode.startswith("EXIT"):
        return count, not certain
    if opcode.startswith(jumping):
        target = re.fullmatch(r"(.*?)\s*0x([0-9a-f]+)\s*", operands)
        if target is not None and int(target[2], 16) % 16 == 0 and int(target[2], 16) // 16 < count:
            return int(target[2], 16) // 16, not certain or target[1] != ""
    elif not opcode.startswith(("BRX", "JMP", "JMX", "CALL", "RET")):
        return None, True
    raise Unreadable(f"{opcode}{operands} at {instruction.address:#x} is not followed")


def _reverse_postorder(successors: Mapping[int, list[int]]) -> list[int]:
    """The blocks that can be reached, each before those it leads to, but for ways back."""
    order, seen, stack = [], {0}, [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        after = next((b for b in rest if b not in seen), None)
        if after is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(successors[after])))
    return order[::-1]


def _dominators(order: list[int], successors: Mapping[int, list[int]]) -> dict[int, set[int]]:
    """For each block, those that every way to it leads through."""
    dominators = {block: set(order) for block in order} | {order[0]: {order[0]}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            ways = [dominators[before] for before in order if block in successors[before]]
            found = set.intersection(*ways) | {block}
            changed |= found != dominators[block]
            dominators[block] = found
    return dominators


def _pipe(opcode: str) -> tuple[str, int]:
    return next((pipe, cycles) for pattern, pipe, cycles in PIPES if re.match(pattern, opcode))


def pipe_cycles(instructions: Iterable[Instruction], arch: int) -> dict[str, int]:
    """For how many cycles of a scheduler each pipe is busy."""
    cycles: Counter[str] = Counter()
    for instruction in instructions:
        pipe, busy = _pipe(instruction.opcode)
        cycles[pipe] += busy * SLOWER.get((arch, pipe), 1)
    return dict(cycles)


@dataclass
class Compiled:
    """What became of one kernel."""

    program: Program
    registers: int
    stack: int
    shared: int
    seconds: float
    atomics: list[str]


def read(cubin: bytes) -> tuple[dict[str, int], Program]:
    """Resources and machine code of the one kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    if code.count("Function :") != 1:
        raise Unreadable(f"{code.count('Function :')} functions in a cubin, not 1")
    return parse_resources(resources), Program(parse(code))


def parse_resources(text: str) -> dict[str, int]:
    """What ``cuobjdump --dump-resource-usage`` prints."""
    found = _RESOURCES.search(text)
    if found is None:
        raise Unreadable(f"no resources in {text!r}")
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))


def parse(code: str) -> list[Instruction]:
    """What ``cuobjdump --dump-sass`` prints for one function; an instruction that is not understood is missed."""
    found = [Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in _LINE.finditer(code)]
    if not found or [i.address for i in found] != [16 * at for at in range(len(found))]:
        raise Unreadable("instructions are missing from the machine code")
    return found


def atomics(ptx: str) -> list[str]:
    """Atomic operations and reductions to memory in PTX."""
    return _ATOMIC.findall(re.sub(r'"[^"\n]*"|//[^\n]*', "", ptx))


def source(
    kernel, types: Mapping[str, str], constants: Mapping[str, object], aligned: Collection[str] = ()
) -> ASTSource:
    """What a launch of a kernel makes Triton compile.

    Args:
        kernel: the ``@triton.jit`` or ``@gluon.jit`` function.
        types: Triton's type of each argument that is not a constexpr, as in ``{"x_ptr": "*bf16", "H": "i32"}``.
        constants: the constexpr arguments.
        aligned: arguments that Triton may take for multiples of 16 (pointers: of 16 bytes). It finds that out by itself
            when a kernel is launched, unless the kernel tells it not to.
    """
    signature = {p.name: "constexpr" if p.is_constexpr else types[p.name] for p in kernel.params}
    attributes = {(p.num,): [["tt.divisibility", 16]] for p in kernel.params if p.name in aligned}
    return of_language(kernel, signature, dict(constants), attributes)


def of_language(kernel, signature: dict, constants: dict, attributes: dict) -> ASTSource:
    """The source of a ``@triton.jit`` or ``@gluon.jit`` kernel: both have classes of their own."""
    kind = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as kind

    return kind(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(source: ASTSource, arch: int, options: Mapping[str, object]) -> Compiled:
    """Compiles from nothing for ``sm_<arch>``; ``options`` are those of a launch, as ``num_warps``."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        wall, cpu = time.perf_counter(), sum(os.times()[:4])
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
        # Of this process and ptxas. What takes longer by the clock waited for a processor, as all of it is computing.
        seconds = min(time.perf_counter() - wall, sum(os.times()[:4]) - cpu)
        cubin, ptx, shared = binary.asm["cubin"], binary.asm["ptx"], binary.metadata.shared
    resources, program = read(cubin)
    return Compiled(
        program, resources["registers"], resources["stack"], max(shared, resources["shared"]), seconds, atomics(ptx)
    )
