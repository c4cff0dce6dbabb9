"""What a corpus may be: settings of documents and of how they become tokens."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from rwkvpipe.base.column import Columns
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.strict import Count, Name, Place, Strict, Whole

# one path, or several: the tag keeps errors to the form that was meant
Paths = Annotated[
    Annotated[Place, Tag("one")] | Annotated[tuple[Place, ...], Tag("several")],
    Discriminator(lambda value: "several" if isinstance(value, list | tuple) else "one"),
]
# what templates may make, by format
OWN = {"text": {"text"}} | dict.fromkeys(("chat", "seq2seq", "question"), {"question", "answer"})
OWN["pairs"] = {"prompt", "chosen", "rejected"}
PLAIN = ("question", "pairs")  # formats that become rows of JSON, not tokens


def check_columns(columns: dict[str, str], templates: dict[str, str]) -> None:
    """Raise ValueError where columns are none; it names the column."""
    try:
        Columns(columns, templates)
    except ConfigError as error:
        raise ValueError(str(error)) from None


class CorpusConfig(Strict):
    """Documents, and how they become tokens."""

    path: Paths | None = None
    """A file (JSONL, JSON, parquet, Arrow, text, numpy; lines and texts also as .gz and .zst), a folder or a glob of
    such files, a data set's folder (save_to_disk), or a URL of one file; of format binidx also several of them."""
    synthetic: str | None = None
    """Or the name of a made corpus."""
    count: Count | None = None
    """synthetic: how many documents."""
    seed: Whole | None = None
    """synthetic: left out, the run's seed."""
    tokenizer: Name | None = None
    """Its vocabulary; only formats question and pairs go without."""
    format: Literal["text", "chat", "seq2seq", "question", "pairs", "array", "binidx"] = "text"
    """text: documents; chat: turns, only the assistant's are learned; seq2seq: sources with targets, for an encoder and
    a decoder; question: prompts with answers, for grpo;
    pairs: prompts with an answer that is chosen and one that is rejected, for dpo;
    array: whole numbers from a .npy file, one row a document; binidx: tokens of .bin and .idx pairs, used where they
    lie."""
    join: Literal["link", "copy"] = "link"
    """binidx: several pairs are read where they lie, through one index (link), or copied into one pair, which other
    programs read too (copy)."""
    limit: Count | None = None
    """Only so many documents, for a trial."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens at a row that cannot be used: the end, naming file and line; or it is left out and listed."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether a document equal to one before it, in either part, is left out; both ways they are counted."""
    field: str = "text"
    """text, array: the column that holds the document; a path such as meta.body or parts[0] may stand there."""
    columns: dict[str, str] = {}
    """Our name (question, answer, options, label, messages; prompt, chosen, rejected) to the file's: a column, or a
    path into it, such as paragraphs[*].qas[*].question, which makes a record of each item."""
    templates: dict[str, str] = {}
    """Our name (also text) to a text that puts columns together: question: "{context} {ask}"."""
    template: str | None = None
    """chat: a Jinja template (a file, or a hub's folder) that lays talks out; left out, the form of released models."""
    replies: Literal["all", "last"] = "all"
    """chat: whether all that the assistant says is learned, or its last turn alone."""
    eod: bool = False
    """chat: end every talk with the id that ends texts, learned, too; refused where the vocabulary has none."""
    labels: Literal["auto", "internal", "preshifted"] = "auto"
    """chat: whether labels of tokenised rows are those of the same positions or of the next ones; auto: the first
    thousand rows show it, and those that fit both say nothing."""
    pairing: Literal["rows", "split", "copy"] = "rows"
    """seq2seq: rows hold both sides; or a text is divided, by lot between a quarter and three quarters (split), or
    stands on both sides (copy)."""
    cut: Count | None = None
    """array: a one-dimensional array is cut into documents of this length; seq2seq with pairing split or copy: a text
    is cut into windows of so many ids, each a pair."""
    valid: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the documents held out for the validation loss (chosen by each document's digest)."""
    valid_path: Paths | None = None
    """Or a file of its own for it."""

    @property
    def masked(self) -> bool:
        """Whether masks lie beside its tokens once it is packed."""
        return self.format in ("chat", "seq2seq")

    @model_validator(mode="after")
    def _source(self):
        if (self.path is None) == (self.synthetic is None):
            raise ValueError("give one of path and synthetic")
        if (self.synthetic is None) != (self.count is None):
            raise ValueError("count belongs to synthetic, and synthetic needs it")
        if self.synthetic is None and self.seed is not None:
            raise ValueError("seed belongs to synthetic")
        if (self.format in PLAIN) != (self.tokenizer is None):
            raise ValueError("every format but question and pairs needs a tokenizer, and those take none")
        if self.format == "pairs" and self.synthetic is not None:
            raise ValueError("no pairs are made here; give path")
        if self.template is not None and (self.format != "chat" or "://" in self.template):
            raise ValueError("template is a local file or folder, and belongs to format chat")
        if self.format != "chat" and (self.replies != "all" or self.eod or self.labels != "auto"):
            raise ValueError("replies, eod and labels belong to format chat")
        if self.format != "seq2seq" and self.pairing != "rows":
            raise ValueError("pairing belongs to format seq2seq")
        if self.cut is not None and self.format != "array" and (self.pairing == "rows" or self.cut < 2):
            raise ValueError("cut belongs to format array, and, from 2 on, to pairing split and copy")
        if self.field != "text" and (self.format not in ("text", "array") or "text" in self.templates):
            raise ValueError("field belongs to formats text and array, and to no template of the text")
        if self.columns and self.format not in ("chat", "seq2seq", *PLAIN) and "text" not in self.templates:
            raise ValueError("columns belongs to formats chat, seq2seq, question and pairs, and to templates.text")
        if self.templates and not set(self.templates) <= (own := OWN.get(self.format, set())):
            raise ValueError(f"templates of format {self.format}: {', '.join(sorted(own)) or 'none'}")
        if self.synthetic is not None and (self.limit or self.on_error != "stop" or self.templates):
            raise ValueError("limit, on_error and templates belong to path; count limits a made corpus")
        check_columns(self.columns | ({"text": self.field} if self.field != "text" else {}), self.templates)
        if self.valid and self.valid_path:
            raise ValueError("give one of valid and valid_path")
        if self.format == "binidx":
            odd = [name for name in ("synthetic", "limit", "valid") if getattr(self, name)]
            odd += [
                name for name, free in (("on_error", "stop"), ("duplicates", "keep")) if getattr(self, name) != free
            ]
            if odd or "://" in f"{self.path}{self.valid_path}":
                raise ValueError(
                    f"a binidx pair is local and used as it is: {', '.join(odd) or 'an address'} cannot be"
                )
        several = any(isinstance(path, tuple) for path in (self.path, self.valid_path))
        if self.format != "binidx" and (self.join != "link" or several):
            raise ValueError("join, and a list of paths, belong to format binidx; a folder or a glob means many files")
        if () in (self.path, self.valid_path):
            raise ValueError("path: a list without a path")
        if self.format in PLAIN and self.duplicates != "keep":
            raise ValueError("duplicates belongs to corpora that become tokens")
        if self.format in PLAIN and (self.valid or self.valid_path):
            raise ValueError(f"format {self.format} has no validation part; make a benchmark of what is held out")
        return self
