"""Triton kernels, installed as ``fishleg_fast.kernels``: one op, one file.

``import fishleg_fast`` imports nothing from here; a backend imports the kernels that it runs, so that only
those who use Triton need it. ``fishleg_fast/kernels`` is a link to this folder, for imports from a checkout.
"""
