"""One run on a GPU that answers everything: ``python3 -m benchmarks.gpu --out DIR``.

It starts on a machine that has PyTorch and Triton and no package index, and needs no installation: the folders of the
tree are laid out as the installed package in a scratch folder.  What a machine lacks beyond that (PyG and what it
needs) is left out with a reason, or comes along as wheels (``--wheels DIR``).

================ ===================================================================================================
``__main__``     the command: starts the sections in order of worth, one process each, within the limit of the whole
``layout``       lays the tree out; wheels; the environment of the processes.  ``record``: one JSON row per measurement
``sections``     what is run, in which order, with which limits
``worker``       the process of a section: runs its units, survives what fails, says where the device was lost
``precompile``   fills Triton's cache with what the sections launch, many processes at once, without the device
``timing``       replayed CUDA graphs, host time, peak memory
``checks``       every op and model against its reference; ``large``: sampled rows of a large graph
``kernels``      ``aggregate`` and ``linear`` against cuSPARSE, cuBLAS and copies
``models``       inference against PyG's ways, small graphs, a training step
``profiles``     profiler tables, and hardware counters where ``ncu`` is there.  ``tuning``: a few launch settings
``report``       the table of a run
================ ===================================================================================================

Only ``worker`` and what it runs import PyTorch.  With ``--dry-run`` everything runs without a card, on tiny graphs
under Triton's interpreter; such times mean nothing and the rows say so.
"""
