"""From what a caller says about a graph to what kernels need of it: plans, normalization, caches, and samples side by
side."""
