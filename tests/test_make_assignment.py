import ast
import importlib.util
import inspect

import pytest

from tests.make_assignment import (
    EXERCISES,
    ROOT,
    STAGES,
    blank,
    find,
    main,
    write_assignment,
)


def sources(folder):
    return {stage: (folder / f"{stage}.py").read_text("utf-8") for stage in STAGES}


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_keeps_all_but_the_solution(name):
    exercise, before = EXERCISES[name], sources(ROOT)[EXERCISES[name].stage]
    after = blank(before, exercise)
    old, new = find(before, exercise), find(after, exercise)
    assert ast.unparse(old.args) == ast.unparse(new.args)
    assert ast.get_docstring(old) == ast.get_docstring(new)
    assert len(new.body) == 2 and isinstance(new.body[1], ast.Raise)
    # What is before and after the function is the same, line by line.
    one, two = before.splitlines(), after.splitlines()
    assert one[: old.lineno] == two[: new.lineno]
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
