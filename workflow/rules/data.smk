rule vocab:
    input:
        files=lambda wildcards: plan.vocabulary_files(wildcards.tokenizer),
    output:
        tokenizer="<results>/shared/tokenizers/{tokenizer}/tokenizer.json",
    log:
        "<results>/shared/log/vocab-{tokenizer}.log",
    benchmark:
        "<results>/shared/log/vocab-{tokenizer}.jsonl"
    wildcard_constraints:
        tokenizer=plan.tokenizers_of("bytes", "integer", "own"),
    conda:
        ENVIRONMENT
    params:
        spec=lambda wildcards: spec(settled.tokenizers[wildcards.tokenizer]),
        made=made_corpora,
        code=plan.code("vocab"),
        folder=subpath(output.tokenizer, parent=True),
    shell:
        "exec python -m rwkvpipe.vocab --code {params.code:q} {input.files:q} --spec {params.spec:q} {params.made:q}"
        " --out {params.folder:q} > {log:q} 2>&1"


use rule vocab as vocab_trie with:
    output:
        tokenizer="<results>/shared/tokenizers/{tokenizer}/tokenizer.json",
        words="<results>/shared/tokenizers/{tokenizer}/vocab.txt",
    wildcard_constraints:
        tokenizer=plan.tokenizers_of("trie", "world"),


use rule vocab as vocab_bpe with:
    output:
        tokenizer="<results>/shared/tokenizers/{tokenizer}/tokenizer.json",
        merges="<results>/shared/tokenizers/{tokenizer}/bpe.json",
    wildcard_constraints:
        tokenizer=plan.tokenizers_of("bpe"),


rule pack:
    input:
        file=lambda wildcards: plan.corpus_file(wildcards.corpus),
        valid=lambda wildcards: plan.valid_file(wildcards.corpus),
        template=lambda wildcards: plan.template_file(wildcards.corpus),
        tokenizer=lambda wildcards: plan.tokenizer_files(settled.corpora[wildcards.corpus].tokenizer),
    output:
        info="<results>/shared/corpora/{corpus}/corpus.json",
        tokens=multiext("<results>/shared/corpora/{corpus}/", "train.bin", "train.idx", "valid.bin", "valid.idx"),
    log:
        "<results>/shared/log/pack-{corpus}.log",
    benchmark:
        "<results>/shared/log/pack-{corpus}.jsonl"
    wildcard_constraints:
        corpus=plan.packed_as("plain"),
    conda:
        ENVIRONMENT
    threads: lambda wildcards: 1 if settled.corpora[wildcards.corpus].synthetic else 8
    resources:
        bpe_engine="tokenizers",
    params:
        spec=lambda wildcards: spec(plan.corpus(wildcards.corpus)),
        code=plan.code("pack"),
        source=corpus_source,
        tokenizer=tokenizer_folder,
        valid=held_out,
        folder=subpath(output.info, parent=True),
    shell:
        "exec python -m rwkvpipe.pack --code {params.code:q} {params.source:q} --spec {params.spec:q} --tokenizer"
        " {params.tokenizer:q} {params.valid:q} --workers {threads} --bpe-engine {resources.bpe_engine:q}"
        " --out {params.folder:q} > {log:q} 2>&1"


use rule pack as pack_masked with:
    output:
        info="<results>/shared/corpora/{corpus}/corpus.json",
        tokens=multiext("<results>/shared/corpora/{corpus}/", "train.bin", "train.idx", "valid.bin", "valid.idx"),
        masks=multiext("<results>/shared/corpora/{corpus}/", "train.mask", "valid.mask"),
    wildcard_constraints:
        corpus=plan.packed_as("masked"),


# pairs that are read where they lie, through one index
use rule pack as pack_spread with:
    output:
        info="<results>/shared/corpora/{corpus}/corpus.json",
        tokens=multiext("<results>/shared/corpora/{corpus}/", "train.parts", "train.idx", "valid.parts", "valid.idx"),
    wildcard_constraints:
        corpus=plan.packed_as("spread"),


rule questions:
    input:
        file=lambda wildcards: plan.benchmark_file(wildcards.benchmark),
    output:
        questions="<results>/shared/benchmarks/{benchmark}.jsonl",
    log:
        "<results>/shared/log/questions-{benchmark}.log",
    benchmark:
        "<results>/shared/log/questions-{benchmark}.jsonl"
    conda:
        ENVIRONMENT
    params:
        source=benchmark_source,
        spec=lambda wildcards: spec(settled.benchmarks[wildcards.benchmark]),
        seed=lambda wildcards: plan.seed(wildcards.benchmark),
        code=plan.code("questions"),
    shell:
        "exec python -m rwkvpipe.questions --code {params.code:q} {params.source:q} --spec {params.spec:q} --seed"
        " {params.seed} --out {output.questions:q} > {log:q} 2>&1"


use rule questions as questions_corpus with:
    input:
        file=lambda wildcards: plan.corpus_file(wildcards.corpus),
    output:
        questions="<results>/shared/corpora/{corpus}.jsonl",
    log:
        "<results>/shared/log/questions-corpus-{corpus}.log",
    benchmark:
        "<results>/shared/log/questions-corpus-{corpus}.jsonl"
    wildcard_constraints:
        corpus=plan.corpora_of("question", "pairs"),
    params:
        source=corpus_source,
        spec=lambda wildcards: spec(plan.corpus(wildcards.corpus)),
        seed=lambda wildcards: plan.corpus(wildcards.corpus).seed or 0,
        code=plan.code("questions"),
