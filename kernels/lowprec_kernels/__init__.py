"""Raw tensor maths: one folder an operation, each with a reference, a fast kernel, and cases for tests and benchmarks.

Nothing here knows autograd, modules or configuration, and nothing imports ``lowprec``.
"""
