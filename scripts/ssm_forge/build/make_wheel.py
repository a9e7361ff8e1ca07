"""Makes the wheel of a finished conda package: for one torch, by its version, its requirements and its index page."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from rattler.package_streaming import extract

from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import BuildError
from ssm_forge.build import provenance as materials
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.package import libraries as elf
from ssm_forge.package import wheel
from ssm_forge.package.kernels import claimed, revision
from ssm_forge.package.pip_torch import Of, Torch, local_part, local_version, page, torch_of
from ssm_forge.package.read import Material
from ssm_forge.package.write import dump_json, read_json

SBOM = "sboms/ssm-forge.cdx.json"

# What a conda package may require that is a project of PyPI; the rest comes with torch there, or is the system's.
_ON_PYPI = {
    "pytorch": "torch",
    **{
        name: name
        for name in ("triton", "numpy", "transformers", "einops", "packaging", "setuptools", "fsspec", *PROJECTS)
    },
}
# The oldest glibc that a tag of PEP 600 can name for a machine.
_OLDEST_GLIBC = {"x86_64": (2, 5), "aarch64": (2, 17)}
# Of wheels that differ in nothing but their GPU code, installers take the one with the highest build number: the one
# that runs on every GPU, for they can't see which there is.
_PORTABLE = 1000


def make(package: Path, folder: Path) -> Path:
    """Write the wheel of a finished package into ``folder``, and return its path. It appears whole or not at all.

    The same package gives the same bytes (with the same zlib).

    Raises:
        IntegrityError: when the package is damaged.
        BuildError: when it was not made for a torch of pip's, or holds what a wheel can't.
    """
    index = read_json(package, "index.json")
    torch, machine = torch_of(index), wheel.platform_of(index).machine
    origin = wheel.origin(package, index)
    archs = ArchList.parse(origin["made_from"]["cuda_arch_list"])
    tree = origin["made_from"].get("tree")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=folder) as scratch:
        extract(package, Path(scratch))
        files = wheel.files(package, Path(scratch))
        old_info = wheel.dist_info(package, files)
        kept = {name: path for name, path in files.items() if not wheel.is_left_out(name, old_info)}
        glibc = _glibc((path for name, path in kept.items() if name.endswith(".so")), machine)
        contents = {name: path.read_bytes() for name, path in kept.items()}
    old_metadata = contents.pop(f"{old_info}/METADATA")
    more = local_part(index["build"], tree["sha256"] if tree else "")
    version = local_version(str(index["version"]), torch, more)
    # Of the projects, mamba-ssm's causal-conv1d: with upstream's kernels too, or ours; a fork takes ours.
    beside = torch.local + ("" if tree else more)
    requires = _requirements(old_metadata, index["depends"], torch, beside)
    distribution = old_info.removesuffix(".dist-info").rpartition("-")[0]
    info = f"{distribution}-{version}.dist-info"
    contents = {re.sub(f"^{re.escape(old_info)}/", f"{info}/", name): data for name, data in contents.items()}
    contents[f"{info}/METADATA"] = _metadata(old_metadata, version, requires)
    tag = f"{wheel.python_tag(index)}-manylinux_{glibc[0]}_{glibc[1]}_{machine}"
    build_number = revision(index["build"]) + (_PORTABLE if archs.is_portable else 0)
    build_tag = f"{build_number}_{archs.tag}"
    contents[f"{info}/WHEEL"] = wheel.about(tag, build_tag)
    of: Of = "tree" if tree else "upstream" if claimed(index["build"]) == "upstream" else "release"
    made_for = {"torch": torch.version, "cuda": torch.cuda, "page": page(torch, of)}
    contents[f"{info}/{wheel.ORIGIN}"] = dump_json({**origin, **made_for})
    contents[f"{info}/{SBOM}"] = dump_json(_sbom(index, version, requires, origin["made_from"].get("materials") or []))
    target = folder / f"{distribution}-{version}-{build_tag}-{tag}.whl"
    wheel.write(target, contents, info, compress=True)
    return target


def _glibc(libraries: Iterable[Path], machine: str) -> tuple[int, int]:
    versions = [tuple(int(part) for part in elf.read(path).glibc.split(".")[:2]) for path in libraries]
    if not versions:
        raise BuildError("there is no compiled library in the package, so there is nothing that is for one torch.")
    major, minor = max([*versions, _OLDEST_GLIBC[machine]])
    return major, minor


def _requirements(metadata: bytes, depends: Sequence[str], torch: Torch, local: str) -> list[str]:
    """Upstream's requirements, narrowed by those of the conda package that PyPI knows by name.

    Args:
        local: local version of the other project's wheel.
    """
    narrowed: dict[str, SpecifierSet] = {}
    for spec in depends:
        name, _, rest = spec.partition(" ")
        if name in _ON_PYPI:
            key = _ON_PYPI[name]
            version = rest.split(" ")[0]
            if name in PROJECTS and version.startswith("=="):
                version += f"+{local}"
            narrowed[key] = narrowed.get(key, SpecifierSet()) & _specifier(version)
    # The exact minor, and not the bounds beside it that say less.
    narrowed["torch"] = SpecifierSet(f"=={torch.version}.*")
    kept = []
    for text in _headers(metadata, "requires-dist"):
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            raise BuildError(f"the package's metadata require '{text}', which is no requirement.") from None
        name = canonicalize_name(requirement.name)
        if requirement.marker is None and not requirement.url and name in narrowed:
            narrowed[name] &= requirement.specifier
        else:
            kept.append(text)
    return [*kept, *(f"{name}{narrowed[name]}" for name in sorted(narrowed))]


def _specifier(version: str) -> SpecifierSet:
    """A conda version range as pip writes it; everything where it can't be written."""
    text = f"=={version}" if re.fullmatch(r"\d[\w.]*(\.\*)?", version) else re.sub(r"\.0a0\b|a0\b", "", version)
    try:
        return SpecifierSet(text)
    except InvalidSpecifier:
        return SpecifierSet()


def _headers(metadata: bytes, field: str) -> list[str]:
    return [" ".join(text.partition(":")[2].split()) for text in _fields(metadata) if _name(text) == field]


def _fields(metadata: bytes) -> list[str]:
    """The header fields of METADATA as they are written, folded ones with all their lines."""
    head = metadata.decode("utf-8", "replace").replace("\r\n", "\n").partition("\n\n")[0]
    return [text for text in re.split(r"\n(?![ \t])", head) if text]


def _name(field: str) -> str:
    return field.partition(":")[0].lower()


def _metadata(old: bytes, version: str, requires: Sequence[str]) -> bytes:
    _, blank, body = old.decode("utf-8", "replace").replace("\r\n", "\n").partition("\n\n")
    fields = [f"Version: {version}" if _name(text) == "version" else text for text in _fields(old)]
    fields = [text for text in fields if _name(text) != "requires-dist"]
    fields += [f"Requires-Dist: {text}" for text in requires]
    return ("\n".join(fields) + "\n" + (f"\n{body}" if blank else "")).encode()


def _sbom(
    index: Mapping[str, Any], version: str, requires: Sequence[str], made_from: Sequence[Material]
) -> dict[str, Any]:
    """The package's bill of materials, about the wheel: with PyPI's name of it, and what it requires there."""
    spaced = [re.sub(r"^([\w.-]+)\s*(\[[^\]]*\])?", r"\1\2 ", text).strip() for text in requires]
    document = materials.sbom({**index, "version": version, "depends": spaced}, made_from)
    purl = f"pkg:pypi/{canonicalize_name(str(index['name']))}@{version.replace('+', '%2B')}"
    document["metadata"]["component"].update({"bom-ref": purl, "purl": purl})
    document["dependencies"][0]["ref"] = purl
    return document
