#!/usr/bin/env bash
# Compiles one project's CUDA extension; both recipes run it, with their settings in the environment.
set -euo pipefail

# conda-forge keeps the toolkit's headers under targets/, NVIDIA's 11.8 packages under include/.
export CUDA_HOME="${BUILD_PREFIX}"
export CPATH="${PREFIX}/targets/x86_64-linux/include:${PREFIX}/targets/x86_64-linux/include/cccl:${PREFIX}/include:${BUILD_PREFIX}/targets/x86_64-linux/include:${BUILD_PREFIX}/include${CPATH:+:$CPATH}"
export LIBRARY_PATH="${PREFIX}/lib:${PREFIX}/targets/x86_64-linux/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
export MAX_JOBS="${CPU_COUNT}"

# Smaller binaries at no cost in time; the SASS in them is the same. nvcc has it from 12.8 on.
if [ "$(printf '%s\n' 12.8 "${CUDA_RELEASE}" | sort -V | head -n 1)" = 12.8 ]; then
    export NVCC_APPEND_FLAGS="--compress-mode=size"
fi

"${BUILD_PREFIX}/bin/nvcc" --version
"${CXX}" --version | head -n 1

# torch's own check of the host compiler, taught the CUDA releases that it does not know.
"${PYTHON}" "${RECIPE_DIR}/../common/patch_torch.py" "${RECIPE_DIR}/../../patches/torch" "${SP_DIR}"

"${PYTHON}" -m pip install . -vv --no-deps --no-build-isolation --no-index

# An upstream release that silently ships without its kernels must not become a package.
if ! ls "${SP_DIR}/${EXTENSION}".*.so >/dev/null 2>&1; then
    echo "error: ${PKG_NAME} ${PKG_VERSION} was built without ${EXTENSION}" >&2
    exit 1
fi
