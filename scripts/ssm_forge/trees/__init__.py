"""Source trees: any project whose setup.py builds a CUDAExtension, with our toolchain, checks and provenance.

In: a folder, an archive, an URL or a git repository. Out: a conda package in the channel, from which a wheel can be
made.

========  ====================================================================================================
source    gets the tree, reads its name and version, refuses what can't be built
recipe    the recipe that builds it, made from that of mamba-ssm
build     builds it, checks what came out, says what it was made from
target    what it is built for: a variant, or an environment's torch
install   puts it into an environment
job       what the task ``build`` does: a tree, or the two projects; their wheels where those are wanted
========  ====================================================================================================
"""
