"""What the tokenizer programs share: they answer `parity`, `encode` and `memory` with a line of JSON each."""

import hashlib
import json
import resource
import sys
import time


def held() -> float:
    """Megabytes of memory now (ru_maxrss would be the parent's too)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def serve(load) -> None:
    """Answer questions about what `load()` gives, a function of text to ids. `cold` is `encode` by a new one."""
    share = int(sys.argv[3])
    with open(sys.argv[1], encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    some, mine = documents[::8], documents[::share]
    size = sum(len(document.encode()) for document in mine)
    before = held()
    encode = load()
    for line in sys.stdin:
        if line.strip() == "parity":
            ids = hashlib.sha256()
            for document in some:
                ids.update(json.dumps([int(number) for number in encode(document)]).encode())
            answer = {"digest": ids.hexdigest()}
        elif line.strip() in ("encode", "cold"):
            encode = load() if line.strip() == "cold" else encode
            began = time.process_time()
            for document in mine:
                encode(document)
            answer = {"megabytes_per_second": size / (time.process_time() - began) / 1e6}
        else:
            answer = {"megabytes_added": held() - before}
        print(json.dumps(answer), flush=True)
