"""Triton kernels of the ops, one module per op; imported on first use, by the dispatcher only.

========================= ==========================================================================
``bits``                  what kernels share: fields of a word, ranges, the epilogue
``schedule``              row order and hub split of a graph
``launch``                launch configurations, argument checks, the debug flag
one module per op         kernel and host launcher, named like the op
``gather``                the inner loops over a row's edges
``aot``, ``sass``         compilation without a GPU and what the binaries show
``autotune``              rewrites the launch configurations on the user's own card
``replay``                times of calls as replayed CUDA graphs
========================= ==========================================================================
"""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"Expected the package triton for kernels of an accelerator (got: {error}); pip install 'qgnn_plugin[gpu]', or "
        f"leave QGNN_BACKEND unset"
    ) from error
