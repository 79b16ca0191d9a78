"""Reads nvcc's PTX and writes each kernel as a C++ function over instructions.h.

An instruction that is not in instructions.py stops the translation with its text and place: nothing is passed over.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import instructions  # noqa: F401  fills the table
from .operands import C_TYPES, Operands, UnknownInstruction, statement

SHARED = re.compile(r"\.shared \.align (?P<align>\d+) \.(?P<type>\w+) (?P<name>[\w$]+)(?P<count>\[\d*\])?;")
ENTRY = re.compile(r"\.entry (?P<name>[\w$]+)\((?P<parameters>.*?)\)(?P<limits>[^{]*)\{(?P<body>.*?)\n\}", re.DOTALL)
REGISTERS = re.compile(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;")
LOCAL = re.compile(r"\.reg \.(\w+) %?(\w+);")
MARK = re.compile(r"// mutant (begin|end)(.*)")
FILE = re.compile(r'^\s*\.file\s+(\d+) "([^"]+)"', re.MULTILINE)
LOCATION = re.compile(r"\.loc\s+(\d+) (\d+) (\d+)(?:, function_name [^,]+, inlined_at (\d+) (\d+) (\d+))?")


@dataclass
class Marks:
    """Statements that mutants.py has marked in the sources, as they are passed: which mutant is in force decides."""

    numbers: list[str] = field(default_factory=list)  # of the statement's mutants: without it, and with a weaker one
    weaker: str = ""
    count: int = 0

    def pass_by(self, side: str, words: list[str]) -> list[str]:
        """The lines at the beginning or the end of a marked statement."""
        if side == "end":
            self.numbers = []
            return [f" mutant{self.count}:;"]
        self.count += 1
        self.weaker, *self.numbers = words
        skip = f"goto mutant{self.count};"
        lines = [f"  if (ptx::mutant({self.numbers[0]})) {skip}"]
        if self.weaker in ("warp", "block"):
            instead = "ptx::warp_barrier(~0u, -1);" if self.weaker == "warp" else "ptx::barrier(-1);"
            lines.append(f"  if (ptx::mutant({self.numbers[1]})) {{ {instead} {skip} }}")
        return lines

    def apply(self, line: str) -> str:
        """A line of the statement; a weaker wait leaves one more group in flight."""
        if self.numbers and self.weaker == "wait":
            return line.replace("ptx::copy_wait(", f"ptx::copy_wait(ptx::mutant({self.numbers[1]}) + ")
        return line


@dataclass(frozen=True)
class Place:
    """Where in the sources an instruction comes from: the innermost line first."""

    lines: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return " < ".join(f"{file}:{line}" for file, line in self.lines[:3])


@dataclass
class Kernel:
    """One kernel instance: its name as nm and the PTX have it, and what was made of it."""

    mangled: str
    name: str  # demangled, with namespaces and template arguments, without parameters
    static_bytes: int
    body: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # of the instructions that touch memory or wait, by their number

    @property
    def function(self) -> str:
        """The C++ function's name: kernels that are the same instruction for instruction share it."""
        return "kernel_" + hashlib.sha256("\n".join([str(self.static_bytes), *self.body]).encode()).hexdigest()[:20]

    @property
    def short_name(self) -> str:
        """As in budgets.json: without namespaces."""
        return re.sub(r"\(anonymous namespace\)::|\bran::(\w+::)*", "", self.name)

    @property
    def cpp_name(self) -> str:
        """How C++ source in the same translation unit names the kernel."""
        return self.name.replace("(anonymous namespace)::", "")

    def source(self) -> str:
        """The function's definition."""
        lines = [f"void {self.function}(const unsigned char* const* parameters) {{", *self.body, "}"]
        return "\n".join(lines) + "\n"


def demangle(names: Sequence[str]) -> list[str]:
    """Names without return type and parameters."""
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [_without_parameters(line.removeprefix("void ")) for line in said.splitlines()]


def _without_parameters(signature: str) -> str:
    depth = 0
    text = signature.replace("(anonymous namespace)", "<anonymous namespace>")  # of the same length
    for position, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return signature[:position]
    return signature


def read(path: Path) -> list[Kernel]:
    """Every kernel of a PTX file.

    Raises:
        UnknownInstruction: with the file, the kernel and the instruction.
    """
    text = path.read_text()
    files = {number: Path(name).name for number, name in FILE.findall(text)}
    entries = list(ENTRY.finditer(text))
    names = demangle([entry["name"] for entry in entries])
    kernels = []
    for entry, name in zip(entries, names, strict=True):
        try:
            kernels.append(_kernel(text, entry, name, files))
        except UnknownInstruction as unknown:
            raise UnknownInstruction(f"{path.name}: {name}: {unknown}") from unknown
    return kernels


def _shared_layout(text: str, body: str) -> tuple[dict[str, int], int]:
    """Offsets of the kernel's shared arrays: static ones first, dynamic memory behind them; and the static bytes."""
    offsets: dict[str, int] = {}
    end, dynamic = 0, None
    for module in re.finditer(r"^\.extern " + SHARED.pattern, text, re.MULTILINE):
        dynamic = module["name"]
    outside = ENTRY.sub("", text)
    for found in [*SHARED.finditer(outside), *SHARED.finditer(body)]:
        if found["name"] == dynamic or not re.search(rf"(?<![\w$]){re.escape(found['name'])}(?![\w$])", body):
            continue
        end = -(-end // int(found["align"])) * int(found["align"])
        offsets[found["name"]] = end
        end += int((found["count"] or "[1]")[1:-1]) * int(re.sub(r"\D", "", found["type"])) // 8
    used = end
    if dynamic:
        offsets[dynamic] = -(-end // 16) * 16
        used = offsets[dynamic] if end else 0
    return offsets, used


def _kernel(text: str, entry: re.Match[str], name: str, files: dict[str, str]) -> Kernel:
    body = entry["body"]
    shared, static_bytes = _shared_layout(text, body)
    kernel = Kernel(entry["name"], name, static_bytes)
    parameters = [re.search(r"(\S+?)(\[\d+\])?\s*$", p)[1] for p in entry["parameters"].split(",") if p.strip()]  # type: ignore[index]
    registers: dict[str, str] = {}
    for kind, prefix, count in REGISTERS.findall(body):
        registers |= {f"%{prefix}{i}": kind for i in range(1, int(count))}
    for kind, name in LOCAL.findall(body):  # of a block of inline assembly, where several may have the same name
        registers[f"%{name}"] = registers[name] = kind
    for kind in sorted(set(registers.values())):
        names = sorted({register.removeprefix("%") for register in registers if registers[register] == kind})
        kernel.body.append(f"  {C_TYPES[kind]} {', '.join(f'{name} = {{}}' for name in names)};")
    operands = Operands(registers, {p: i for i, p in enumerate(parameters)}, shared)
    locations: dict[tuple[str, ...], tuple[str, ...]] = {}
    here: tuple[str, ...] = ()
    marks = Marks()
    for line in body.split("\n"):
        if location := LOCATION.search(line):
            here = location.groups()[:3]
            if location[4]:
                locations[here] = location.groups()[3:]
            continue
        if mark := MARK.search(line):
            kernel.body += marks.pass_by(mark[1], mark[2].split())
            continue
        for text_of_one in _statements(line):
            operands.number = len(kernel.places)
            kernel.body.append(marks.apply(_translate(text_of_one, operands)))
            if operands.numbered:
                kernel.places.append(str(_place(here, locations, files)))
    return kernel


def _statements(line: str) -> Iterator[str]:
    """The statements and labels of a line; comments, directives, and the braces around inline assembly left out."""
    line = re.sub(r"//.*", "", line).strip()
    if label := re.fullmatch(r"([\w$]+):", line):
        yield f"{label[1]}:"
        return
    line = re.sub(r";\s*\}$", ";", line.removeprefix("{"))
    for part in (part.strip() for part in line.split(";")):
        if part in ("", "}") or part.startswith((".pragma", ".shared", ".section", ".reg ")):
            continue
        yield part


def _translate(text: str, operands: Operands) -> str:
    operands.numbered = False
    if text.endswith(":"):
        return f" {operands.label(text[:-1])}:;"
    guard = re.fullmatch(r"@(!?)%(p\d+)\s+(.*)", text, re.DOTALL)
    done = statement(guard[3] if guard else text, operands)
    return f"  if ({guard[1]}{guard[2]}) {done}" if guard else f"  {done}"


def _place(here: tuple[str, ...], locations: dict[tuple[str, ...], tuple[str, ...]], files: dict[str, str]) -> Place:
    lines: list[tuple[str, int]] = []
    seen = set()
    while here and here not in seen:
        seen.add(here)
        lines.append((files.get(here[0], "?"), int(here[1])))
        here = locations.get(here, ())
    return Place(tuple(lines))
