"""``lowprec bench train``: whole training steps beside other libraries', each run in a process of its own.

Importing this package imports nothing: in its process a peer that changes transformers has to come first.
"""
