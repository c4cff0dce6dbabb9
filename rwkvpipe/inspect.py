"""Say what is in a checkpoint: format, layout, family, sizes, dtype, parameters, vocabulary.

python -m rwkvpipe.inspect results/demo/base/model.safetensors --json
"""

import json
import sys
from collections import Counter

from rwkvpipe.base.config import LoraConfig
from rwkvpipe.base.errors import Parser, run
from rwkvpipe.base.strict import check_json
from rwkvpipe.model.family import contradiction, released
from rwkvpipe.weights import store
from rwkvpipe.weights.kinds import PARTS
from rwkvpipe.weights.source import open_source
from rwkvpipe.weights.states import states_of


def describe(path: str) -> dict:
    """Facts about a checkpoint or an adapter; the tensors' data is not read."""
    source = open_source(path)
    like = source.tensors.like
    kinds = Counter(str(value.dtype).removeprefix("torch.") for value in like.values())
    facts = {
        "file": str(source.path),
        "format": source.format,
        "bytes": sum(file.stat().st_size for file in source.files),
        "dtype": ", ".join(name for name, _ in kinds.most_common()),
        "tensors": len(like),
        "parameters": sum(value.numel() for value in like.values()),
    }
    if "lora" in source.metadata:
        settings = check_json(LoraConfig, source.metadata["lora"], path).model_dump()
        full = sorted({name for name in like if name.rpartition(".")[2] not in PARTS})
        facts |= {"adapter": settings | {"full_tensors": full}, "base_sha256": source.metadata.get("base", "")}
        return facts | ({"base_name": source.metadata["base_name"]} if "base_name" in source.metadata else {})
    if (states := states_of(source)) is not None:
        shapes = ", ".join(sorted({" x ".join(map(str, value.shape)) for value in states.like.values()}))
        return facts | {"initial_states": f"of {len(states)} layers, {shapes}; merge them into their model"}
    found = store.open_model(path)
    facts |= {"layout": found.layout, "never_read": sum(found.tensors.like[n].numel() for n in found.unread)}
    facts |= {"sizes_of": released(found.config) or "no released model"}
    if what := contradiction(path, found.config):
        facts |= {"odd": what}
    return facts | {"vocabulary": found.config.vocab_size} | found.config.model_dump(exclude={"vocab_size"})


def main(argv: list[str] | None = None) -> None:
    """Print the facts as a table, or as JSON."""
    parser = Parser(prog="rwkvpipe.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a .pth, .safetensors or .gguf file, an index of shards, or a folder")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    given = parser.parse_args(argv)
    facts = describe(given.file)
    if given.json:
        sys.stdout.write(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        sys.stdout.write(f"{name:<{width}}  {shown}\n")


if __name__ == "__main__":
    run(main)
