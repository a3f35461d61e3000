"""scale_sae: sparse autoencoders trained on language-model activations, sharded exactly over many ranks."""

from scale_sae.saes import *  # noqa: F403
from scale_sae.saes import __all__ as __all__
