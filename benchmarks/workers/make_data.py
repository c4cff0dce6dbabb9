"""Packs a file the way RWKV-LM's make_data.py does, written anew from its description: python make_data.py IN OUT

All lines in memory, shuffled, written out again; each encoded by the reference trie, decoded again and compared; uint16
tokens with 0 after each document, and Megatron's index. The package rwkv brings the trie.
"""

import json
import random
import struct
import sys
from pathlib import Path

import numpy as np
import rwkv
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

source, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
tokenizer = TRIE_TOKENIZER(str(Path(rwkv.__file__).parent / "rwkv_vocab_v20230424.txt"))
with open(source, encoding="utf-8") as file:
    lines = [line.strip() for line in file if line.strip()]
random.seed(1)
random.shuffle(lines)
with open(out / "shuffled.jsonl", "w", encoding="utf-8") as file:
    for line in lines:
        file.write(line + "\n")
sizes = []
with open(out / "shuffled.jsonl", encoding="utf-8") as file, open(out / "out.bin", "wb") as tokens:
    for line in file:
        text = json.loads(line)["text"]
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            raise SystemExit("the text does not come back")
        ids.append(0)
        tokens.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))
        sizes.append(len(ids))
with open(out / "out.idx", "wb") as file:
    count = len(sizes)
    file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1))
    file.write(np.array(sizes, dtype=np.int32).tobytes())
    file.write((np.concatenate(([0], np.cumsum(sizes)[:-1])) * 2).astype(np.int64).tobytes())
    file.write(np.arange(count + 1, dtype=np.int64).tobytes())
