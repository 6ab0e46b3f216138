"""What packed layers are made of: ranges, products of packed matrices, linear maps and kin."""
