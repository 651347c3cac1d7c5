"""Lease engines for tests: real programs, fetched, started and stopped."""
