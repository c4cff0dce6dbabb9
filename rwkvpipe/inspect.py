"""Say what is in a checkpoint: family, sizes, dtype, parameters, vocabulary.

python -m rwkvpipe.inspect results/demo/base/model.safetensors --json
"""

import json
import sys
from collections import Counter

from rwkvpipe.base.errors import Parser, run
from rwkvpipe.weights import store


def describe(path: str) -> dict:
    """Facts about a checkpoint or an adapter; the data of safetensors is not read."""
    tensors, metadata = store.describe(path)
    kinds = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    facts = {
        "file": str(path),
        "dtype": ", ".join(name for name, _ in kinds.most_common()),
        "tensors": len(tensors),
        "parameters": sum(value.numel() for value in tensors.values()),
    }
    if "lora" in metadata:
        settings = json.loads(metadata["lora"])
        full = sorted({name for name in tensors if not name.endswith((".lora_A", ".lora_B"))})
        return facts | {"adapter": settings | {"full_tensors": full}, "base_sha256": metadata.get("base", "")}
    config = store.sizes(path)
    return facts | {"vocabulary": config.vocab_size} | config.model_dump(exclude={"vocab_size"})


def main(argv: list[str] | None = None) -> None:
    """Print the facts as a table, or as JSON."""
    parser = Parser(prog="rwkvpipe.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a .safetensors or .pth file, or a folder that holds one")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    given = parser.parse_args(argv)
    facts = describe(given.file)
    if given.json:
        sys.stdout.write(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        sys.stdout.write(f"{name:<{width}}  {shown}\n")


if __name__ == "__main__":
    run(main)
