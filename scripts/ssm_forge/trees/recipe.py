"""The recipe of a source tree: that of mamba-ssm, with the tree for its source and a script that needs no patches."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from packaging.version import Version

from ssm_forge.base.errors import BuildError
from ssm_forge.base.paths import Workspace
from ssm_forge.manifest.patching import patched
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.trees.source import Tree

# PyPI's names of what a tree may require and the bridge has; the rest is named to the user.
CARRIED = ("einops", "packaging", "transformers", "triton", "numpy")

# CUDA's libraries that ATen/cuda/CUDAContext.h includes the headers of, which many extensions include. Our two projects
# do not. The torch of an environment has them beside it (see recipes/source-tree/build.sh).
_TORCHS_HEADERS_INCLUDE = ("libcublas-dev", "libcusolver-dev", "libcusparse-dev")
_NOT_AN_ENVIRONMENTS = 'forge_variant[:4] != "env-"'

# Loads every library of the package as Python would, without the modules around them and what those import.
_LOADS = """\
import importlib.machinery as machinery, importlib.metadata as metadata, importlib.util as util, torch
libraries = [f for f in metadata.distribution("NAME").files if f.name.endswith(".so")]
assert libraries, "the package has no library"
for file in libraries:
    name = file.name.split(".")[0]
    loader = machinery.ExtensionFileLoader(name, str(file.locate()))
    util.module_from_spec(util.spec_from_file_location(name, file.locate(), loader=loader))
    print("loads:", file)
"""

# Prints a line for each top-level module of the package that can't be imported, and why.
_IMPORTS = """\
import importlib, importlib.metadata as metadata, torch
files = [f for f in metadata.distribution("NAME").files if f.name.endswith(".py") or f.name.endswith(".so")]
names = {f.parts[0] if len(f.parts) > 1 else f.name.partition(".")[0] for f in files}
for name in sorted(names):
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name} ({type(error).__name__}: {error})")
"""


def write(tree: Tree, patches: Sequence[str], workspace: Workspace, root: Path) -> None:
    """Make a checkout at ``root`` that the tree is built from: its recipe beside what all recipes share.

    Args:
        patches: those that were applied to the tree, by their path below ``patches/``.
    """
    recipes = root / "recipes"
    shutil.copytree(workspace.recipes / "common", recipes / "common")
    # In the recipe's own folder, so that its digest is of them, too.
    shutil.copytree(workspace.recipes / "source-tree", recipes / tree.name)
    shutil.copy(workspace.recipes / "compile-costs.txt", recipes)
    shutil.copytree(workspace.patches / "torch", root / "patches" / "torch")
    for name in patches:
        # Where the recipe's digest looks for them.
        copy = root / "patches" / tree.name / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(workspace.patches / name, copy)
    base = yaml.safe_load((workspace.recipes / "mamba-ssm" / "recipe.yaml").read_text(encoding="utf-8"))
    text = yaml.safe_dump(_recipe(base, tree), sort_keys=False, width=10**9)
    (recipes / tree.name / "recipe.yaml").write_text(text, encoding="utf-8")
    (recipes / tree.name / "loads.py").write_text(loads(tree.name), encoding="utf-8")


def _recipe(base: dict[str, Any], tree: Tree) -> dict[str, Any]:
    context = {**base["context"], "name": tree.name, "version": tree.version, "build_number": 0}
    build = {
        **base["build"],
        "script": {"file": "build.sh", "env": dict(base["build"]["script"]["env"])},
    }
    build["string"] = build["string"].replace("_h${{ hash }}", f"_tree{tree.sha256[:8]}_h${{{{ hash }}}}")
    build["script"]["env"]["EXTENSION"] = "none"
    required = {requirement.name.lower() for requirement in tree.requires}
    run = [spec for spec in base["requirements"]["run"] if _is_kept(spec, required)]
    host = [*base["requirements"]["host"], {"if": _NOT_AN_ENVIRONMENTS, "then": list(_TORCHS_HEADERS_INCLUDE)}]
    return {
        "schema_version": 1,
        "context": context,
        "package": base["package"],
        "source": [{"path": "../../tree", "use_gitignore": False}],
        "build": build,
        "requirements": {**base["requirements"], "host": host, "run": run},
        "tests": [{"script": ["python loads.py"], "files": {"recipe": ["loads.py"]}}],
        "about": {"summary": f"{tree.name} {tree.version} from a source tree ({tree.origin})"},
    }


def loads(name: str) -> str:
    """A Python program that fails where a library of the package does not load."""
    return _LOADS.replace("NAME", name)


def imports(name: str) -> str:
    """A Python program that prints which modules of the package can't be imported, and why."""
    return _IMPORTS.replace("NAME", name)


def _is_kept(spec: Any, required: set[str]) -> bool:
    """Whether a requirement of mamba-ssm is one of every extension for torch, or of this tree, too.

    A condition on numpy is about torch, and kept; one on Triton or transformers is about what the project imports.
    """
    if isinstance(spec, dict):
        imported = {name for name in ("triton", "transformers") if name in str(spec)}
        return not imported or bool(imported & required)
    name = spec.split()[0]
    return name in ("cuda-version", "python", "python_abi", "pytorch") or (name in CARRIED and name in required)


def apply_known_patches(tree: Tree, workspace: Workspace) -> list[str]:
    """Apply those of our patches that fit the tree whole, each on top of those before; returns their paths.

    Those of ``patches/source-tree`` are for any tree. Those of a project are for a tree with its name: its version's,
    then those of every other, the newest first.
    """
    folders = [workspace.patches / "source-tree"]
    if tree.name in PROJECTS:
        versions = sorted((workspace.patches / tree.name).iterdir(), key=lambda path: Version(path.name), reverse=True)
        folders += sorted(versions, key=lambda folder: folder.name != tree.version)
    applied: list[Path] = []
    for patch in (path for folder in folders for path in sorted(folder.glob("*.patch"))):
        if any(other.name[5:] == patch.name[5:] for other in applied):
            continue  # The same change for another version.
        try:
            changed, results = patched([patch], tree.folder)
        except (BuildError, UnicodeDecodeError):
            continue
        if results and all(result.found is not None for result in results):
            for name, text in changed.items():
                (tree.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (tree.folder / name).write_text(text, encoding="utf-8")
            applied.append(patch)
    return [patch.relative_to(workspace.patches).as_posix() for patch in applied]
