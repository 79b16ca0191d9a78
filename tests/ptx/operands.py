"""What the operands of PTX mean in C++, and the table of instructions, which instructions.py fills.

An opcode must match one pattern whole, modifiers included: rounding, saturation or a cache hint that nobody has thought
about stops the translation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

#: How a register of each type is kept, and how memory of each type is read.
C_TYPES = {
    "pred": "bool",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
}
SPECIAL = {
    **{
        f"%{name}.{axis}": f"ptx::{name}({i})"
        for name in ("tid", "ntid", "ctaid", "nctaid")
        for i, axis in enumerate("xyz")
    },
    "%cluster_ctarank": "ptx::cluster_rank()",
    "%envreg1": "ptx::grid_workspace(32)",
    "%envreg2": "ptx::grid_workspace(0)",
}


class UnknownInstruction(Exception):
    """An instruction or operand that the translation does not know."""


@dataclass
class Operands:
    """What the operands of one kernel's instructions mean."""

    registers: dict[str, str]  # by name, with %: its type
    parameters: dict[str, int]
    shared: dict[str, int]
    number: int = 0  # of the next instruction that touches memory or waits
    numbered: bool = False  # whether the last one took it

    def take_number(self) -> int:
        self.numbered = True
        return self.number

    def label(self, name: str) -> str:
        return "label" + re.sub(r"\W", "_", name)

    def type_of(self, text: str) -> str:
        return self.registers.get(text, "")

    def name(self, text: str) -> str:
        """A destination."""
        if text not in self.registers:
            raise UnknownInstruction(f"destination {text}")
        return text.removeprefix("%")

    def value(self, text: str, kind: str = "") -> str:
        """A source; ``kind``: the type that the instruction reads it as."""
        text = text.strip()
        plain = self._plain(text)
        if not kind or text in self.parameters:
            return plain
        c_type, held = C_TYPES[kind], self.type_of(text)
        if held and (held[0] == "f") != (kind[0] == "f"):
            return f"__builtin_bit_cast({c_type}, {plain})"
        return plain if held and C_TYPES[held] == c_type else f"({c_type}){plain}" if kind[0] != "f" else plain

    def _plain(self, text: str) -> str:
        if text in self.registers:
            return text.removeprefix("%")
        if text in SPECIAL:
            return SPECIAL[text]
        if text in self.parameters:
            return f"(uint64_t)parameters[{self.parameters[text]}]"
        if text in self.shared:
            return f"{self.shared[text]}u"
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}", text):
            return f"__builtin_bit_cast(float, 0x{text[2:]}u)"
        if re.fullmatch(r"0d[0-9A-Fa-f]{16}", text):
            return f"__builtin_bit_cast(double, 0x{text[2:]}ull)"
        if re.fullmatch(r"-?\d+", text):
            return f"{text}ll"
        raise UnknownInstruction(f"operand {text}")

    def address(self, text: str) -> tuple[str, str]:
        """The base (a register or a symbol) and the whole address, of ``[base+offset]``."""
        match = re.fullmatch(r"\[([%\w$.]+)(?:\+(-?\d+))?\]", text.strip())
        if not match:
            raise UnknownInstruction(f"address {text}")
        base = self.value(match[1], "b64") if match[1] not in self.shared else self.value(match[1])
        return match[1], f"{base} + {match[2]}" if match[2] else base


def split(text: str) -> list[str]:
    """Operands, at the commas outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text)] if text.strip() else []


def members(text: str) -> list[str]:
    """Of ``{a, b}``, or the one operand."""
    return split(text[1:-1]) if text.startswith("{") else [text]


Handler = Callable[[re.Match[str], list[str], Operands], str]
TABLE: list[tuple[re.Pattern[str], Handler]] = []


def instruction(pattern: str) -> Callable[[Handler], Handler]:
    """The handler gives the whole statement."""

    def add(handler: Handler) -> Handler:
        TABLE.append((re.compile(pattern), handler))
        return handler

    return add


def assignment(pattern: str) -> Callable[[Handler], Handler]:
    """The handler gives what the first operand becomes."""

    def add(handler: Handler) -> Handler:
        return instruction(pattern)(lambda m, a, o: f"{o.name(a[0])} = {handler(m, a, o)};")

    return add


def statement(text: str, operands: Operands) -> str:
    """One instruction as C++.

    Raises:
        UnknownInstruction: it, or one of its operands, is not known.
    """
    opcode, _, rest = " ".join(text.split()).partition(" ")
    for pattern, handler in TABLE:
        if match := pattern.fullmatch(opcode):
            try:
                return handler(match, split(rest), operands)
            except (UnknownInstruction, IndexError, KeyError, ValueError) as fault:
                raise UnknownInstruction(f"{text}: {fault}") from fault
    raise UnknownInstruction(text)
