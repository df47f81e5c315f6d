"""Memory that says what a kernel does wrong with it.

An access is a matrix of byte indices [lanes, bytes]; a lane is one thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["MANY", "Access", "GlobalMemory", "KernelError", "Races", "SharedMemory"]

_SPACING = 1 << 36
_ACTORS = 1 << 32
MANY = _ACTORS - 1


class KernelError(Exception):
    """What a kernel may not do, and where."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who touches memory: what happens in the same epoch happens in no order, unless one actor does it."""

    actor: np.ndarray
    """[lanes]."""
    epoch: np.ndarray
    """[lanes]; it only grows."""

    def stamp(self) -> np.ndarray:
        return (self.epoch.astype(np.int64) * _ACTORS + self.actor)[:, None]


class Races:
    """Who wrote and who read each byte last."""

    def __init__(self, num_bytes: int) -> None:
        self.written = np.full(num_bytes, -1, np.int64)
        self.read = np.full(num_bytes, -1, np.int64)

    def note_read(self, at: np.ndarray, access: Access, where: str) -> None:
        """Note a read.

        Raises:
            KernelError: another actor wrote in the same epoch.
        """
        stamp = access.stamp()
        now = stamp - stamp % _ACTORS
        written = self.written[at]
        if ((written >= now) & (written != stamp)).any():
            raise KernelError(f"race: {where} is read, and another thread writes it, with no barrier between")
        before = self.read[at]
        after = np.where((before < now) | (before == stamp), stamp, now + MANY)
        self.read[at] = after
        # Two lanes of this access may read the same byte.
        others = self.read[at] != after
        self.read[at[others]] = np.broadcast_to(now + MANY, at.shape)[others]

    def note_write(self, at: np.ndarray, access: Access, where: str, changed: np.ndarray) -> None:
        """Note a write.

        Args:
            at: the bytes.
            access: who writes.
            where: what they are called.
            changed: [lanes, bytes], whether they hold something else so far.

        Raises:
            KernelError: another actor read in the same epoch, or wrote something else.
        """
        stamp = access.stamp()
        now = stamp - stamp % _ACTORS
        read, written = self.read[at], self.written[at]
        if ((read >= now) & (read != stamp)).any():
            raise KernelError(f"race: {where} is written, and another thread reads it, with no barrier between")
        if ((written >= now) & (written != stamp) & changed).any():
            raise KernelError(f"race: {where} is written by two threads with no barrier between")
        self.written[at] = np.broadcast_to(stamp, at.shape)


def _store(data: np.ndarray, at: np.ndarray, values: np.ndarray, where: str) -> None:
    data[at] = values
    if (data[at] != values).any():
        raise KernelError(f"race: two threads write different values to {where} at once")


def check_alignment(addresses: np.ndarray, num_bytes: int, where: str) -> None:
    """That an access of so many bytes lies on a multiple of them.

    Raises:
        KernelError: it does not.
    """
    if (wrong := addresses[addresses % num_bytes != 0]).size:
        raise KernelError(f"misaligned: {num_bytes} bytes of {where} at {int(wrong[0]):#x}")


@dataclass(slots=True)
class Buffer:
    """An allocation; `written` says of each byte whether it holds anything."""

    name: str
    address: int
    data: np.ndarray
    written: np.ndarray
    races: Races


class GlobalMemory:
    """Buffers, far from each other unless they are given addresses.

    Blocks of one launch run in no order: what one writes, no other may touch.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.launches = 0

    def add(self, name: str, data: np.ndarray, *, written: bool = True, shift: int = 0, address: int = 0) -> int:
        """Make an array's bytes a buffer.

        Args:
            name: to call it by.
            data: any dtype; kernels write into it.
            written: whether it holds anything.
            shift: bytes by which it misses a multiple of 256.
            address: where it lies; 0 is far from all others.

        Returns:
            Its address.
        """
        raw = data.reshape(-1).view(np.uint8)
        address = address or (len(self.buffers) + 1) * _SPACING + shift
        self.buffers.append(Buffer(name, address, raw, np.full(raw.size, written), Races(raw.size)))
        self.buffers.sort(key=lambda one: one.address)
        return address

    def __getitem__(self, name: str) -> Buffer:
        return next(one for one in self.buffers if one.name == name)

    def load(self, addresses: np.ndarray, num_bytes: int, blocks: np.ndarray) -> np.ndarray:
        """Bytes [lanes, num_bytes]."""
        result = np.empty((addresses.size, num_bytes), np.uint8)
        for buffer, lanes, at in self._find(addresses, num_bytes):
            if not buffer.written[at].all():
                raise KernelError(f"{buffer.name}: byte {int(at[~buffer.written[at]][0])} is read before it is written")
            buffer.races.note_read(at, self._access(blocks[lanes]), buffer.name)
            result[lanes] = buffer.data[at]
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray, blocks: np.ndarray) -> None:
        """Write bytes [lanes, n]."""
        for buffer, lanes, at in self._find(addresses, values.shape[1]):
            changed = buffer.data[at] != values[lanes]
            buffer.races.note_write(at, self._access(blocks[lanes]), buffer.name, changed)
            _store(buffer.data, at, values[lanes], buffer.name)
            buffer.written[at] = True

    def _access(self, blocks: np.ndarray) -> Access:
        return Access(blocks, np.full(blocks.size, self.launches))

    def _find(self, addresses: np.ndarray, num_bytes: int) -> Sequence[tuple[Buffer, np.ndarray, np.ndarray]]:
        starts = np.array([one.address for one in self.buffers], np.uint64)
        owner = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
        found: list[tuple[Buffer, np.ndarray, np.ndarray]] = []
        for index in np.unique(owner):
            lanes = np.flatnonzero(owner == index)
            if index < 0:
                raise KernelError(f"out of bounds: {int(addresses[lanes[0]]):#x} is in no buffer")
            buffer = self.buffers[index]
            check_alignment(addresses[lanes], num_bytes, buffer.name)
            offset = (addresses[lanes] - starts[index]).astype(np.int64)
            if (last := int(offset.max()) + num_bytes) > buffer.data.size:
                raise KernelError(f"out of bounds: {buffer.name} has {buffer.data.size} bytes, not {last}")
            found.append((buffer, lanes, offset[:, None] + np.arange(num_bytes)))
        return found


class SharedMemory:
    """The shared memory of several blocks, one behind the other.

    Copies that run on their own (`cp.async`) are pending until their thread waits for them.
    """

    def __init__(self, num_blocks: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.epoch = np.zeros(num_blocks, np.int64)
        """Barriers that a block has passed."""
        self._data = np.zeros(num_blocks * num_bytes, np.uint8)
        self._pending = np.zeros(num_blocks * num_bytes, bool)
        self._races = Races(num_blocks * num_bytes)

    def load(self, addresses: np.ndarray, num_bytes: int, blocks: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Bytes [lanes, num_bytes]."""
        at = self._at(addresses, num_bytes, blocks)
        if (self._races.written[at] < 0).any():
            raise KernelError("shared memory is read before it is written")
        self._races.note_read(at, Access(threads, self.epoch[blocks]), "shared memory")
        return self._data[at]

    def store(self, addresses: np.ndarray, values: np.ndarray, blocks: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Write bytes [lanes, n]; the result says where, as `start_copy` and `finish_copy` take it."""
        at = self._at(addresses, values.shape[1], blocks)
        changed = self._data[at] != values
        self._races.note_write(at, Access(threads, self.epoch[blocks]), "shared memory", changed)
        _store(self._data, at, values, "shared memory")
        return at

    def start_copy(self, at: np.ndarray) -> None:
        """Make what was stored pending."""
        self._pending[at] = True

    def finish_copy(self, at: np.ndarray, blocks: np.ndarray, threads: np.ndarray) -> None:
        """What was pending is there: for its own thread, and after the next barrier for all."""
        self._pending[at] = False
        self._races.written[at] = np.broadcast_to(Access(threads, self.epoch[blocks]).stamp(), at.shape)

    def _at(self, addresses: np.ndarray, num_bytes: int, blocks: np.ndarray) -> np.ndarray:
        check_alignment(addresses, num_bytes, "shared memory")
        if addresses.size and (last := int(addresses.max()) + num_bytes) > self.num_bytes:
            raise KernelError(f"out of bounds: shared memory has {self.num_bytes} bytes, not {last}")
        at = (addresses.astype(np.int64) + blocks * self.num_bytes)[:, None] + np.arange(num_bytes)
        if self._pending[at].any():
            raise KernelError("shared memory is accessed while a copy into it that nobody waited for may still run")
        return at
