"""Makes walks.npy (sequences x length) and recording.npy (one long row): directions that turn by habit.

python examples/sequences.py
"""

import numpy as np


def walk(draw: np.random.Generator, length: int) -> np.ndarray:
    """Directions (length,) from 0 to 35: each walk turns by a step of its own, with a little noise."""
    turn, noise = draw.integers(1, 6), draw.choice([-1, 0, 1], size=length, p=[0.1, 0.8, 0.1])
    return (draw.integers(36) + np.cumsum(turn + noise)) % 36


if __name__ == "__main__":
    draw = np.random.default_rng(1)
    np.save("walks.npy", np.stack([walk(draw, 96) for _ in range(800)]))
    np.save("recording.npy", np.concatenate([walk(draw, int(draw.integers(50, 200))) for _ in range(600)]))
