"""Largest sizes that configuration files and checkpoints may ask for.

A wrong or hostile file is rejected before memory is allocated.
"""

MAX_IMAGE_SIDE = 4096  # px
MAX_CHANNELS = 1024  # of the first convolution of a U-Net or discriminator; published: 64
MAX_IDENTITIES = 200_000  # classes of a checkpoint; the largest public training set has under 5,000
# Down-samplings of a U-Net: its width doubles over the first levels and must reach its maximum, and
# 2 ** 10 px is the smallest image with 10.
NUM_DOWNS = (5, 10)
