"""The peers' side of the tokenizer's comparison: argv is the text, `rust` or `trie`, a share of the documents."""

import importlib.metadata
import sys

from tokenize_loop import serve


def load():
    """What turns text into ids: the Rust package, or the trie that RWKV-LM and the package rwkv have."""
    if sys.argv[2] == "rust":
        import pyrwkv_tokenizer

        return pyrwkv_tokenizer.RWKVTokenizer().encode
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    path = importlib.metadata.distribution("rwkv").locate_file("rwkv/rwkv_vocab_v20230424.txt")
    return TRIE_TOKENIZER(str(path)).encode


serve(load)
