"""``backend="triton"``: the ops of ``backends.reference``, for whole lists of blocks in a handful of launches.

Launches for all blocks together, whatever their number (each dtype of parameters and precision apart):

    θ step   Kron, Kron(scale=True), SumKron: 3; 2 with normalize=None and nothing else. DiagKron: 5; among those
             2 more. Diagonal: 1 more. normalize="spectral": 19 more
    Q u      Kron, Kron(scale=True), SumKron: 2. DiagKron: 4; among those 2 more. Diagonal: 1
    λ step   Kron, SumKron: 4 (5 without learn_scale), 2 more with precondition. Diagonal: 2 more
    refresh  Kron, Kron(scale=True), SumKron: 1 (P and S). DiagKron: 1 (padded copies of its factors)
    inner    1

The reference's functions do the work, within the same step and its one decision, of: blocks so large that torch.mm is
faster (``host.configurations.library_product``), but for their P and S; λ of Kron(scale=True) and DiagKron;
diagonal and block-diagonal factors; structures of custom layers; float64; low-rank gradients in Q u and λ steps;
parameters whose columns two strides do not find. Polar factors of those blocks are the kernels' all the same, but of
float64's.

CUDA graphs: with ``capturable``, after a step or two outside, and without an update of λ: replays never learn λ again,
which steps outside the graph do. What a graph reads is kept until the process ends.

Host work: a plan (``host/plans.py``) has the launches of a list of blocks, ready to be made, and is found again by what
it depends on, which is compared at every step. What changes from step to step, gradients' addresses and
hyperparameters, is told in one small table, copied when it differs from the last (``host/tables/step_table.py``): at
most one upload a θ step, λ step or Q u. ``python -m benchmarks.gpu.host_work`` measures it.

Importing this module imports Triton; ``availability`` says first whether it is there.
"""

from ..backends.reference import average_moments as average_moments
from ..backends.reference import natural_step as natural_step
from ..backends.reference import start_kfac as start_kfac
from .availability import available as available
from .host.inner import inner as inner
from .host.learning.step import lambda_step as lambda_step
from .host.qv import qv as qv
from .host.refresh import refresh as refresh
from .host.theta.step import theta_step as theta_step
