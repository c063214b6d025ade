"""Machine code as text: instructions, stack frames and main loops, out of `nvdisasm`.

Knows no kernel. An instruction is counted once for its warp, however many lanes it serves.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?) ?;")
TARGET = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
GUARD = re.compile(r"@!?U?P\w+ ")
STORE_LOCAL = re.compile(r"\bSTL(\.\w+)* \[R\d+(?:\+(-?0x[0-9a-f]+))?\]")
BYTES = {".64": 8, ".128": 16}
WEIGHTS_OF_A_PRODUCT = 16 * 16  # the A fragment of one mma or of one warp's part of a wgmma


def disassembler() -> Path | None:
    """nvdisasm of the pip package, where it is installed."""
    found = find_spec("nvidia")
    roots = [] if found is None else list(found.submodule_search_locations or ())
    places = [Path(root) / "cu13" / "bin" / "nvdisasm" for root in roots]
    return next((place for place in places if place.exists()), None)


@dataclass(frozen=True, slots=True)
class Code:
    """The instructions of one function, and where its labels stand."""

    instructions: tuple[str, ...]
    labels: dict[str, int]

    @property
    def spilled(self) -> int:
        """Bytes of local memory that are written: the frame's end, 4 at least for any access."""
        end = 0
        for text in self.instructions:
            if store := STORE_LOCAL.search(text):
                end = max(end, int(store[2] or "0", 16) + BYTES.get(store[1], 4))
            elif opcode(text) in ("STL", "LDL"):
                end = max(end, 4)
        return end

    def main_loop(self) -> tuple[str, ...]:
        """The longest way once round the loop with most matrix products out of shared memory.

        Of an if and its else one side is on it, of what is skipped at the end of a row all.
        """
        first, last = self._bounds()
        best = {first: (1, -1)}
        for i in range(first, last):
            if i not in best:
                continue
            for after in self._after(i, last):
                way = (best[i][0] + 1, i)
                best[after] = max(best.get(after, way), way)
        way, at = [], last
        while at >= first:
            way.append(self.instructions[at])
            at = best[at][1]
        return tuple(reversed(way))

    def _bounds(self) -> tuple[int, int]:
        loops: dict[int, int] = {}
        for i, text in enumerate(self.instructions):
            target = self._target(text)
            if target is not None and target < i:
                loops[target] = i
        return max(loops.items(), key=lambda ends: (shared(self._between(*ends)), -ends[1]))

    def _between(self, first: int, last: int) -> tuple[str, ...]:
        return self.instructions[first : last + 1]

    def _after(self, i: int, last: int) -> list[int]:
        text = self.instructions[i]
        target = self._target(text)
        jumps = opcode(text) in ("BRA", "EXIT") and not GUARD.match(text)
        places = [] if jumps else [i + 1]
        return places + ([target] if target is not None and i < target <= last else [])

    def _target(self, text: str) -> int | None:
        label = TARGET.search(text)
        return None if label is None else self.labels.get(label[1])


def opcode(instruction: str) -> str:
    """Its name without guard and modifiers."""
    return GUARD.sub("", instruction).split()[0].split(".")[0]


def products(instructions: Sequence[str]) -> int:
    """How many are matrix products."""
    return sum(opcode(text) in ("HMMA", "HGMMA") for text in instructions)


def shared(instructions: Sequence[str]) -> int:
    """How many read matrices in shared memory."""
    return sum(opcode(text) in ("LDSM", "HGMMA") for text in instructions)


def disassemble(cubin: bytes) -> dict[str, Code]:
    """The functions of a cubin."""
    tool = disassembler()
    assert tool is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-c", "-ndf", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sections = re.split(r"^//-+ \.text\.(\w+) .*$", text, flags=re.MULTILINE)
    return {name: _code(body) for name, body in zip(sections[1::2], sections[2::2], strict=True)}


def _code(body: str) -> Code:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction[1])
    return Code(tuple(instructions), labels)
