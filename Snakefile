# The workflow is workflow/Snakefile, where the workflow catalogue looks for it; this lets `snakemake` find it beside
# config.yaml. An include sets no default target, so there is a rule here.
include: "workflow/Snakefile"


rule default:
    default_target: True
    input:
        rules.all.input,
    localrule: True


onsuccess:
    made = story.targets()[0]
    logger.info(f"the report is {made}" if story.subjects else f"the first tokenizer is {made}")
