"""The settings of a vocabulary: which kind, and what each kind is made of."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rwkvpipe.base.strict import Count, Name, Place, Strict

LEAST = 257  # ids of a bpe: every byte, and the end of a document
NO_CLASS = "is not module:Class, such as my_tokenizers:Letters"
# which kinds of tokenizer a key is for
TOKENIZER_FIELDS = {
    "offset": ("bytes",),
    "size": ("integer",),
    "path": ("world", "trie", "bpe"),
    "corpora": ("trie", "bpe", "integer"),
    "vocab_size": ("bpe",),
    "sample": ("bpe",),
    "end": ("bpe",),
    "import_path": ("own",),
    "options": ("own",),
}


class TokenizerConfig(Strict):
    """A vocabulary."""

    kind: Literal["bytes", "integer", "world", "trie", "bpe", "own"]
    """Single bytes; whole numbers; RWKV World; longest match in a vocabulary; byte pair encoding; a class of yours."""
    offset: Annotated[int, Field(ge=0, le=1, strict=True)] = 1
    """bytes: id of byte 0. With 1, id 0 ends a document; with 0 nothing does."""
    size: Annotated[Count, Field(le=2**31 - 1)] | None = None
    """integer: numbers run from 0 to size - 1 (id = number + 1, id 0 ends a document). Left out, they run as far
    as in corpora."""
    path: Place | None = None
    """trie: a vocabulary file in RWKV-LM's format, or a URL; bpe: a tokenizer.json; world: left out, the file in the
    package rwkv."""
    corpora: tuple[Name, ...] = ()
    """trie: or the corpora whose characters become the vocabulary; bpe: or those it is learned from; integer: or those
    whose largest number is the last."""
    vocab_size: Annotated[Count, Field(ge=LEAST)] | None = None
    """bpe, learned: how many ids at most; id 0 ends a document, every byte has one."""
    sample: Count = 64
    """bpe, learned: from so many megabytes of text at most, taken evenly from all of the corpora."""
    end: str | None = None
    """bpe, from a file: the token that ends a document; left out, what it is usually called."""
    import_path: str | None = None
    """own: `module:Class`. Here alone code of yours runs: rwkvpipe/tokenizer/own.py says what the class must have."""
    options: dict[str, Any] = {}
    """own: what the class is made with."""

    @model_validator(mode="after")
    def _fields(self):
        for field, kinds in TOKENIZER_FIELDS.items():
            default = type(self).model_fields[field].default
            if self.kind not in kinds and getattr(self, field) != default:
                raise ValueError(f"{field} belongs to kind {' or '.join(kinds)}, this is {self.kind}")
        if self.kind == "integer" and (self.size is None) == (not self.corpora):
            raise ValueError("kind integer needs one of size (how many different numbers there are) and corpora")
        if self.kind in ("trie", "bpe") and (self.path is None) == (not self.corpora):
            raise ValueError(f"kind {self.kind} needs one of path and corpora")
        if self.kind == "bpe" and (self.vocab_size is None) != (not self.corpora):
            raise ValueError("vocab_size belongs to a bpe learned from corpora, and that needs it")
        if not self.corpora and self.sample != type(self).model_fields["sample"].default:
            raise ValueError("sample belongs to a bpe learned from corpora")
        if self.corpora and self.end is not None:
            raise ValueError("end belongs to a bpe from a file; one learned here ends documents with id 0")
        if self.kind == "own" and self.import_path is None:
            raise ValueError("kind own needs import_path: module:Class")
        if self.import_path is not None and not is_class(self.import_path):
            raise ValueError(f"import_path: {self.import_path!r} {NO_CLASS}")
        return self


def is_class(import_path: str) -> bool:
    """Whether a text may be `module:Class`."""
    module, _, name = import_path.partition(":")
    return all(word.isidentifier() for word in (*module.split("."), name))
