"""A JSON-lines file that grows by whole lines, whatever happens to the process that writes it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mcore_spec.errors import ConfigError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Line(NamedTuple):
    """One object of the file, and where it stands."""

    where: str
    value: dict[str, Any]


class GrowingFile:
    """Lines of JSON objects, appended by one process at a time.

    A line is written in one piece and ends with its line break, so that of a process that was killed at most the last
    line is incomplete; `read` takes it away.
    """

    def __init__(self, path: Path, *, field: str) -> None:
        """Open the file, or make it.

        Args:
            path: of the file; directories that it needs are made.
            field: what messages call it.

        Raises:
            ConfigError: it is a directory, or another process writes to it.
        """
        if path.is_dir():
            raise ConfigError(f"{field} = {path} is a directory; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise ConfigError(
                f"{field} = {path}: another process is writing to it; wait for it, or choose another file"
            ) from error
        except OSError as error:
            # Some cluster file systems have no locks; there the user has to see to it, as with any other file.
            if error.errno not in _NO_LOCKS:
                os.close(self._descriptor)
                raise

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._descriptor).st_size

    def read(self) -> Iterator[Line]:
        """Every line from the beginning; a last one that was cut off is removed.

        Raises:
            ConfigError: a line that is no JSON object.
        """
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{self.path}:{number}"
                try:
                    value = json.loads(line.decode()) if line.strip() else None
                except ValueError as error:  # no JSON, or no UTF-8
                    if not line.endswith(b"\n"):
                        os.ftruncate(self._descriptor, start)
                        return
                    raise ConfigError(f"{where}: not JSON ({error}); correct or delete the line") from error
                if value is not None and not isinstance(value, dict):
                    raise ConfigError(f"{where}: holds {value!r:.60}; correct or delete the line")
                start += len(line)
                if not line.endswith(b"\n"):
                    os.write(self._descriptor, b"\n")
                if value is not None:
                    yield Line(where, value)

    def append(self, value: Mapping[str, Any]) -> None:
        """Write one line, with the operating system when this returns.

        Raises:
            OSError: it cannot be written; the file is then as it was.
        """
        size = self.size
        rest = memoryview((json.dumps(value, ensure_ascii=False) + "\n").encode())
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def clear(self) -> None:
        """Remove every line."""
        os.ftruncate(self._descriptor, 0)

    def close(self, *, remove_if_empty: bool = False) -> None:
        """Bring the lines onto the disk and let go of the file.

        Args:
            remove_if_empty: leave no file behind in which nothing stands.
        """
        if remove_if_empty and self.size == 0:
            self.path.unlink(missing_ok=True)
        else:
            os.fsync(self._descriptor)
        os.close(self._descriptor)
