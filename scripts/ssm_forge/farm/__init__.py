"""Many packages on many machines: Snakemake distributes jobs that each make one package.

In: an expression over the build matrix, an executor (this machine, Slurm, Kubernetes, any command that submits), and a
folder that all machines see: checkout, cache and channel. Out: the packages in the channel, a receipt for each job, a
report. A receipt's name holds the digest of what the job was made from, so what has one is not done again; it is
believed only as long as the channel has the very package that it names.

:mod:`cells` selects, :mod:`inputs` says what a package is made from, :mod:`jobs` makes the graph with what each job
needs (:mod:`costs`), :mod:`engine` runs Snakemake, :mod:`worker` is what it starts on a node, :mod:`estimate` plays a
farm through without running it, :mod:`run` puts them in order and :mod:`report` tells what came of it.
"""
