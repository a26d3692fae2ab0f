"""Fuzzing: inputs that are damaged, forged or of wrong types, tried by the thousand in processes of their own.

A driver (one module a kind of input) makes a *recipe* from a random number generator: plain JSON that says how the
input differs from a good one. Running a recipe may succeed or raise a PydflashError; any other exception, the end of
the process and a trial of more than 12 seconds are faults. ``python -m tests.fuzz`` runs many and prints a table. What
once was a fault is kept as a recipe in ``seeds`` and replayed by the suite.
"""
