import ast
import importlib
import inspect
import json
import os
import subprocess
import sys

import make_assignment
import pytest
from make_assignment import EXERCISES, ROOT, SCRIPTS, blank, find, main, run_tests


def sources(folder):
    return {name: (folder / f"{name}.py").read_text("utf-8") for name in SCRIPTS}


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_keeps_all_but_the_solution(name):
    exercise, before = EXERCISES[name], sources(ROOT)[EXERCISES[name].script]
    after = blank(before, exercise)
    functions = exercise.functions
    for function in functions:
        old, new = find(before, function), find(after, function)
        assert ast.unparse(old.args) == ast.unparse(new.args)
        assert ast.get_docstring(old) == ast.get_docstring(new)
        assert len(new.body) == 2 and isinstance(new.body[1], ast.Raise)
        (said,) = new.body[1].exc.args
        assert new.body[1].exc.func.id == "NotImplementedError"
        assert said.value == exercise.task
    # The lines before and after the functions are identical.
    one, two = before.splitlines(), after.splitlines()
    old, new = find(before, functions[0]), find(after, functions[0])
    assert one[: old.lineno] == two[: new.lineno]
    old, new = find(before, functions[-1]), find(after, functions[-1])
    assert one[old.end_lineno :] == two[new.end_lineno :]


def test_the_tests_that_the_table_names_exist():
    for exercise in EXERCISES.values():
        module = importlib.import_module(f"test_{exercise.script}")
        for test in exercise.tests:
            assert inspect.isfunction(getattr(module, test))


def test_a_copy_has_a_sheet_and_no_solutions(tmp_path):
    main([str(tmp_path / "copy"), "--exercise", "guidance", "swap"])
    copy, original = sources(tmp_path / "copy"), sources(ROOT)
    changed = {name for name in SCRIPTS if copy[name] != original[name]}
    assert changed == {"ar_model", "cluster"}
    assert not (tmp_path / "copy" / "tests" / "make_assignment.py").exists()
    sheet = (tmp_path / "copy" / "ASSIGNMENT.md").read_text("utf-8")
    assert sheet.index("guidance (1 point") < sheet.index("swap (4 points")
    assert "    pytest tests/test_ar_model.py -k" in sheet and "5 points" in sheet


def test_the_students_readme_does_not_show_where_solutions_stand():
    columns = "| file | writes | first breakpoint | look at |\n|---|---|---|---|\n"
    readme = f"# CTF\n\n{columns}| a.py | a.pt | `solution` | `x` |\n\n"
    readme += "| other | table |\n|---|---|\n| 1 | 2 |\n"
    course = "\n## For a course\n\nmake_assignment.py\n\n```sh\n# comment\n```\n"
    rest = "\n## Citation\n\nText.\n"
    wanted = "# CTF\n\n| file | writes |\n|---|---|\n| a.py | a.pt |\n\n"
    wanted += "| other | table |\n|---|---|\n| 1 | 2 |\n\n"
    students = make_assignment.students_readme
    assert students(readme + course + rest) == wanted + rest[1:]
    assert students(readme + course) == wanted
    assert students(rest) == rest


def test_a_copy_replaces_nothing(tmp_path, capsys):
    (tmp_path / "copy").mkdir()
    for flags in ([tmp_path / "copy"], [], [tmp_path / "new", "--exercise", "nothing"]):
        with pytest.raises(SystemExit) as exit_info:
            main([str(flag) for flag in flags])
        assert exit_info.value.code == 2
    assert not any((tmp_path / "copy").iterdir()) and not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of a submission with several mistakes: {exercise: result}."""
    folder = tmp_path_factory.mktemp("submission")
    additions = {
        "tokenizer": "\nimport sys\nsys.exit(0)\n",
        "cluster": "\nimport not_handed_in\n",
        "ar_model": "\nfrom my_guidance import guide\n",
        "aux_model": "\ndef broken(:\n",
    }
    for name, source in sources(ROOT).items():
        text = source + additions.get(name, "")
        (folder / f"{name}.py").write_text(text, "utf-8")
    wrong = "def guide(cond, uncond, scale):\n    return cond * scale\n"
    (folder / "my_guidance.py").write_text(wrong)
    # A student who edits the tests gains nothing.
    (folder / "tests").mkdir()
    passes = "def test_guidance_formula(): pass\n"
    (folder / "tests" / "test_ar_model.py").write_text(passes)
    names = ["guidance", "key-value-cache", "codebook-update", "seeding", "fine-loss"]
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        main(["--grade", str(folder), "--exercise", *names])
    tests = json.loads((folder / "results.json").read_text())["tests"]
    assert [result["name"] for result in tests] == names
    return {result["name"]: result for result in tests}


def test_each_exercise_is_graded_alone(results):
    """The submission has errors in all other scripts, and a module of its own."""
    cache, guidance = results["key-value-cache"], results["guidance"]
    assert cache["score"] == cache["max_score"] == 4 and cache["status"] == "passed"
    assert guidance["score"] == 0 and guidance["status"] == "failed"
    assert "scale 0 " in guidance["output"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("codebook-update", "pytest ended with exit code 0:\nnothing was printed"),
        ("seeding", "No module named 'not_handed_in'"),
        ("fine-loss", "SyntaxError: "),
    ],
)
def test_tests_that_do_not_run_have_a_reason(results, name, reason):
    result = results[name]
    assert result["score"] == 0 and result["status"] == "failed"
    assert result["output"].count("not run") == len(EXERCISES[name].tests)
    assert reason in result["output"]


def test_a_skipped_test_is_not_passed(tmp_path):
    (tmp_path / "tests").mkdir()
    skip = "import pytest\n\n\ndef test_it():\n    pytest.skip('not today')\n"
    (tmp_path / "tests" / "test_skip.py").write_text(skip)
    found, _ = run_tests(tmp_path, ["skip"], ["test_it"], limit=60)
    assert list(found.values()) == ["not today"]


def test_an_endless_loop_costs_its_exercise(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    loop = "def test_it():\n    while True:\n        pass\n"
    (tmp_path / "tests" / "test_loop.py").write_text(loop)
    found, why = run_tests(tmp_path, ["loop"], limit=2)
    assert found == {} and why.startswith("time limit: stopped after 2 s")
    monkeypatch.setattr(make_assignment, "run_tests", lambda *_: (found, why))
    (result,) = make_assignment.grade(ROOT, ["guidance"], 2, 1)
    assert result["score"] == 0 and why in result["output"]


@pytest.mark.parametrize("name", ["submission/ar_model.py", "ar_model (1).py", ""])
def test_missing_files_are_named_and_nothing_is_graded(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "unzipped" / name
    path.mkdir(parents=True)  # a folder instead of a file is as good as nothing
    with pytest.raises(SystemExit) as exit_info:
        main(["--grade", "unzipped", "--exercise", "guidance", "swap"])
    there = name.split("/")[0] or "nothing"
    line = f"unzipped lacks ar_model.py, cluster.py; it contains {there}"
    assert exit_info.value.code == f"error: nothing graded: {line}"  # exit code 1
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("quota", "jobs"), [("50000 100000", 1), ("300000 100000", 3), ("max 100000", 4)]
)
def test_jobs_are_the_cpus_that_may_be_used(tmp_path, monkeypatch, quota, jobs):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(make_assignment, "QUOTA", tmp_path / "cpu.max")
    assert make_assignment.usable_cpus() == 4  # no such file: not in a container
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert make_assignment.usable_cpus() == jobs


def test_pytest_tests_works_wherever_the_clone_is(tmp_path):
    """Below settings of pytest for another project, as a package by accident, and with
    a copy for students inside."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --cov=src\n")
    clone = tmp_path / "clone"
    make_assignment.write_assignment(clone, [])
    (clone / "__init__.py").touch()
    make_assignment.write_assignment(clone / "homework", ["guidance"])
    command = [sys.executable, "-m", "pytest", "tests", "--collect-only", "-q"]
    for folder in (clone, clone / "homework"):
        printed = subprocess.check_output(command, cwd=folder, text=True)
        assert "test_ar_model.py::test_guidance_formula" in printed
        assert "homework" not in printed
    for file in (".ci/run", ".github/workflows/tests.yml"):
        assert "pytest tests" in (ROOT / file).read_text("utf-8")
