"""What runs on the other machine: ``python3 BUNDLE.pyz``. The standard library and its torch are enough.

Becomes ``__main__.py`` of the bundle. It checks that the packages fit this Python, torch and glibc, unpacks
them into a folder of their own, and runs the checks and measurements of ``ssm_forge.kernels`` beside the
torch that is there. Nothing of the machine's Python is changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import lzma
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

EXIT_FAIL, EXIT_NOT_RUN, EXIT_UNFIT = 9, 3, 4
# What mamba_ssm imports besides torch.
MODULES = ("einops", "triton", "transformers", "huggingface_hub", "packaging")
STEPS = ("check", "bench", "upstream", "sanitize", "models", "gpus")
# Timing wants the GPU for itself; the others compare results, and run side by side after it.
ALONE = "bench"
# What timing may take of the whole when it is not all that is asked for; what it leaves is the others'.
SHARE_ALONE = 0.45
GRACE_SECONDS = 25.0
RESERVE_SECONDS = 15.0


# What the libraries raise for a file that was cut or changed on the way.
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError, KeyError),
    *(TypeError, AttributeError, RuntimeError, OverflowError),
)


class UnfitError(Exception):
    """The packages in the bundle can't work here."""


def say(line: str) -> None:
    """One line of progress on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def problems(needs: dict[str, str]) -> list[str]:
    """Everything about this machine that the packages do not fit, one sentence each."""
    sentences = []
    machine = needs.get("machine", "x86_64")
    if sys.platform != "linux" or platform.machine() != machine:
        sentences.append(f"the packages are for linux {machine}, this is {sys.platform} {platform.machine()}")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python != needs["python"]:
        sentences.append(
            f"the packages are for Python {needs['python']}, this is {python} ({sys.executable}); "
            f"start the bundle with python{needs['python']}, or make one with --python {python}"
        )
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        sentences.append("the packages are for the ordinary Python, this one is free-threaded")
    libc, glibc = platform.libc_ver()
    # By hand: packaging need not be on that machine.
    if libc != "glibc" or tuple(map(int, glibc.split("."))) < tuple(map(int, needs["glibc"].split("."))):
        sentences.append(f"the packages need glibc {needs['glibc']} or newer, this machine has {libc} {glibc}")
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        sentences.append(f"the packages import {', '.join(missing)}, not installed here (pip install them)")
    return sentences + _torch_problems(needs)


def _torch_problems(needs: dict[str, str]) -> list[str]:
    try:
        import torch
    except ImportError as error:
        return [f"torch does not import in {sys.executable}: {error}"]
    sentences = []
    if _minor(torch.__version__) != needs["torch"]:
        sentences.append(
            f"the packages are for torch {needs['torch']}, this is {torch.__version__}; "
            f"a variant for torch {_minor(torch.__version__)} may exist ('./run variants')"
        )
    if torch.version.cuda is None:
        sentences.append(f"this torch ({torch.__version__}) is built without CUDA")
    elif torch.version.cuda.split(".")[0] != needs["cuda"]:
        sentences.append(f"the packages are for CUDA {needs['cuda']}, this torch is built for {torch.version.cuda}")
    return sentences


def unpack(bundle: zipfile.ZipFile, folder: Path) -> dict[str, Any]:
    """Unpack everything into ``folder``; every file of the packages is compared with its sha256.

    Returns:
        ``bundle.json``.

    Raises:
        UnfitError: when a file is not what its package says.
    """
    try:
        return _unpack(bundle, folder)
    except _DAMAGE as error:
        raise UnfitError(f"the bundle is damaged ({type(error).__name__}: {error}); make it again") from error


def _unpack(bundle: zipfile.ZipFile, folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(bundle.read("bundle.json"))
    for name in bundle.namelist():
        if name.startswith(("src/", "tests/", "pytest/")):
            bundle.extract(name, folder)
    for archive in (n for n in bundle.namelist() if n.startswith("others/")):
        _extract(bundle.read(archive), folder / "others" / Path(archive).name.removesuffix(".tar.xz"))
    for package in manifest["packages"]:
        prefix = folder / "prefix"
        _extract(bundle.read(package["payload"]), prefix)
        for path, expected in package["files"].items():
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise UnfitError(f"{path} of {package['file']} is outside of the bundle; make it again")
            if hashlib.sha256((prefix / path).read_bytes()).hexdigest() != expected:
                raise UnfitError(f"{path} of {package['file']} is damaged in this bundle; make it again")
    return manifest


def _extract(data: bytes, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and ".." not in parts and not Path(member.name).is_absolute():
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member)
                assert stream is not None
                path.write_bytes(stream.read())
                path.chmod(member.mode & 0o755)


def arguments(step: str, folder: Path, output: Path, manifest: dict[str, Any], seconds: float) -> list[str]:
    """The command line of one step."""
    line = [sys.executable, "-m", "ssm_forge.kernels", step, "--output", str(output / f"{step}.json")]
    line += ["--limit", str(int(seconds))]
    if step == "check":
        line += ["--full"]
    elif step == "bench":
        # Of each build, together at most half of the step.
        wait = seconds / 2 / (1 + len(manifest["others"]))
        line += ["--plot", str(output), "--first-use", str(int(wait))]
        for label in manifest["others"]:
            line += ["--other", f"{label}={folder / 'others' / label}"]
    elif step == "upstream":
        for project in manifest["tests"]:
            line += ["--tests", f"{project}={folder / 'tests' / project / 'tests'}"]
    return line


def run_step(step: str, line: list[str], environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Run one step, at most ``seconds`` and a little.

    Returns:
        Its document; one with a failed check where it left none.
    """
    started = time.monotonic()
    output = Path(line[line.index("--output") + 1])
    say(f"--- {step} (at most {seconds:.0f} s)")
    # A session of its own, so that what the step started ends with it.
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        ended = f"ended with status {process.wait(timeout=seconds + GRACE_SECONDS)}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ended = f"was stopped after {seconds + GRACE_SECONDS:.0f} s"
    say(f"--- {step} {ended} after {time.monotonic() - started:.0f} s")
    if not output.is_file():
        return {"checks": [{"name": step, "status": "fail", "detail": f"{ended}, and left no result"}]}
    document: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return document


def run_steps(steps: list[str], folder: Path, output: Path, manifest: dict[str, Any], limit: float) -> dict[str, Any]:
    """Run the steps within ``limit`` seconds and write ``summary.json``."""
    minor = manifest["needs"]["python"]
    site = folder / "prefix" / "lib" / f"python{minor}" / "site-packages"
    path = [str(site), str(folder / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    if importlib.util.find_spec("pytest") is None:
        path.append(str(folder / "pytest"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
    deadline = time.monotonic() + limit - RESERVE_SECONDS
    files = {p["file"]: p["sha256"] for p in manifest["packages"]}
    summary: dict[str, Any] = {"packages": files, "device": None, "steps": {}}
    groups = [[s for s in steps if s == ALONE], [s for s in steps if s != ALONE]]
    for group in filter(None, groups):
        seconds = deadline - time.monotonic() - GRACE_SECONDS
        if seconds < 10:
            for step in group:
                summary["steps"][step] = [{"name": step, "status": "not-run", "detail": "no time was left"}]
            continue
        if group == groups[0] and groups[1]:
            seconds *= SHARE_ALONE

        def start(step: str, seconds: float = seconds) -> dict[str, Any]:
            return run_step(step, arguments(step, folder, output, manifest, seconds), environment, seconds)

        with ThreadPoolExecutor(len(group)) as pool:
            for step, document in zip(group, pool.map(start, group), strict=True):
                summary["steps"][step] = document["checks"]
                summary["device"] = summary["device"] or document.get("device")
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def exit_code(summary: dict[str, Any], *, allow_missing_gpu: bool) -> int:
    """0 when something passed and nothing failed; 9 on a failure; 3 when nothing could run."""
    statuses = {c["status"] for checks in summary["steps"].values() for c in checks}
    if "fail" in statuses:
        return EXIT_FAIL
    if "pass" in statuses:
        return 0
    return 0 if allow_missing_gpu and summary["device"] is None else EXIT_NOT_RUN


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of the bundle's own command line; argparse ends the process for a wrong one."""
    parser = argparse.ArgumentParser(description="Check and measure the packages of this bundle.")
    parser.add_argument("--output", type=Path, help="where JSON and PNG go (default: $OUT, or ./ssm-forge-results)")
    parser.add_argument("--into", type=Path, help="unpack here and keep it (default: a temporary folder)")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"which of {','.join(STEPS)}")
    parser.add_argument("--limit", type=float, default=530.0, metavar="SECONDS", help="for all (default: 530)")
    parser.add_argument("--unpack-only", action="store_true", help="unpack into --into and stop")
    parser.add_argument("--any-torch", action="store_true", help="only warn where the packages do not fit")
    parser.add_argument("--allow-missing-gpu", action="store_true", help="exit 0 where there is no GPU")
    options = parser.parse_args(argv)
    options.steps = options.steps.split(",")
    unknown = sorted(set(options.steps) - set(STEPS))
    if unknown:
        parser.error(f"no such step: {', '.join(unknown)}")
    if options.unpack_only and options.into is None:
        parser.error("--unpack-only needs --into")
    return options


def install_and_run(options: argparse.Namespace, bundle_path: Path, folder: Path) -> int:
    """Check the machine, unpack, run.

    Raises:
        UnfitError: when the packages can't work here.
    """
    with zipfile.ZipFile(bundle_path) as bundle:
        unfit = problems(json.loads(bundle.read("bundle.json"))["needs"])
        if unfit and not options.any_torch:
            raise UnfitError("; ".join(unfit))
        for problem in unfit:
            say(f"warning: {problem}")
        manifest = unpack(bundle, folder)
    say(f"unpacked into {folder}: {', '.join(p['file'] for p in manifest['packages'])}")
    if options.unpack_only:
        return 0
    output = options.output or Path(os.environ.get("OUT") or "ssm-forge-results")
    output.mkdir(parents=True, exist_ok=True)
    summary = run_steps(options.steps, folder, output.resolve(), manifest, options.limit)
    for step, checks in summary["steps"].items():
        counts = {s: sum(c["status"] == s for c in checks) for s in ("pass", "fail", "not-run")}
        print(f"{step}: {counts['pass']} passed, {counts['fail']} failed, {counts['not-run']} not run")
        for check in checks:
            if check["status"] != "pass":
                print(f"  {check['status']:8} {check['name']}: {check['detail']}")
    print(f"results: {output}")
    return exit_code(summary, allow_missing_gpu=options.allow_missing_gpu)


def main() -> int:
    """Do what the command line says; the exit code comes out."""
    options = parse(sys.argv[1:])
    # Inside a .pyz, this file's folder is the archive itself.
    bundle_path = Path(__file__).parent
    try:
        if options.into is not None:
            return install_and_run(options, bundle_path, options.into.resolve())
        with tempfile.TemporaryDirectory(prefix="ssm-forge-") as folder:
            return install_and_run(options, bundle_path, Path(folder))
    except UnfitError as error:
        say(f"error: {error}.")
        return EXIT_UNFIT


if __name__ == "__main__":
    sys.exit(main())
