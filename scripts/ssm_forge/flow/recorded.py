"""What a package says that it was made from, and whether this checkout has it."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_forge.base.errors import ForgeError, IntegrityError, UsageError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.build import finalize
from ssm_forge.build import provenance as materials
from ssm_forge.manifest import recipe, variants
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.package.read import PROVENANCE, Material
from ssm_forge.package.write import read_json

# Commits looked at for one that has a package's inputs.
_HISTORY = 200


@dataclass(frozen=True)
class Recorded:
    """What a package says it was made from.

    Attributes:
        filename: the name that it was built under, whatever the file is called now.
        requires: names of the packages of ours that it depends on.
        key: what it was built for.
    """

    filename: str
    project: str
    requires: frozenset[str]
    format: int
    recipe_sha256: str
    key: BuildKey
    materials: tuple[Material, ...]


def read(package: Path) -> Recorded:
    """What a package says that it was made from.

    Raises:
        UsageError: when it was not made by ssm-forge.
        IntegrityError: when it is not a whole .conda package.
    """
    index = _json(package, "index.json")
    provenance = _json(package, PROVENANCE.removeprefix("info/"))
    tree = provenance.get("tree")
    if isinstance(tree, dict):
        raise UsageError(
            f"{package} was made from a source tree ({tree.get('origin')}), which is not kept here.",
            fix=f"Build that tree again with '{launcher()} build --source-tree', and compare the two with 'cmp'.",
        )
    key, listed = _key(provenance), provenance.get("materials")
    is_projects = provenance.get("name") in recipe.PROJECTS
    if not is_projects or key is None or not isinstance(listed, list) or not all(map(_is_material, listed)):
        reason = f"its {PROVENANCE} is for something else" if provenance else f"it has no {PROVENANCE}"
        raise UsageError(
            f"{package} is not a package that ssm-forge made: {reason}, and it is {_name(index) or 'nameless'}.",
            fix=f"Name one that '{launcher()} build' made, of {' or '.join(recipe.PROJECTS)}.",
        )
    depends = {str(spec).split()[0] for spec in index.get("depends", [])}
    return Recorded(
        filename=f"{_name(index)}.conda",
        project=provenance["name"],
        requires=frozenset(depends & set(recipe.PROJECTS)),
        format=provenance.get("format", 0),
        recipe_sha256=str(provenance.get("recipe_sha256", "")),
        key=key,
        materials=tuple(listed),
    )


def _key(provenance: Mapping[str, Any]) -> BuildKey | None:
    try:
        return BuildKey.from_provenance(provenance)
    except ValueError:
        return None


def _is_of_texts(value: object, keys: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and set(keys) <= set(value) and all(isinstance(v, str) for v in value.values())


def _json(package: Path, name: str) -> dict[str, Any]:
    """A JSON object of the package's info; empty where it has none."""
    try:
        content = read_json(package, name)
    except KeyError:
        return {}
    return content if isinstance(content, dict) else {}


def _name(index: dict[str, Any]) -> str:
    return "-".join(str(index[key]) for key in ("name", "version", "build") if key in index)


def check_inputs(recorded: Recorded, workspace: Workspace) -> None:
    """Refuse a package that this checkout can't build again.

    Raises:
        IntegrityError: when the package was made from other inputs than ``workspace`` has; names them.
    """
    if recorded.format != finalize.FORMAT:
        raise IntegrityError(
            f"{recorded.filename} is finished in format {recorded.format}, and this checkout writes format "
            f"{finalize.FORMAT}, so a rebuild here can't give the same bytes.",
            fix="Check out the version of ssm-forge that built it (git log -S 'FORMAT = "
            f"{recorded.format}' -- scripts/ssm_forge/build/finalize.py).",
        )
    differing = _other_inputs(recorded, workspace)
    if differing:
        raise IntegrityError(
            f"{recorded.filename} was not made from what this checkout has, so a rebuild would prove nothing: "
            f"{'; '.join(differing)}.",
            fix=_where_they_are(recorded, workspace),
        )


def _is_material(item: Any) -> bool:
    """A package that a channel gave may have nothing stronger than md5."""
    known_by_md5 = _is_of_texts(item, ("uri", "md5", "role")) and item["role"] == materials.SOLVED
    return known_by_md5 or _is_of_texts(item, ("uri", "sha256", "role"))


def _other_inputs(recorded: Recorded, workspace: Workspace) -> list[str]:
    """What of the package's inputs ``workspace`` lacks or has otherwise; empty when all are the same."""
    differing = [sentence for item in recorded.materials if (sentence := _other_file(item, workspace))]
    digest = recipe.digest(recorded.project, workspace)
    if digest != recorded.recipe_sha256 and not any(sentence.startswith("patches/") for sentence in differing):
        differing.append(
            f"recipes/{recorded.project}, recipes/common or patches differ (sha256 over them {digest[:12]} here, "
            f"{recorded.recipe_sha256[:12] or 'none'} in the package)"
        )
    differing += _other_values(recorded, workspace)
    if differing:
        return differing
    listed = materials.collect(
        recipe.render(recorded.project, recorded.key, workspace),
        recorded.key,
        workspace,
        compiler_lock=compiler_lock(recorded, workspace),
    )
    ours = {item["uri"]: item["sha256"] for item in listed}
    theirs = {item["uri"]: item["sha256"] for item in recorded.materials if item["role"] != materials.SOLVED}
    differing += [f"{uri} is an input here, and none of the package's" for uri in sorted(ours.keys() - theirs.keys())]
    differing += [f"{uri} is an input of the package, and none here" for uri in sorted(theirs.keys() - ours.keys())]
    differing += [
        f"{uri} has sha256 {ours[uri][:12]} here, {theirs[uri][:12]} in the package"
        for uri in sorted(ours.keys() & theirs.keys())
        if ours[uri] != theirs[uri]
    ]
    return differing


def compiler_lock(recorded: Recorded, workspace: Workspace) -> Path | None:
    """The lock of the compiler, where the bridge brought it."""
    names = (item["uri"] for item in recorded.materials if item["uri"].startswith("recipes/bridge/debs.gcc-"))
    return next((workspace.root / name for name in names), None)


def _other_file(item: Material, workspace: Workspace) -> str:
    """How a patch or lock differs here; empty when it is the same, or something to download."""
    if item["role"] in ("source", materials.SOLVED):
        return ""
    path = workspace.root / item["uri"]
    if not path.resolve().is_relative_to(workspace.root.resolve()) or not path.is_file():
        return f"{item['uri']} ({item['role']}) is not here"
    sha256 = sha256_of(path)
    if sha256 == item["sha256"]:
        return ""
    return f"{item['uri']} ({item['role']}) differs (sha256 {sha256[:12]} here, {item['sha256'][:12]} in the package)"


def _other_values(recorded: Recorded, workspace: Workspace) -> list[str]:
    """Values of the build matrix that are others here. The compiler is the machine's, not the matrix's."""
    key = recorded.key
    matrix = variants.load(workspace.variants)
    row = next((v for v in matrix.variants if (v.name, v.source) == (key.variant, key.source)), None)
    if row is None or key.python not in row.pythons:
        return [f"recipes/variants.yaml has no {key.variant} ({key.source}) for Python {key.python}"]
    compiler = key.compiler if key.source == "bridge" else None
    own_key = row.key(key.python, key.archs, compiler=compiler, kernels=key.kernels, platform=key.platform)
    if own_key == key:
        return []
    return [
        f"recipes/variants.yaml: {name} is {own_key.settings.get(name, 'nothing')} here, "
        f"{key.settings.get(name, 'nothing')} in the package"
        for name in sorted(own_key.settings.keys() | key.settings.keys())
        if own_key.settings.get(name) != key.settings.get(name)
    ]


def _where_they_are(recorded: Recorded, workspace: Workspace) -> str:
    """Which commit has the package's inputs, as something to do."""
    paths = ("recipes", "patches", "pixi.lock")
    for commit in _git(workspace.root, "log", f"-{_HISTORY}", "--format=%h", "--", *paths).decode().split():
        with tempfile.TemporaryDirectory(prefix="ssm-forge-history-") as folder:
            archive = _git(workspace.root, "archive", commit)
            subprocess.run(["tar", "-x", "-C", folder, *paths], input=archive, capture_output=True, check=False)
            try:
                same = not _other_inputs(recorded, Workspace(Path(folder), workspace.cache))
            except (ForgeError, OSError, ValueError, KeyError, TypeError, IndexError):
                # The files of then need not be readable by the code of now.
                continue
        if same:
            # Stashed first: restore drops what was changed and not committed.
            restore = f"git stash && git restore --source={commit} {' '.join(paths)}"
            return f"Commit {commit} has them: bring them here with '{restore}', and run it again."
    return "No commit of this checkout has them; check out the one that the package was built from."


def _git(root: Path, *arguments: str) -> bytes:
    """git's answer; empty without git or outside of a repository."""
    try:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, check=False).stdout
    except OSError:
        return b""
