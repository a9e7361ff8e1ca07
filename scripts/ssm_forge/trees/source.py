"""Gets a source tree, reads what it says of itself without running it, and refuses what can't be built."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from ssm_forge.base import foreign, web
from ssm_forge.base.credentials import redact, require_clean
from ssm_forge.base.errors import IntegrityError, NetworkError, UsageError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.unpacking import unpack_tar

_MOST_BYTES = 2_000_000_000
# What earlier builds and Python leave: stale objects would be linked, and none of it is source.
_LEFT_OUT = shutil.ignore_patterns(
    ".git", "__pycache__", "*.pyc", "*.so", "*.o", "*.egg-info", "temp.*", "lib.linux-*", "bdist.*", ".pixi", ".tools"
)
_CUDA = (".cu", ".cuh")


@dataclass(frozen=True)
class Tree:
    """A source tree, copied to where it is built.

    Attributes:
        folder: the copy.
        name: of the project, normalized: ``mamba-ssm``.
        version: as its files say, without a local part.
        sha256: of the names, modes and bytes of all its files.
        origin: where it was taken from, fit to be shown; a folder of this machine by its name only.
        commit: of git, empty where it is not known; ends with ``-dirty`` where files differ from it.
        requires: upstream's requirements without a condition.
        sources: its CUDA files.
    """

    folder: Path
    name: str
    version: str
    sha256: str
    origin: str
    commit: str
    requires: tuple[Requirement, ...]
    sources: tuple[str, ...]


class _Origin(NamedTuple):
    """Where a tree was taken from, fit to be shown, and the commit of git, empty where it is not known."""

    shown: str
    commit: str = ""


class _Metadata(NamedTuple):
    """What one file of a tree says of the project; empty what it does not say."""

    name: str = ""
    version: str = ""
    requires: Sequence[str] = ()


def get(address: str, target: Path) -> Tree:
    """Copy, download or clone the source tree at an address to ``target``, and read what it says of itself.

    Args:
        address: a folder, an archive (.tar.gz, .zip), the URL of one, or ``git+URL@REVISION``; ``#subdirectory=a/b``
            and ``#sha256=...`` may follow an URL or a file.
        target: a folder that is not there yet.

    Raises:
        UsageError: when it is not there, or is none that can be built: no setup.py, no CUDA sources, a missing
            submodule, a link that leads out of it.
        IntegrityError: for another sha256 than the one named, or a damaged archive.
        NetworkError: when it can't be downloaded.
    """
    require_clean(address)
    shown = redact(address)
    path, _, fragment = address.partition("#")
    settings = dict(part.partition("=")[::2] for part in fragment.split("&") if part)
    if unknown := set(settings) - {"subdirectory", "sha256", "egg"}:
        raise UsageError(f"'#{sorted(unknown)[0]}=' after {redact(path)} means nothing here.")
    subdirectory = settings.get("subdirectory", "")
    scratch = target.with_name(f"{target.name}.got")
    origin, commit = _fetch(path, settings.get("sha256", ""), scratch)
    root = _root(scratch / subdirectory) if not commit else scratch / subdirectory
    if not foreign.is_inside(subdirectory or ".") or not root.is_dir():
        raise UsageError(f"{shown} has no folder '{subdirectory}'.")
    _check(root, shown)
    shutil.copytree(root, target, symlinks=True, ignore=_LEFT_OUT)
    shutil.rmtree(scratch)
    name, version, requires = _describe(target, shown)
    sources = tuple(p.relative_to(target).as_posix() for p in files(target) if p.suffix == ".cu")
    return Tree(target, name, version, digest(target), origin, commit, requires, sources)


def digest(folder: Path) -> str:
    """sha256 over all files of a tree: names, whether they can be executed, bytes."""
    total = hashlib.sha256()
    for path in files(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            total.update(f"link\0{name}\0{os.readlink(path)}\0".encode())  # noqa: PTH115
        else:
            total.update(f"{'exec' if path.stat().st_mode & 0o100 else 'file'}\0{name}\0{sha256_of(path)}\0".encode())
    return total.hexdigest()


def files(folder: Path) -> Iterator[Path]:
    """All files and links below a folder, in the order of their names."""
    return (path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())


def _fetch(path: str, sha256: str, scratch: Path) -> _Origin:
    """Bring the tree at ``path`` to ``scratch``."""
    if path.startswith("git+"):
        return _clone(path.removeprefix("git+"), scratch)
    if urlsplit(path).scheme in ("http", "https"):
        archive = _download(path, scratch.with_name(f"{scratch.name}-{Path(urlsplit(path).path).name}"))
    else:
        archive = Path(path.removeprefix("file://")).expanduser().absolute()
        if archive.is_dir():
            commit = _commit(archive)
            # Their symbolic links are looked at before anything is followed.
            shutil.copytree(archive, scratch, symlinks=True, ignore=_LEFT_OUT)
            return _Origin(archive.name, commit)
        if not archive.is_file():
            raise UsageError(f"{archive} is neither a folder nor an archive.", fix="Name the folder with setup.py.")
    archive_sha256 = sha256_of(archive)
    if sha256 and sha256 != archive_sha256:
        raise IntegrityError(f"{redact(path)} has sha256 {archive_sha256}, not {sha256}.")
    _unpack(archive, scratch)
    is_web = urlsplit(path).scheme in ("http", "https")
    if is_web:
        archive.unlink()
    return _Origin(f"{redact(path) if is_web else archive.name}#sha256={archive_sha256}")


def _unpack(archive: Path, scratch: Path) -> None:
    if not zipfile.is_zipfile(archive):
        unpack_tar(archive, scratch)
        return
    with zipfile.ZipFile(archive) as source:
        for name in source.namelist():
            if not foreign.is_inside(name.rstrip("/") or "."):
                raise IntegrityError(f"{archive} has an entry '{name}' that leads out of its folder.")
        source.extractall(scratch)


def _root(folder: Path) -> Path:
    """The folder itself, or the one folder that an archive has everything in."""
    inside = [path for path in folder.iterdir() if path.name != "pax_global_header"] if folder.is_dir() else []
    return inside[0] if len(inside) == 1 and inside[0].is_dir() and not (folder / "setup.py").exists() else folder


def _download(url: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with web.session() as client, client.stream("GET", url) as answer, target.open("wb") as stream:
            answer.raise_for_status()
            for chunk in answer.iter_bytes(1 << 20):
                stream.write(chunk)
                if stream.tell() > _MOST_BYTES:
                    raise NetworkError(f"{redact(url)} is larger than {_MOST_BYTES} bytes.")
    except httpx.HTTPError as error:
        raise NetworkError(redact(f"{url} can't be downloaded ({error or type(error).__name__}).")) from error
    return target


def _clone(url: str, scratch: Path) -> _Origin:
    address, revision = _revision(url)
    if revision.startswith("-"):
        raise UsageError(f"'{revision}' is no revision of a git repository.")
    commands = [
        ["git", "clone", "--quiet", "--no-checkout", "--", address, str(scratch)],
        ["git", "-C", str(scratch), "checkout", "--quiet", revision, "--"],
    ]
    for command in commands:
        done = _git(command)
        if done.returncode:
            reason = redact(" ".join(done.stderr.split())[-300:])
            raise NetworkError(f"{redact(url)} can't be cloned: {reason}.")
    # One that can't be had may be for benchmarks alone; a build that needs it says so.
    _git(["git", "-C", str(scratch), "submodule", "--quiet", "update", "--init", "--recursive"])
    return _Origin(f"git+{redact(address)}", _commit(scratch))


def _revision(url: str) -> tuple[str, str]:
    """Address of a repository, and the branch, tag or commit after an at sign; HEAD where none is named.

    An at sign before the path belongs to the host.
    """
    path = url.find("/", url.index("://") + 3) if "://" in url else url.find(":")
    at = url.rfind("@")
    return (url[:at], url[at + 1 :]) if at > path else (url, "HEAD")


def _git(command: list[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which("git") is None:
        raise UsageError("there is no git on this machine.", fix="Install it, or name a folder or an archive.")
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)


def _commit(folder: Path) -> str:
    if shutil.which("git") is None:
        return ""
    head = _git(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if head.returncode:
        return ""
    changed = _git(["git", "-C", str(folder), "status", "--porcelain", "--", "."]).stdout.strip()
    return head.stdout.strip() + ("-dirty" if changed else "")


def _check(root: Path, shown: str) -> None:
    setup = root / "setup.py"
    if not setup.is_file():
        below = sorted(path.parent.relative_to(root).as_posix() for path in root.glob("*/**/setup.py"))
        hint = f"It has one in {', '.join(below[:3])}: name that folder." if below else ""
        raise UsageError(f"{shown} has no setup.py, so nothing says how it is compiled.", fix=hint)
    for path in files(root):
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            raise UsageError(f"{shown} has a link {path.relative_to(root)} that leads out of it.")
    for submodule in missing_submodules(root):
        # Many are for benchmarks alone, and the kernels compile without them.
        if submodule in setup.read_text(encoding="utf-8", errors="replace"):
            raise UsageError(
                f"{shown} needs the git submodule {submodule}, which is not there.",
                fix="Get it with 'git submodule update --init --recursive' in a clone, and name that folder; archives "
                "of a repository leave submodules out.",
            )
    if not any(path.suffix in _CUDA for path in files(root)):
        raise UsageError(
            f"{shown} has no CUDA sources (.cu), so there are no kernels to compile.",
            fix="Source archives on PyPI may leave them out, as those of causal-conv1d 1.0 and 1.1 do: name the "
            "repository, git+URL@TAG.",
        )
    if "CUDAExtension" not in setup.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(
            f"the setup.py of {shown} builds no CUDAExtension, the only kind of extension that is built here."
        )


def missing_submodules(root: Path) -> list[str]:
    """Paths of git submodules that are not there."""
    return [path for path in _submodules(root) if not (root / path).is_dir() or not any((root / path).iterdir())]


def _submodules(root: Path) -> list[str]:
    listed = root / ".gitmodules"
    text = listed.read_text(encoding="utf-8", errors="replace") if listed.is_file() else ""
    return [path for path in re.findall(r"^\s*path\s*=\s*(.+?)\s*$", text, re.MULTILINE) if foreign.is_inside(path)]


def _describe(root: Path, shown: str) -> tuple[str, str, tuple[Requirement, ...]]:
    """Name, version and requirements, by the first of its files that says them."""
    files_metadata = [_of_pkg_info(root), _of_pyproject(root), _of_setup(root)]
    stated_name = next((m.name for m in files_metadata if m.name), "")
    stated_version = next((m.version for m in files_metadata if m.version), "") or _of_init(root, stated_name) or "0"
    requires = next((m.requires for m in files_metadata if m.requires), ())
    if not stated_name:
        raise UsageError(f"{shown} does not say its name where that can be read without running it (setup(name=...)).")
    try:
        version = Version(stated_version).public
    except InvalidVersion:
        raise UsageError(f"{shown} says that its version is '{stated_version}', which is none.") from None
    name = canonicalize_name(stated_name)
    if not re.fullmatch(r"[a-z0-9-]+", name):
        raise UsageError(f"{shown} says that its name is '{stated_name}', which is none.")
    return name, version, tuple(_requirements(requires))


def _requirements(texts: Sequence[str]) -> Iterator[Requirement]:
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None:
            yield requirement


def _of_pkg_info(root: Path) -> _Metadata:
    file = root / "PKG-INFO"
    headers = HeaderParser().parsestr(file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "")
    return _Metadata(headers.get("Name", ""), headers.get("Version", ""), headers.get_all("Requires-Dist", []))


def _of_pyproject(root: Path) -> _Metadata:
    file = root / "pyproject.toml"
    try:
        project = foreign.toml_from(foreign.read_bytes(file)).get("project", {}) if file.is_file() else {}
    except ValueError:
        project = {}
    return _Metadata(project.get("name", ""), project.get("version", ""), project.get("dependencies", []))


def _of_setup(root: Path) -> _Metadata:
    try:
        module = ast.parse((root / "setup.py").read_text(encoding="utf-8", errors="replace"))
    except SyntaxError:
        return _Metadata()
    constants = {
        target.id: node.value.value
        for node in ast.walk(module)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def text(node: ast.expr | None) -> str:
        value = constants.get(node.id) if isinstance(node, ast.Name) else getattr(node, "value", None)
        return value if isinstance(value, str) else ""

    for node in ast.walk(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "setup":
            given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            needs = given.get("install_requires")
            listed = [text(item) for item in needs.elts] if isinstance(needs, (ast.List, ast.Tuple)) else []
            return _Metadata(text(given.get("name")), text(given.get("version")), [item for item in listed if item])
    return _Metadata()


def _of_init(root: Path, name: str) -> str:
    for file in (root / name.replace("-", "_") / "__init__.py", *sorted(root.glob("*/__init__.py"))):
        if file.is_file():
            match = re.search(r"^__version__\s*=\s*[\"']([^\"']+)", file.read_text("utf-8", "replace"), re.MULTILINE)
            if match:
                return match.group(1)
    return ""
