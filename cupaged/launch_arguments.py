"""What `cuLaunchKernel` reads a kernel's parameters from."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import TypeAlias

#: Host memory that begins with a pointer to each parameter, and its address.
Argument: TypeAlias = tuple[bytearray, int]


class ArgumentLayout:
    """Where the parameters of a kernel lie behind the pointers to them.

    Parameters
    ----------
    *sizes : int
        Bytes of each parameter.

    Attributes
    ----------
    begins : tuple of int
        Where each begins, in bytes.
    """

    def __init__(self, *sizes: int) -> None:
        self._pointers = struct.Struct(f"{len(sizes)}Q")
        end = -(-self._pointers.size // 16) * 16
        begins = []
        for size in sizes:
            begins.append(end)
            end += size
        self.begins = tuple(begins)
        self._size = end

    def new(self) -> Argument:
        """Another argument, empty but for the pointers."""
        memory = bytearray(self._size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._pointers.pack_into(memory, 0, *(address + begin for begin in self.begins))
        return memory, address


class Arguments:
    """Arguments of a kernel, each of which one call uses at a time.

    A call takes one and puts it back once it has launched, as the driver has copied it by then.
    Calls of other threads meanwhile have others.

    Parameters
    ----------
    layout : ArgumentLayout
    fill : callable, optional
        Writes what all calls have in common into a new argument's memory.
    """

    __slots__ = ("_fill", "_layout", "_spare")

    def __init__(
        self, layout: ArgumentLayout, fill: Callable[[bytearray], None] | None = None
    ) -> None:
        self._layout = layout
        self._fill = fill
        self._spare: list[Argument] = []

    def __len__(self) -> int:
        """How many no call is using."""
        return len(self._spare)

    def take(self) -> Argument:
        """An argument that no call is using."""
        try:
            return self._spare.pop()
        except IndexError:
            argument = self._layout.new()
            if self._fill is not None:
                self._fill(argument[0])
            return argument

    def put_back(self, argument: Argument) -> None:
        """Let others have an argument that was taken."""
        self._spare.append(argument)
