"""The Triton backend, installed as ``fishleg_fast.kernels``: ``device/`` has the kernels, ``host/`` what launches them.

``import fishleg_fast`` imports nothing from here: only those who use Triton need it. ``fishleg_fast/kernels`` is a link
to this folder, for imports from a checkout.
"""
