"""Unpack a tar of anyone's into a folder, and write nowhere else.

The standard library's own guard (``filter="data"``) exists from Python 3.10.12 and 3.11.4 on only, and what it lets
through has changed since. This does the same on every Python: plain files, folders and links, without owners, special
mode bits or rights to write for others.
"""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import posixpath
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import IO

from ssm_forge.base.errors import IntegrityError

# What reading a damaged archive raises, by the standard library's word and otherwise.
DAMAGE = (tarfile.TarError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, ValueError, OverflowError)
# What the system says of names that can't be, or not beside those that are there; a full disk is another matter.
_NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_LONG_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
_MOST_HEADER_BYTES = 1 << 20


def is_damage(error: Exception) -> bool:
    """Whether what unpacking raised is the archive's fault, not the machine's."""
    return isinstance(error, DAMAGE) or (isinstance(error, OSError) and error.errno in _NAMES)


class Member(tarfile.TarInfo):
    """A member of an archive of anyone's: the standard library reads a long name, however long, into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in (*_LONG_HEADERS, tarfile.SOLARIS_XHDTYPE) and not 0 <= self.size <= _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        if self.size < 0:
            raise tarfile.ReadError(f"a member of {self.size} bytes")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member


def unpack_tar(source: Path | IO[bytes], folder: Path, *, named: object = "", absolute_links: bool = False) -> None:
    """Unpack an archive, compressed or not, below ``folder``, which is made when missing.

    Args:
        source: the archive; a stream must be able to seek.
        named: what to call the archive in an error, for a stream.
        absolute_links: take ``folder`` for the root that absolute symbolic links start from, instead of refusing them.

    Raises:
        IntegrityError: when the archive is damaged, or a member is a device or reaches outside ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(os.path.realpath(folder))
    folders = []
    try:
        with _opened(source) as tar:
            for member in tar:
                if member.isdir():
                    folders.append((_folder(member, root, _parts(member, member.name)), member.mtime))
                else:
                    _make(tar, member, root, absolute_links)
            # To the very end, where the compression keeps its checksum.
            while tar.fileobj and tar.fileobj.read(1 << 20):
                pass
        # At the end, because a file that is made in a folder changes the folder's time.
        for path, time in folders:
            os.utime(path, (time, time))
    except (*DAMAGE, OSError) as error:
        if not is_damage(error):
            raise
        # Of a text of several lines, the first says what and the others why each compression is not it.
        reason = str(error).partition("\n")[0].rstrip(":")
        raise IntegrityError(f"{named or source} can't be unpacked: {reason}.") from error


def _opened(source: Path | IO[bytes]) -> tarfile.TarFile:
    if isinstance(source, Path):
        return tarfile.open(source, tarinfo=Member)
    return tarfile.open(fileobj=source, tarinfo=Member)


def _make(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path, absolute_links: bool) -> None:
    """Make a file or a link."""
    parts = _parts(member, member.name)
    path = _folder(member, root, parts[:-1]).joinpath(*parts[-1:])
    if path.is_dir() and not path.is_symlink():
        raise _refused(member, "would replace a folder")
    if member.issym():
        link = _link(member, path.parent.relative_to(root), absolute_links)
        path.unlink(missing_ok=True)
        path.symlink_to(link)
        return
    if member.islnk():
        original = _original(member, root)
        if original == path:
            return
        path.unlink(missing_ok=True)
        os.link(original, path)
    elif member.isfile():
        # Never through what is there: it may be a link, or one of several names of a file.
        path.unlink(missing_ok=True)
        stream = tar.extractfile(member)
        assert stream is not None
        with path.open("xb") as out:
            shutil.copyfileobj(stream, out, 1 << 20)
    else:
        raise _refused(member, "is a device or another special file")
    path.chmod(0o600 | member.mode & (0o755 if member.mode & 0o100 else 0o644))
    os.utime(path, (member.mtime, member.mtime))


def _parts(member: tarfile.TarInfo, name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise _refused(member, f"would be outside the folder that it is unpacked to ('{name}')")
    return parts


def _folder(member: tarfile.TarInfo, root: Path, parts: list[str]) -> Path:
    """The real folder that a name leads to, through links that earlier members made; made where it is missing."""
    folder = root
    for part in parts:
        step = folder / part
        if not os.path.lexists(step):
            step.mkdir()
        try:
            folder = Path(os.path.realpath(step, strict=True))
        except OSError as error:
            raise _refused(member, f"leads through '{part}', a link to nowhere") from error
        if not folder.is_relative_to(root):
            raise _refused(member, f"would be outside the folder that it is unpacked to, through '{part}'")
        if not folder.is_dir():
            raise _refused(member, f"leads through '{part}', which is no folder")
    return folder


def _link(member: tarfile.TarInfo, parent: Path, absolute_links: bool) -> str:
    """What a symbolic link is to hold; ``parent`` is its real folder, seen from the root.

    A link may climb and then go down. Climbing from a real folder leads where the words say. After a name it does
    not: the name may be a link itself, or become one later.
    """
    link = member.linkname
    if absolute_links and link.startswith("/"):
        link = posixpath.relpath(link, f"/{parent.as_posix()}")
    climbs = [part == ".." for part in link.split("/") if part not in ("", ".")]
    if not link or link.startswith("/") or climbs != sorted(climbs, reverse=True) or sum(climbs) > len(parent.parts):
        raise _refused(member, f"is a link outside the folder that it is unpacked to ('{link}')")
    return link


def _original(member: tarfile.TarInfo, root: Path) -> Path:
    """The file that a hard link is another name of; an earlier member made it."""
    parts = _parts(member, member.linkname)
    path = _folder(member, root, parts[:-1]).joinpath(*parts[-1:])
    if path.is_symlink() or not path.is_file():
        raise _refused(member, f"is a hard link to '{member.linkname}', which no earlier member made")
    return path


def _refused(member: tarfile.TarInfo, why: str) -> tarfile.TarError:
    return tarfile.TarError(f"'{member.name}' {why}")
