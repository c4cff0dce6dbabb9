"""rwkvpipe's side of the tokenizer's comparison: argv is the text, the engine (`list` behind it: to lists), a share."""

import sys

from tokenize_loop import serve

from rwkvpipe.tokenizer.memo import Memo
from rwkvpipe.tokenizer.world import WorldTokenizer, load_world

engine, _, form = sys.argv[2].partition(" ")


def load():
    """The tokenizer with the engine that is asked for, nothing remembered."""
    entries = load_world().entries
    found = WorldTokenizer(entries, "plain" if engine == "numpy" else engine)
    if engine == "numpy":
        found.__dict__["_engine"] = Memo(found.ids, found._part)
    found.encode("made before anything is timed" * 20)
    return found.encode if form == "list" or engine == "numpy" else found.encode_array


serve(load)
