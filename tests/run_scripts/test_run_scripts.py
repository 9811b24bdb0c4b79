"""The shell scripts with recorded instead of real commands: words, launchers, SLURM, set-up. Nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = ("setup_common.sh", "pretrain.sh", "pretrain_multi_gpus.sh", "finetune.sh", "test.sh")
CORPORA = ("ct_rate", "chest_ctrg")
PYTHON_STUB = """#!/usr/bin/env bash
case "$*" in
  *sys.prefix*) echo "$STUB_HOME" ;;
  -c*) ;;
  *) { printf '<%s>' "${0##*/}" "$@"; echo " $MASTER_ADDR:$MASTER_PORT omp=$OMP_NUM_THREADS"; } >>"$STUB_HOME/calls" ;;
esac
[[ "$*" != *"$STUB_FAIL_ON"* || -z "$STUB_FAIL_ON" ]] || exit 2
"""


class Stage:
    """A copy of the scripts in a folder with a blank in its name, and the commands they call, recorded."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.root, self.home, self.said = folder / "check out", folder / "home", ""
        (self.root / "run_scripts").mkdir(parents=True)
        (self.home / "bin").mkdir(parents=True)
        for name in SCRIPTS:
            shutil.copy(repository / "run_scripts" / name, self.root / "run_scripts" / name)
        for name in ("", "-nodeps", "-test", "-test-nodeps"):
            (self.root / f"requirements{name}.txt").write_text(f"# {name}\n")
        for name in ("python", "nvidia-smi"):
            self.command(name, PYTHON_STUB if name == "python" else "#!/bin/sh\nexit 9\n")

    def command(self, name: str, text: str = PYTHON_STUB) -> None:
        path = self.home / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, script: str, *words: str, code: int = 0, **environ: str) -> list[str]:
        """Run a script and return the recorded commands, one line each."""
        (self.home / "calls").unlink(missing_ok=True)
        base = {"PATH": f"{self.home / 'bin'}:/usr/bin:/bin", "HOME": str(self.home), "VIRTUAL_ENV": str(self.home)}
        base |= {"STUB_HOME": str(self.home), "STUB_FAIL_ON": "", "MASTER_ADDR": "", "MASTER_PORT": ""}
        done = subprocess.run(
            ["bash", str(self.root / "run_scripts" / script), *words],
            env=base | environ, cwd=self.home, capture_output=True, encoding="utf-8", timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        self.said = done.stderr
        calls = self.home / "calls"
        return calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []


@pytest.fixture
def stage(tmp_path: Path, repository: Path) -> Stage:
    made = Stage(tmp_path, repository)
    made.run("pretrain.sh", "task_pretrain_mg3d")  # leaves the stamp of an installed requirements.txt
    return made


def test_scripts_are_short_and_pass_shellcheck(repository: Path) -> None:
    for name in SCRIPTS:
        assert len((repository / "run_scripts" / name).read_text(encoding="utf-8").splitlines()) <= 30, name
    checker = Path(sys.executable).with_name("shellcheck")
    every = subprocess.run(
        ["git", "ls-files", "*.sh", ".ci/run"], cwd=repository, capture_output=True, encoding="utf-8", check=True
    ).stdout.split()
    assert {*(f"run_scripts/{name}" for name in SCRIPTS), ".ci/run"} <= set(every)
    done = subprocess.run(
        [str(checker), "-x", "-P", "SCRIPTDIR", *(str(repository / name) for name in every)],
        capture_output=True, encoding="utf-8", timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_requirements_are_installed_once_and_again_when_they_change(tmp_path: Path, repository: Path) -> None:
    stage = Stage(tmp_path, repository)
    first = stage.run("pretrain.sh", "tiny")
    assert first[0].startswith("<python><-m><pip><install><--quiet><-r><requirements.txt>")
    assert "<--no-deps><-r><requirements-nodeps.txt>" in first[1]
    assert not any("<pip>" in call for call in stage.run("pretrain.sh", "tiny"))
    (stage.root / "requirements.txt").write_text("numpy>=2\n")
    assert "<pip>" in stage.run("pretrain.sh", "tiny")[0]
    (stage.root / "requirements.txt").write_text("numpy>=3\n")
    stage.run("pretrain.sh", "tiny", code=2, STUB_FAIL_ON="pip")
    assert "<pip>" in stage.run("pretrain.sh", "tiny")[0], "a failed installation leaves no stamp"


def test_without_a_virtual_environment_one_is_made(stage: Stage) -> None:
    stage.command(
        "python3.11",
        "#!/usr/bin/env bash\n"
        '[[ "$1 $2" == "-m venv" ]] || exit 7\n'
        'mkdir -p "$3/bin" && cp "$STUB_HOME/bin/python" "$3/bin/" && echo "export MADE=1" >"$3/bin/activate"\n',
    )
    stage.run("pretrain.sh", "tiny", VIRTUAL_ENV="")
    assert (stage.root / ".venv" / "bin" / "python").exists()
    assert stage.run("pretrain.sh", "tiny", VIRTUAL_ENV="")[-1].startswith("<python><main.py><with>")


ODD = [
    "data_root=/data/a demo $(touch $HOME/made) 'quoted' \"twice\" ; task_b",
    "data_root=`touch $HOME/made`",
    "data_root=a && touch $HOME/made",
    "data_root=*? [a-z] {a,b} ~ \\ %s !x #y",
    "data_root=two\nlines\tand tabs",
    "data_root=Röntgen 肺",
    "data_root=-n",
]


@pytest.mark.parametrize("script", ["pretrain.sh", "finetune.sh", "pretrain_multi_gpus.sh"])
@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_words_do_nothing_and_arrive_as_they_are(stage: Stage, script: str, odd: str) -> None:
    calls = "\n".join(stage.run(script, odd, "num_gpus=0"))
    assert calls.count(f"<{odd}>") == 2, "once to be checked, once to be run"
    assert not (stage.home / "made").exists() and not (stage.root / "made").exists()


@pytest.mark.parametrize("task", ["task_pretrain_ptunifier", "result/run/config.json"])
def test_a_named_task_is_not_doubled(stage: Stage, task: str) -> None:
    assert "task_pretrain_mg3d" not in stage.run("pretrain.sh", "seed=0", task, "vit3d16")[-1]


def test_no_word_makes_packs_and_trains_on_phantoms(stage: Stage) -> None:
    calls = [call.split(" omp")[0] for call in stage.run("pretrain.sh")]
    packing = "prepro/prepro_pretraining_data.py"
    assert [call.split("><")[1] for call in calls[:-1]] == ["main.py", "-m", packing, packing]
    assert "<mg3d.phantoms><--out><data/phantom>" in calls[1]
    assert "<ct_rate>" in calls[2] and "<--out><data/phantom_arrows>" in calls[2] and "<ctrg>" in calls[3]
    assert "<main.py><with><task_pretrain_mg3d><demo>" in calls[-1]
    # With two cores and no GPU the two halves of each batch go to two processes.
    assert ("<--nproc-per-node=2>" in calls[-1]) == ("<per_gpu_batchsize=8>" in calls[-1])
    for place in ("phantom/manifest.json", "phantom_arrows/clm_ct_rate_test.arrow"):
        (stage.root / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        (stage.root / "data" / place).touch()
    again = stage.run("pretrain.sh")
    assert [call.split("><")[2] for call in again[:-1]] == ["check", "ctrg"]
    assert "<with><task_pretrain_mg3d><demo>" in again[-1]


def test_fine_tuning_without_words_says_what_it_starts_from(stage: Stage) -> None:
    packed = stage.root / "data"
    for place in ("phantom/manifest.json", *(f"phantom_arrows/clm_{name}_test.arrow" for name in CORPORA)):
        (packed / place).parent.mkdir(parents=True, exist_ok=True)
        (packed / place).touch()
    first = stage.run("finetune.sh")
    assert len(first) == 2 and "no weights of pretrain.sh" in stage.said
    assert "<with><task_finetune_clm_ct_rate_vision_only><demo_reports>" in first[-1] and "load_path" not in first[-1]
    for version, age in (("version_0", 100), ("version_1", 0), ("version_2", 50)):
        left = stage.root / "result" / "demo-seed0-from_" / version / "checkpoints" / "last.ckpt"
        left.parent.mkdir(parents=True)
        left.touch()
        os.utime(left, (1_700_000_000 - age,) * 2)
    again = stage.run("finetune.sh")[-1]
    assert "<load_path=result/demo-seed0-from_/version_1/checkpoints/last.ckpt>" in again
    assert "version_1" in stage.said and "no weights" not in stage.said


def test_fine_tuning_makes_the_phantoms_of_pretraining(stage: Stage) -> None:
    made = {script: stage.run(script)[1:-1] for script in ("pretrain.sh", "finetune.sh")}
    assert len(made["finetune.sh"]) == 3 and made["finetune.sh"] == made["pretrain.sh"]


def test_fine_tuning_passes_its_words(stage: Stage) -> None:
    call = stage.run("finetune.sh", "clip32", "load_path=a b")[-1]
    assert call.startswith("<python><main.py><with><task_finetune_clm_ctrg_chest_vision_only><clip32><load_path=a b>")
    given = stage.run("finetune.sh", "seed=0", "task_finetune_clm_ct_rate_vision_only", "demo_reports")
    assert "<with><seed=0><task_finetune_clm_ct_rate_vision_only><demo_reports>" in given[-1]
    assert stage.said == "" and len(stage.run("finetune.sh", "nonsense=1", code=2, STUB_FAIL_ON="nonsense")) == 1


def test_a_refused_word_starts_nothing(stage: Stage) -> None:
    assert len(stage.run("pretrain.sh", "demo", "nonsense=1", code=2, STUB_FAIL_ON="nonsense")) == 1


def test_several_local_processes(stage: Stage) -> None:
    call = stage.run("pretrain_multi_gpus.sh", "tiny", "data_root=a b")[-1]
    assert call.startswith("<python><-m><torch.distributed.run><--nproc-per-node=2><--nnodes=1><--standalone><main.py>")
    assert "<with><task_pretrain_mg3d><tiny><data_root=a b><num_nodes=1>" in call
    assert "<--nproc-per-node=3>" in stage.run("pretrain_multi_gpus.sh", "tiny", NPROC="3")[-1]
    assert "<--nproc-per-node=4>" in stage.run("pretrain_multi_gpus.sh", "tiny", "num_gpus=4")[-1]
    stage.command("nvidia-smi", "#!/bin/sh\nprintf 'GPU 0\\nGPU 1\\nGPU 2\\n'\n")
    assert "<--nproc-per-node=3>" in stage.run("pretrain_multi_gpus.sh", "tiny")[-1]


def test_without_words_several_processes_train_on_phantoms(stage: Stage) -> None:
    calls = stage.run("pretrain_multi_gpus.sh")
    assert "<mg3d.phantoms>" in calls[1] and "<with><task_pretrain_mg3d><demo><num_nodes=1>" in calls[-1]


def test_several_machines_by_hand(stage: Stage) -> None:
    call = stage.run("pretrain_multi_gpus.sh", "tiny", NNODES="2", NODE_RANK="1", MASTER_ADDR="alpha")[-1]
    assert "<--nnodes=2><--node-rank=1><--master-addr=alpha><--master-port=29500>" in call and "<num_nodes=2>" in call
    stage.run("pretrain_multi_gpus.sh", "tiny", "num_nodes=2", code=1)


SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "mg3d"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-05,9],cpu1", "gpu03"), ("alpha,beta", "alpha"), ("node-a[7]", "node-a7"), ("alpha,b[1-2]", "alpha")],
)
def test_slurm_batch_starts_every_task_with_srun(stage: Stage, nodes: str, first: str) -> None:
    stage.command("srun")
    call = stage.run("pretrain_multi_gpus.sh", "tiny", **SLURM, SLURM_JOB_NODELIST=nodes)[-1]
    assert call.startswith("<srun><--job-name=mg3d><--kill-on-bad-exit=1><python><main.py><with>")
    assert "<num_nodes=2>" in call and f" {first}:19711 " in call


def test_slurm_copy_of_the_script_finds_its_place(stage: Stage) -> None:
    stage.command("srun")
    spool = stage.home / "slurm_script"
    shutil.copy(stage.root / "run_scripts" / "pretrain_multi_gpus.sh", spool)
    call = stage.run(str(spool), "tiny", **SLURM, SLURM_JOB_NODELIST="a[1-2]", SLURM_SUBMIT_DIR=str(stage.root))[-1]
    assert call.startswith("<srun>")


def test_faked_slurm_of_two_nodes_resolves_ranks_and_address(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Inside a task the script starts Python directly; Lightning and our own layout agree with what it exported."""
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    from mg3d.training.processes import detect_layout

    stage.command("srun")
    for rank in ("0", "1"):
        task = SLURM | {"SLURM_STEP_ID": "0", "SLURM_PROCID": rank, "SLURM_LOCALID": "0", "SLURM_NODEID": rank}
        task |= {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "node[04-05]"}
        call = stage.run("pretrain_multi_gpus.sh", "tiny", **task, SLURM_JOB_NODELIST="node[04-05]")[-1]
        assert call.startswith("<python><main.py><with>")
        address, port = call.split(" ")[-2].split(":")
        for key, value in (task | {"MASTER_ADDR": address, "MASTER_PORT": port}).items():
            monkeypatch.setenv(key, value)
        lightning = SLURMEnvironment(auto_requeue=False)
        layout = detect_layout(0, 2, dict(os.environ))
        assert SLURMEnvironment.detect()
        assert (lightning.main_address, lightning.main_port) == ("node04", 19711)
        assert lightning.world_size() == layout.world_size == 2 and layout.nodes == 2
        assert lightning.global_rank() == layout.rank == int(rank)
        assert lightning.local_rank() == layout.local_rank == 0 and lightning.node_rank() == int(rank)
        assert layout.launcher == "slurm" and layout.main_address == "node04"


def test_test_script_chooses_tiers(stage: Stage) -> None:
    calls = stage.run("test.sh", "-k", "a or b")
    assert "<-r><requirements-test.txt>" in calls[0] and "<--no-deps><-r><requirements-test-nodeps.txt>" in calls[1]
    pytest_of_two = "<python><-m><pytest><-n><2><--dist><loadfile>"
    assert calls[2].startswith(f"{pytest_of_two}<-m><not slow><-k><a or b>") and calls[2].endswith("omp=1")
    assert stage.run("test.sh", "--slow")[0].startswith(f"{pytest_of_two}<-m><slow>")
    assert stage.run("test.sh", "--realdata", "-x")[0].startswith(f"{pytest_of_two}<-m><realdata><-x>")
    assert stage.run("test.sh", "--all", "-x")[0].startswith(f"{pytest_of_two}<-x>")
    marked = stage.root / "tests" / "a" / "test_b.py"
    marked.parent.mkdir(parents=True)
    marked.write_text("@pytest.mark.smoke\n")
    assert stage.run("test.sh", "--smoke", "-x")[0].startswith("<python><-m><pytest><-m><smoke><tests/a/test_b.py><-x>")


def test_cpu_allocator_defaults_equal_those_of_the_process(repository: Path) -> None:
    from mg3d.training.environment import PROCESS_DEFAULTS

    text = (repository / "run_scripts" / "setup_common.sh").read_text(encoding="utf-8")
    assert all(f"${{{key}:={value}}}" in text for key, value in PROCESS_DEFAULTS.items())
