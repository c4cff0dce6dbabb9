rule download:
    input:
        lambda wildcards: plan.origin(wildcards.download),
    output:
        file="<results>/shared/downloads/{download}",
    log:
        "<results>/shared/log/download-{download}.log",
    benchmark:
        "<results>/shared/log/download-{download}.jsonl"
    wildcard_constraints:
        download=plan.downloads_of(whole=False),
    retries: 3
    conda:
        ENVIRONMENT
    resources:
        network=1,
    params:
        source=lambda wildcards: plan.downloads[wildcards.download].source,
        digest=digest_wanted,
        hub=hub_asked,
    shell:
        "exec python -m rwkvpipe.download {params.source:q} {params.digest:q} {params.hub:q}"
        " --out {output.file:q} > {log:q} 2>&1"


use rule download as download_repository with:
    output:
        file=directory("<results>/shared/downloads/{download}"),
    wildcard_constraints:
        download=plan.downloads_of(whole=True),


rule convert:
    input:
        checkpoint=lambda wildcards: plan.checkpoint(wildcards.weights),
        adapter=lambda wildcards: plan.merged_in(wildcards.weights),
    output:
        model="<results>/shared/weights/{weights}/model.safetensors",
        config="<results>/shared/weights/{weights}/config.json",
    log:
        "<results>/shared/log/convert-{weights}.log",
    benchmark:
        "<results>/shared/log/convert-{weights}.jsonl"
    conda:
        ENVIRONMENT
    params:
        code=plan.code("convert"),
        adapter=adapter_given,
    shell:
        "exec python -m rwkvpipe.convert --code {params.code:q} {input.checkpoint:q} {params.adapter:q}"
        " --out {output.model:q} > {log:q} 2>&1"


# by its name alone: `snakemake kernels`, where there is a compiler, before jobs go to nodes without one
rule kernels:
    log:
        "<results>/shared/log/kernels.log",
    localrule: True
    conda:
        ENVIRONMENT
    shell:
        "exec python -m rwkvpipe.kernels > {log:q} 2>&1"
