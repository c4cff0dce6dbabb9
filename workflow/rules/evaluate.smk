# runs the model and keeps its answers; grading is a step of its own, so a changed grader regrades in seconds
rule bench:
    input:
        model=lambda wildcards: plan.model(wildcards.subject),
        tokenizer=lambda wildcards: plan.vocabulary(wildcards.subject),
        questions="<results>/shared/benchmarks/{benchmark}.jsonl",
    output:
        answers="<results>/{run}/{subject}/bench/{benchmark}.answers.jsonl",
    log:
        "<results>/{run}/{subject}/log/bench-{benchmark}.log",
    benchmark:
        "<results>/{run}/{subject}/log/bench-{benchmark}.jsonl"
    conda:
        ENVIRONMENT
    threads: THREADS["bench"]
    resources:
        gpu=GPU,
        rows=64,
    params:
        spec=lambda wildcards: spec(settled.benchmarks[wildcards.benchmark]),
        code=plan.code("bench"),
        tokenizer=tokenizer_folder,
        threads=computing("bench"),
    shell:
        "exec python -m rwkvpipe.launch --threads {params.threads} {resources.gpu} bench --code {params.code:q} --spec"
        " {params.spec:q} --model {input.model:q} --tokenizer {params.tokenizer:q} --questions {input.questions:q}"
        " --rows {resources.rows} --out {output.answers:q} > {log:q} 2>&1"


rule score:
    input:
        answers="<results>/{run}/{subject}/bench/{benchmark}.answers.jsonl",
        questions="<results>/shared/benchmarks/{benchmark}.jsonl",
    output:
        score="<results>/{run}/{subject}/bench/{benchmark}.json",
        samples="<results>/{run}/{subject}/bench/{benchmark}.samples.jsonl",
    log:
        "<results>/{run}/{subject}/log/score-{benchmark}.log",
    benchmark:
        "<results>/{run}/{subject}/log/score-{benchmark}.jsonl"
    conda:
        ENVIRONMENT
    params:
        spec=lambda wildcards: spec(settled.benchmarks[wildcards.benchmark]),
        code=plan.code("score"),
    shell:
        "exec python -m rwkvpipe.score --code {params.code:q} {input.answers:q} --spec {params.spec:q} --questions"
        " {input.questions:q} --out {output.score:q} > {log:q} 2>&1"


rule generate:
    input:
        model=lambda wildcards: plan.model(wildcards.subject),
        tokenizer=lambda wildcards: plan.vocabulary(wildcards.subject),
        prompts=lambda wildcards: plan.prompts(wildcards.subject),
    output:
        samples="<results>/{run}/{subject}/samples.jsonl",
    log:
        "<results>/{run}/{subject}/log/generate.log",
    benchmark:
        "<results>/{run}/{subject}/log/generate.jsonl"
    conda:
        ENVIRONMENT
    threads: THREADS["generate"]
    resources:
        gpu=GPU,
    params:
        spec=lambda wildcards: spec(plan.samples(wildcards.subject)),
        code=plan.code("generate"),
        tokenizer=tokenizer_folder,
        threads=computing("generate"),
    shell:
        "exec python -m rwkvpipe.launch --threads {params.threads} {resources.gpu} generate --code {params.code:q}"
        " --model {input.model:q} --tokenizer {params.tokenizer:q} --spec {params.spec:q} --out {output.samples:q} >"
        " {log:q} 2>&1"
