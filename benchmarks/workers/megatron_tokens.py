"""Lines of JSON to tokens with Megatron's builder of data sets: python megatron_tokens.py IN TOKENIZER OUT

The wheel megatron-core has the builder, not the program preprocess_data.py; what that does with a line is written anew
here: the line is parsed, its text encoded by itself with the library tokenizers, the end added, the document handed on.
"""

import json
import os
import sys

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, as the others
import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer

source, tokenizer, out = sys.argv[1], Tokenizer.from_file(sys.argv[2]), sys.argv[3]
os.makedirs(out, exist_ok=True)
end = tokenizer.token_to_id("<|endoftext|>")
builder = IndexedDatasetBuilder(f"{out}/out.bin", dtype=np.uint16)
with open(source, encoding="utf-8") as file:
    for line in file:
        ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
        ids.append(end)
        builder.add_document(ids, [len(ids)])
builder.finalize(f"{out}/out.idx")
