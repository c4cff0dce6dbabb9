"""A kernel in PTX as blocks of instructions that all threads which enter go through."""

import re
from dataclasses import dataclass, field

ENDS = ("bra", "ret", "exit", "trap")


@dataclass(frozen=True)
class Instruction:
    """`name` in its parts (ld, global, f32), operands as text, and the predicate that lets a thread through."""

    name: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None = None
    unless: bool = False


@dataclass
class Block:
    """Instructions in a row; the last alone may send threads elsewhere or have them wait for others."""

    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Kernel:
    """`registers` and the kind of number that each holds, `labels` and the block that begins there."""

    name: str
    parameter: str = ""
    size: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=lambda: [Block()])
    labels: dict[str, int] = field(default_factory=dict)

    def add(self, instruction: Instruction) -> None:
        """One more; what may send threads elsewhere ends a block."""
        self.blocks[-1].instructions.append(instruction)
        if instruction.name[0] in ENDS or instruction.name[:2] in (("bar", "sync"), ("bar", "red")):
            self.blocks.append(Block())

    def label(self, name: str) -> None:
        """The next instruction is one that others go to."""
        if self.blocks[-1].instructions:
            self.blocks.append(Block())
        self.labels[name] = len(self.blocks) - 1


def kernels(text: str) -> dict[str, Kernel]:
    """All of a file, by name. Raises ValueError where a line is none that is known."""
    found: dict[str, Kernel] = {}
    now, inner, alone = None, 0, {}
    for line in _lines(text):
        if entry := re.match(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+(\w+)", line):
            now = found[entry[1]] = Kernel(entry[1])
        if now is None or line.startswith((".maxntid", ".minnctapersm", ".pragma", ".reqntid", "{", "}", ")")):
            inner, alone = inner + line.startswith("{"), {}  # registers in braces of their own
            continue
        if entry or line.startswith(".param"):
            if taken := re.search(r"\.param\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]", line):
                now.parameter, now.size = taken[1], int(taken[2])
        elif told := re.match(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>", line):
            now.registers |= {f"{told[2]}{n}": told[1] for n in range(int(told[3]))}
        elif told := re.match(r"\.reg\s+\.(\w+)\s+(%\w+)$", line):
            alone[told[2]] = f"{told[2]}_{inner}"
            now.registers[alone[told[2]]] = told[1]
        elif line.endswith(":"):
            now.label(line[:-1])
        else:
            for name, other in alone.items():
                line = re.sub(rf"{name}\b", other, line)
            now.add(_instruction(line))
    return found


def _lines(text: str) -> list[str]:
    """Statements, each in a line, without comments and what is for debuggers."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"(\$\w+:)", r"\1\n", text)
    lines = [" ".join(part.split()) for part in re.split(r";|\n(?=\s*[.$@{}\w])", text)]
    return [line for line in lines if line and not line.startswith((".loc", ".file"))]


def _instruction(line: str) -> Instruction:
    told = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", line)
    if told is None:
        raise ValueError(f"PTX that is not known: {line}")
    unless, guard, name, rest = told.groups()
    return Instruction(tuple(name.replace("::", ".").split(".")), _operands(rest), guard, bool(unless))


def _operands(text: str) -> tuple[str, ...]:
    """Split by commas that are in no braces."""
    parts = re.findall(r"(?:\{[^}]*\}|[^,{])+", text)
    return tuple(part.strip() for part in parts if part.strip())
