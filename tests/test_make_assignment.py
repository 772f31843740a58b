import ast
import importlib.util
import inspect
import json
import textwrap

import pytest

from tests import make_assignment
from tests.make_assignment import (
    EXERCISES,
    ROOT,
    STAGES,
    blank,
    find,
    main,
    run_tests,
    write_assignment,
)


def sources(folder):
    return {stage: (folder / f"{stage}.py").read_text("utf-8") for stage in STAGES}


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_keeps_all_but_the_solution(name):
    exercise, before = EXERCISES[name], sources(ROOT)[EXERCISES[name].stage]
    after = blank(before, exercise)
    functions = exercise.functions
    for function in functions:
        old, new = find(before, function), find(after, function)
        assert ast.unparse(old.args) == ast.unparse(new.args)
        assert ast.get_docstring(old) == ast.get_docstring(new)
        assert len(new.body) == 2 and isinstance(new.body[1], ast.Raise)
    # What is before and after is the same, line by line.
    one, two = before.splitlines(), after.splitlines()
    old, new = find(before, functions[0]), find(after, functions[0])
    assert one[: old.lineno] == two[: new.lineno]
    old, new = find(before, functions[-1]), find(after, functions[-1])
    assert one[old.end_lineno :] == two[new.end_lineno :]


def test_the_copy_says_what_to_do(tmp_path):
    write_assignment(tmp_path / "copy", ["guidance", "swap"])
    copy, original = sources(tmp_path / "copy"), sources(ROOT)
    changed = {stage for stage in STAGES if copy[stage] != original[stage]}
    assert changed == {"ar_model", "cluster"}
    path = tmp_path / "copy" / "ar_model.py"
    spec = importlib.util.spec_from_file_location("students", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(NotImplementedError, match="towards those with it, and beyond"):
        module.guide(1.0, 2.0, 3.0)
    assert not (tmp_path / "copy" / "tests" / "make_assignment.py").exists()
    readme = (tmp_path / "copy" / "README.md").read_text("utf-8")
    assert "make_assignment" not in readme and "For a course" not in readme
    assert "## One image, stage by stage\n" in readme and "\n## Citation\n" in readme
    assert "inertia.append" not in readme and "debugger first" not in readme, (
        "where to set breakpoints shows solutions"
    )
    assert "| `evaluate.py` |" in readme
    sheet = (tmp_path / "copy" / "ASSIGNMENT.md").read_text("utf-8")
    assert sheet.index("guidance (1 point") < sheet.index("swap (4 points")
    assert "pytest tests/test_ar_model.py -k" in sheet and "5 points" in sheet


def students(folder, **functions):
    """The solution, in which functions of ar_model.py are defined once more at its end."""
    write_assignment(folder, [])
    with open(folder / "ar_model.py", "a") as file:
        file.writelines(
            "\n\n" + textwrap.dedent(source) for source in functions.values()
        )
    return folder


def test_marks_of_a_right_and_a_wrong_solution(tmp_path, monkeypatch):
    wrong = "def guide(cond, uncond, scale):\n    return cond * scale\n"
    folder = students(tmp_path / "copy", guide=wrong)
    # A student who edits the tests gains nothing.
    (folder / "tests" / "test_ar_model.py").write_text(
        "def test_guidance_formula(): pass"
    )
    monkeypatch.chdir(tmp_path)
    some = "guidance", "key-value-cache"
    main(["--grade", str(folder), "--exercise", *some])
    guidance, cache = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert cache["score"] == cache["max_score"] == 4 and cache["status"] == "passed"
    assert guidance["score"] == 0 and guidance["status"] == "failed"
    assert "scale 0 forgets the class" in guidance["output"]


def test_an_endless_loop_costs_its_exercise(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    loop = "def test_it():\n    while True:\n        pass\n"
    (tmp_path / "tests" / "test_loop.py").write_text(loop)
    assert run_tests(tmp_path, ["loop"], limit=4) is None
    monkeypatch.setattr(make_assignment, "run_tests", lambda *args: None)
    (mark,) = make_assignment.grade(tmp_path, 4, ["guidance"])
    assert mark["score"] == 0 and "endless loop" in mark["output"]


def test_the_tests_that_the_table_names_exist():
    for exercise in EXERCISES.values():
        module = importlib.import_module(f"tests.test_{exercise.stage}")
        for test in exercise.tests:
            assert inspect.isfunction(getattr(module, test))


def test_a_copy_replaces_nothing(tmp_path, capsys):
    (tmp_path / "copy").mkdir()
    for flags in ([tmp_path / "copy"], [], [tmp_path / "new", "--exercise", "nothing"]):
        with pytest.raises(SystemExit) as exit_info:
            main([str(flag) for flag in flags])
        assert exit_info.value.code == 2
    assert not any((tmp_path / "copy").iterdir()) and not (tmp_path / "new").exists()
