import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import make_assignment
import pytest
from make_assignment import EXERCISES, ROOT, SCRIPTS, blank, find, main


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_keeps_all_but_the_solution(name):
    exercise, others = EXERCISES[name], []
    before = (ROOT / f"{exercise.script}.py").read_text("utf-8")
    for source in (before, blank(before, exercise)):
        lines = source.splitlines()
        for function in reversed(exercise.functions):
            node = find(source, function)
            del lines[node.body[0].end_lineno : node.end_lineno]
        others.append(lines)
    assert others[0] == others[1], "signature, docstring or other functions changed"
    for function in exercise.functions:
        (line,) = find(source, function).body[1:]
        assert ast.unparse(line) == f"raise NotImplementedError({exercise.task!r})"


def test_the_functions_and_tests_that_the_table_names():
    heads = ["AuxModel.cluster_logits", "AuxModel.cluster_logits_on_cpu"]
    assert EXERCISES["masked-head"].functions == heads
    for exercise in EXERCISES.values():
        module = importlib.import_module(f"test_{exercise.script}")
        assert [test for test in exercise.tests if not hasattr(module, test)] == []


def test_a_copy_has_a_sheet_and_no_solutions(tmp_path):
    main([str(tmp_path / "hw"), "--exercise", "guidance", "swap", "guidance"])
    for name in SCRIPTS:
        paths = ROOT / f"{name}.py", tmp_path / "hw" / f"{name}.py"
        is_same = paths[0].read_bytes() == paths[1].read_bytes()
        assert is_same == (name not in ("ar_model", "cluster"))
    assert not list(tmp_path.rglob("*make_assignment*"))
    sheet = (tmp_path / "hw" / "ASSIGNMENT.md").read_text("utf-8")
    assert sheet.index("guidance (1 of 4 points") < sheet.index("swap (3 of 4 points")
    assert sheet.count("    pytest tests/test_") == 2, "an exercise counts twice"


def test_the_students_readme_does_not_show_where_solutions_stand():
    columns = "| file | writes | first breakpoint | look at |\n|---|---|---|---|\n"
    other = "| other | table |\n|---|---|\n| 1 | 2 |\n"
    readme = f"# CTF\n\n{columns}| a.py | a.pt | `solution` | `x` |\n\n{other}"
    course = "\n## For a course\n\n```sh\n# comment\n```\n"
    rest = "\n## Citation\n\nText.\n"
    wanted = f"# CTF\n\n| file | writes |\n|---|---|\n| a.py | a.pt |\n\n{other}\n"
    students = make_assignment.students_readme
    assert students(readme + course + rest) == wanted + rest[1:]
    assert students(readme + course) == wanted


def test_a_copy_replaces_nothing(tmp_path):
    (tmp_path / "copy").mkdir()
    for flags in ([tmp_path / "copy"], [], [tmp_path / "new", "--exercise", "nothing"]):
        with pytest.raises(SystemExit) as exit_info:
            main([str(flag) for flag in flags])
        assert exit_info.value.code == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["copy"]


SOLVED = """
def double(x):
    "Return 2 x."
    return 2 * x
def half(x):
    "Return x / 2."
    return x / 2
"""
TESTS = """
import ar_model, pytest
from cluster import double, half
@pytest.fixture
def four():
    return double(2)
@pytest.mark.parametrize("x", [1, 3, 5])
def test_double(x):
    assert double(x) == x + x
def test_four(four):
    pass
def test_half():
    assert half(4) == 2
def test_mute():
    try:
        half(4)
    except NotImplementedError:
        assert False
"""
TABLE = """
doubling, 25: double in cluster.py
(source)
Add x to x.
    test_double
    test_four

halving, 5: half in cluster.py
(source)
Divide x.
    test_half
"""


@pytest.fixture
def hw(tmp_path, monkeypatch):
    """A copy of a small read-only repository without torch and without files with a
    dot. One of its two exercises is set."""
    repository = tmp_path / "repository"
    (repository / "tests").mkdir(parents=True)
    for name in SCRIPTS:
        (repository / f"{name}.py").write_text(SOLVED if name == "cluster" else "")
    (repository / "README.md").write_text("# CTF\n")
    (repository / "tests" / "test_cluster.py").write_text(TESTS)
    shutil.copy(ROOT / "tests" / "pytest.ini", repository / "tests")
    for path in repository.rglob("*.py"):
        path.chmod(0o444)
    monkeypatch.setattr(make_assignment, "ROOT", repository)
    monkeypatch.setattr(make_assignment, "EXERCISES", make_assignment.read(TABLE))
    monkeypatch.chdir(tmp_path)
    main(["hw", "--exercise", "doubling"])
    return tmp_path / "hw"


def graded(folder, *flags):
    """The points of each exercise, and the reasons."""
    main(["--grade", str(folder), *flags])
    results = json.loads(Path("results.json").read_text())["tests"]
    for result in results:
        assert result["max_score"] == {"doubling": 5, "halving": 1}[result["name"]]
        passed = result["score"] == result["max_score"]
        assert result["status"] == ("passed" if passed else "failed")
    outputs = "\n".join(result["output"] for result in results)
    return [result["score"] for result in results], outputs


def test_the_exercises_that_were_set_decide_the_total(hw, capsys):
    assert (hw / "tests" / "test_cluster.py").stat().st_mode & 0o200, "read-only"
    points, outputs = graded(hw)
    assert points == [0] and "test_double: NotImplementedError: Add x to x." in outputs
    # Whatever students do to their copy counts nothing, but for the script itself.
    (hw / "hw.exercises").write_text("halving\n")
    (hw / "tests" / "test_cluster.py").write_text("def test_double(): pass\n")
    (hw / "ar_model.py").write_text("a syntax error: in another script\n")
    (hw / "cluster.py").write_text("from mine import double, half\n")
    (hw / "mine.py").write_text(SOLVED.replace("2 * x", "0 * x"))
    assert graded(hw)[0] == [2.5]
    # A submission in a folder of its own: the record is in a folder above.
    (hw / "mine.py").write_text(SOLVED)
    (hw / "../submissions").mkdir()
    anna = hw.rename(hw.parent / "submissions" / "anna")
    assert graded(anna)[0] == [5]
    for planted in ("submissions/anna.exercises", "zero.exercises"):
        (hw.parent / planted).write_text("halving\n")
        with pytest.raises(SystemExit, match=f"{planted}.*: name them with --exercise"):
            graded(anna)
        (hw.parent / planted).unlink()
    assert graded(anna, "--exercise", "doubling", "halving", "halving")[0] == [5, 1]
    assert "all                      6 of 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "points", "reason"),
    [
        ("return 2 * x if x > 1 else 0", 2.5, "test_double: assert 0 == (1 + 1)"),
        ("return {1: 2, 3: 6, 5: 10}[x]", 2.5, "test_four: "),  # fails in a fixture
        ("__import__('pytest').skip('')", 0, "test_four: "),
        ("breakpoint(); return 2 * x", 0, "stdin is closed"),
        ("raise KeyboardInterrupt", 0, "exit code 2"),
        ("__import__('os')._exit(0)", 0, "nothing was printed"),
        ("return x +", 0, "SyntaxError: "),
    ],
)
def test_half_a_solution_has_its_share_and_its_reasons(hw, body, points, reason):
    (hw / "cluster.py").write_text(SOLVED.replace("return 2 * x", body))
    found, outputs = graded(hw)
    assert found == [points] and reason in outputs, outputs


def test_a_time_limit_ends_all_processes_of_an_exercise(hw):
    beat = hw.parent / "beat"
    child = (
        f"import time\nwhile 1: open({str(beat)!r}, 'a').write('.'); time.sleep(0.01)"
    )
    start = f"__import__('subprocess').Popen([{sys.executable!r}, '-c', {child!r}])"
    source = SOLVED.replace("return 2 * x", f"{start}\n    while True: pass")
    (hw / "cluster.py").write_text(source)
    points, outputs = graded(hw, "--limit", "3")
    assert points == [0] and "time limit: stopped after 3 s" in outputs
    if os.name != "nt" and beat.exists():
        size = beat.stat().st_size
        time.sleep(0.3)
        assert size == beat.stat().st_size, "a process was left over"


def test_missing_files_are_named_and_nothing_is_graded(hw):
    (hw.parent / "zip" / "cluster.py").mkdir(parents=True)  # a folder, not a file
    line = "error: nothing graded: zip lacks cluster.py; it contains cluster.py"
    with pytest.raises(SystemExit, match=line):  # exit code 1
        main(["--grade", "zip"])
    assert not (hw.parent / "results.json").exists()


def test_pytest_tests_works_wherever_the_clone_is(hw):
    """Below settings of pytest for another project, and as a package by accident."""
    (hw.parent / "pytest.ini").write_text("[pytest]\naddopts = --cov=src\n")
    for folder in (hw, hw.parent):
        (folder / "__init__.py").touch()
    (hw / "cluster.py").write_text(SOLVED)
    command = [sys.executable, "-m", "pytest", "tests", "-q"]
    assert "6 passed" in subprocess.check_output(command, cwd=hw, text=True)


def test_check_fails_if_tests_do_not_run_or_do_not_fit(hw, capsys, monkeypatch):
    wrong = {"test_half": "", "test_nothing": "not run"}
    wrong |= {"test_four": "needs another exercise", "test_double": "should fail and"}
    wrong["test_mute"] = "should fail and"  # it does not say what to do
    for test, line in wrong.items():
        table = TABLE.replace("    test_half", f"    {test}")
        monkeypatch.setattr(make_assignment, "EXERCISES", make_assignment.read(table))
        with pytest.raises(SystemExit) as exit_info:
            main(["--check", "--exercise", "halving", "doubling"])
        assert exit_info.value.code == bool(line) and line in capsys.readouterr().out
