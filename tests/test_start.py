"""start.py: what it installs and when, and what it says when it cannot."""

import ast
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import start

ROOT = Path(start.__file__).parent
FOR_TESTS = ("requirements-optim.txt", "requirements-tagger.txt", "requirements-dev.txt")
REQUIREMENTS = ("requirements.txt", "requirements-cuda.txt", *FOR_TESTS)

# Stands for every Python: notes what it is asked to do, and fails where a file named after the word says so.
FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "{root}/calls"
case "$*" in
    *"-m venv"*) mkdir -p "{root}/.venv/bin"; cp "$0" "{root}/.venv/bin/python" ;;
esac
for word in "$@"; do
    name=$(basename "$word")
    if [ -f "{root}/fail-$name" ]; then cat "{root}/fail-$name"; exit 3; fi
done
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in for Python is a shell script")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with requirement files, no GPU, and a Python that only takes notes."""
    for name in REQUIREMENTS:
        (tmp_path / name).write_text(f"something-for-{name}==1\n")
    python = tmp_path / "system-python"
    python.write_text(FAKE_PYTHON.format(root=tmp_path))
    python.chmod(0o755)
    monkeypatch.setattr(start.sys, "executable", str(python))
    monkeypatch.setattr(start, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(start, "DISK_NEEDED", {"cpu": 0.0, "cuda": 0.0})
    return tmp_path


def prepare(project, *, for_tests=False):
    """Prepare the environment; what pip was asked to install, in order."""
    (project / "calls").write_text("")
    start.Environment(project).prepare(for_tests=for_tests)
    return installed(project)


def installed(project):
    found = re.findall(r"--progress-bar off (.*)", (project / "calls").read_text())
    return [arguments.replace(f"{project}/", "") for arguments in found]


CPU_TORCH = f"{start.TORCH} --index-url {start.CPU_INDEX} --timeout 10 --retries 0"


def test_torch_for_the_processor_comes_first(project):
    assert prepare(project) == [CPU_TORCH, "-r requirements.txt"]


def test_second_run_installs_nothing(project):
    prepare(project)
    assert prepare(project) == []


def test_tests_need_more_and_only_that_is_added(project):
    prepare(project)
    assert prepare(project, for_tests=True) == [f"-r {name}" for name in FOR_TESTS]
    assert prepare(project, for_tests=True) == []


def test_changed_requirements_are_installed_again(project):
    prepare(project)
    (project / "requirements.txt").write_text("something-else==2\n")
    (project / ".venv/lib/python3/site-packages/torch-2.13.0+cpu.dist-info").mkdir(parents=True)
    assert prepare(project) == ["-r requirements.txt"]


def test_another_torch_is_replaced(project):
    (project / ".venv/lib/python3/site-packages/torch-2.12.0.dist-info").mkdir(parents=True)
    assert prepare(project)[0] == CPU_TORCH


def test_gpu_takes_the_cuda_build_and_more(project, monkeypatch):
    monkeypatch.setattr(start, "has_nvidia_gpu", lambda: True)
    assert prepare(project) == [start.TORCH, "-r requirements.txt", "-r requirements-cuda.txt"]


def test_unreachable_processor_index_falls_back(project, capsys):
    (project / "fail-cpu").write_text("")
    assert prepare(project) == [CPU_TORCH, start.TORCH, "-r requirements.txt"]
    assert "usual package index" in capsys.readouterr().out


def test_failed_installation_is_explained_and_continued(project):
    (project / "fail-requirements.txt").write_text("ERROR: [Errno 28] No space left on device\n")
    with pytest.raises(start.SetupError, match=r"(?s)requirements.txt failed.*No space left.*disk is full"):
        prepare(project)
    (project / "fail-requirements.txt").unlink()
    assert prepare(project)[-1] == "-r requirements.txt"
    assert "-m venv" not in (project / "calls").read_text()


def test_interrupted_set_up_starts_over(project, capsys):
    prepare(project)
    (project / ".venv/installing").touch()
    (project / ".venv/installed.json").unlink()
    prepare(project)
    assert "-m venv --clear" in (project / "calls").read_text()
    assert "interrupted" in capsys.readouterr().out
    assert not (project / ".venv/installing").exists()


def test_broken_environment_is_made_again(project):
    prepare(project)
    (project / ".venv/bin/python").unlink()
    prepare(project)
    assert "-m venv --clear" in (project / "calls").read_text()


def test_damaged_stamp_counts_as_nothing_installed(project):
    prepare(project)
    (project / ".venv/installed.json").write_text("{")
    assert "-r requirements.txt" in prepare(project)


def test_half_finished_installation_leaves_no_stamp(project):
    (project / "fail-requirements.txt").write_text("killed")
    with pytest.raises(start.SetupError):
        prepare(project)
    assert json.loads((project / ".venv/installed.json").read_text())["requirements.txt"] is None


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ConnectTimeoutError: Connection to pypi.org timed out", "connection"),
        ("ERROR: No matching distribution found for torch==2.13.0", "Python 3.11"),
        ("PermissionError: [Errno 13] Permission denied: '.venv'", "cannot be written"),
        ("something nobody foresaw", "run the same command again"),
    ],
)
def test_explanation_says_what_to_do(line, advice):
    text = start.explain(["Collecting torch", line], "It failed.")
    assert text.startswith("It failed.")
    assert line in text
    assert advice in text


def test_old_python_is_refused():
    with pytest.raises(start.SetupError, match=r"3\.11 or newer is needed; this is 3\.10\.2"):
        start.check_python((3, 10, 2))
    start.check_python((3, 11, 0))
    start.check_python((4, 0, 0))


def test_missing_venv_module_is_explained(monkeypatch):
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    with pytest.raises(start.SetupError, match=r"no module ensurepip.*\n.*apt install python3\.\d+-venv"):
        start.check_venv_module()


def test_full_disk_is_refused(tmp_path):
    with pytest.raises(start.SetupError, match="GB are free"):
        start.check_disk(tmp_path, 1e9)


def test_set_up_that_fails_ends_with_one_block(project, monkeypatch, capsys):
    monkeypatch.setattr(start, "Environment", lambda: start_environment)
    start_environment = type("Failing", (), {"prepare": lambda self, for_tests: start.check_python((3, 8))})()
    assert start.main(["setup"]) == 1
    shown = capsys.readouterr().err
    assert "3.8" in shown
    assert "Traceback" not in shown


def test_every_check_runs_and_the_first_failure_counts(project, monkeypatch):
    ran = []
    codes = {"ruff": 0, "mypy": 5, "pytest": 1}

    def run(command, root):
        ran.append(command[2:])
        return codes[command[2]]

    monkeypatch.setattr(start, "run", run)
    assert start.test(start.Environment(project), ["-k", "loop"]) == 5
    assert ran[:3] == [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
    assert [ran[3][0], *ran[3][-2:]] == ["pytest", "-k", "loop"]


def test_demo_stops_with_the_code_of_what_failed(project, monkeypatch, capsys):
    ran = []

    def run(command, root):
        ran.append(command[1])
        return 2 if "before_after" in command[1] else 0

    monkeypatch.setattr(start, "run", run)
    assert start.demo(start.Environment(project)) == 2
    assert ran == ["train_network.py", "examples/quickstart/before_after.py"]
    assert "wrote" not in capsys.readouterr().out


def test_demo_names_what_it_wrote(project, monkeypatch, capsys):
    monkeypatch.setattr(start, "run", lambda command, root: 0)
    assert start.demo(start.Environment(project)) == 0
    shown = capsys.readouterr().out
    for name in ("shs.safetensors", "sample", "log", "before_after.png"):
        assert str(start.DEMO_OUTPUT / name) in shown


def test_unknown_arguments_are_refused_but_go_to_pytest():
    assert start.parse_arguments(["test", "-k", "loop"]) == ("test", ["-k", "loop"])
    with pytest.raises(SystemExit, match="2"):
        start.parse_arguments(["demo", "--fast"])
    with pytest.raises(SystemExit, match="2"):
        start.parse_arguments([])


def test_start_needs_only_the_standard_library_and_reads_on_older_pythons():
    tree = ast.parse((ROOT / "start.py").read_text(encoding="utf-8"), feature_version=(3, 7))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_is_exact_and_has_its_reason(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted
    for line in wanted:
        assert re.fullmatch(r"[\w-]+==[\w.]+ +# \S.*", line), line


def test_torch_is_the_same_everywhere():
    assert start.TORCH in (ROOT / "requirements.txt").read_text(encoding="utf-8").split()


@pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="an export without .ci")
def test_ci_passes_the_exit_code_through(tmp_path):
    fake = tmp_path / "python3"
    fake.write_text('#!/bin/sh\necho "$CI $*"\nif read -r line; then exit 9; fi\nexit 7\n')
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(
        ["bash", str(ROOT / ".ci/run")], env=environment, capture_output=True, text=True, input="typed\n", check=False
    )
    assert (ran.stdout.strip(), ran.returncode) == ("true start.py test", 7)
