"""Files that are written whole or not at all, whatever ends the process."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: no locks, and no open file can take another's place
    fcntl = None  # type: ignore[assignment]

__all__ = ["PathLike", "atomic_file", "named", "shown"]

PathLike = str | bytes | os.PathLike[str] | os.PathLike[bytes]

TEMPORARY = re.compile(r"\.qgnn-[0-9a-f]{32}\.tmp")
ATTEMPTS = 100


def named(path: PathLike) -> str:
    """``path`` as a text.

    Raises:
        TypeError: If it is none, such as an open file.
    """
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(
            f"Expected a path, of str, bytes or os.PathLike (got {type(path).__name__}): files are opened here, to be "
            f"written whole or not at all"
        )
    return os.fsdecode(path)


def shown(path: PathLike) -> str:
    """``path`` for a message: bytes that are no UTF-8 are escaped."""
    return named(path).encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[BinaryIO]:
    """A new file to write to; it takes the place of ``path`` when the block ends, and is gone if it raises.

    Readers see the old file or the new one, after a crash of the machine as well.  A symbolic link at ``path`` is
    replaced, what it points to is left alone.  The permissions are those that the umask leaves.  What earlier writers
    left behind in the folder when they were killed is removed.

    Raises:
        FileNotFoundError: If there is no folder to write to.
        OSError: If ``path`` is a folder or cannot be written.
    """
    target = os.path.abspath(named(path))
    folder = os.path.dirname(target)
    _check(target, folder)
    _sweep(folder)
    with _about(target):
        temporary, file = _create(folder)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while it is locked: no other writer takes it for one that was left behind
                with _about(target):
                    os.replace(temporary, target)
        if fcntl is None:
            with _about(target):
                os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync(folder)


@contextlib.contextmanager
def _about(target: str) -> Iterator[None]:
    """Errors name ``target``: nobody asked for the temporary file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(error.errno, error.strerror, shown(target)) from error


def _check(target: str, folder: str) -> None:
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise NotADirectoryError(errno.ENOTDIR, "Expected a folder to write to", shown(folder))
        raise FileNotFoundError(
            errno.ENOENT, "Expected a folder to write to (there is none); make it first", shown(folder)
        )
    with _about(target):
        try:
            is_folder = stat.S_ISDIR(os.lstat(target).st_mode)
        except FileNotFoundError:
            return
    if is_folder:
        raise IsADirectoryError(errno.EISDIR, "Expected the name of a file (got a folder)", shown(target))


def _create(folder: str) -> tuple[str, BinaryIO]:
    """A new file under a name that nobody can guess, locked for as long as it is open."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    for flag in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, flag, 0)
    for _ in range(ATTEMPTS):
        path = os.path.join(folder, f".qgnn-{secrets.token_hex(16)}.tmp")
        descriptor = os.open(path, flags, 0o666)
        _lock(descriptor, wait=True)
        # Not there: a sweep between the two calls has taken it for one that was left behind.
        if os.path.lexists(path):
            return path, os.fdopen(descriptor, "w+b")
        os.close(descriptor)
    raise OSError(errno.EEXIST, "Expected a place for a temporary file", folder)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock a file, where there are locks; whether that is done."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _sweep(folder: str) -> None:
    """Remove temporary files whose writers are dead: a lock ends with its process."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                _remove_if_left(entry.path)


def _remove_if_left(path: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            if _lock(descriptor, wait=False):
                os.unlink(path)
        finally:
            os.close(descriptor)


def _sync(folder: str) -> None:
    """Make the new name last; where folders cannot be synced they need not be."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
