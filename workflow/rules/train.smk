rule settings:
    output:
        settings="<results>/{run}/{stage}/settings.json",
    log:
        "<results>/{run}/{stage}/log/settings.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda wildcards: canonical(plan.settings(wildcards.stage)),
        code=plan.code("settings"),
    shell:
        "exec python -m rwkvpipe.settings --code {params.code:q} --spec {params.spec:q} --out {output.settings:q} >"
        " {log:q} 2>&1"


rule init:
    input:
        settings="<results>/{run}/{stage}/settings.json",
        tokenizer=lambda wildcards: plan.vocabulary(wildcards.stage),
    output:
        weights="<results>/{run}/{stage}/init.safetensors",
    log:
        "<results>/{run}/{stage}/log/init.log",
    benchmark:
        "<results>/{run}/{stage}/log/init.jsonl"
    wildcard_constraints:
        stage=plan.only(fresh=True),
    conda:
        ENVIRONMENT
    params:
        code=plan.code("init"),
        tokenizer=tokenizer_folder,
    shell:
        "exec python -m rwkvpipe.init --code {params.code:q} {input.settings:q} --tokenizer {params.tokenizer:q}"
        " --out {output.weights:q} > {log:q} 2>&1"


rule pretrain:
    input:
        settings="<results>/{run}/{stage}/settings.json",
        model=lambda wildcards: plan.start(wildcards.stage),
        data=lambda wildcards: plan.data(wildcards.stage),
    output:
        weights="<results>/{run}/{stage}/model.safetensors",
        config="<results>/{run}/{stage}/config.json",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    log:
        "<results>/{run}/{stage}/log/pretrain.log",
    benchmark:
        "<results>/{run}/{stage}/log/pretrain.jsonl"
    wildcard_constraints:
        stage=plan.only("pretrain", lora=False, best=False),
    conda:
        ENVIRONMENT
    threads: THREADS["pretrain"]
    resources:
        gpu=GPU,
        micro_batch=micro_batch,
    params:
        code=plan.code("pretrain"),
        data=packed_folders,
        knobs=knobs,
        threads=training("pretrain"),
    shell:
        "exec python -m rwkvpipe.launch --threads {params.threads} {resources.gpu} pretrain --code {params.code:q}"
        " {input.settings:q} --model {input.model:q} --data {params.data:q} --micro-batch {resources.micro_batch}"
        " {params.knobs} --out {output.weights:q} > {log:q} 2>&1"


use rule pretrain as pretrain_lora with:
    output:
        weights="<results>/{run}/{stage}/adapter.safetensors",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    wildcard_constraints:
        stage=plan.only("pretrain", lora=True, best=False),


use rule pretrain as pretrain_best with:
    output:
        weights="<results>/{run}/{stage}/model.safetensors",
        best="<results>/{run}/{stage}/best.safetensors",
        config="<results>/{run}/{stage}/config.json",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    wildcard_constraints:
        stage=plan.only("pretrain", lora=False, best=True),


use rule pretrain as pretrain_lora_best with:
    output:
        weights="<results>/{run}/{stage}/adapter.safetensors",
        best="<results>/{run}/{stage}/best_adapter.safetensors",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    wildcard_constraints:
        stage=plan.only("pretrain", lora=True, best=True),


rule sft:
    input:
        settings="<results>/{run}/{stage}/settings.json",
        model=lambda wildcards: plan.start(wildcards.stage),
        data=lambda wildcards: plan.data(wildcards.stage),
    output:
        weights="<results>/{run}/{stage}/model.safetensors",
        config="<results>/{run}/{stage}/config.json",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    log:
        "<results>/{run}/{stage}/log/sft.log",
    benchmark:
        "<results>/{run}/{stage}/log/sft.jsonl"
    wildcard_constraints:
        stage=plan.only("sft", lora=False, best=False),
    conda:
        ENVIRONMENT
    threads: THREADS["sft"]
    resources:
        gpu=GPU,
        micro_batch=micro_batch,
    params:
        code=plan.code("sft"),
        data=packed_folders,
        knobs=knobs,
        threads=training("sft"),
    shell:
        "exec python -m rwkvpipe.launch --threads {params.threads} {resources.gpu} sft --code {params.code:q}"
        " {input.settings:q} --model {input.model:q} --data {params.data:q} --micro-batch {resources.micro_batch}"
        " {params.knobs} --out {output.weights:q} > {log:q} 2>&1"


use rule sft as sft_lora with:
    output:
        weights="<results>/{run}/{stage}/adapter.safetensors",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    wildcard_constraints:
        stage=plan.only("sft", lora=True, best=False),


use rule sft as sft_best with:
    output:
        weights="<results>/{run}/{stage}/model.safetensors",
        best="<results>/{run}/{stage}/best.safetensors",
        config="<results>/{run}/{stage}/config.json",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    wildcard_constraints:
        stage=plan.only("sft", lora=False, best=True),


use rule sft as sft_lora_best with:
    output:
        weights="<results>/{run}/{stage}/adapter.safetensors",
        best="<results>/{run}/{stage}/best_adapter.safetensors",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    wildcard_constraints:
        stage=plan.only("sft", lora=True, best=True),


rule dpo:
    input:
        settings="<results>/{run}/{stage}/settings.json",
        model=lambda wildcards: plan.start(wildcards.stage),
        tokenizer=lambda wildcards: plan.vocabulary(wildcards.stage),
        data=lambda wildcards: plan.data(wildcards.stage),
    output:
        weights="<results>/{run}/{stage}/model.safetensors",
        config="<results>/{run}/{stage}/config.json",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    log:
        "<results>/{run}/{stage}/log/dpo.log",
    benchmark:
        "<results>/{run}/{stage}/log/dpo.jsonl"
    wildcard_constraints:
        stage=plan.only("dpo", lora=False),
    conda:
        ENVIRONMENT
    threads: THREADS["dpo"]
    resources:
        gpu=GPU,
        micro_batch=micro_batch,
    params:
        code=plan.code("dpo"),
        tokenizer=tokenizer_folder,
        knobs=knobs,
        threads=training("dpo"),
    shell:
        "exec python -m rwkvpipe.launch --threads {params.threads} {resources.gpu} dpo --code {params.code:q}"
        " {input.settings:q} --model {input.model:q} --tokenizer {params.tokenizer:q} --data {input.data:q}"
        " --micro-batch {resources.micro_batch} {params.knobs} --out {output.weights:q} > {log:q} 2>&1"


use rule dpo as dpo_lora with:
    output:
        weights="<results>/{run}/{stage}/adapter.safetensors",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    wildcard_constraints:
        stage=plan.only("dpo", lora=True),


rule grpo:
    input:
        settings="<results>/{run}/{stage}/settings.json",
        model=lambda wildcards: plan.start(wildcards.stage),
        tokenizer=lambda wildcards: plan.vocabulary(wildcards.stage),
        data=lambda wildcards: plan.data(wildcards.stage),
        judges=lambda wildcards: plan.judges(wildcards.stage),
    output:
        weights="<results>/{run}/{stage}/model.safetensors",
        config="<results>/{run}/{stage}/config.json",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    log:
        "<results>/{run}/{stage}/log/grpo.log",
    benchmark:
        "<results>/{run}/{stage}/log/grpo.jsonl"
    wildcard_constraints:
        stage=plan.only("grpo", lora=False),
    conda:
        ENVIRONMENT
    threads: THREADS["grpo"]
    resources:
        gpu=GPU,
        micro_batch=micro_batch,
    params:
        code=plan.code("grpo"),
        tokenizer=tokenizer_folder,
        knobs=knobs,
        threads=training("grpo"),
    shell:
        "exec python -m rwkvpipe.launch --threads {params.threads} {resources.gpu} grpo --code {params.code:q}"
        " {input.settings:q} --model {input.model:q} --tokenizer {params.tokenizer:q} --data {input.data:q}"
        " --micro-batch {resources.micro_batch} {params.knobs} --out {output.weights:q} > {log:q} 2>&1"


use rule grpo as grpo_lora with:
    output:
        weights="<results>/{run}/{stage}/adapter.safetensors",
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    wildcard_constraints:
        stage=plan.only("grpo", lora=True),


# no stage of its own: whoever needs the weights of a stage with an adapter makes Snakemake merge it
rule merge:
    input:
        model=lambda wildcards: plan.start(wildcards.stage),
        adapter="<results>/{run}/{stage}/adapter.safetensors",
    output:
        model="<results>/{run}/{stage}/model.safetensors",
        config="<results>/{run}/{stage}/config.json",
    log:
        "<results>/{run}/{stage}/log/merge.log",
    benchmark:
        "<results>/{run}/{stage}/log/merge.jsonl"
    wildcard_constraints:
        stage=plan.only(lora=True),
    conda:
        ENVIRONMENT
    params:
        code=plan.code("merge"),
    shell:
        "exec python -m rwkvpipe.merge --code {params.code:q} --model {input.model:q} --adapter {input.adapter:q}"
        " --out {output.model:q} > {log:q} 2>&1"


# whoever starts from the best weights of such a stage
use rule merge as merge_best with:
    input:
        model=lambda wildcards: plan.start(wildcards.stage),
        adapter="<results>/{run}/{stage}/best_adapter.safetensors",
    output:
        model="<results>/{run}/{stage}/best.safetensors",
    log:
        "<results>/{run}/{stage}/log/merge-best.log",
    benchmark:
        "<results>/{run}/{stage}/log/merge-best.jsonl"
    wildcard_constraints:
        stage=plan.only(lora=True, best=True),
