"""Places: local paths, pyarrow.fs URIs and files inside installed packages, all opened the same way."""

import hashlib
import importlib.resources
import uuid
from pathlib import Path, PurePosixPath

from pyarrow import fs

PACKAGE_SCHEME = "package:"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def resolve(location: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem and the path on it.

    `package:NAME/PATH` is a file inside an installed package, so that one configuration is right on every node.
    Relative and `~` paths are made absolute.

    Raises:
        ValueError: the URI's scheme is unknown or its filesystem cannot be reached.
    """
    if location.startswith(PACKAGE_SCHEME):
        package, _, inner = location.removeprefix(PACKAGE_SCHEME).partition("/")
        return fs.LocalFileSystem(), str(importlib.resources.files(package) / inner)
    if "://" not in location:
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    try:
        filesystem, path = fs.FileSystem.from_uri(location)
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot open {location!r}: {error}") from None
    return filesystem, path


def read_bytes(location: str) -> bytes:
    """Return a file's content.

    Raises:
        FileNotFoundError: there is no such file.
    """
    filesystem, path = resolve(location)
    with filesystem.open_input_file(path) as stream:
        return bytes(stream.readall())


def is_dir(location: str) -> bool:
    """Say whether a folder is there."""
    filesystem, path = resolve(location)
    return bool(filesystem.get_file_info(path).type == fs.FileType.Directory)


def exists(location: str) -> bool:
    """Say whether a file or folder is there."""
    filesystem, path = resolve(location)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def write_bytes(location: str, content: bytes) -> None:
    """Write a file whole, with its folders: a reader sees the old one or the new one, never a part.

    Raises:
        OSError: the place cannot be written to.
    """
    filesystem, path = resolve(location)
    filesystem.create_dir(str(PurePosixPath(path).parent), recursive=True)
    if not isinstance(filesystem, fs.LocalFileSystem):
        # An object store shows an object only once its upload is complete.
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        return
    unfinished = Path(f"{path}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


READ_AT_MOST = 64 * 2**20


def fingerprint(location: str) -> str:
    """Return text that changes when what lies at a location changes; empty when nothing does.

    A file of up to 64 MiB counts by its content, a larger one by size and date, a folder by the names and sizes of its
    images and tables.
    """
    try:
        filesystem, path = resolve(location)
        info = filesystem.get_file_info(path)
    except (ValueError, OSError):
        return ""
    if info.type == fs.FileType.Directory:
        files = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        kept = [f for f in files if f.path.lower().endswith((".parquet", *IMAGE_SUFFIXES))]
        text = "\n".join(sorted(f"{f.path[len(path) :]}:{f.size}" for f in kept))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    if info.type != fs.FileType.File:
        return ""
    if info.size > READ_AT_MOST:
        return f"{info.size}:{info.mtime_ns}"
    return hashlib.sha256(read_bytes(location)).hexdigest()[:16]
