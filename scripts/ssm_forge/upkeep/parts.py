"""Newer parts for the bridge: Debian packages and wheels; and torch's patches for newer CUDA releases."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from packaging.utils import parse_wheel_filename
from packaging.version import Version

from ssm_forge.base import foreign
from ssm_forge.base.errors import BuildError, MachineError, SolveError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import LINUX_64, Platform
from ssm_forge.base.ui import say
from ssm_forge.bridge import debian, pylock
from ssm_forge.bridge.torch_patch import MEMBER, Bounds, make_patch, read_bounds, read_host_config
from ssm_forge.manifest import variants
from ssm_forge.manifest.patching import reapply
from ssm_forge.upkeep.package_index import Release, index_url, releases
from ssm_forge.upkeep.projects import Update
from ssm_forge.upkeep.remote_zip import read_member

_BOUNDS_PATCH = "0001-cuda-compiler-bounds.patch"
# From CUDA 13 on host_config.h has a wheel of its own.
_CRT = "nvidia-cuda-crt"


def bump_bridge(workspace: Workspace) -> Update:
    """Newer Debian packages of the same releases, and newer wheels within the pins of the ``*.in`` files.

    Raises:
        NetworkError, IntegrityError: from Debian's index or the package index.
        SolveError: when the requirements have no solution any more.
    """
    summary: list[str] = []
    files: dict[Path, str | None] = {}
    for lock in sorted(workspace.bridge_locks.glob("debs.*.toml")):
        _refresh_debs(lock, workspace, summary, files)
    matrix = variants.load(workspace.variants)
    # Variant and part, which name a lock, the requirements that it is made from, Python, whether they are all there is.
    parts = [("tools", "old", "tools-old", "3.9", False), ("cu124", "ptxas", "cu124-ptxas", "3.10", True)]
    rows = [variant for variant in matrix.variants if variant.source == "bridge"]
    for variant in rows:
        name = variant.name
        parts += [(name, f"py{python.replace('.', '')}", name, python, False) for python in variant.pythons]
        parts.append((name, "toolkit", f"{name}-toolkit", variant.pythons[0], True))
    for name, part, requirements, python, alone in parts:
        pins = ""
        # The other platforms have the versions of the first.
        for platform in next((row.platforms for row in rows if row.name == name), (LINUX_64,)):
            lock = pylock.lock_path(workspace, name, part, platform)
            source = workspace.bridge_locks / f"{requirements}.in"
            text = _compiled(source, python, alone, platform, pins, workspace)
            pins = pins or "".join(f"{p['name']}=={p['version']}\n" for p in _packages(text))
            old = lock.read_text(encoding="utf-8") if lock.exists() else ""
            if text != old:
                files[lock] = text
                summary += [f"{lock.name}: {line}" for line in _differences(old, text)]
    return Update(tuple(summary) or ("every lock of the bridge is up to date.",), files)


def _refresh_debs(lock: Path, workspace: Workspace, summary: list[str], files: dict[Path, str | None]) -> None:
    debs = debian.read_lock(lock)
    now = debian.refreshed(debs, workspace)
    index = debian.index_of(debs[0], workspace)
    say(f"{lock.name}: Debian {index.suite} {index.release}, signature {index.signature}")
    if now == debs:
        return
    changed = [(old, new) for old, new in zip(debs, now, strict=True) if old != new]
    summary += [f"{lock.name}: {old.package} {old.version} -> {new.version}" for old, new in changed]
    text = lock.read_text(encoding="utf-8")
    notes = [line[2:] for line in text.splitlines() if line.startswith("# ") and "bump bridge" not in line]
    files[lock] = debian.lock_text(lock.name, now, note="\n".join(notes))


def _compiled(source: Path, python: str, alone: bool, platform: Platform, pins: str, workspace: Workspace) -> str:
    """The lock of the requirements in a file for a Python minor and a platform; ``pins`` say versions, one a line."""
    tool = shutil.which("uv")
    if tool is None:
        raise MachineError("uv is missing from the tools.", fix="Delete .pixi/tools and run again.")
    with tempfile.TemporaryDirectory() as scratch:
        target, constraints = Path(scratch) / "pylock.toml", Path(scratch) / "pins.txt"
        constraints.write_text(pins, encoding="utf-8")
        command = [tool, "pip", "compile", str(source), "-o", str(target), "--format", "pylock.toml", "--quiet"]
        command += ["--no-config", "--default-index", index_url(workspace), "--upgrade"]
        command += ["--python-version", python, "--python-platform", f"{platform.machine}-manylinux_2_28"]
        command += ["--constraint", str(constraints)]
        command += ["--only-binary", ":all:", "--no-header", "--no-annotate", *(["--no-deps"] if alone else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            what = f"Python {python} on {platform.subdir}"
            raise SolveError(f"{source.name} has no solution for {what}: {done.stderr.strip()}")
        return target.read_text(encoding="utf-8")


def _packages(lock: str) -> list[dict[str, Any]]:
    packages: list[dict[str, Any]] = foreign.toml_from(lock.encode()).get("packages", [])
    return packages


def _differences(old: str, new: str) -> list[str]:
    before, after = ({p["name"]: p.get("version", "?") for p in _packages(text)} for text in (old, new))
    lines = [f"{name} {before.get(name, 'new')} -> {after[name]}" for name in sorted(after)]
    lines = [line for line, name in zip(lines, sorted(after), strict=True) if before.get(name) != after[name]]
    return lines + [f"{name} {before[name]} is no longer needed" for name in sorted(set(before) - set(after))]


def bump_torch(workspace: Workspace) -> Update:
    """Bounds of new CUDA releases, patches for new patch releases of the matrix's torch, all hunks checked.

    Raises:
        BuildError: when torch's table or NVIDIA's header is written another way, or a patch does not fit.
    """
    folder = workspace.patches / "torch"
    summary: list[str] = []
    files: dict[Path, str | None] = {}
    bounds = list(read_bounds(folder / "bounds.toml"))
    for fresh in _new_bounds(bounds, workspace):
        bounds.append(fresh)
        summary.append(f"CUDA {fresh.cuda}: g++ up to {fresh.gcc}, clang up to {fresh.clang}")
    if summary:
        files[folder / "bounds.toml"] = bounds_text(bounds)
    wheels = [r for r in releases("torch", workspace) if not r.is_sdist and _fits_linux(r)]
    minors = sorted({v.torch for v in variants.load(workspace.variants).variants}, key=Version)
    for minor in minors:
        # Every patch release of a minor takes the patches of the one that has some.
        patched_releases = {path.name for path in folder.glob(f"{minor}.*") if path.is_dir()}
        of_minor = [r for r in wheels if str(r.version).startswith(f"{minor}.")]
        chosen = [r for r in of_minor if str(r.version) in patched_releases] or of_minor
        if not chosen:
            raise BuildError(f"the index has no torch {minor} for Linux.")
        _refresh_torch(chosen[-1], bounds, folder, summary, files)
    if wheels[-1].version > Version(f"{minors[-1]}.999"):
        summary.append(f"torch {wheels[-1].version} is out; the matrix has up to {minors[-1]}")
    return Update(tuple(summary) or ("torch's patches are up to date.",), files)


def _refresh_torch(
    wheel: Release, bounds: list[Bounds], folder: Path, summary: list[str], files: dict[Path, str | None]
) -> None:
    version = str(wheel.version)
    source = read_member(wheel.artifact.url, MEMBER).decode("utf-8")
    target = folder / version
    minor = version.rpartition(".")[0]
    others = sorted(path for path in folder.glob(f"{minor}.*") if path.is_dir())
    texts = {_BOUNDS_PATCH: make_patch(version, source, bounds)}
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        (tree / MEMBER).parent.mkdir(parents=True)
        (tree / MEMBER).write_text(source, encoding="utf-8")
        first = tree / _BOUNDS_PATCH
        first.write_text(texts[_BOUNDS_PATCH], encoding="utf-8")
        further = [p for p in sorted(others[-1].glob("*.patch")) if p.name != _BOUNDS_PATCH] if others else []
        applied, results = reapply([first, *further], tree)
    if misfits := [str(result) for result in results if result.found is None]:
        raise BuildError("patches do not fit torch " + f"{version}; nothing was written:\n  " + "\n  ".join(misfits))
    texts |= {patch.name: applied[patch.name] for patch in further}
    changed = {
        target / name: text
        for name, text in texts.items()
        if not (target / name).exists() or (target / name).read_text(encoding="utf-8") != text
    }
    if changed:
        summary.append(f"torch {version}: {', '.join(path.name for path in changed)}")
        files.update(changed)


def _fits_linux(release: Release) -> bool:
    tags = parse_wheel_filename(release.artifact.name)[3]
    return any("linux" in tag.platform and tag.platform.endswith(LINUX_64.machine) for tag in tags)


def _new_bounds(bounds: list[Bounds], workspace: Workspace) -> list[Bounds]:
    """Bounds of CUDA releases that are newer than the newest known."""
    newest = max(Version(bound.cuda) for bound in bounds)
    by_minor = {".".join(str(r.version).split(".")[:2]): r for r in releases(_CRT, workspace) if _fits_linux(r)}
    newer = []
    for cuda, release in by_minor.items():
        if Version(cuda) <= newest:
            continue
        data = read_member(release.artifact.url, "crt/host_config.h")
        read = read_host_config(data.decode("utf-8"), cuda)
        digest = hashlib.sha256(data).hexdigest()
        newer.append(Bounds(cuda, read.gcc, read.clang, source=release.artifact.name, sha256=digest))
    return newer


def bounds_text(bounds: list[Bounds]) -> str:
    """``bounds.toml`` for these bounds."""
    text = (
        "# Host compilers that each CUDA toolkit accepts: the newest g++ and clang majors its crt/host_config.h "
        "lets pass.\n# Refresh with: ./run bump torch\n"
    )
    for bound in sorted(bounds, key=lambda b: Version(b.cuda)):
        text += f'\n["{bound.cuda}"]\ngcc = {bound.gcc}\nclang = {bound.clang}\n'
        text += f'source = "{bound.source}"\nsha256 = "{bound.sha256}"\n'
    return text
