"""FishLeg for PyTorch: natural-gradient descent with a learned inverse Fisher matrix, at the cost of a first-order
optimizer.
"""

from ._version import __version__ as __version__
from .likelihoods import BernoulliLikelihood as BernoulliLikelihood
from .likelihoods import CategoricalLikelihood as CategoricalLikelihood
from .likelihoods import GaussianLikelihood as GaussianLikelihood
from .likelihoods import Likelihood as Likelihood
from .modules import FishBatchNorm1d as FishBatchNorm1d
from .modules import FishBatchNorm2d as FishBatchNorm2d
from .modules import FishBatchNorm3d as FishBatchNorm3d
from .modules import FishConv2d as FishConv2d
from .modules import FishEmbedding as FishEmbedding
from .modules import FishGroupNorm as FishGroupNorm
from .modules import FishLayerNorm as FishLayerNorm
from .modules import FishLinear as FishLinear
from .modules import FishModule as FishModule
from .modules import FishMultiheadAttention as FishMultiheadAttention
from .modules import FishRMSNorm as FishRMSNorm
from .optimizer import FishLeg as FishLeg
from .structures import DiagKron as DiagKron
from .structures import Diagonal as Diagonal
from .structures import Kron as Kron
from .structures import SumKron as SumKron
