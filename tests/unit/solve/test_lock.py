"""pixi.lock: written from recorded repodata, deterministic, checked against pixi.toml, compared by people."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conda_channel import demo_channel
from ssm_forge.base.errors import ForgeError, SolveError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.cli import COMMANDS
from ssm_forge.manifest import environments as manifests
from ssm_forge.package import intact
from ssm_forge.solve import lock as locks
from ssm_forge.solve import lock_changes
from ssm_forge.solve.solver import Request, solve

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared"
SNAPSHOT = SHARED / "conda-snapshot"

needs_snapshot = [
    pytest.mark.shared,
    pytest.mark.skipif(not SNAPSHOT.exists(), reason="needs the recorded conda repodata beside the checkout"),
]


@pytest.fixture
def manifest() -> manifests.Manifest:
    return manifests.load(ROOT / "pixi.toml")


def edited(tmp_path: Path, old: str, new: str) -> manifests.Manifest:
    """pixi.toml with one text replaced."""
    text = (ROOT / "pixi.toml").read_text()
    assert old in text
    path = tmp_path / "pixi.toml"
    path.write_text(text.replace(old, new))
    return manifests.load(path)


def manifest_data() -> dict[str, Any]:
    return manifests.read_toml(ROOT / "pixi.toml")


def records(name: str) -> dict[str, Any]:
    return {r.name.normalized: r for r in locks.environment(ROOT / "pixi.lock", name).records}


class TestCommittedLock:
    def test_agrees_with_the_manifest(self, manifest: manifests.Manifest) -> None:
        problems = [str(p) for found in locks.check(manifest, ROOT / "pixi.lock").values() for p in found]
        assert problems == []

    def test_is_version_7_with_all_environments(self, manifest: manifests.Manifest) -> None:
        assert (ROOT / "pixi.lock").read_text().startswith("version: 7\n")
        locked = {e.name for e in locks.read(ROOT / "pixi.lock")}
        assert locked == {e.name for e in manifest.environments} == {"default", "dev", "cu118", "cu129", "cu130"}

    def test_platforms_are_called_as_pixi_calls_them(self) -> None:
        found = {e.name: e.platform.name for e in locks.read(ROOT / "pixi.lock")}
        assert found == {"default": "linux-64", "dev": "linux-64", "cu118": "p1", "cu129": "p2", "cu130": "p3"}

    def test_every_package_is_an_https_url_of_a_named_channel_with_a_hash(self) -> None:
        for environment in locks.read(ROOT / "pixi.lock"):
            for record in environment.records:
                assert record.url.startswith("https://")
                assert any(locks.is_from(record, channel) for channel in environment.channels)
                algorithm, value = intact.digest(record)
                assert re.fullmatch(r"[0-9a-f]{64}" if algorithm == "sha256" else r"[0-9a-f]{32}", value)
                if algorithm == "md5":
                    assert "/nvidia/label/cuda-11.8.0/" in record.url, "every other channel publishes sha256"

    def test_cu118_is_the_classic_stack_to_the_letter(self) -> None:
        found = records("cu118")
        versions = {name: str(found[name].version) for name in ("pytorch", "cuda-nvcc", "cudnn", "gxx_linux-64")}
        assert versions == {
            "pytorch": "2.3.0",
            "cuda-nvcc": "11.8.89",
            "cudnn": "8.9.7.29",
            "gxx_linux-64": "11.4.0",
        }
        assert str(found["python"].version).startswith("3.10.")
        assert str(found["pytorch"].build).startswith("py3.10_cuda11.8_")
        assert "/pytorch/" in found["pytorch"].url
        assert "/nvidia/label/cuda-11.8.0/" in found["cuda-nvcc"].url
        # conda-forge has the same cuDNN for CUDA 12; this is the one for CUDA 11.
        assert any("cuda-version >=11" in d for d in found["cudnn"].depends)

    @pytest.mark.parametrize(("name", "nvcc"), [("cu129", "12.9."), ("cu130", "13.0.")])
    def test_current_stacks_have_cuda_torch_and_compiler(self, name: str, nvcc: str) -> None:
        found = records(name)
        assert str(found["pytorch"].build).startswith(f"cuda{name[2:]}")
        assert str(found["cuda-nvcc"].version).startswith(nvcc)
        assert str(found["libcudnn"].version).startswith("9.")
        assert {"triton", "gxx_linux-64", "cuda-cudart-dev", "einops", "transformers"} <= set(found)

    def test_tools_have_what_builds_and_channels_use(self) -> None:
        """Else builds fetch Debian's ccache, and tasks start again with the tools of ./run."""
        assert {"ccache", "boto3", "cryptography", "msgpack-python"} <= set(records("default"))

    def test_tools_need_no_cuda(self, manifest: manifests.Manifest) -> None:
        for environment in (manifest.environment("default"), manifest.environment("dev")):
            assert all(v.name != "__cuda" for p in environment.platforms for v in p.virtual)


class TestManifest:
    def test_names_every_task_of_the_command_line_and_no_other(self) -> None:
        data = manifests.read_toml(ROOT / "pixi.toml")
        assert set(data["tasks"]) == set(COMMANDS)
        for name, task in data["tasks"].items():
            assert task["cmd"] == f"python -m ssm_forge {name}"
            assert task["description"] == COMMANDS[name][1].rstrip(".")

    @pytest.mark.shared
    @pytest.mark.skipif(not SHARED.exists(), reason="needs the recorded pixi schema beside the checkout")
    def test_is_valid_for_pixi(self) -> None:
        import jsonschema

        schema = json.loads((SHARED / "schemas" / "pixi-manifest.schema.json").read_text())
        jsonschema.validate(manifests.read_toml(ROOT / "pixi.toml"), schema)

    def test_platforms_declare_drivers_instead_of_system_requirements(self, manifest: manifests.Manifest) -> None:
        assert "system-requirements" not in (ROOT / "pixi.toml").read_text()
        drivers = {
            e.name: [str(v) for p in e.platforms for v in p.virtual if v.name == "__cuda"]
            for e in manifest.environments
        }
        assert drivers == {
            "default": [],
            "dev": [],
            "cu118": ["__cuda=11.8"],
            "cu129": ["__cuda=12.9"],
            "cu130": ["__cuda=13.0"],
        }

    def test_no_version_is_ambiguous(self) -> None:
        """pixi 0.77 warns at every command of a bare ``2.3.0``, and says that it will be an error."""
        bare = []
        for table in [manifest_data(), *manifest_data()["feature"].values()]:
            for name, spec in table.get("dependencies", {}).items():
                version = spec if isinstance(spec, str) else spec.get("version", "*")
                if re.match(r"\d", version) and not version.endswith(".*"):
                    bare.append(f"{name} = {version}")
        assert bare == []

    def test_says_what_it_can_not_lock(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="pypi-dependencies"):
            edited(tmp_path, "[tasks]", "[pypi-dependencies]\nx = '*'\n[tasks]")
        with pytest.raises(UsageError, match="git"):
            edited(tmp_path, 'rich = "*"', 'rich = { git = "x" }')
        with pytest.raises(UsageError, match=r"no environment 'cu999'.*cu118"):
            manifests.load(ROOT / "pixi.toml").environment("cu999")


class TestCheck:
    @pytest.mark.parametrize(
        ("old", "new", "environment", "package"),
        [
            ('cuda-version = "12.9.*"', 'cuda-version = "12.8.*"', "cu129", "cuda-version"),
            ('build = "cuda130*"', 'build = "cpu*"', "cu130", "pytorch"),
            (
                'channel = "nvidia/label/cuda-11.8.0" }\ncuda-cccl',
                'channel = "nvidia" }\ncuda-cccl',
                "cu118",
                "cuda-nvcc",
            ),
            ('conda-build = "*"', 'conda-build = "*"\nno-such-tool = "*"', "dev", "no-such-tool"),
            ('conda-build = "*"\n', "", "dev", "conda-build"),
        ],
    )
    def test_names_environment_and_package(
        self, tmp_path: Path, old: str, new: str, environment: str, package: str
    ) -> None:
        result = locks.check(edited(tmp_path, old, new), ROOT / "pixi.lock")
        assert package in {p.package for p in result[environment]}
        assert [name for name, problems in result.items() if problems] == [environment]

    def test_notices_another_machine_and_other_channels(self, tmp_path: Path) -> None:
        other = edited(tmp_path, 'cuda = "13.0", glibc = "2.28"', 'cuda = "13.2", glibc = "2.28"')
        assert "__cuda=13.2" in locks.check(other, ROOT / "pixi.lock")["cu130"][0].reason
        other = edited(tmp_path, '"pytorch", "conda-forge"]', '"conda-forge", "pytorch"]')
        assert "channels are" in locks.check(other, ROOT / "pixi.lock")["cu118"][0].reason

    def test_platforms_may_be_called_as_pixi_likes(self, tmp_path: Path, manifest: manifests.Manifest) -> None:
        """pixi 0.77 writes short names, older ones wrote those of pixi.toml; both are the same machines."""
        lock = tmp_path / "pixi.lock"
        text = (ROOT / "pixi.lock").read_text()
        for number, name in ((1, "cu118"), (2, "cu129"), (3, "cu130")):
            text = re.sub(rf"\bp{number}\b(?=:?$)", f"linux-64-{name}", text, flags=re.MULTILINE)
        assert text != (ROOT / "pixi.lock").read_text()
        lock.write_text(text)
        assert [p for problems in locks.check(manifest, lock).values() for p in problems] == []
        assert lock_changes.compare(locks.read(lock), locks.read(ROOT / "pixi.lock"), {}) == []
        assert lock_changes.compare(locks.read(ROOT / "pixi.lock"), locks.read(lock), {}) == []

    def test_notices_an_edited_lock(self, tmp_path: Path, manifest: manifests.Manifest) -> None:
        lock = tmp_path / "pixi.lock"
        text = (ROOT / "pixi.lock").read_text()
        gone = re.compile(r"^ +- conda: \S+/numpy-1\S+\n", re.MULTILINE)
        assert len(gone.findall(text)) == 1
        lock.write_text(gone.sub("", text))
        problems = locks.check(manifest, lock)["cu118"]
        assert {"numpy", "transformers"} <= {p.package for p in problems}

    def test_a_missing_or_broken_lock_is_a_usage_error(self, tmp_path: Path, manifest: manifests.Manifest) -> None:
        with pytest.raises(UsageError, match="does not exist"):
            locks.check(manifest, tmp_path / "pixi.lock")
        (tmp_path / "pixi.lock").write_text("version: 7\nplatforms: nonsense\n")
        with pytest.raises(UsageError, match="not a readable lock"):
            locks.check(manifest, tmp_path / "pixi.lock")


class TestWrite:
    pytestmark = needs_snapshot

    def test_same_input_same_bytes_and_the_committed_lock(self, tmp_path: Path, manifest: manifests.Manifest) -> None:
        first, second = tmp_path / "first.lock", tmp_path / "second.lock"
        locks.write(manifest, first, snapshot=SNAPSHOT)
        locks.write(manifest, second, snapshot=SNAPSHOT)
        assert first.read_bytes() == second.read_bytes() == (ROOT / "pixi.lock").read_bytes()

    def test_an_unsolvable_environment_is_named_and_the_lock_stays(self, tmp_path: Path) -> None:
        lock = tmp_path / "pixi.lock"
        shutil.copy(ROOT / "pixi.lock", lock)
        with pytest.raises(SolveError, match="environment cu118 on linux-64-cu118") as caught:
            locks.write(edited(tmp_path, 'cudnn = "==8.9.7.29"', 'cudnn = "==8.9.7.30"'), lock, snapshot=SNAPSHOT)
        assert "cudnn" in str(caught.value)
        assert lock.read_bytes() == (ROOT / "pixi.lock").read_bytes()
        assert not list(tmp_path.glob(".lock-*"))

    def test_a_folder_without_the_channels_is_a_usage_error(self, tmp_path: Path, manifest: manifests.Manifest) -> None:
        with pytest.raises(UsageError, match="no recorded repodata"):
            locks.write(manifest, tmp_path / "pixi.lock", snapshot=tmp_path)


class TestCommand:
    """The command line on a copy of the workspace, so that its manifest can be changed."""

    @pytest.fixture
    def copy(self, tmp_path: Path) -> Path:
        for name in ("pixi.toml", "pixi.lock"):
            shutil.copy(ROOT / name, tmp_path / name)
        for name in ("scripts", "recipes"):
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".pixi"))
        return tmp_path

    def run(self, copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ssm_forge", "lock", *words],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(copy / "scripts"),
                "SSM_FORGE_CACHE_DIR": str(copy / "cache"),
            },
        )

    @pytest.mark.shared
    @pytest.mark.skipif(not SNAPSHOT.exists(), reason="needs the recorded conda repodata beside the checkout")
    def test_locks_twice_to_the_same_bytes_and_checks(self, copy: Path) -> None:
        files = [copy / name for name in ("pixi.lock", "recipes/pixi.toml", "recipes/pixi.lock")]
        for path in files:
            path.unlink()
        contents = []
        for _ in range(2):
            done = self.run(copy, "--snapshot", str(SNAPSHOT))
            assert done.returncode == 0, done.stderr
            contents.append([path.read_bytes() for path in files])
        assert contents[0] == contents[1] == [(ROOT / path.relative_to(copy)).read_bytes() for path in files]
        assert self.run(copy, "--check").returncode == 0

    def test_check_fails_naming_environment_and_package(self, copy: Path) -> None:
        manifest = copy / "pixi.toml"
        manifest.write_text(manifest.read_text().replace('cudnn = "==8.9.7.29"', 'cudnn = "8.9.6.*"'))
        done = self.run(copy, "--check")
        assert done.returncode == 9
        assert "pixi.lock does not match pixi.toml: cu118: cudnn:" in done.stderr
        listed = json.loads(self.run(copy, "--check", "--json").stdout)
        assert not listed["agree"]
        assert [name for name, problems in listed["environments"].items() if problems] == ["cu118"]

    def test_without_network_or_record_it_says_so_at_once(self, copy: Path) -> None:
        if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
            pytest.skip("this machine does not allow a network namespace")
        done = subprocess.run(
            ["unshare", "-rn", sys.executable, "-m", "ssm_forge", "lock"],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PYTHONPATH": str(copy / "scripts")},
        )
        assert done.returncode == 4
        assert "could not be read" in done.stderr
        assert "--snapshot DIR" in done.stderr


class TestDiff:
    @pytest.fixture
    def changed(self, tmp_path: Path) -> Path:
        """The committed lock with pyelftools of the tools replaced by an older one."""
        text = (ROOT / "pixi.lock").read_text()
        version = re.search(r"/pyelftools-([\d.]+)-(\w+)\.conda", text)
        assert version is not None
        path = tmp_path / "pixi.lock"
        path.write_text(text.replace(version.group(0), f"/pyelftools-0.1-{version.group(2)}.conda"))
        return path

    def test_lists_upgrades_by_environment_asked_for_first(self, changed: Path) -> None:
        asked = {"default": {"pyelftools"}}
        found = lock_changes.compare(locks.read(changed), locks.read(ROOT / "pixi.lock"), asked)
        assert [e.environment for e in found] == ["default", "dev"]
        (item,) = found[0].changes
        assert (item.kind, item.package, item.old, item.asked_for) == ("upgraded", "pyelftools", "0.1", True)
        assert not found[1].changes[0].asked_for

    def test_is_empty_for_equal_locks(self) -> None:
        same = locks.read(ROOT / "pixi.lock")
        assert lock_changes.compare(same, same, {}) == []

    def test_other_bytes_under_the_same_url_come_first(self) -> None:
        old, new = locks.read(ROOT / "pixi.lock"), locks.read(ROOT / "pixi.lock")
        cu118 = next(e for e in new if e.name == "cu118")
        pytorch = next(r for r in cu118.records if r.name.normalized == "pytorch")
        pytorch.sha256 = bytes(32)
        pytorch.md5 = bytes(16)
        (found,) = lock_changes.compare(old, new, {})
        assert [(c.kind, c.package) for c in found.changes] == [("bytes changed", "pytorch")]

    def test_added_and_removed_environments_are_notes(self) -> None:
        locked = locks.read(ROOT / "pixi.lock")
        fewer = tuple(e for e in locked if e.name != "cu130")
        assert "new," in lock_changes.compare(fewer, locked, {})[0].notes[0]
        assert "removed" in lock_changes.compare(locked, fewer, {})[0].notes[0]

    def test_reads_a_git_revision(self, tmp_path: Path, changed: Path) -> None:
        def git(*words: str) -> None:
            subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

        git("init", "-q")
        git("add", "pixi.lock")
        git("-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "lock")
        place = Workspace(root=tmp_path, cache=tmp_path / "cache")
        assert len(lock_changes.at_revision(place, "HEAD")) == 5
        with pytest.raises(UsageError, match="nonsense"):
            lock_changes.at_revision(place, "nonsense")
        for option in (f"--output={tmp_path}/written", "-p", "--", ""):
            with pytest.raises(UsageError, match="is no revision of git"):
                lock_changes.at_revision(place, option)
        assert not list(tmp_path.glob("written*"))


@pytest.mark.parametrize("snapshot", [True, False])
def test_only_commands_that_have_the_option_advise_it(tmp_path: Path, snapshot: bool) -> None:
    """Away, not recorded, and not to be solved: errors that named it to everybody."""
    folder = demo_channel(tmp_path)
    given = tmp_path if snapshot else None
    for specs, channel in ((("tool",), "http://127.0.0.1:9/"), (("no-such-package",), folder.as_uri())):
        request = Request(specs=specs, channels=(channel,), snapshot=given)
        with pytest.raises(ForgeError) as caught:
            solve(request)
        assert caught.value.fix
        assert "--snapshot" not in str(caught.value)


def test_a_command_that_has_the_option_advises_it(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="--snapshot DIR"):
        solve(Request(specs=("tool",), channels=("http://127.0.0.1:9/",), offers_snapshot=True))


def test_the_commands_whose_errors_name_the_option_have_it() -> None:
    commands = ROOT / "scripts" / "ssm_forge" / "commands"
    having = {path.name for path in commands.glob("*.py") if '"--snapshot"' in path.read_text()}
    assert having == {"lock.py", "build.py"}
    library = ROOT / "scripts" / "ssm_forge"
    offering = {path.name for path in library.rglob("*.py") if "offers_snapshot=True" in path.read_text()}
    assert offering == {"lock.py", "recipes.py"}
