# The farm as Snakemake sees it: one rule for each kind of job, everything else is in the file that `farm` names.
# ssm_forge.farm.engine starts it with the jobs that are left; what is done is not in there.
import json
from pathlib import Path

FARM = json.loads(Path(config["farm"]).read_text(encoding="utf-8"))
NAMES = {job["name"]: job for job in FARM["jobs"]}
STEMS = {Path(job["receipt"]).stem: job for job in FARM["jobs"]}


def of(wildcards):
    return STEMS[wildcards.stem]


rule all:
    input:
        [job["receipt"] for job in FARM["jobs"]],
    default_target: True


for kind in FARM["kinds"]:

    rule:
        name:
            kind
        input:
            lambda wildcards: [NAMES[name]["receipt"] for name in of(wildcards)["needs"]],
        output:
            f"receipts/{kind}/{{stem}}.json",
        benchmark:
            f"measured/{kind}/{{stem}}.tsv"
        threads: lambda wildcards: of(wildcards)["cores"]
        resources:
            # What failed may have been killed for its memory or its time: it gets more of both the next time.
            mem_mb=lambda wildcards, attempt: int(of(wildcards)["memory"] / 1e6 * (1 + (attempt - 1) / 4)),
            runtime=lambda wildcards, attempt: of(wildcards)["minutes"] * attempt,
            disk_mb=lambda wildcards: int(of(wildcards)["disk"] / 1e6),
        params:
            python=FARM["python"],
            farm=config["farm"],
            name=lambda wildcards: of(wildcards)["name"],
        shell:
            "{params.python:q} -m ssm_forge.farm.worker {params.farm:q} {params.name:q} {threads}"
