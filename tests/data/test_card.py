"""What a corpus is: equal documents are told, however many there are."""

import numpy as np
import pytest

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


@pytest.mark.parametrize(
    "error, why",
    [
        ("a b/c.jsonl:12: `text` is null, text is needed", "`text` is null, text is needed"),
        ("c.jsonl:7: `text` is int 57, text is needed", "`text` is int, text is needed"),
        ("c.jsonl:7: `text` is dict {'a': 1}, text is needed", "`text` is dict, text is needed"),
        ("c.parquet: row 3: `text` is null, text is needed", "`text` is null, text is needed"),
        ("c.json:1: record 3: no `a.b`; the row has x", "no `a.b`"),
        ("c.jsonl:7: not UTF-8 at byte 9 of the line; save it as UTF-8", "not UTF-8 at byte # of the line"),
        ("c.jsonl:1: the vocabulary has no 'b' (U+0062), character 2; learn",
         "the vocabulary has no ... (U+#), character #"),
    ],
)  # fmt: skip
def test_reasons_are_told_without_places_and_values(error, why):
    assert card.reason(error) == why
