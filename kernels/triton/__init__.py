"""What the Triton kernels of the ops share; imported on first use, by the dispatcher only.

========================= ==========================================================================
``bits``                  fields of a word, ranges, the epilogue
``schedule``              row order and hub split of a graph
``launch``                launch configurations, argument checks, the debug flag
``gather``                the inner loops over a row's edges
``autotune``              rewrites the launch configurations on the user's own card
``replay``                times of calls as replayed CUDA graphs
========================= ==========================================================================

Kernels and launchers themselves: ``triton.py`` in the folder of each op.  ``tools/aot.py`` compiles them without a GPU.
"""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"Expected the package triton for kernels of an accelerator (got: {error}); pip install 'qgnn_plugin[gpu]', or "
        f"leave QGNN_BACKEND unset"
    ) from error
