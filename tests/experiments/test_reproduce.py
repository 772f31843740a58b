"""reproduce.sh, with a stand-in for python that writes empty files."""

import fcntl
import os
import re
import subprocess
import time
from importlib import import_module

import pytest
from conftest import ROOT

import tokenizer

SCRIPT = ROOT / "tests" / "experiments" / "reproduce.sh"
OF_BOTH = ["rates", "sampling", "table1"]
NAMES = ["default", "random", *(f"{name}_digits" for name in OF_BOTH), "ablations"]
NAMES += ["convergence", "second_tokenizer", "rates_k", "over_k", "speed"]
NAMES += ["photographs", *(f"{name}_photographs" for name in OF_BOTH)]
# It logs what begins and ends, and fails where the file "broken" names its script. A
# training waits until as many have begun as the file "await" says, for 20 s at most.
PYTHON = """#!/usr/bin/env bash
echo "begin ${OMP_NUM_THREADS:-all} $*" >> log
case $1 in
    tests/*) [ -e no-table ] && exit 1; echo "the table $2" && exit ;;
    *) echo "progress" && mkdir -p "$3" ;;
esac
[ ! -e broken ] || [ "$1" != "$(cat broken)" ] || exit 1
[ $1 != ar_model.py ] || touch "$3/coarse.pt"
for _ in {1..1000}; do
    [[ $1 = *_model.py && -e await ]] || break
    [ "$(grep -c "begin .*_model.py" log)" -lt "$(cat await)" ] || break
    sleep 0.02
done
[ $1 != evaluate.py ] || touch "$3/metrics.json"
echo "end $*" >> log
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A function that calls reproduce.sh in a repository of its own."""
    home = tmp_path / "repository"
    (home / "tests" / "experiments").mkdir(parents=True)
    (home / "tests" / "experiments" / "reproduce.sh").write_text(SCRIPT.read_text())
    (home / "sample.py").write_text("first")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("OUT", "an out")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def call(*names, command=("bash", "tests/experiments/reproduce.sh")):
        done = subprocess.run(
            [*command, *names], cwd=home, capture_output=True, text=True, check=False
        )
        log = (home / "log").read_text() if (home / "log").exists() else ""
        (home / "log").unlink(missing_ok=True)
        return done.returncode, done.stdout, done.stderr, log.splitlines()

    call.home, call.git = home, lambda *a: call(*a, command=("git", *IDENTITY))
    call.git("init", "-q")
    call.git("add", "sample.py")
    call.git("commit", "-qm", "first")
    return call


IDENTITY = "-c", "user.name=a", "-c", "user.email=a@b"


def test_without_names_it_lists_them_with_their_minutes(call):
    code, out, _, log = call()
    assert code == 0 and not log and not (call.home / "an out").exists()
    assert [line.split()[0] for line in out.splitlines()] == NAMES
    assert all(line.split()[1].isdecimal() for line in out.splitlines())


def test_tables_go_to_stdout_and_finished_commands_are_skipped(call):
    code, out, err, log = call("default")
    assert code == 0 and out.split("\n") == ["the table mean", "", ""]
    assert "progress" in err and len(log) == 2 * 8 + 1
    assert log[-1] == "begin 1 tests/experiments/results.py mean an out"
    kept = call.home / "an out" / "results" / "default"
    assert (kept / "an out.json").exists()
    assert call("default")[3] == log[-1:]  # only the table
    assert (kept / "tables.md").read_text() == "the table mean\n\n", "once"
    (call.home / "no-table").touch()
    assert call("default")[0] != 0 and not (kept / "tables.md").exists()


def test_a_stopped_training_is_resumed(call):
    (call.home / "broken").write_text("ar_model.py")
    code, out, err, log = call("default", "random")
    assert code == 1 and out == "" and log[-1] == "begin 1 ar_model.py --out an out"
    assert err.splitlines()[-1].startswith("error: this failed: python ar_model.py")
    assert call("default")[3] == ["begin 1 ar_model.py --out an out"]
    (call.home / "an out" / "coarse.pt").touch()
    (call.home / "broken").unlink()
    log = call("default")[3]
    assert log[0] == "begin 1 ar_model.py --out an out --resume"
    assert log[-1].startswith("begin 1 tests/experiments/results.py")


def test_what_runs_ends_with_the_script(call):
    command = ["bash", "tests/experiments/reproduce.sh", "-j", "2", "default"]
    log = call.home / "log"
    (call.home / "await").write_text("9")
    with subprocess.Popen(command, cwd=call.home, stderr=subprocess.DEVNULL) as process:
        while not log.exists() or "ar_model" not in log.read_text():
            time.sleep(0.01)
        process.terminate()
    (call.home / "await").unlink()  # a training that still runs would end now
    time.sleep(0.5)
    assert process.returncode == 1 and "end ar_model.py" not in log.read_text()


def test_other_settings_draw_and_judge_again(call):
    call("default", "random")
    script = call.home / "tests" / "experiments" / "reproduce.sh"
    text = script.read_text()
    assert 'plain=([ctf]="2 1"' in text
    script.write_text(text.replace('plain=([ctf]="2 1"', 'plain=([ctf]="3 1"', 1))
    ran = [line.split()[2] for line in call("default", "random")[3] if "begin" in line]
    results = "tests/experiments/results.py"
    assert ran == [results, "sample.py", "evaluate.py", results]


def test_two_trainings_at_a_time_with_one_thread_each(call):
    call("default")
    begin, end = ["begin"], ["end"]
    for jobs, order in (1, begin + end + begin + end), (2, begin * 2 + end * 2):
        subprocess.run(["rm", "-r", call.home / "an out" / "random"], check=False)
        (call.home / "await").write_text(str(jobs))
        log = call("-j", str(jobs), "random")[3]
        trainings = [line for line in log if "_model.py" in line]
        assert [line.split()[0] for line in trainings] == order
        assert all(line.startswith("begin 1 ") for line in log if "begin" in line)
        first = next(i for i, line in enumerate(log) if "sample.py" in line)
        assert not any(line in trainings for line in log[first:]), "waits for both"


REFUSED = {
    "unknown": (["default", "tabel1"], "tabel1 is none of default"),
    "jobs": (["-j", "default"], "usage"),
    "missing": (["convergence"], "convergence needs .*: run table1_digits first"),
    "commit": (["default"], "belongs to commit .*, the scripts to"),
    "changed": (["default"], "commit the changes"),
    "locked": (["default"], "another call works in an out"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_it_refuses_in_one_line_and_before_anything_runs(call, why):
    names, text = REFUSED[why]
    if why in ("commit", "changed"):
        call("convergence")
        (call.home / "sample.py").write_text("second")
    if why == "commit":
        call.git("commit", "-qam", "second")
    (call.home / "an out" / ".done").mkdir(parents=True, exist_ok=True)
    with open(call.home / "an out" / ".done" / "lock", "w") as lock:
        if why == "locked":
            fcntl.flock(lock, fcntl.LOCK_EX)
        code, out, err, log = call(*names)
    assert code == 1 and out == "" and not log
    assert re.fullmatch(f"error: .*{text}.*\n", err)


def test_marks_survive_a_commit_that_leaves_the_scripts_alone(call):
    call("default")
    (call.home / "README.md").write_text("new")
    call.git("add", "README.md")
    call.git("commit", "-qm", "second")
    assert len(call("default")[3]) == 1


def test_every_command_of_every_name_is_known_to_its_script(call, tmp_path, capsys):
    """Each gets past the script's flags, and stops at the first missing artifact."""
    functions = SCRIPT.read_text().partition("# Run a script on a folder")[0]
    functions = functions.replace('cd "$(dirname', ': "$(dirname')
    record = (
        'once() { echo "$1 ${*:3}"; }\nneed() { :; }\nsettle() { :; }\ncp() { :; }\n'
    )
    record += "print() { :; }\ntable() { :; }\nenv() { :; }\nmkdir() { :; }\n"
    for name in NAMES:
        base, _, data = name.rpartition("_")
        if name == "photographs" or data not in ("digits", "photographs"):
            base, data = name, "photographs" if name == "photographs" else "digits"
        record += f"suffix=_{data}; settings_{data}; {base}\n"
    record = subprocess.check_output(
        ["bash", "-c", functions + record], text=True, cwd=tmp_path
    )
    commands = sorted(set(record.splitlines()))
    assert len(commands) > 100
    for command in commands:
        script, *flags = command.split()
        module = import_module(script.removesuffix(".py"))
        if module is tokenizer:
            tokenizer.parse_args(flags)
            continue
        with pytest.raises(SystemExit) as exit_info:
            module.main([*flags, "--out", str(tmp_path)])
        assert str(exit_info.value).startswith("error: "), command
