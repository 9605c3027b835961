"""The public functions and the rows, one file per family; registry.py lists the rows."""
