rule plot:
    input:
        metrics="<results>/{run}/{stage}/metrics.jsonl",
    output:
        loss=report(
            "<results>/{run}/{stage}/plots/loss.png",
            caption="../report/loss.rst",
            category="Training",
            labels={"stage": "{stage}", "figure": "loss"},
        ),
        lr=report(
            "<results>/{run}/{stage}/plots/lr.png",
            caption="../report/lr.rst",
            category="Training",
            labels={"stage": "{stage}", "figure": "learning rate"},
        ),
        grad_norm=report(
            "<results>/{run}/{stage}/plots/grad_norm.png",
            caption="../report/grad_norm.rst",
            category="Training",
            labels={"stage": "{stage}", "figure": "gradient norm"},
        ),
        throughput=report(
            "<results>/{run}/{stage}/plots/throughput.png",
            caption="../report/throughput.rst",
            category="Training",
            labels={"stage": "{stage}", "figure": "throughput"},
        ),
        data="<results>/{run}/{stage}/plots/metrics.csv",
    log:
        "<results>/{run}/{stage}/log/plot.log",
    benchmark:
        "<results>/{run}/{stage}/log/plot.jsonl"
    wildcard_constraints:
        stage=plan.only("pretrain", "sft"),
    conda:
        ENVIRONMENT
    params:
        code=plan.code("plot"),
        folder=subpath(output.data, parent=True),
    shell:
        "exec python -m rwkvpipe.plot {input.metrics:q} --out {params.folder:q} > {log:q} 2>&1"


use rule plot as plot_grpo with:
    output:
        loss=report(
            "<results>/{run}/{stage}/plots/loss.png",
            caption="../report/loss.rst",
            category="Training",
            labels={"stage": "{stage}", "figure": "loss"},
        ),
        lr=report(
            "<results>/{run}/{stage}/plots/lr.png",
            caption="../report/lr.rst",
            category="Training",
            labels={"stage": "{stage}", "figure": "learning rate"},
        ),
        grad_norm=report(
            "<results>/{run}/{stage}/plots/grad_norm.png",
            caption="../report/grad_norm.rst",
            category="Training",
            labels={"stage": "{stage}", "figure": "gradient norm"},
        ),
        throughput=report(
            "<results>/{run}/{stage}/plots/throughput.png",
            caption="../report/throughput.rst",
            category="Training",
            labels={"stage": "{stage}", "figure": "throughput"},
        ),
        reward=report(
            "<results>/{run}/{stage}/plots/reward.png",
            caption="../report/reward.rst",
            category="Training",
            labels={"stage": "{stage}", "figure": "reward"},
        ),
        data="<results>/{run}/{stage}/plots/metrics.csv",
    wildcard_constraints:
        stage=plan.only("grpo"),


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
        story=canonical(story.story()),
        code=plan.code("report"),
    shell:
        "exec python -m rwkvpipe.report --spec {params.story:q} --out {output.html:q} > {log:q} 2>&1"
