"""Makes a built package say what it is, and nothing about where or when it was made.

The engine's package carries the time, the channel's path and the folder of the build. Those are replaced by
fixed values; what the package was made from, what GPU code its binaries hold and which glibc they need, read
from the binaries themselves, are written in.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.version import Version

from ssm_forge.base import platforms
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import BuildError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import Platform
from ssm_forge.build import provenance as materials
from ssm_forge.manifest import recipe
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.recipe import Rendered
from ssm_forge.package import kernels as package_kernels
from ssm_forge.package import libraries as elf
from ssm_forge.package import read as inspection
from ssm_forge.package.read import PROVENANCE
from ssm_forge.package.write import EPOCH, InfoFiles, dump_json, repack

SBOM = "info/sbom.cdx.json"

# Raised when finished packages change without their recipe changing; older ones are then built anew.
FORMAT = 4


def finalize(
    package: Path,
    rendered: Rendered,
    key: BuildKey,
    workspace: Workspace,
    *,
    compiler: str = "",
    compiler_lock: Path | None = None,
    solved: Sequence[inspection.Material] | None = None,
) -> Path:
    """Write the finished package, into the folder above that of ``package``, and return its path.

    Args:
        rendered: the recipe that it was built from.
        compiler, compiler_lock: as in :class:`ssm_forge.build.request.BuildRequest`.
        solved: what it was built with from channels, where the engine that built it does not say so in the package.

    Raises:
        BuildError: when the extension is missing, or holds other GPU code than asked for; when the engine does not say
            what it built with, or a library looks for others in a folder of the build.
    """
    from rattler.package_streaming import extract

    project = rendered.name
    with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        extract(package, Path(scratch))
        libraries = sorted(Path(scratch).glob("lib/python*/site-packages/**/*.so"))
        if solved is None:
            solved = materials.solved(Path(scratch)) if key.source == "conda" else []
        check_machine(libraries, key.platform)
        facts = _facts(libraries, project, key)
    provenance = {
        "format": FORMAT,
        "name": project,
        "recipe_sha256": recipe.digest(project, workspace),
        "variant": key.to_provenance(),
        **({"kernels": key.kernels} if key.kernels != package_kernels.DEFAULT else {}),
        "materials": materials.collect(rendered, key, workspace, compiler_lock=compiler_lock, packages=solved),
        **({"compiler": compiler} if compiler else {}),
        **facts,
    }
    target = package.parent.parent / package.name

    def edit(files: InfoFiles) -> InfoFiles:
        return edited(files, provenance)

    repack(package, target, edit)
    return target


def check_machine(libraries: Sequence[Path], platform: Platform) -> None:
    """Refuse libraries for another machine than the package is for: a compiler of the wrong one was taken.

    Raises:
        BuildError: naming both.
    """
    for library in libraries:
        found = platforms.of_program(library)
        if found is not None and found != platform:
            name = found if isinstance(found, str) else found.people
            raise BuildError(
                f"{library.name} is for {name}, and the package is for {platform.people}.",
                fix="The compiler that the build ran is not the one of its environment; please report this.",
            )


def _facts(libraries: list[Path], project: str, key: BuildKey) -> dict[str, Any]:
    extension = recipe.EXTENSIONS[project]
    built = [path for path in libraries if path.name.startswith(f"{extension}.")]
    if not built:
        raise BuildError(f"{project} was built without {extension}.")
    archs = elf.gpu_code(built[0])
    if archs != key.archs:
        raise BuildError(
            f"{extension} holds {archs.tag}, but {key.archs.tag} was asked for.",
            fix="The recipe's patches no longer set the compute capabilities; please report this.",
        )
    if key.kernels == "upstream" and package_kernels.found(built[0], extension) != "upstream":
        raise BuildError(
            f"{extension} holds kernels of this project, but upstream's were asked for.",
            fix="The recipe no longer leaves out all patches of the kernels; please report this.",
        )
    return {"cuda_arch_list": str(archs), "glibc": checked_glibc(libraries)}


def checked_glibc(libraries: Sequence[Path]) -> str:
    """The glibc that libraries need together, such as ``2.17``.

    Raises:
        BuildError: when one looks for others in a folder of this build.
    """
    checked = [elf.read(path) for path in libraries]
    for library in checked:
        if library.foreign_rpaths:
            raise BuildError(
                f"{library.path.name} would look for libraries in {library.foreign_rpaths[0]}, a folder of this build.",
                fix="A flag of the compiler got past recipes/common/compile.sh; please report this.",
            )
    return max((library.glibc for library in checked), key=Version)


def edited(files: InfoFiles, provenance: dict[str, Any]) -> InfoFiles:
    """The info files of a package with its provenance in them, and without what tells of the build."""
    kept = {name: data for name, data in files.items() if not name.startswith("info/recipe/")}
    index = json.loads(kept["info/index.json"])
    index["timestamp"] = EPOCH * 1000
    _tell_whose_kernels(index)
    depends = [spec for spec in index["depends"] if not spec.startswith("__glibc")]
    index["depends"] = sorted({*depends, f"__glibc >={provenance['glibc']},<3.0.a0"})
    tell_the_solver(index, ArchList.parse(provenance["cuda_arch_list"]))
    kept["info/index.json"] = dump_json(index)
    about = json.loads(kept.get("info/about.json", b"{}"))
    about.pop("channels", None)
    about.setdefault("extra", {})["ssm-forge"] = {"cuda_arch_list": provenance["cuda_arch_list"]}
    kept["info/about.json"] = dump_json(about)
    kept[PROVENANCE] = dump_json(provenance)
    kept[SBOM] = dump_json(materials.sbom(index, provenance["materials"]))
    return kept


def tell_the_solver(index: dict[str, Any], archs: ArchList) -> None:
    """Let the solver pick the package for the GPU: one made for it where it is known, else a portable one.

    A package for one generation requires a known GPU of that generation. A portable one refuses only a known GPU
    that it has no code for, and gives way to any other (``track_features`` is conda's word for that).

    Args:
        index: the content of info/index.json, which is changed in place.
        archs: what GPUs the package has code for.
    """
    spec = f"__cuda_arch {archs.gpu_range}"
    if archs.is_portable:
        index["constrains"] = sorted([*index.get("constrains", []), spec])
        _track(index, "cuda_arch_portable")
    else:
        index["depends"] = sorted([*index["depends"], spec])


def _tell_whose_kernels(index: dict[str, Any]) -> None:
    """Let upstream's kernels give way to ours, of whatever revision, and older ones of theirs to newer ones.

    Their build number is 0 already, for where ours have a feature too. Being all 0, they are told apart by the time.
    """
    if package_kernels.claimed(index["build"]) == "upstream":
        _track(index, "upstream_kernels")
        index["timestamp"] += package_kernels.revision(index["build"]) * 1000


def _track(index: dict[str, Any], feature: str) -> None:
    index["track_features"] = " ".join([*filter(None, [index.get("track_features")]), feature])
