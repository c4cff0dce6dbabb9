"""Megabytes a CPU second of the library tokenizers' own batches: python batch_tokens.py IN TOKENIZER"""

import json
import os
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, as the others
from tokenizers import Tokenizer

with open(sys.argv[1], encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
tokenizer = Tokenizer.from_file(sys.argv[2])
began = time.process_time()
for start in range(0, len(texts), 1000):
    tokenizer.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
print(json.dumps({"cpu_seconds": time.process_time() - began}))
