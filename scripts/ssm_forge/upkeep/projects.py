"""Newer releases of what is built: find, re-apply the patches, write recipe, patches and matrix; all or nothing."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from ssm_forge.base.errors import BuildError, UsageError
from ssm_forge.base.fetch import Artifact
from ssm_forge.base.files import write_whole
from ssm_forge.base.paths import Workspace
from ssm_forge.manifest import recipe as recipes
from ssm_forge.manifest import sdists
from ssm_forge.manifest.patching import HunkResult, reapply
from ssm_forge.manifest.recipe import EXTENSIONS
from ssm_forge.upkeep.package_index import Release, releases


@dataclass(frozen=True)
class Update:
    """What a refresh would change.

    Attributes:
        summary: one line a finding, for people.
        files: new contents by path; None removes the file.
    """

    summary: tuple[str, ...]
    files: Mapping[Path, str | None]

    def write(self) -> None:
        """Put every file in place."""
        for path, text in self.files.items():
            if text is None:
                path.unlink(missing_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text.encode())


def bump_project(project: str, workspace: Workspace) -> Update:
    """A newer release of a project, with the patches of the newest one that the recipe knows.

    Raises:
        BuildError: when a patch does not fit, naming each file and hunk, or the release has no kernels.
        NetworkError, IntegrityError: when the release can't be had.
    """
    recipe = workspace.recipes / project / "recipe.yaml"
    releases_of_recipe = sorted(recipes.releases(project, workspace), key=Version)
    if not releases_of_recipe:
        raise UsageError(f"{recipe} names no version in its source section.")
    newest = [r for r in releases(project, workspace) if r.is_sdist][-1]
    if newest.version <= Version(releases_of_recipe[-1]):
        return Update((f"{project} {releases_of_recipe[-1]} is the newest release.",), {})
    return update_project(project, releases_of_recipe[-1], newest, workspace)


def update_project(project: str, old: str, newest: Release, workspace: Workspace) -> Update:
    """The update from ``old`` to ``newest``.

    Raises:
        BuildError: when a patch does not fit, or the release has no kernels; nothing is written.
    """
    new = newest.artifact.name.removesuffix(".tar.gz").rpartition("-")[2]
    # Those that a person already wrote for the new release come first.
    written = workspace.patches / project / new
    folder = written if written.is_dir() else workspace.patches / project / old
    patches = sorted(folder.glob("*.patch"))
    with tempfile.TemporaryDirectory() as scratch:
        tree = sdists.unpack(newest.artifact, Path(scratch), workspace)
        _check_kernels(project, new, tree)
        texts, results = reapply(patches, tree)
    if misfits := [str(result) for result in results if result.found is None]:
        raise BuildError(
            f"{len(misfits)} of {len(results)} hunks of patches/{project}/{folder.name} do not fit {project} {new}; "
            "nothing was written:\n  " + "\n  ".join(misfits),
            fix=f"\nWrite patches that fit into patches/{project}/{new} by hand, then run the same command again.",
        )
    matrix, still_used = _matrix(project, old, new, workspace)
    files: dict[Path, str | None] = {workspace.patches / project / new / name: text for name, text in texts.items()}
    recipe = workspace.recipes / project / "recipe.yaml"
    text = _recipe(recipe.read_text(encoding="utf-8"), old, new, newest.artifact, keep=still_used)
    files[recipe] = text
    files[workspace.variants] = matrix
    # Older releases, which somebody may name, are built with those of its patches that fit them.
    unused = [
        p for p in (workspace.patches / project / old).glob("*.patch") if f"/{project}/{old}/{p.name}\n" not in text
    ]
    files |= dict.fromkeys(unused)
    return Update((f"{project} {old} -> {new}", *_moved(results)), files)


def _moved(results: list[HunkResult]) -> list[str]:
    moved = [str(result) for result in results if result.found != result.line]
    return [f"all {len(results)} hunks of the patches fit", *moved]


def _check_kernels(project: str, version: str, tree: Path) -> None:
    extension = EXTENSIONS[project]
    setup = tree / "setup.py"
    if not setup.is_file() or extension not in setup.read_text(encoding="utf-8"):
        raise BuildError(f"setup.py of {project} {version} does not build {extension} any more.")
    if not list(tree.glob("csrc/**/*.cu")):
        raise BuildError(f"the source archive of {project} {version} has no CUDA sources under csrc/.")


def _matrix(project: str, old: str, new: str, workspace: Workspace) -> tuple[str, bool]:
    """``variants.yaml`` with the rows at ``old`` moved to ``new``; no other row can be at ``old`` then.

    A row that was held back at an older release stays where it is: it needs more than a newer number.
    """
    text = workspace.variants.read_text(encoding="utf-8")
    key = project.replace("-", "_")
    line = re.search(rf"^{key}: .*$", text, re.MULTILINE)
    if line is None:
        raise UsageError(f"{workspace.variants} has no key {key}.")
    moved = line.group(0).replace(f'"{old}"', f'"{new}"')
    return text[: line.start()] + moved + text[line.end() :], f'"{old}"' in moved


def _recipe(text: str, old: str, new: str, artifact: Artifact, *, keep: bool) -> str:
    """The recipe with an entry for ``new``, made from that for ``old``, which is replaced unless kept."""
    entry = re.search(rf'^  - if: version == "{re.escape(old)}"\n(?:    .*\n)+', text, re.MULTILINE)
    if entry is None:
        raise BuildError(f"the recipe's source section has no entry '- if: version == \"{old}\"'.")
    fresh = entry.group(0).replace(f'"{old}"', f'"{new}"').replace(f"/{old}/", f"/{new}/")
    fresh = re.sub(r"(\n      url: ).*", rf"\g<1>{artifact.url}", fresh)
    fresh = re.sub(r"(\n      sha256: ).*", rf"\g<1>{artifact.sha256}", fresh)
    before = entry.group(0) if keep else ""
    return text[: entry.start()] + fresh + before + text[entry.end() :]
