"""scale_sae: sparse autoencoders trained on language-model activations, sharded exactly over many ranks."""

from scale_sae.saes.inference import SAE as SAE
