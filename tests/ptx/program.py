"""Reads the PTX of a kernel: instructions, in blocks that are entered at their first and left after their last one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Bytes of a register by the letters of its name, as LLVM gives them; predicates are bool.
WIDTHS = {"p": 1, "rs": 2, "h": 2, "r": 4, "f": 4, "rd": 8, "fd": 8}
_DECLARED = {"pred": 1, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8}
_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z_][\w.:]*)\s*(.*)", re.DOTALL)
_NAME = re.compile(r"%([a-z]+)\d+$")


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands``; operands are texts, or tuples of texts for ``{a, b}``, or ("[", address, offset)."""

    opcode: str
    operands: tuple
    guard: str | None = None
    negated: bool = False

    @property
    def parts(self) -> list[str]:
        return self.opcode.replace("::", ".").split(".")

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{'!' * self.negated}{self.guard} "
        return f"{guard}{self.opcode} {self.operands}"


def leaves(instruction: Instruction) -> bool:
    """Does a block of instructions end with this one: a branch, the end, a barrier of all threads?"""
    return instruction.parts[0] in ("bra", "ret", "exit", "bar", "barrier") and "warp" not in instruction.parts


@dataclass
class Program:
    """A kernel. ``widths``: of registers by name; ``params``: bytes of each parameter, in order."""

    name: str
    params: dict[str, int]
    threads: int
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # where named arrays begin; all of ours is one

    def width(self, name: str) -> int:
        if name not in self.widths:
            found = _NAME.match(name)
            if found is None or found[1] not in WIDTHS:
                raise NotImplementedError(f"register {name}")
            self.widths[name] = WIDTHS[found[1]]
        return self.widths[name]


def read(text: str) -> Program:
    """The one kernel in this text.

    Raises:
        NotImplementedError: it holds something that is not understood.
    """
    text = re.sub(r"//[^\n]*|^\s*\.loc\b[^\n]*", "", text, flags=re.MULTILINE)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\n\{", text, re.DOTALL)
    sizes = {"u64": 8, "b64": 8, "s64": 8, "u32": 4, "b32": 4, "s32": 4, "f32": 4, "u8": 1, "b8": 1, "u16": 2}
    params = {}
    for line in head[2].split(","):
        words = line.split()
        if words:
            params[words[-1]] = sizes[words[1].lstrip(".")]
    threads = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])[1])
    program = Program(head[1], params, threads)
    for name in re.findall(r"\.extern\s+\.shared[^;]*?\b(\w+)\[\]", text):
        program.shared[name] = 0
    _body(program, text[head.end() :])
    return program


def _body(program: Program, text: str) -> None:
    block: list[Instruction] = []
    program.blocks.append(block)
    depth = 1
    for statement in _statements(text):
        if statement in "{}":
            depth += 1 if statement == "{" else -1
            if depth == 0:
                return
            continue
        if statement.endswith(":"):
            if not statement.startswith("$L__BB"):
                continue  # for debuggers
            if block:
                block = []
                program.blocks.append(block)
            program.labels[statement[:-1]] = len(program.blocks) - 1
            continue
        if statement.startswith("."):
            _declared(program, statement)
            continue
        instruction = _instruction(statement)
        block.append(instruction)
        if leaves(instruction):
            block = []
            program.blocks.append(block)
    raise NotImplementedError("the body has no end")


def _statements(text: str):
    """Statements, labels and the braces of blocks; braces within a statement belong to it."""
    at = 0
    while True:
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            return
        label = re.compile(r"[$\w]+:(?!:)").match(text, at)
        if text[at] in "{}":
            yield text[at]
            at += 1
        elif label:
            yield label[0]
            at = label.end()
        else:
            end = text.index(";", at)
            yield " ".join(text[at:end].split())
            at = end + 1


def _declared(program: Program, statement: str) -> None:
    if not statement.startswith(".reg"):
        return  # .pragma
    _, kind, names = statement.split(None, 2)
    if "<" not in names:  # else a numbered family, of which the names tell
        for name in names.split(","):
            program.widths[name.strip()] = _DECLARED[kind.lstrip(".")]


def _instruction(statement: str) -> Instruction:
    found = _STATEMENT.fullmatch(statement)
    if found is None:
        raise NotImplementedError(statement)
    negated, guard, opcode, rest = found.groups()
    return Instruction(opcode, tuple(map(_operand, _split(rest))), guard, bool(negated))


def _split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    found, depth, begin = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(text[begin:at].strip())
            begin = at + 1
    found.append(text[begin:].strip())
    return [one for one in found if one]


def _operand(text: str):
    if text.startswith("{"):
        return tuple(part.strip() for part in text.strip("{} ").split(","))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        return ("[", base.strip(), int(offset.strip() or "0", 0))
    return text
