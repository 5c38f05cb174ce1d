"""The machine instructions of a compiled kernel, as far as the tests ask for them.

An instruction is 16 bytes from compute capability 7.0 on. The nine lowest bits tell which it is;
the numbers below are those that NVIDIA's nvdisasm names so in cubins for 9.0.
"""

from __future__ import annotations

import struct
from collections import Counter

import numpy as np

_NAMES = {
    0x03C: "HMMA",
    0x183: "LDL",
    0x187: "STL",
    0x1AE: "LDGSTS",
    0x1B4: "UTMALDG",
    0x1C8: "USETMAXREG",
    0x1F0: "HGMMA",
}

# Of an ELF file's header: where the section headers begin, how many there are, and which one is of
# the section of their names; and of a section's: name, offset and size.
_FILE_HEADER = struct.Struct("<40xQ12xHH")
_SECTION_HEADER = struct.Struct("<I20xQQ24x")


def _code(cubin: bytes) -> bytes:
    """The section of the one kernel's instructions."""
    begin, count, of_names = _FILE_HEADER.unpack_from(cubin)
    sections = [
        _SECTION_HEADER.unpack_from(cubin, begin + i * _SECTION_HEADER.size) for i in range(count)
    ]
    names = sections[of_names][1]
    (found,) = (
        cubin[offset : offset + size]
        for name, offset, size in sections
        if cubin.startswith(b".text.", names + name)
    )
    return found


def _words(cubin: bytes) -> np.ndarray:
    """The lower half of every instruction: uint64."""
    return np.frombuffer(_code(cubin), "<u8")[::2]


def instructions(cubin: bytes) -> Counter[str]:
    """How many there are of each instruction that has a name here."""
    numbers = (_words(cubin) & 0x1FF).tolist()
    return Counter(_NAMES[number] for number in numbers if number in _NAMES)


def register_counts(cubin: bytes) -> list[int]:
    """What each `setmaxnreg` sets the registers of a thread to, ascending."""
    words = _words(cubin)
    (number,) = (number for number, name in _NAMES.items() if name == "USETMAXREG")
    return sorted((words[words & 0x1FF == number] >> 32 & 0x1FF).tolist())
