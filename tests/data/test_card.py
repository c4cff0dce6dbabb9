"""What a corpus is: equal documents are told, however many there are."""

import numpy as np

from rwkvpipe.data import card


def test_digests_are_known_again_also_from_files(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "HELD", 500)
    lots, known, seen = np.random.default_rng(0), set(), card.Seen(tmp_path)
    for _ in range(100):
        digests = lots.integers(0, 20000, lots.integers(0, 400)).astype("<u8")
        fresh = seen.fresh(digests).tolist()
        for digest, new in zip(digests.tolist(), fresh, strict=True):
            assert new == (digest not in known)
            known.add(digest)
    assert len(seen.laid) > 3 and sum(map(len, seen.runs)) < 2000
