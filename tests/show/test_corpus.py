"""The report shows what a corpus is, as far as corpus.json says it."""

from rwkvpipe.show.corpus import corpus_card

CORPUS = {
    "train": {"documents": 12000, "tokens": 345678},
    "valid": {"documents": 3, "tokens": 99},
    "bytes_per_token": 3.456,
    "empty": 2,
    "skipped": 3,
    "reasons": {"`text` is null": 2, "not UTF-8": 1},
    "vocab_size": 65536,
    "tokenizer": '{"vocab.txt": "0123456789abcdef0123"}',
    "duplicates": 7,
    "duplicates_dropped": 7,
    "lengths": [{"from": 0, "to": 0, "documents": 0}, {"from": 1, "to": 1, "documents": 5},
                {"from": 2, "to": 3, "documents": 10}],
    "longest": [{"tokens": 3, "origin": "a<b.jsonl:7"}],
    "inputs": [{"file": f"{n}.jsonl", "sha256": "0" * 64} for n in range(25)],
}  # fmt: skip


def test_a_corpus_is_told_with_its_lengths_as_bars():
    page = corpus_card(CORPUS)
    out = "2 empty; 3 rows that could not be used, listed in skipped.jsonl; 7 equal to one before them"
    for part in ("12,000, 345,678", "3.46", out, "a&lt;b.jsonl:7", "5 more are in"):
        assert part in page
    assert page.count('<i style="width:') == 2 and "width:50.00%" in page and "2 to 3" in page
    assert "3 rows that could not be used" in page and "2 times `text` is null; 1 times not UTF-8" in page
    assert "65,536 ids; digest vocab.txt 0123456789abcdef..." in page


def test_a_corpus_that_says_little_or_nonsense_has_no_card():
    assert corpus_card({}) == "" == corpus_card({"train": {"tokens": 1}})
    assert "nothing" in corpus_card({"lengths": [None, {}], "inputs": None, "longest": [3], "valid": 5})


def test_a_mix_tells_of_each_corpus_and_of_all_together(tmp_path, monkeypatch):
    import json

    from rwkvpipe.show.evidence import Evidence, Story

    monkeypatch.chdir(tmp_path)
    paths = {}
    for name, documents in (("stories (75.0%)", 3), ("code (25.0%)", 4)):
        paths[name] = f"{name[:4]}.json"
        (tmp_path / paths[name]).write_text(json.dumps({"train": {"documents": documents, "tokens": 10}}))
    subject = {"name": "base", "kind": "pretrain", "folder": "x", "data": ", ".join(paths), "mix": paths}
    evidence = Evidence(Story.model_validate({"run": "r", "config": {}, "subjects": [subject], "steps": []}))
    base = evidence.story.subjects[0]
    assert evidence.corpus(base) == {"documents": 7, "tokens": 20}
    assert list(evidence.corpora(base)) == list(paths)
