"""A finished conda package of mamba-ssm with a few small files in it, as ``build`` leaves one."""

from __future__ import annotations

from pathlib import Path

from rattler_build import assemble_package

from ssm_forge.package.write import dump_json, rewrite_info

SITE = "lib/python3.11/site-packages"
INFO = "mamba_ssm-2.3.1.dist-info"
METADATA = "Metadata-Version: 2.1\nName: mamba-ssm\nVersion: 2.3.1\nRequires-Dist: torch\n\nText.\n"
CONTENTS = {
    f"{SITE}/mamba_ssm/__init__.py": '__version__ = "2.3.1"\n',
    f"{SITE}/mamba_ssm/__pycache__/__init__.cpython-311.pyc": "compiled",
    f"{SITE}/selective_scan_cuda.cpython-311-x86_64-linux-gnu.so": "library",
    f"{SITE}/{INFO}/METADATA": METADATA,
    f"{SITE}/{INFO}/WHEEL": "Wheel-Version: 1.0\nTag: made-by-the-build\n",
    f"{SITE}/{INFO}/RECORD": "of the build,,\n",
    f"{SITE}/{INFO}/INSTALLER": "pip\n",
}
DEPENDS = ["python_abi 3.11.* *_cp311", "pytorch 2.7.* there_cuda126_12345678_*", "__glibc >=2.32,<3.0.a0"]


def conda_package(
    folder: Path, extra: dict[str, str] | None = None, depends: list[str] | None = None, version: str = "2.3.1"
) -> Path:
    content = folder / "content"
    for name, text in {**CONTENTS, **(extra or {})}.items():
        path = content / name.replace("2.3.1", version)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("2.3.1", version), encoding="utf-8")
    made = assemble_package(
        name="mamba-ssm",
        version=version,
        target_platform="linux-64",
        build_string="cuda124_py311_sm90_h0_2",
        output_dir=str(folder / "raw"),
        files_dir=str(content),
        depends=DEPENDS if depends is None else depends,
        detect_prefix=False,
    )
    target = folder / Path(made.path).name
    rewrite_info(
        Path(made.path),
        target,
        lambda files: {**files, "info/ssm-forge.json": dump_json({"cuda_arch_list": "9.0", "glibc": "2.32"})},
    )
    return target
