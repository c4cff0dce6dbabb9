"""Lines of JSON to tokens by datatrove, runs in the peer's environment: python datatrove_tokens.py IN TOKENIZER OUT"""

import os
import sys
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, as the others
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

source, tokenizer, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
steps = [
    JsonlReader(str(source.parent), glob_pattern=source.name),
    DocumentTokenizer(out, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>", shuffle_documents=False),
]
LocalPipelineExecutor(pipeline=steps, tasks=1, logging_dir=f"{out}/logs", skip_completed=False).run()
