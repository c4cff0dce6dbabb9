"""Random numbers of one text: a stream of its own, whatever is written beside it."""

import numpy as np

from rwkvpipe.base.errors import ConfigError

BITS = (31, 24, 8)  # of prompt, sample and stage in a number


def number(prompt: int, sample: int, stage: int = 1) -> int:
    """The number of a text, of 63 bits: that of its prompt, which sample of it, and which stage of the answer (1 on).

    Raises ConfigError for what does not fit in.
    """
    found = 0
    for value, bits, what in zip((prompt, sample, stage), BITS, ("prompt", "sample", "stage"), strict=True):
        if not 0 <= value < 1 << bits:
            raise ConfigError(f"{what} {value}: numbers of texts are 0 to {(1 << bits) - 1}; ask for fewer at a time")
        found = found << bits | value
    return found


class Lot:
    """Numbers in [0, 1), of 53 bits, one after the other.

    Philox with the settings' seed and the text's number as its key of 128 bits, so that no two texts share a stream;
    a generator of PyTorch would look at 32 bits of a seed, and not see the prompt.
    """

    def __init__(self, seed: int, prompt: int, sample: int):
        key = np.array([seed % 2**64, number(prompt, sample)], dtype=np.uint64)
        self._source = np.random.Philox(key=key)

    def draw(self, count: int) -> list[float]:
        """The next ones."""
        return ((self._source.random_raw(count) >> np.uint64(11)) * 2.0**-53).tolist()
