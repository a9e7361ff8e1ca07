#!/usr/bin/env bash
# Compiles any project whose setup.py builds a CUDAExtension, for the capabilities that were asked for, whatever it
# hard-codes, and with the toolchain of causal-conv1d and mamba-ssm.
set -euo pipefail

# That toolchain is set up by their own script, all of it before pip runs.
common="${RECIPE_DIR}/../common/build.sh"
end='# The wheel is unpacked at once'
if ! grep -q "^${end}" "${common}"; then
    echo "error: recipes/common/build.sh has no line '${end}' any more, where the set-up of the toolchain ends" >&2
    exit 1
fi
. <(sed "/^${end}/,\$d" "${common}")
# What its files cost is not known: what was chosen for files of average size.
export MAX_JOBS="${CPU_COUNT}"

tools="${SRC_DIR}/.tools"
for tool in nvcc g++; do
    mv "${tools}/${tool}" "${tools}/path/forge-${tool}"
    printf '#!/bin/sh\nexec "%s" %s "%s" "$@"\n' "${RECIPE_DIR}/own_flags.sh" "${tool}" "${tools}/path/forge-${tool}" \
        >"${tools}/${tool}"
    chmod +x "${tools}/${tool}"
done
export COMPILED="${tools}/compiled"

# torch's headers include those of CUDA's libraries. An environment's torch has them in the wheels beside it.
for folder in "${SP_DIR}"/nvidia/*/include; do
    [ ! -d "${folder}" ] || CPATH="${CPATH}:.site${folder#"${SP_DIR}"}"
done

# What setup.py would do beside compiling: with no network it can't take a wheel that somebody else has compiled, and it
# writes nowhere but into the folders of this build.
export FORCE_CUDA=1 MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
export GIT_ALLOW_PROTOCOL=none http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9
export HOME="${tools}/home" TMPDIR="${tools}/tmp" GUARD_REPORT="${tools}/guard.txt"
export GUARD_FOLDERS="${SRC_DIR}:${PREFIX}:${BUILD_PREFIX}"
newest="${TORCH_CUDA_ARCH_LIST##*;}"
export GUARD_CAPABILITY="${newest%+PTX}"
mkdir -p "${HOME}" "${TMPDIR}"

status=0
PYTHONPATH="${RECIPE_DIR}/guard" "${PYTHON}" -m pip install . -vv \
    --no-deps --no-build-isolation --no-index --no-compile --no-cache-dir --disable-pip-version-check || status=$?

refused() {
    # Shown to the user as it is (see ssm_forge.build.run.hint).
    echo "error: setup.py $1" >&2
    exit 1
}
if wrote="$(grep -m 1 '^write ' "${GUARD_REPORT}" 2>/dev/null)"; then
    refused "wants to write ${wrote#write }, which is outside of its folder; a build may not."
fi
if [ ! -s "${COMPILED}" ]; then
    if asked="$(grep -m 1 '^network ' "${GUARD_REPORT}" 2>/dev/null)"; then
        refused "downloads from ${asked#network } instead of compiling; a build has no network."
    fi
    [ "${status}" -ne 0 ] || refused "compiled no CUDA source: it left its extension out."
fi
[ "${status}" -eq 0 ] || exit "${status}"

# pip notes the work folder.
for record in "${SP_DIR}"/*.dist-info/RECORD; do
    if grep -q '/direct_url\.json,' "${record}"; then
        sed -i '/direct_url\.json/d' "${record}"
        rm -f "$(dirname "${record}")/direct_url.json"
    fi
done
