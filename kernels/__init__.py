"""Bit layout, graph plans, references and kernels (imported as ``qgnn_plugin.kernels``)."""
