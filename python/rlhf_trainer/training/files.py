"""Files and folders that are there whole or not at all, and the checksums of their contents."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes beside `path` and moves the file into place: a reader sees all of it or none, also of two writers."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path, *, flush: bool = False) -> Iterator[Path]:
    """A new folder to be filled, which is moved to `folder` when the block ends; an OSError if `folder` is not empty.

    `flush`: to the disk first, or a power cut can leave a folder in place whose files are empty.
    """
    new = beside(folder)
    shutil.rmtree(new, ignore_errors=True)  # of a run that died here
    new.mkdir(parents=True)
    yield new
    if flush:
        for path in (*new.iterdir(), new):
            flush_to_disk(path)
    new.rename(folder)
    if flush:
        flush_to_disk(folder.parent)


def beside(folder: Path) -> Path:
    """Where `folder` is filled."""
    return folder.with_name(f".{folder.name}")


def flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(content: bytes | Path) -> str:
    """The BLAKE2b checksum of bytes, or of a file's content, in hexadecimal."""
    if isinstance(content, bytes):
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
