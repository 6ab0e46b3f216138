"""Values that are computed when they are asked for: results of packed layers, and their weights as floats."""
