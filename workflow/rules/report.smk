rule plot:
    input:
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    output:
        curves=report(
            multiext("<results>/{run}/{stage}/plots/", "loss.png", "lr.png", "grad_norm.png", "throughput.png"),
            caption="../report/curves.rst",
            category="Training",
            subcategory="{stage}",
        ),
        data="<results>/{run}/{stage}/plots/metrics.csv",
    log:
        "<results>/{run}/{stage}/log/plot.log",
    benchmark:
        "<results>/{run}/{stage}/log/plot.jsonl"
    wildcard_constraints:
        stage=plan.only("pretrain", "sft", "dpo"),
    conda:
        ENVIRONMENT
    params:
        code=plan.code("plot"),
        folder=subpath(output.data, parent=True),
    shell:
        "exec python -m rwkvpipe.plot --code {params.code:q} {input.metrics:q} --out {params.folder:q} > {log:q} 2>&1"


use rule plot as plot_grpo with:
    output:
        curves=report(
            multiext(
                "<results>/{run}/{stage}/plots/", "loss.png", "lr.png", "grad_norm.png", "throughput.png", "reward.png"
            ),
            caption="../report/curves.rst",
            category="Training",
            subcategory="{stage}",
        ),
        data="<results>/{run}/{stage}/plots/metrics.csv",
    wildcard_constraints:
        stage=plan.only("grpo"),


# the file that is written last; of a folder, the others come before it
rule export:
    input:
        model=lambda wildcards: plan.exported_from(wildcards.subject, wildcards.exported),
        tokenizer=lambda wildcards: plan.vocabulary(wildcards.subject),
        scores=lambda wildcards: plan.graded(wildcards.subject, wildcards.exported),
    output:
        "<results>/{run}/{subject}/export/{exported}",
    log:
        "<results>/{run}/{subject}/log/export/{exported}.log",
    benchmark:
        "<results>/{run}/{subject}/log/export/{exported}.jsonl"
    wildcard_constraints:
        exported=any_of(EXPORTED.values()),
    conda:
        ENVIRONMENT
    params:
        spec=lambda wildcards: spec(plan.exports(wildcards.subject)[wildcards.exported]),
        code=plan.code("export"),
        tokenizer=tokenizer_folder,
        scores=lambda wildcards, input: ["--scores", *input.scores] if input.scores else [],
        out=lambda wildcards, output: destination(output[0]),
    shell:
        "exec python -m rwkvpipe.export {input.model:q} --spec {params.spec:q} --tokenizer {params.tokenizer:q}"
        " {params.scores:q} --out {params.out:q} > {log:q} 2>&1"


rule report:
    input:
        plan.evidence(),
    output:
        html=report(
            f"{plan.home}/report.html",
            caption="../report/report.rst",
            category="Report",
            labels={"page": "the whole run"},
        ),
        chart=report(plan.chart(), caption="../report/scores.rst", category="Evaluation"),
    log:
        f"{plan.home}/log/report.log",
    benchmark:
        f"{plan.home}/log/report.jsonl"
    conda:
        ENVIRONMENT
    params:
        story=lambda wildcards: canonical(story.story()),
        code=plan.code("report"),
    shell:
        "exec python -m rwkvpipe.report --code {params.code:q} --spec {params.story:q} --out {output.html:q} > {log:q}"
        " 2>&1"
