"""What a stage learned from, on demand: counts, how long documents are, what was left out, digests."""

import json

from rwkvpipe.show.markup import Html, count, el, facts, fold

LEFT_OUT = {
    "empty": "empty",
    "skipped": "rows that could not be used, listed in skipped.jsonl",
    "duplicates_dropped": "equal to one before them",
}


def _lengths(bins: list[dict]) -> Html:
    """How many documents are how long, as bars: each bin is twice as wide as the one before."""
    bins = [each for each in bins if isinstance(each, dict) and isinstance(each.get("documents"), int)]
    while bins and not bins[0]["documents"]:
        bins = bins[1:]
    if not bins:
        return Html("")
    most = max(each["documents"] for each in bins)
    rows = [
        el(
            "li",
            el("span", f"{count(each['from'])} to {count(each['to'])}" if each["to"] > each["from"] else each["to"]),
            el("span", el("i", style=f"width:{100 * each['documents'] / most:.2f}%"), klass="bar"),
            el("span", count(each["documents"])),
        )
        for each in bins
    ]
    return el("div", el("h4", "Documents by their length in tokens"), el("ol", *rows, klass="lengths"))


def _short(tokenizer: object) -> str:
    """The digest of a tokenizer's files: of its one file that, of several one for each."""
    try:
        digests = json.loads(str(tokenizer))
    except ValueError:
        return str(tokenizer)  # one that has no files has a name
    pairs = digests.items() if isinstance(digests, dict) else ()
    return ", ".join(f"{name} {str(value)[:16]}..." for name, value in pairs) or str(tokenizer)


def corpus_card(corpus: dict, name: str = "The corpus") -> Html:
    """All that corpus.json tells; nothing where it tells little."""
    if not isinstance(corpus.get("lengths"), list):
        return Html("")
    parts = {part: corpus.get(part) if isinstance(corpus.get(part), dict) else {} for part in ("train", "valid")}
    told = {
        f"{title} documents, tokens": ", ".join(count(parts[part].get(name, 0)) for name in ("documents", "tokens"))
        for part, title in (("train", "Training"), ("valid", "Held-out"))
    }
    if corpus.get("bytes_per_token"):
        told["Bytes a token"] = f"{corpus['bytes_per_token']:.2f}"
    out = [f"{count(corpus[name])} {what}" for name, what in LEFT_OUT.items() if corpus.get(name)]
    told["Left out"] = "; ".join(out) or "nothing"
    reasons = corpus.get("reasons") if isinstance(corpus.get("reasons"), dict) else {}
    if reasons:
        told["Why rows could not be used"] = "; ".join(f"{count(n)} times {why}" for why, n in reasons.items())
    told["Equal to one before"] = count(corpus.get("duplicates", 0))
    longest = [each for each in corpus.get("longest") or () if isinstance(each, dict)][:3]
    if longest:
        told["Longest"] = "; ".join(f"{count(each.get('tokens', 0))} tokens ({each.get('origin')})" for each in longest)
    if corpus.get("tokenizer"):
        told["Tokenizer"] = f"{count(corpus.get('vocab_size', 0))} ids; digest {_short(corpus['tokenizer'])}"
    inputs = [each for each in corpus.get("inputs") or () if isinstance(each, dict)]
    shown = [el("li", el("code", each.get("file")), " ", el("small", each.get("sha256", ""))) for each in inputs[:20]]
    more = [el("li", f"{count(len(inputs) - 20)} more are in corpus.json")] if len(inputs) > 20 else []
    files = [el("h4", "Files"), el("ul", *shown, *more)] if inputs else []
    return fold(name, facts(told), _lengths(corpus["lengths"]), *files)
