"""Sixty logs, written for these tests as the tools write them: thirty with a known cause, thirty of unrelated failures."""

from __future__ import annotations

SYMBOL = "_ZN3c106detail14torchCheckFailEPKcS2_jRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"

# (text, codes that must be named, the first one first)
KNOWN: dict[str, tuple[str, list[str]]] = {
    "pip, no nvcc, old setup.py": (
        """Collecting mamba-ssm
  Preparing metadata (setup.py) ... error
  error: subprocess-exited-with-error
  × python setup.py egg_info did not run successfully.
  │ exit code: 1
  ╰─> [20 lines of output]
      torch.__version__  = 2.1.2+cu121
      <string>:78: UserWarning: mamba_ssm was requested, but nvcc was not found.  Are you sure your environment has
      nvcc available?
      Traceback (most recent call last):
        File "<string>", line 135, in <module>
      NameError: name 'bare_metal_version' is not defined
      [end of output]
error: metadata-generation-failed
""",
        ["no-nvcc"],
    ),
    "runtime image": (
        "RuntimeError: causal_conv1d was requested, but nvcc was not found.  Are you sure your environment has nvcc?\n",
        ["no-nvcc"],
    ),
    "uv, isolation": (
        """Resolved 34 packages in 1.2s
  × Failed to build `mamba-ssm==2.2.4`
  ├─▶ The build backend returned an error
  ╰─▶ Call to `setuptools.build_meta:__legacy__.get_requires_for_build_wheel` failed (exit status: 1)
      [stderr]
      Traceback (most recent call last):
        File "<string>", line 14, in <module>
        File "<string>", line 9, in <module>
      ModuleNotFoundError: No module named 'torch'
      hint: This error likely indicates that `mamba-ssm@2.2.4` depends on `torch`, but doesn't declare it.
""",
        ["build-isolation"],
    ),
    "toolkit of another major": (
        """  File "/env/lib/python3.10/site-packages/torch/utils/cpp_extension.py", line 412, in _check_cuda_version
    raise RuntimeError(CUDA_MISMATCH_MESSAGE.format(cuda_str_version, torch.version.cuda))
RuntimeError:
The detected CUDA version (11.5) mismatches the version that was used to compile
PyTorch (12.1). Please make sure to use the same CUDA versions.
""",
        ["toolkit-mismatch"],
    ),
    "GitHub not reached": (
        """Guessing wheel URL:  https://github.com/Dao-AILab/causal-conv1d/releases/download/v1.4.0/causal_conv1d.whl
Traceback (most recent call last):
  File "/usr/lib/python3.10/urllib/request.py", line 1351, in do_open
urllib.error.URLError: <urlopen error [Errno 110] Connection timed out>
""",
        ["github-blocked"],
    ),
    "silence": ("Precompiled wheel not found. Building from source...\n", ["source-build-slow"]),
    "ABI": (
        f"ImportError: /e/site-packages/causal_conv1d_cuda.cpython-310-x86_64-linux-gnu.so: undefined symbol: {SYMBOL}\n",
        ["cxx11-abi"],
    ),
    "SetDevice": (
        "ImportError: /e/selective_scan_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: "
        "_ZN3c104cuda9SetDeviceEi\n",
        ["other-torch"],
    ),
    "Warning": (
        "ImportError: selective_scan_cuda.cpython-310-x86_64-linux-gnu.so: undefined symbol: "
        "_ZN3c107WarningC1ESt7variantIJNS0_11UserWarningENS0_18DeprecationWarningEEERKNS_14SourceLocationESsb\n",
        ["other-torch"],
    ),
    "zeros_like": (
        "undefined symbol: _ZN2at4_ops10zeros_like4callERKNS_6TensorEN3c108optionalINS5_10ScalarTypeEEE\n",
        ["other-torch"],
    ),
    "glibc": (
        "ImportError: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.32' not found (required by "
        "/e/selective_scan_cuda.cpython-310-x86_64-linux-gnu.so)\n",
        ["glibc-too-old"],
    ),
    "libstdc++": (
        "ImportError: /lib64/libstdc++.so.6: version ‘GLIBCXX_3.4.29’ not found (required by /e/torch/lib/libtorch.so)\n",
        ["libstdcxx-too-old"],
    ),
    "cudart": (
        "ImportError: libcudart.so.11.0: cannot open shared object file: No such file or directory\n",
        ["cuda-runtime-missing"],
    ),
    "missing kernels, a notebook with colours": (
        "\x1b[0;31m---------------------------------------------------------------------------\x1b[0m\n"
        "\x1b[0;31mModuleNotFoundError\x1b[0m                       Traceback (most recent call last)\n"
        "Cell \x1b[0;32mIn[3], line 1\x1b[0m\n\x1b[0;32m----> 1\x1b[0m from mamba_ssm import Mamba\n"
        "\x1b[0;31mModuleNotFoundError\x1b[0m: No module named \x1b[1m'selective_scan_cuda'\x1b[0m\n",
        ["kernels-missing"],
    ),
    "VMamba": (
        '  File "/VMamba/classification/models/csms6s.py", line 31, in forward\n'
        "NameError: name 'selective_scan_cuda_core' is not defined. Did you mean: 'selective_scan_cuda'?\n",
        ["vmamba-kernels-missing"],
    ),
    "hidden conv1d": ("AttributeError: 'NoneType' object has no attribute 'causal_conv1d_fwd'\n", ["conv1d-hidden"]),
    "signature": (
        "TypeError: causal_conv1d_fwd(): incompatible function arguments. The following argument types are supported:\n"
        "    1. (arg0: torch.Tensor, arg1: torch.Tensor, arg2: Optional[torch.Tensor], arg3: bool) -> torch.Tensor\n",
        ["kernel-signature"],
    ),
    "Vim": ("TypeError: Mamba.__init__() got an unexpected keyword argument 'bimamba_type'\n", ["fork-shadowed"]),
    "no kernel image": (
        "RuntimeError: CUDA error: no kernel image is available for execution on the device\n"
        "CUDA kernel errors might be asynchronously reported at some other API call\n",
        ["no-kernel-image"],
    ),
    "driver": (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
        "driver by downloading and installing a new version\n",
        ["driver-too-old"],
    ),
    "bf16": (
        "ptxas /tmp/a.ptx, line 31; error   : Feature '.bf16' requires .target sm_80 or higher\n",
        ["bf16-on-old-gpu"],
    ),
    "Turing": ('  File "triton/compiler/make_launcher.py"\nIndexError: map::at\n', ["triton-on-turing"]),
    "shared memory": (
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 147456, Hardware limit: 101376."
        " Reducing block sizes or `num_stages` may help.\n",
        ["shared-memory"],
    ),
    "cuda:1": (
        "ValueError: Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)\n",
        ["triton-other-device"],
    ),
    "on the CPU": ("RuntimeError: Expected u.is_cuda() to be true, but got false.\n", ["cpu-tensor"]),
    "strides": (
        "RuntimeError: causal_conv1d with channel last layout requires strides (x.stride(0) and x.stride(2)) to be "
        "multiples of 8\n",
        ["conv1d-strides"],
    ),
    "offsets": (
        '  File "/e/mamba_ssm/ops/triton/ssd_chunk_scan.py", line 1288, in _chunk_scan_bwd_dC\n'
        "RuntimeError: CUDA error: an illegal memory access was encountered\n",
        ["offsets-32-bit"],
    ),
    "C compiler": (
        "RuntimeError: Failed to find C compiler. Please specify via CC environment variable or set "
        "triton.knobs.build.impl.\n",
        ["no-c-compiler"],
    ),
    "pixi without a driver": (
        "  × failed to solve the conda requirements of environment 'cu130'\n"
        "  ╰─▶ Virtual package '__cuda >=13' does not match any of the available virtual packages on your machine\n",
        ["no-virtual-cuda"],
    ),
    "two causes: no transformers path, and its reason": (
        f"ImportError: causal_conv1d_cuda.so: undefined symbol: {SYMBOL}\n"
        "The fast path is not available because one of `(selective_state_update)` is None.\n"
        "OSError: [Errno 28] No space left on device\n",
        ["cxx11-abi", "disk-full"],
    ),
}

UNRELATED: dict[str, str] = {
    "pip resolver": "ERROR: Cannot install a==1 and b==2 because these package versions have conflicting dependencies.\n",
    "pip no release": "ERROR: Could not find a version that satisfies the requirement torchvision==9.9 (from versions: 0.1)\n"
    "ERROR: No matching distribution found for torchvision==9.9\n",
    "pip hash": "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n    Expected sha256 1234\n",
    "uv": "  × No solution found when resolving dependencies:\n  ╰─▶ Because you require foo>=2 and foo<2, unsatisfiable.\n",
    "conda": "PackagesNotFoundError: The following packages are not available from current channels:\n  - foo=9\n",
    "pixi manifest": "Error:   × missing field `channels` in table [workspace]\n   ╭─[pixi.toml:1:1]\n",
    "ninja": "ninja: error: build.ninja:12: expected newline, got lexing error\n",
    "gcc": "csrc/main.cpp:12:5: error: 'foo' was not declared in this scope\nerror: command '/usr/bin/g++' failed with exit code 1\n",
    "nvcc": 'csrc/k.cu(31): error: identifier "__hmul3" is undefined\n1 error detected in the compilation of "csrc/k.cu".\n',
    "cmake": 'CMake Error at CMakeLists.txt:4 (find_package): Could not find a package configuration file of "Foo"\n',
    "linker": "/usr/bin/ld: build/a.o: undefined reference to `foo::bar(int)'\ncollect2: error: ld returned 1 exit status\n",
    "pytest": "E       AssertionError: Tensor-likes are not close!\nE       Mismatched elements: 3 / 4096 (0.1%)\nFAILED test_a.py\n",
    "training": "Traceback (most recent call last):\n  File \"train.py\", line 91, in <module>\nKeyError: 'lr_scheduler'\n",
    "device assert": "RuntimeError: CUDA error: device-side assert triggered\nAssertion `t >= 0 && t < n_classes` failed.\n",
    "nccl": "[rank3]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12) ran for 600012 milliseconds\n",
    "shm": "RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that shm is too small.\n",
    "json": "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)\n",
    "hub": "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error. Repository Not Found for url: https://hf/x\n",
    "slurm": "slurmstepd: error: *** JOB 91 ON node3 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n",
    "git": "fatal: Authentication failed for 'https://git.lab.example/repo.git/'\n",
    "tls": "ssl.SSLCertVerificationError: certificate verify failed: self signed certificate in certificate chain\n",
    "rights": "PermissionError: [Errno 13] Permission denied: '/usr/local/lib/python3.10/dist-packages/foo'\n",
    "syntax": "  File \"a.py\", line 3\n    print 'x'\nSyntaxError: Missing parentheses in call to 'print'\n",
    "own module": "ImportError: cannot import name 'build_model' from 'models' (/home/a/models/__init__.py)\n",
    "shapes": "RuntimeError: mat1 and mat2 shapes cannot be multiplied (32x512 and 256x64)\n",
    "another library's symbol": "ImportError: /e/lib/libgdal.so.30: undefined symbol: sqlite3_deserialize\n",
    "another library": "ImportError: libGL.so.1: cannot open shared object file: No such file or directory\n",
    "flash-attn's arguments": "TypeError: fwd(): incompatible function arguments. The following argument types are supported:\n"
    "  File flash_attn/flash_attn_interface.py\n",
    "checkpoint": 'RuntimeError: Error(s) in loading state_dict for MixerModel: Missing key(s): "backbone.norm_f.weight"\n',
    "rust": "error[E0433]: failed to resolve: use of undeclared crate `pyo3`\nerror: can't find Rust compiler\n",
}
