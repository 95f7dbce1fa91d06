"""Raw tensor maths: one folder an operation, each with a reference, a fast kernel, and the cases that tests and benchmarks share.

Nothing here knows autograd, modules or configuration, and nothing imports ``lowprec``.
"""
