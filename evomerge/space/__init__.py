"""What may vary in a search: genomes and the recipes they stand for.

A gene is one number of a merge (a weight, a density, whether a block of layers is there), in its
own units; decoding copies the genes into a recipe, clipped to their bounds.
"""

from evomerge.space.config import SPACE_KEYS, Bounds, SpaceConfig, StackConfig
from evomerge.space.evolve import GenomeConfig
from evomerge.space.genes import Gene, Genome
from evomerge.space.space import SearchSpace

__all__ = [
    "SPACE_KEYS",
    "Bounds",
    "Gene",
    "Genome",
    "GenomeConfig",
    "SearchSpace",
    "SpaceConfig",
    "StackConfig",
]
