"""Seeded inputs of each family, for the checks, the tests and the benchmark."""
