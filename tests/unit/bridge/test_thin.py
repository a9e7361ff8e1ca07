"""A torch that is elsewhere as packages of links: what builds find, and that nothing is copied or written there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fake_environment import add, add_torch
from ssm_forge.bridge import thin
from ssm_forge.bridge.assemble import _borrow, drop_older_layout
from ssm_forge.bridge.package import BridgePackage, write


def there(site: Path, **changes: str) -> thin.There:
    torch = thin.Linked("torch", "2.7.1", site, ("torch", "torch-2.7.1.dist-info"))
    einops = thin.Linked("einops", changes.get("einops", "0.8.1"), site, ("einops",))
    return thin.There("2.7.1", "there_cuda126_12345678", "3.11", (torch, einops), "12.4")


def packages(found: thin.There) -> dict[str, BridgePackage]:
    return {package.name: package for package in thin.packages(found)}


def test_entries_are_the_top_level_names_that_lie_in_the_folder(tmp_path: Path) -> None:
    paths = ["../../../bin/torchrun", "torch/__init__.py", "torch/lib/a.so", "six.py", "__pycache__/six.pyc"]
    assert thin.entries(paths) == ("six.py", "torch")


def test_torch_is_links_and_everything_else_stands_for_a_name(tmp_path: Path) -> None:
    add_torch(tmp_path)
    add(tmp_path, "einops", "0.8.1")
    made = packages(there(tmp_path))
    folder = tmp_path / "stage"
    folder.mkdir()
    made["pytorch"].stage(folder)
    site = folder / "lib/python3.11/site-packages"
    assert (site / "torch").readlink() == tmp_path / "torch"
    assert (site / "einops").readlink() == tmp_path / "einops"
    assert (site / "torch/version.py").is_file()
    assert made["pytorch"].build.startswith("there_cuda126_12345678_py311_h")
    empty = tmp_path / "empty"
    empty.mkdir()
    made["einops"].stage(empty)
    assert (made["einops"].version, list(empty.iterdir())) == ("0.8.1", [])


def test_another_environment_or_release_is_another_package_of_the_same_torch(tmp_path: Path) -> None:
    one, two = packages(there(tmp_path / "a"))["pytorch"], packages(there(tmp_path / "b"))["pytorch"]
    three = packages(there(tmp_path / "a", einops="0.7"))["pytorch"]
    assert len({one.build, two.build, three.build}) == 3
    assert {p.build.rpartition("_h")[0] for p in (one, two, three)} == {"there_cuda126_12345678_py311"}


def test_tools_that_are_not_linked_come_as_packages(tmp_path: Path) -> None:
    """CUDA 11's libraries of torch 2.0 require wheel and setuptools, and pip check looks for them."""
    names = {depend.split()[0] for depend in packages(there(tmp_path))["pytorch"].depends}
    assert names >= {"packaging", "setuptools", "wheel"}


def test_a_python_with_these_packages_writes_no_bytecode_into_the_environment(tmp_path: Path) -> None:
    add_torch(tmp_path / "theirs")
    folder = tmp_path / "stage"
    folder.mkdir()
    packages(there(tmp_path / "theirs"))["pytorch"].stage(folder)
    site = folder / "lib/python3.11/site-packages"
    code = f"import site; site.addsitedir({str(site)!r}); import torch; print(torch.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{site}/torch/__init__.py\n"
    assert not list((tmp_path / "theirs").rglob("__pycache__"))


def test_links_to_folders_survive_packing(tmp_path: Path) -> None:
    from rattler.package_streaming import extract

    add_torch(tmp_path / "theirs")
    channel = tmp_path / "channel"
    file = write(packages(there(tmp_path / "theirs"))["pytorch"], channel, threads=1)
    extract(file, tmp_path / "out")
    link = tmp_path / "out/lib/python3.11/site-packages/torch"
    assert link.readlink() == tmp_path / "theirs/torch"
    assert file.stat().st_size < 10_000


def test_what_another_channel_of_the_bridge_has_is_not_made_again(tmp_path: Path) -> None:
    package = packages(there(tmp_path))["einops"]
    first, second = tmp_path / "bridge/env-a", tmp_path / "bridge/env-b"
    for channel in (first, second):
        drop_older_layout(channel)
    assert not _borrow(package, second)
    made = write(package, first, threads=1)
    assert _borrow(package, second)
    assert (second / "linux-64" / package.filename).samefile(made)
