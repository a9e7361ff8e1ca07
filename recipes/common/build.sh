#!/usr/bin/env bash
# Compiles one project's CUDA extension; both recipes run it, with their settings in the environment.
set -euo pipefail

case "${target_platform}" in
    linux-64) targets=targets/x86_64-linux ;;
    linux-aarch64) targets=targets/sbsa-linux ;;
    *) echo "error: there is no folder of CUDA's headers known for ${target_platform}" >&2 && exit 1 ;;
esac
# conda-forge keeps the toolkit's headers under targets/, NVIDIA's 11.8 packages under include/. The paths are those
# that compile.sh works with: the compile cache compares this variable too.
export CUDA_HOME="${BUILD_PREFIX}"
export CPATH=".host/${targets}/include:.host/${targets}/include/cccl:.host/include:.build/${targets}/include:.build/include"
export LIBRARY_PATH="${PREFIX}/lib:${PREFIX}/${targets}/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
# For another platform: this machine's Python builds, and answers as the host's does where it is asked about itself; what
# runs in the build is compiled by this machine's compiler.
pip_options=()
native_cxx="${CXX}"
if [ "${build_platform}" != "${target_platform}" ]; then
    mkdir -p "${SRC_DIR}/.tools"
    cp -r "${RECIPE_DIR}/../common/cross" "${SRC_DIR}/.tools/cross"
    export PYTHON="${BUILD_PREFIX}/bin/python" PYTHONPATH="${SRC_DIR}/.tools/cross"
    export _PYTHON_SYSCONFIGDATA_NAME=_sysconfigdata_of_host _PYTHON_HOST_PLATFORM="${target_platform}"
    pip_options=(--prefix "${PREFIX}")
    native_cxx="${CXX_FOR_BUILD}"
fi
costs="${RECIPE_DIR}/../compile-costs.txt"
# Upstream's kernels are in fewer and larger files, which were measured, too.
measured="${EXTENSION}${KERNELS:+@${KERNELS}}"
MAX_JOBS="$("${PYTHON}" "${RECIPE_DIR}/../common/jobs.py" "${costs}" "${measured}" "${CPU_COUNT}")"
export MAX_JOBS
# The engine sets it to this build's folder, for the linker to take as rpath; replaced afterwards, it would still be
# in the binary's build ID. These are the rpaths of the recipe.
export LD_RUN_PATH='$ORIGIN/../..:$ORIGIN/torch/lib'

# Activation may give bare names, and a bare name is the system's for whoever looks it up with another PATH, such as the
# compile cache.
CC="$(command -v "${CC}")"
CXX="$(command -v "${CXX}")"
export CC CXX

# Reached through links, no folder of this build shows in what is compiled (see compile.sh).
ln -sfn "${PREFIX}" "${SRC_DIR}/.host"
ln -sfn "${BUILD_PREFIX}" "${SRC_DIR}/.build"
ln -sfn "${SP_DIR}" "${SRC_DIR}/.site"
ln -sfn "$(dirname "$(find "${PREFIX}/include" -maxdepth 2 -path '*/python3*/Python.h')")" "${SRC_DIR}/.python"
mkdir -p "${SRC_DIR}/.tools"
# Temporary files beside the objects have constant names, and names of temporary files get into the objects.
# Uncompressed GPU code makes a package four times smaller: zstd sees what the kernels have in common.
# As arguments, not in NVCC_APPEND_FLAGS, so that the compile cache sees them; torch passes -ccbin itself.
unset NVCC_PREPEND_FLAGS NVCC_APPEND_FLAGS
compile="${RECIPE_DIR}/../common/compile.sh"
printf '#!/bin/sh\nexec "%s" "%s" -objtemp -no-compress "$@"\n' "${compile}" "${BUILD_PREFIX}/bin/nvcc" >"${SRC_DIR}/.tools/nvcc"
# conda-forge's GCC adds the build environment to the rpath of everything it links, by its specs file; beside that file
# lie the specs without (see compile.sh).
specs="$("${CXX}" -print-file-name=builtin.specs)"
[ -f "${specs}" ] || specs=""
sysroot="$("${CXX}" -print-sysroot)"
[ -d "${sysroot}" ] || sysroot=""
printf '#!/bin/sh\nexport LINK_SPECS="%s" LINK_SYSROOT="%s"\nexec "%s" "%s" "$@"\n' \
    "${specs}" "${sysroot}" "${compile}" "${CXX}" >"${SRC_DIR}/.tools/g++"
# torch writes build.ninja and starts the first ninja on PATH; this one orders the files before it starts the real one.
order="${RECIPE_DIR}/../common/order.py"
mkdir -p "${SRC_DIR}/.tools/path"
printf '#!/bin/sh\n[ ! -f build.ninja ] || "%s" "%s" "%s" "%s" build.ninja || exit\nexec "%s" "$@"\n' \
    "${PYTHON}" "${order}" "${costs}" "${measured}" "${BUILD_PREFIX}/bin/ninja" >"${SRC_DIR}/.tools/path/ninja"
chmod +x "${SRC_DIR}/.tools/nvcc" "${SRC_DIR}/.tools/g++" "${SRC_DIR}/.tools/path/ninja"
export PATH="${SRC_DIR}/.tools/path:${PATH}"
export PYTORCH_NVCC="${SRC_DIR}/.tools/nvcc"

# Objects that the compile cache has from before nvcc's compilers were run like this hold other names of symbols: its key
# knows of both files.
identity="${RECIPE_DIR}/../common/constant_identity.cpp"
stage="${RECIPE_DIR}/../common/nvcc_stage.sh"
"${native_cxx}" -shared -fPIC -o "${SRC_DIR}/.tools/constant_identity.so" "${identity}" -ldl
export CCACHE_EXTRAFILES="${identity}:${stage}"
# A g++ of the build environment names its own headers by their absolute paths.
CCACHE_BASEDIR="$(cd "${BUILD_PREFIX}/.." && pwd -P)"
export CCACHE_BASEDIR
for tool in "${BUILD_PREFIX}/bin/cudafe++" "${BUILD_PREFIX}/nvvm/bin/cicc"; do
    # A second build in the same environment finds the script of the first.
    if [ "$(head -c 2 "${tool}")" != '#!' ]; then
        mv -f "${tool}" "${tool}.real"
    fi
    printf '#!/bin/sh\nexec "%s" "%s" "$@"\n' "${stage}" "${tool}" >"${tool}"
    chmod +x "${tool}"
done

# For GPUs that this nvcc does not know; its requirement says when (see newer_ptxas.sh).
if [ -x "${BUILD_PREFIX}/bin/newer-ptxas" ]; then
    newer="${RECIPE_DIR}/../common/newer_ptxas.sh"
    for tool in nvcc ptxas fatbinary; do
        if [ "$(head -c 2 "${BUILD_PREFIX}/bin/${tool}")" != '#!' ]; then
            mv -f "${BUILD_PREFIX}/bin/${tool}" "${BUILD_PREFIX}/bin/${tool}.real"
        fi
        install -m 755 "${newer}" "${BUILD_PREFIX}/bin/${tool}"
    done
    CCACHE_EXTRAFILES="${CCACHE_EXTRAFILES}:${BUILD_PREFIX}/bin/newer-ptxas:${BUILD_PREFIX}/bin/nvcc.real"
fi

"${BUILD_PREFIX}/bin/nvcc" --version
"${CXX}" --version | head -n 1
export CXX="${SRC_DIR}/.tools/g++"

# torch's own check of the host compiler, taught the CUDA releases that it does not know.
"${PYTHON}" "${RECIPE_DIR}/../common/patch_torch.py" "${RECIPE_DIR}/../../patches/torch" "${SP_DIR}" \
    "${BUILD_PREFIX}/.unpatched-torch"

# Debug information of the one C++ file is all that would tell where it was compiled.
export CFLAGS="${CFLAGS:-} -g0"
export CXXFLAGS="${CXXFLAGS:-} -g0"

# pixi builds again in the environments of its last build: what that one installed must not get into this package.
rm -rf "${SP_DIR:?}/${PKG_NAME//-/_}" "${SP_DIR}/${PKG_NAME//-/_}"-*.dist-info "${SP_DIR}/${EXTENSION}".*.so

# The wheel is unpacked at once: not worth compressing.
printf '[bdist_wheel]\ncompression = stored\n' >"${SRC_DIR}/.tools/setup.cfg"
export DIST_EXTRA_CONFIG="${SRC_DIR}/.tools/setup.cfg"

# The .cu files of these two projects need so little of torch that they are compiled without its headers, which makes one
# object of each for every torch (see cu_headers/README.md). Reached through a link, as all folders.
ln -sfn "$(cd "${RECIPE_DIR}/../common" && pwd -P)" "${SRC_DIR}/.common"
export CU_HEADERS="${SRC_DIR}/.common/cu_headers"

"${PYTHON}" -m pip install . -vv --no-deps --no-build-isolation --no-index --no-compile ${pip_options[@]+"${pip_options[@]}"}

# pip notes the work folder; bytecode is made with hashes and paths below the prefix, so that it is always the same.
for record in "${SP_DIR}/${PKG_NAME//-/_}"-*.dist-info/RECORD; do
    sed -i '/direct_url\.json/d' "${record}"
    rm -f "$(dirname "${record}")/direct_url.json"
done
# A constant seed, for sets among the constants are written in the order of their hashes.
PYTHONHASHSEED=0 "${PYTHON}" -m compileall -q --invalidation-mode unchecked-hash -s "${PREFIX}" -p / "${SP_DIR}/${PKG_NAME//-/_}"

# An upstream release that silently ships without its kernels must not become a package.
if ! ls "${SP_DIR}/${EXTENSION}".*.so >/dev/null 2>&1; then
    echo "error: ${PKG_NAME} ${PKG_VERSION} was built without ${EXTENSION}" >&2
    exit 1
fi
