"""Packed message passing without kernels by hand: traced, by relation, by blocks of rows."""
