"""The files in launch/ do what their comments say: one machine, several, a Slurm job that stops and resumes.

The multi-GPU and DeepSpeed files are compared with one process in `test_distributed.py`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from omnimem.recipe import list_recipes
from small_runs import ROOT, adapter, arguments, environment, free_port, largest_difference, lines, main, metrics

LAUNCH = ROOT / "launch"
SCRIPT, CONTAINER = LAUNCH / "slurm.sh", LAUNCH / "Containerfile"
YAMLS, JSONS = sorted(LAUNCH.glob("*.yaml")), sorted(LAUNCH.glob("*.json"))
PLAIN = ("train.optim=sgd", "train.max_steps=1", "train.save_steps=1")
"""SGD shows errors of scale, to which Adam is invariant."""


def head(file: Path) -> list[str]:
    """The comment at the head of a file; lines that end in a backslash are joined."""
    comment = re.match(r"(#.*\n)+", file.read_text(encoding="utf-8").removeprefix("#!/bin/bash\n"))
    assert comment, f"{file.name} does not begin with a comment"
    return re.sub(r"^# ?", "", comment[0], flags=re.MULTILINE).replace("\\\n", " ").splitlines()


def check_training(command: list[str]) -> None:
    """The arguments of `train.py` at the end of a command name an existing recipe."""
    recipe = next(word.removeprefix("recipe=") for word in command if word.startswith("recipe="))
    assert recipe in list_recipes()


def check_launching(command: list[str]) -> Path:
    """Check that the options are those of `accelerate launch`; return the configuration that they name."""
    assert command[:2] == ["accelerate", "launch"]
    found = launch_command_parser().parse_args(command[2:])
    assert (ROOT / found.training_script).is_file() and found.training_script == "train.py"
    check_training(found.training_script_args)
    return ROOT / found.config_file


# ---- as written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.stem)
def test_a_configuration_loads_and_opens_with_its_command(file):
    loaded = load_config_from_file(str(file))
    assert loaded.num_machines == 1 and loaded.num_processes in (1, 2)
    assert check_launching(shlex.split(head(file)[0])) == file
    if loaded.deepspeed_config:
        assert (ROOT / loaded.deepspeed_config["deepspeed_config_file"]) in JSONS


@pytest.mark.parametrize("file", JSONS, ids=lambda file: file.stem)
def test_a_deepspeed_file_shards_and_is_used(file):
    assert json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]["stage"] in (2, 3)
    assert any(f"launch/{file.name}" in configuration.read_text(encoding="utf-8") for configuration in YAMLS)


def test_several_machines_need_four_options():
    words = shlex.split(head(LAUNCH / "multi_node.yaml")[0])
    assert {"--num_machines", "--num_processes", "--machine_rank", "--main_process_ip"} <= set(words)


# ---- started ---------------------------------------------------------------------------------------------------------


def accelerate(*words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "accelerate.commands.launch", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(ACCELERATE_USE_CPU="true"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process with the batches of two."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(arguments(folder, *PLAIN, "train.gradient_accumulation_steps=2")) == 0
    return folder / "run"


def check_same(run: Path, alone: Path) -> None:
    """Compare a run of two processes with one of a single process."""
    assert largest_difference(adapter(run), adapter(alone)) <= 1e-6
    assert all(value.abs().max() > 1e-4 for name, value in adapter(run).items() if "lora_B" in name), "it moved"
    (found,), (wanted,) = metrics(run), metrics(alone)
    assert (found["answer_tokens"], found["tokens"]) == (wanted["answer_tokens"], wanted["tokens"])
    assert json.loads((run / "checkpoints" / "step-00000001" / "state.json").read_text())["processes"] == 2


@pytest.mark.long
def test_one_process(tmp_path, alone):
    launcher = accelerate(
        "--config_file",
        "launch/single.yaml",
        "train.py",
        *arguments(tmp_path, *PLAIN, "train.gradient_accumulation_steps=2"),
    )
    _, told = launcher.communicate()
    assert launcher.returncode == 0, told.decode()
    assert largest_difference(adapter(tmp_path / "run"), adapter(alone)) == 0


@pytest.mark.long
def test_two_machines_equal_one_process(tmp_path, alone):
    args = arguments(tmp_path, *PLAIN)
    options = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    options += ["--main_process_port", str(free_port()), "--config_file", "launch/multi_node.yaml"]
    machines = [accelerate(*options, "--machine_rank", str(rank), "train.py", *args) for rank in (0, 1)]
    try:
        told = [machine.communicate(timeout=120)[1].decode() for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], told
    check_same(tmp_path / "run", alone)
    said = [[line for line in lines(text) if "adapter and budget profile saved" in line] for text in told]
    assert [len(of_machine) for of_machine in said] == [1, 0], "one process of all machines writes"


# ---- Slurm -----------------------------------------------------------------------------------------------------------

SRUN = """#!/bin/bash
echo "$@" >> "$FAKES/srun.txt"
while [[ $1 == --* ]]; do shift; done
for SLURM_NODEID in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    export SLURM_NODEID
    setsid "$@" &
    trap 'kill -USR1 -- "-$!"' USR1
    while kill -0 $! 2> /dev/null; do wait $!; done
    wait $! || exit
done
"""
"""Runs its command on every "node", and sends USR1 to all processes there."""

SCONTROL = """#!/bin/bash
if [[ "$1 $2" == "show hostnames" && $3 == "gpu[07-08]" ]]; then printf 'gpu07\\ngpu08\\n'
elif [[ "$1 $2" == "show hostnames" ]]; then echo "$3"
else echo "$@" >> "$FAKES/scontrol.txt"; fi
"""


def fake(folder: Path, **commands: str) -> dict[str, str]:
    """Environment of a job with scripts in place of Slurm."""
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, **commands}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return environment(
        PATH=path,
        FAKES=str(folder),
        ACCELERATE_USE_CPU="true",
        SLURM_JOB_ID=str(free_port()),
        SLURM_JOB_NODELIST="127.0.0.1",
        SLURM_JOB_NUM_NODES="1",
        SLURM_CPUS_PER_TASK="2",
        PROCESSES_PER_NODE="2",
    )


def submit(env: dict[str, str], *args: str) -> subprocess.Popen[bytes]:
    """Run the script as Slurm does: in the folder where it was submitted."""
    return subprocess.Popen(
        ["bash", SCRIPT, *args], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_the_script_is_valid_bash_and_opens_with_its_sbatch_command():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    words = shlex.split(head(SCRIPT)[0])
    assert words[0] == "sbatch" and "launch/slurm.sh" in words
    check_training(words)
    # Slurm reads options up to the first command only.
    before, _, after = SCRIPT.read_text(encoding="utf-8").partition("\nset ")
    assert {"--ntasks-per-node=1", "--requeue"} <= set(re.findall(r"^#SBATCH (\S+)$", before, re.MULTILINE))
    assert "#SBATCH" not in after


def test_every_node_gets_its_rank(tmp_path):
    env = fake(tmp_path / "fakes", accelerate='#!/bin/bash\necho "$@"\n')
    del env["PROCESSES_PER_NODE"]
    env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1234567"}
    env |= {"SLURM_GPUS_ON_NODE": "4", "CONFIG": "launch/deepspeed_zero3.yaml"}
    job = submit(env, "recipe=quickstart", "finish.question=What is heard?")
    told, wrong = job.communicate()
    assert job.returncode == 0, wrong.decode()
    commands = told.decode().splitlines()
    for rank, command in enumerate(commands):
        found = launch_command_parser().parse_args(command.split()[1:])
        assert command.endswith(" train.py recipe=quickstart finish.question=What is heard?")
        assert (found.machine_rank, found.num_machines, found.num_processes) == (rank, 2, 8)
        assert (found.main_process_ip, found.main_process_port) == ("gpu07", 24567)
        assert found.config_file == "launch/deepspeed_zero3.yaml" and found.deepspeed_multinode_launcher == "standard"
    assert len(commands) == 2
    asked = (tmp_path / "fakes" / "srun.txt").read_text().split()
    assert {"--nodes=2", "--ntasks=2", "--cpus-per-task=2", "--kill-on-bad-exit=1"} <= set(asked)


def test_a_job_without_gpus_is_one_line(tmp_path):
    env = fake(tmp_path / "fakes")
    del env["PROCESSES_PER_NODE"]
    env.pop("SLURM_GPUS_ON_NODE", None)
    job = submit(env, "recipe=quickstart")
    told = job.communicate()[1].decode()
    assert job.returncode != 0 and "ask for --gpus-per-node, or set PROCESSES_PER_NODE" in told
    assert not (tmp_path / "fakes" / "srun.txt").exists()


@pytest.mark.long
def test_a_job_trains(tmp_path, alone):
    job = submit(fake(tmp_path / "fakes"), *arguments(tmp_path, *PLAIN))
    told = job.communicate()[1].decode()
    assert job.returncode == 0, told
    check_same(tmp_path / "run", alone)
    assert not (tmp_path / "fakes" / "scontrol.txt").exists(), "nothing to queue again"


@pytest.mark.long
def test_a_job_near_its_time_limit_saves_is_requeued_and_resumes(tmp_path):
    """No step is lost or repeated; the checkpoint it resumes from is not one of `train.save_steps`."""
    env = fake(tmp_path / "fakes")
    args = arguments(tmp_path, "train.optim=sgd", "train.max_steps=5", "train.save_steps=5")
    first = submit(env, *args)
    try:
        until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and metrics(tmp_path / "run"), first)
        first.send_signal(signal.SIGUSR1)
        told = first.communicate(timeout=60)[1].decode()
    finally:
        first.kill()
    assert first.returncode != 0
    assert (tmp_path / "fakes" / "scontrol.txt").read_text().split() == ["requeue", env["SLURM_JOB_ID"]]
    done = metrics(tmp_path / "run")[-1]["step"]
    assert done < 5 and f"stopped after step {done}, which is saved" in told
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step-{done:08d}"
    queued = (tmp_path / "fakes" / "scontrol.txt").stat().st_mtime_ns
    assert saved.stat().st_ctime_ns < queued, "Slurm ends whatever still runs when the launchers are gone"

    again = submit(env, *args)
    told = again.communicate()[1].decode()
    assert again.returncode == 0, told
    assert f"resuming after step {done}" in told
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 6))
    unbroken = tmp_path / "unbroken"
    assert main([*args, "train.gradient_accumulation_steps=2", f"output_dir={unbroken}"]) == 0
    assert largest_difference(adapter(tmp_path / "run"), adapter(unbroken)) <= 1e-6


def until(condition, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(process.communicate()[1].decode())
        time.sleep(0.05)


# ---- container -------------------------------------------------------------------------------------------------------


def instructions() -> list[list[str]]:
    """Lines of the Containerfile, as words."""
    text = CONTAINER.read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_container_has_all_files_that_a_run_reads():
    copied = {source for name, *words in instructions() if name == "COPY" for source in words[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    assert all((ROOT / source).is_dir() == source.endswith("/") for source in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (packages,) = re.findall(r"^include = (\[.*\*.*\])$", project, re.MULTILINE)
    packages = {f"{pattern.rstrip('*')}/" for pattern in json.loads(packages)}
    named = {"README.md", "LICENSE", "pyproject.toml"}
    assert all(f'"{name}"' in project for name in named - {"pyproject.toml"})
    assert packages | named | {"train.py", "recipes/", "launch/"} <= copied
    (extras,) = re.findall(r'-e "\.\[([a-z,]+)\]"', CONTAINER.read_text(encoding="utf-8"))
    assert {"deepspeed", "bitsandbytes", "tensorboard"} == set(extras.split(","))
    (known,) = re.findall(r"^\[project\.optional-dependencies\]\n((?:.+\n)+)", project, re.MULTILINE)
    assert set(extras.split(",")) <= set(re.findall(r"^(\w+) = \[", known, re.MULTILINE))


def test_the_container_runs_the_command_of_its_comment_as_a_user():
    written = instructions()
    names = [name for name, *_ in written]
    assert written[names.index("USER")] == ["USER", "omnimem"] and names.index("USER") > names.index("RUN")
    (command,) = (json.loads(line[4:]) for line in CONTAINER.read_text().splitlines() if line.startswith("CMD "))
    assert command[:2] == ["python", "train.py"]
    check_training(command)
    build, run = (shlex.split(line) for line in head(CONTAINER)[:2])
    assert build[:2] == ["docker", "build"] and build[build.index("-f") + 1] == "launch/Containerfile"
    arguments_ = {word.partition("=")[0] for name, word, *_ in written if name == "ARG"}
    assert build[build.index("--build-arg") + 1].partition("=")[0] in arguments_
    image = build[build.index("-t") + 1]
    assert run[:2] == ["docker", "run"] and {"--gpus", "all"} <= set(run) and any("--shm-size=" in word for word in run)
    mounted = [run[at + 1].split(":")[1] for at, word in enumerate(run) if word == "-v"]
    assert mounted == ["/data", "/runs"]
    inside = run[run.index(image) + 1 :]
    assert check_launching(inside) == LAUNCH / "multi_gpu.yaml"
    assert all(
        word.partition("=")[2].startswith(("/data/", "/runs/")) for word in inside if "/" in word and "=" in word
    )
