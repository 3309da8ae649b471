"""The recipes for several hosts name configs and flags that exist, and are what bash and Kubernetes can read."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from llama_jax.__main__ import parse
from llama_jax.run import load_config

LAUNCH = Path(__file__).resolve().parents[2] / "docs" / "launch"
JOINING = {"coordinator_address", "num_processes", "process_id"}
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
JOBSET = yaml.safe_load((LAUNCH / "kubernetes_jobset.yaml").read_text("utf-8"))


def options_of(command: str) -> dict[str, str]:
    """The flags of a `train.py` command; its config and keys exist."""
    args = parse(["train", *shlex.split(command.partition("train.py ")[2])])
    load_config(args.config, args.keys)
    assert {"data.path", "data.cache_dir", "tokenizer.path"} <= args.keys.keys()
    assert args.run_dir is not None
    return {key: value for key in JOINING if (value := getattr(args, key)) is not None}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text("utf-8").replace("\\\n", "")
    commands = re.findall(r"train\.py [^\n]*", text)
    assert len(commands) == 1
    command = commands[0].removesuffix('"') if commands[0].count('"') % 2 else commands[0]  # of a quoted whole
    assert not options_of(command)


def test_jobset():
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = JOBSET["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    (command,) = container["args"]
    subprocess.run(["bash", "-n", "-c", command], check=True)
    options = options_of(command)
    name = JOBSET["metadata"]["name"]
    assert options["coordinator_address"].split(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    assert int(options["num_processes"]) == spec["parallelism"] == spec["completions"]
    assert options["process_id"] == "$JOB_COMPLETION_INDEX"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_pages_name_files_that_exist():
    for page in LAUNCH.glob("*.md"):
        text = page.read_text("utf-8")
        assert [name for name in re.findall(r"\]\(([\w./-]+)\)", text) if not (LAUNCH / name).exists()] == []
        assert [name for name in re.findall(r"docs/launch/([\w.]+)", text) if not (LAUNCH / name).exists()] == []
