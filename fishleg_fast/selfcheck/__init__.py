"""Whether a backend's kernels compute what they should on this device: checked once, in a process of its own, and kept.

``cases`` has the blocks and quantities that are compared, ``child`` compares them, ``examination`` asks a child and
survives it, ``dispatch`` makes ops of what passed, ``tuning`` finds which of them are fastest, ``cache`` keeps both for
the next process under the device and versions that ``identity`` tells.
"""
