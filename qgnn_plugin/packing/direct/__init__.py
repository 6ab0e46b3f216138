"""The short way of packed layers on few rows: one compiled call or a few."""
