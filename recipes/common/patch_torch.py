"""Patches the torch of a build's host environment: `python patch_torch.py PATCHES SITE_PACKAGES KEPT`.

Runs in the build with the build's own Python and nothing but its standard library. PATCHES has a folder per
torch version (``2.3.0/0001-*.patch``, unified diffs with paths as in site-packages); another patch release of
the same minor takes the folder of its minor's newest. Each file is replaced, never written in place: it is a
hard link to the package cache, which all later environments are made from. All patches fit, or none is applied;
what an earlier build in the same environment applied is left as it is. KEPT is a folder of the build for the files as
they were, so that the next build in these environments can apply other patches than the last.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@")


class MisfitError(Exception):
    """A patch that does not fit what is there."""


def torch_version(site_packages: Path) -> str:
    text = (site_packages / "torch/version.py").read_text(encoding="utf-8")
    found = re.search(r"""__version__\s*=\s*['"](\d+\.\d+\.\d+)""", text)
    if found is None:
        raise MisfitError(f"{site_packages}/torch/version.py does not tell torch's version")
    return found.group(1)


def patches_for(version: str, folder: Path) -> list[Path]:
    """The patches of a version, or of the newest patch release of its minor."""
    minor = version.rpartition(".")[0]
    same_minor = [path for path in folder.glob(f"{minor}.*") if path.is_dir()]
    same_minor.sort(key=lambda path: (path.name == version, int(path.name.rpartition(".")[2])))
    if not same_minor:
        raise MisfitError(f"{folder} has no patches for torch {version}; make them with the task 'bump torch'")
    return sorted(same_minor[-1].glob("*.patch"))


def parse(patch: Path) -> list[tuple[str, list[tuple[int, list[str], list[str]]]]]:
    """(file, [(first line, lines before, lines after)]) for each file of a unified diff."""
    files: list[tuple[str, list[tuple[int, list[str], list[str]]]]] = []
    for line in patch.read_text(encoding="utf-8").splitlines():
        hunk = _HUNK.match(line)
        if line.startswith("+++ "):
            files.append((line[4:].split("\t")[0].split("/", 1)[1], []))
        elif hunk and files:
            files[-1][1].append((int(hunk.group(1)), [], []))
        elif files and files[-1][1] and not line.startswith(("--- ", "\\")):
            _, before, after = files[-1][1][-1]
            if line[:1] in (" ", "-", ""):
                before.append(line[1:])
            if line[:1] in (" ", "+", ""):
                after.append(line[1:])
    if not files:
        raise MisfitError(f"{patch} is not a unified diff")
    return files


def patched(lines: list[str], hunks: list[tuple[int, list[str], list[str]]], where: str) -> list[str]:
    """``lines`` with every hunk applied that is not yet; context must match exactly, at one place only.

    Raises:
        MisfitError: naming the hunk.
    """
    for number, (first, before, after) in enumerate(hunks, 1):
        places = _places(before, lines)
        applied = _places(after, lines)
        # The longer of the two may hold the other: where it is, that is what is there.
        if len(applied) == 1 and (not places or len(after) > len(before)):
            continue
        if len(places) != 1:
            found = "nowhere" if not places else f"at {len(places)} places"
            raise MisfitError(f"{where}: hunk {number} (line {first}) fits {found}; its first line is '{before[0]}'")
        lines = [*lines[: places[0]], *after, *lines[places[0] + len(before) :]]
    return lines


def _places(block: list[str], lines: list[str]) -> list[int]:
    return [i for i in range(len(lines) - len(block) + 1) if lines[i : i + len(block)] == block]


def replace(path: Path, text: str) -> None:
    """Put ``text`` in place of a file that other environments share, and drop its compiled form."""
    fresh = path.with_name(f".{path.name}.patched")
    fresh.write_text(text, encoding="utf-8")
    shutil.copymode(path, fresh)
    os.replace(fresh, path)  # noqa: PTH105 - what it does is the point
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def unpatched(site_packages: Path, name: str, kept: Path) -> str:
    """A file as it was before the last build here patched it; what someone else has put there is taken as it is."""
    text = (site_packages / name).read_text(encoding="utf-8")
    before, after = _kept(name, kept)
    if after.is_file() and after.read_text(encoding="utf-8") == text:
        return before.read_text(encoding="utf-8")
    return text


def _kept(name: str, kept: Path) -> tuple[Path, Path]:
    """Where a file is kept as it was, and as it became."""
    return kept / "before" / name, kept / "after" / name


def apply(patches: Path, site_packages: Path, kept: Path) -> list[str]:
    """Patch torch; returns the names of the patches.

    Raises:
        MisfitError: when a patch does not fit; nothing was changed then.
    """
    version = torch_version(site_packages)
    originals: dict[str, str] = {}
    texts: dict[str, list[str]] = {}
    names = []
    for patch in patches_for(version, patches):
        for name, hunks in parse(patch):
            if name not in texts:
                if not (site_packages / name).is_file():
                    raise MisfitError(f"{patch.name} does not fit torch {version}: it has no file {name}")
                originals[name] = unpatched(site_packages, name, kept)
                texts[name] = originals[name].splitlines()
            where = f"{patch.parent.name}/{patch.name} does not fit {name} of torch {version}"
            texts[name] = patched(texts[name], hunks, where)
        names.append(f"{patch.parent.name}/{patch.name}")
    for name, lines in texts.items():
        path, text = site_packages / name, "\n".join(lines) + "\n"
        if text != path.read_text(encoding="utf-8"):
            replace(path, text)
            before, after = _kept(name, kept)
            for place, content in ((before, originals[name]), (after, text)):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(content, encoding="utf-8")
    return names


def main() -> int:
    if (Path(sys.argv[2]) / "torch").is_symlink():
        print("torch: that of an environment, left as it is; its own check only warns of CUDA releases it doesn't know")
        return 0
    try:
        for name in apply(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])):
            print(f"torch: applied {name}")
    except MisfitError as misfit:
        print(f"error: {misfit}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
