"""What a conversion costs and gains, measured: comparisons, reports, and bit widths under a budget."""
