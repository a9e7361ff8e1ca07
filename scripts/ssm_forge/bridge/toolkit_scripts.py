"""The texts that CUDA toolkit packages bring beside NVIDIA's files: nvcc's profile, and what activates it."""

from __future__ import annotations

from ssm_forge.base.platforms import Platform

# For str.format: where the headers and libraries lie below the prefix.
PROFILE = """\
TOP              = $(_HERE_)/..

CICC_PATH        = $(TOP)/nvvm/bin
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice

LD_LIBRARY_PATH += $(TOP)/lib:
PATH            += $(CICC_PATH):$(_HERE_):

INCLUDES        +=  "-I$(TOP)/{root}include" $(_SPACE_)
SYSTEM_INCLUDES +=  "-isystem" "$(TOP)/{root}include/cccl" $(_SPACE_)

LIBRARIES        =+ $(_SPACE_) "-L$(TOP)/{root}lib/stubs" "-L$(TOP)/{root}lib"

CUDAFE_FLAGS    +=
PTXAS_FLAGS     +=
"""

# The last of all scripts: it takes the compiler and adds to the flags that the others have set. What it added is taken
# out again, whatever was put back meanwhile.
_ACTIVATE = """\
if [ "${CONDA_BUILD:-0}" = 1 ]; then
    _forge_host="$PREFIX/@TARGET@" _forge_own="$BUILD_PREFIX/@TARGET@"
else
    _forge_host="$CONDA_PREFIX/@TARGET@" _forge_own="$CONDA_PREFIX/@TARGET@"
fi
export SSM_FORGE_NVCC_INCLUDES=" -I$_forge_host/include -I$_forge_own/include"
export SSM_FORGE_NVCC_LIBRARIES=" -L$_forge_host/lib -L$_forge_host/lib/stubs"
export CPPFLAGS="${CPPFLAGS:-}$SSM_FORGE_NVCC_INCLUDES" CFLAGS="${CFLAGS:-}$SSM_FORGE_NVCC_INCLUDES"
export CXXFLAGS="${CXXFLAGS:-}$SSM_FORGE_NVCC_INCLUDES" LDFLAGS="${LDFLAGS:-}$SSM_FORGE_NVCC_LIBRARIES"
if [ -n "${NVCC_PREPEND_FLAGS+x}" ]; then export SSM_FORGE_BACKUP_NVCC_PREPEND_FLAGS="$NVCC_PREPEND_FLAGS"; fi
if [ -n "${CUDAARCHS+x}" ]; then export SSM_FORGE_BACKUP_CUDAARCHS="$CUDAARCHS"; fi
export NVCC_PREPEND_FLAGS="${NVCC_PREPEND_FLAGS:+$NVCC_PREPEND_FLAGS }-ccbin=${CXX:-c++}" CUDAARCHS=all-major
unset _forge_host _forge_own
"""

DEACTIVATE = """\
for _forge_name in CPPFLAGS CFLAGS CXXFLAGS LDFLAGS; do
    _forge_added="$SSM_FORGE_NVCC_INCLUDES"
    if [ "$_forge_name" = LDFLAGS ]; then _forge_added="$SSM_FORGE_NVCC_LIBRARIES"; fi
    eval "_forge_value=\\${$_forge_name:-}"
    case "$_forge_value" in
        "$_forge_added") unset "$_forge_name" ;;
        *"$_forge_added"*) export "$_forge_name=${_forge_value%%"$_forge_added"*}${_forge_value#*"$_forge_added"}" ;;
    esac
done
for _forge_name in NVCC_PREPEND_FLAGS CUDAARCHS; do
    eval "_forge_value=\\${SSM_FORGE_BACKUP_$_forge_name-}"
    unset "$_forge_name" "SSM_FORGE_BACKUP_$_forge_name"
    if [ -n "$_forge_value" ]; then export "$_forge_name=$_forge_value"; fi
done
unset _forge_name _forge_added _forge_value SSM_FORGE_NVCC_INCLUDES SSM_FORGE_NVCC_LIBRARIES
"""


def activate(target: Platform) -> str:
    """What activates an nvcc that compiles for ``target``."""
    return _ACTIVATE.replace("@TARGET@", target.targets)
