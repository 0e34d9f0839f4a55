"""FishLeg for PyTorch: natural-gradient descent with a learned inverse Fisher matrix, at the cost of a first-order
optimizer.
"""

from ._version import __version__ as __version__
from .algebra.structures.base import Structure as Structure
from .algebra.structures.diagkron import DiagKron as DiagKron
from .algebra.structures.diagonal import Diagonal as Diagonal
from .algebra.structures.kron import Kron as Kron
from .algebra.structures.sumkron import SumKron as SumKron
from .likelihoods import BernoulliLikelihood as BernoulliLikelihood
from .likelihoods import CategoricalLikelihood as CategoricalLikelihood
from .likelihoods import GaussianLikelihood as GaussianLikelihood
from .likelihoods import Likelihood as Likelihood
from .model.modules import FishBatchNorm1d as FishBatchNorm1d
from .model.modules import FishBatchNorm2d as FishBatchNorm2d
from .model.modules import FishBatchNorm3d as FishBatchNorm3d
from .model.modules import FishConv2d as FishConv2d
from .model.modules import FishEmbedding as FishEmbedding
from .model.modules import FishGroupNorm as FishGroupNorm
from .model.modules import FishLayerNorm as FishLayerNorm
from .model.modules import FishLinear as FishLinear
from .model.modules import FishModule as FishModule
from .model.modules import FishMultiheadAttention as FishMultiheadAttention
from .model.modules import FishRMSNorm as FishRMSNorm
from .optimizer import FishLeg as FishLeg
