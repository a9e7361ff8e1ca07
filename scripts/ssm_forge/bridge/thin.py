"""A torch that is in somebody's environment, as conda packages that hold nothing but links to it.

A build and its tests then find that torch, and what the kernels import beside it, in their own environments: under
constant paths, so that the compile cache hits for every environment, and the packages are the same bytes. Nothing is
copied, and nothing is written there: bytecode is switched off wherever these packages are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.bridge.metadata import conda_name
from ssm_forge.bridge.package import BridgePackage, link

# Read by every Python that starts there: the links lead into folders that are not ours to write to.
_SWITCH = "ssm-forge-writes-no-bytecode.pth"
_SWITCHED = "import sys; sys.dont_write_bytecode = True\n"


@dataclass(frozen=True)
class Linked:
    """What is linked of one installed Python package.

    Attributes:
        name: of the project.
        version: as its metadata has it.
        site: the folder that it is in.
        entries: names of its folders and files there.
    """

    name: str
    version: str
    site: Path
    entries: tuple[str, ...]


@dataclass(frozen=True)
class There:
    """A torch in an environment.

    Attributes:
        release: ``2.7.1``.
        prefix: start of the build string, which says which torch it is.
        python: minor of the environment's Python.
        packages: torch, and all that it and the kernels import; tools that a build has its own of are left out.
        cuda: CUDA release of the toolkit.
    """

    release: str
    prefix: str
    python: str
    packages: tuple[Linked, ...]
    cuda: str

    @property
    def identity(self) -> str:
        """A text that is another for every other torch, place or Python."""
        return repr(self)


def packages(there: There) -> list[BridgePackage]:
    """``pytorch`` with all the links, and an empty package for each other project, for recipes to require."""
    tag = there.python.replace(".", "")
    major, minor = (int(part) for part in there.release.split(".")[:2])
    pytorch = BridgePackage(
        name="pytorch",
        version=there.release,
        inputs=(there.identity, _SWITCHED),
        stage=lambda folder: _stage(there, folder),
        depends=(
            f"cuda-version >={there.cuda.split('.')[0]},<{int(there.cuda.split('.')[0]) + 1}",
            "packaging",
            f"python {there.python}.*",
            f"python_abi {there.python}.* *_cp{tag}",
            # The tools are not linked, and some torch or library of CUDA requires each: pip check looks for them.
            "setuptools",
            "wheel",
        ),
        run_exports={"weak": [f"pytorch >={there.release},<{major}.{minor + 1}.0a0"]},
        build_prefix=f"{there.prefix}_py{tag}",
        summary="Links to the torch of an environment of this machine",
    )
    return [pytorch, *(_stand_in(linked) for linked in there.packages if linked.name != "torch")]


def _stand_in(linked: Linked) -> BridgePackage:
    return BridgePackage(
        name=conda_name(linked.name),
        version=conda_version(linked.version),
        inputs=(linked.version,),
        stage=lambda folder: None,
        summary="Stands for the package of that name in an environment of this machine",
    )


def conda_version(version: str) -> str:
    """A PEP 440 version as conda takes one in a file's name."""
    return version.replace("-", "_").replace("!", "_").partition("+")[0]


def _stage(there: There, folder: Path) -> None:
    site = folder / f"lib/python{there.python}/site-packages"
    site.mkdir(parents=True)
    (site / _SWITCH).write_text(_SWITCHED, encoding="utf-8")
    for linked in there.packages:
        for entry in linked.entries:
            # Of a namespace the first link leads to the whole folder.
            if not (site / entry).is_symlink():
                link(str(linked.site / entry), site / entry)


def entries(paths: Sequence[str]) -> tuple[str, ...]:
    """The top-level names among the paths of a RECORD, without what lies outside its folder."""
    tops = {path.split("/", 1)[0] for path in paths}
    return tuple(sorted(tops - {"..", "__pycache__", ""}))
