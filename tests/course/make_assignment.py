"""Exercises for a course: write copies with blanked functions, and grade submissions.

    python tests/make_assignment.py --list
    python tests/make_assignment.py ../homework --exercise guidance key-value-cache
    python tests/make_assignment.py ../homework        # all exercises
    python tests/make_assignment.py --grade ../homework    # a table, and results.json
    python tests/make_assignment.py --check            # do the tests fit the exercises?

In an exercise, the body of a function is replaced by a NotImplementedError, which says
in one sentence what to do. Then the tests that the table names fail. The tests of later
scripts still pass, except where the table says that they need the exercise.

--grade runs each exercise in its own process with a time limit: the submitted script of
the exercise with our other scripts and tests. So an error in one script costs only the
exercises of that script. results.json has the format of Gradescope's autograder. There
is no sandbox: submitted code runs with your permissions.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
SCRIPTS = ["tokenizer", "cluster", "ar_model", "aux_model", "sample", "evaluate"]
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container on Linux: "50000 100000"
CACHES = shutil.ignore_patterns("__pycache__", ".pytest_cache")


@dataclass
class Exercise:
    script: str  # without .py
    functions: list  # in that script, side by side: "name", or "Class.name"
    reference: str  # where the method is from: paper, figure, equation
    minutes: int  # about how long it takes
    task: str  # the sentence of the NotImplementedError
    tests: list  # in tests/test_<script>.py: they fail without a solution
    needed_by: tuple = ()  # later scripts whose tests need a solution too

    @property
    def points(self):
        """One point for five minutes."""
        return max(1, self.minutes // 5)


EXERCISES = {
    "straight-through": Exercise(
        "tokenizer",
        ["VQVAE.quantize"],
        "VQ-VAE (van den Oord et al. 2017), equations 1 to 3",
        40,
        "Find the nearest code of every vector, pass the gradient straight through, "
        "and compute the commitment loss.",
        [
            "test_quantize_picks_the_nearest_code",
            "test_quantize_hands_the_gradient_straight_through",
            "test_commitment_pulls_the_encoder_and_not_the_codes",
            "test_codes_are_found_in_float32_under_autocast",
        ],
    ),
    "codebook-update": Exercise(
        "tokenizer",
        ["VQVAE.update_codebook"],
        "VQ-VAE, appendix A.1",
        45,
        "Move every code to the EMA of the vectors that chose it, normalise the code, "
        "and re-initialise dead codes.",
        [
            "test_the_codebook_follows_moving_averages",
            "test_dead_codes_start_anew_at_an_encoder_output",
            "test_many_dead_codes_start_at_many_vectors_drawn_by_the_generator",
            "test_a_code_is_dead_by_the_new_counts_and_the_share_asked_for",
        ],
    ),
    "seeding": Exercise(
        "cluster",
        ["kmeans_plus_plus"],
        "k-means++ (Arthur and Vassilvitskii 2007)",
        30,
        "Choose k rows, each with probability proportional to its squared distance to "
        "the nearest row chosen so far.",
        [
            "test_seeding_draws_in_proportion_to_the_squared_distance",
            "test_seeding_takes_every_distinct_row_before_any_twice",
            "test_the_first_row_of_seeding_is_any_row",
            "test_seeding_draws_rows_of_x_by_rng_alone",
        ],
    ),
    "k-means": Exercise(
        "cluster",
        ["kmeans"],
        "CTF, figure 1a; Lloyd's algorithm",
        75,
        "Assign every row to its nearest centroid, move every centroid to the mean of "
        "its rows, and repeat until no assignment changes; no cluster may stay empty.",
        [
            "test_kmeans_against_scipy",
            "test_kmeans_ends_at_a_fixed_point",
            "test_inertia_never_rises_and_no_cluster_stays_empty",
            "test_an_empty_cluster_takes_over_a_row",
            "test_an_empty_cluster_does_not_rob_one_of_a_single_row",
            "test_as_many_clusters_as_rows_leave_no_inertia",
            "test_kmeans_starts_at_the_rows_that_seeding_draws_with_its_seed",
        ],
    ),
    "coarse-labels": Exercise(
        "cluster",
        ["to_coarse", "labels_by_cluster"],
        "CTF, figure 1a: the map g and its inverse",
        15,
        "Look up the cluster of every token of a data set, and list the codes of every "
        "cluster.",
        ["test_coarse_labels_of_examples_and_back"],
        needed_by=("ar_model",),
    ),
    "swap": Exercise(
        "cluster",
        ["swap_within_clusters"],
        "CTF, figure 1b",
        20,
        "Replace every token by a random code from the same cluster.",
        ["test_swaps_stay_in_their_cluster_and_reach_all_of_it"],
    ),
    "causal-attention": Exercise(
        "ar_model",
        ["Block.forward"],
        "LlamaGen's block: RMSNorm, SwiGLU; the causal mask",
        75,
        "Add to x the output of the attention, with a causal mask if self.causal, then "
        "add the output of the SwiGLU network.",
        [
            "test_future_tokens_do_not_change_past_logits",
            "test_without_the_mask_every_token_sees_all",
            "test_attention_against_the_formula",
        ],
        needed_by=("aux_model",),
    ),
    "key-value-cache": Exercise(
        "ar_model",
        ["Cache.extend"],
        "none: a cache changes the speed, not the results",
        20,
        "Append the new keys and values to the cached ones, and return all of them.",
        ["test_the_cache_returns_all_keys_and_values_so_far"],
    ),
    "coarse-loss": Exercise(
        "ar_model",
        ["next_token_loss"],
        "CTF, figure 1c: p(c_t given c_<t, y). A warm-up",
        10,
        "Predict every token from the class and the tokens before it, and return the "
        "mean cross-entropy.",
        ["test_loss_is_the_mean_of_minus_log_p"],
    ),
    "guidance": Exercise(
        "ar_model",
        ["guide"],
        "classifier-free guidance (Ho and Salimans 2022). A warm-up",
        5,
        "Start at the logits without the class, and add scale times the difference to "
        "the logits with the class.",
        ["test_guidance_formula"],
    ),
    "top-k-top-p": Exercise(
        "ar_model",
        ["filter_logits"],
        "CTF, table 3 (d); top-p: Holtzman et al. 2020",
        40,
        "Keep the top_k largest logits, of these the smallest set whose probabilities "
        "sum to top_p or more, and set all others to -inf.",
        [
            "test_top_k_keeps_the_k_largest",
            "test_top_p_keeps_the_fewest_that_reach_p",
            "test_top_k_and_top_p_together_and_on_the_edge",
        ],
    ),
    "masked-head": Exercise(
        "aux_model",
        ["AuxModel.cluster_logits", "AuxModel.cluster_logits_on_cpu"],
        "CTF, figure 1c: q_i lies in the cluster c_i",
        40,
        "Return the logits of the codes of each token's cluster, and MASKED where "
        "self.members is -1; cluster_logits_on_cpu may call cluster_logits.",
        [
            "test_logits_are_those_of_the_masked_k_way_head",
            "test_the_fast_head_of_a_cpu_equals_the_definition",
        ],
    ),
    "fine-loss": Exercise(
        "aux_model",
        ["fine_loss"],
        "CTF, figure 1c: p(q_i given c_1 .. c_T, y)",
        20,
        "Return the mean cross-entropy of the fine labels within their clusters, and "
        "the top-1 accuracy.",
        [
            "test_loss_is_the_masked_cross_entropy",
            "test_gradient_is_that_of_the_masked_cross_entropy",
        ],
    ),
    "one-pass": Exercise(
        "aux_model",
        ["predict_fine"],
        "CTF, figure 1c: the + 1 of T + 1 steps",
        40,
        "Predict all fine labels in one pass: guide, divide by the temperature, apply "
        "top_k, and sample; if top_k is 1, take the argmax.",
        [
            "test_a_fine_label_always_lies_in_its_cluster",
            "test_likeliest_fine_labels_with_guidance",
            "test_draws_follow_the_probabilities",
        ],
    ),
    "sampling": Exercise(
        "sample",
        ["sample_images"],
        "CTF, figure 1c",
        20,
        "Sample the coarse labels, then the fine labels, and decode them; the baseline "
        "samples the fine labels directly.",
        [
            "test_coarse_then_fine_then_pixels",
            "test_the_baseline_draws_fine_labels_directly",
        ],
    ),
    "frechet-distance": Exercise(
        "evaluate",
        ["frechet_distance"],
        "FID (Heusel et al. 2017), equation 6",
        25,
        "Compute the squared distance of the means plus the trace of "
        "S1 + S2 - 2 (S1 S2)^1/2.",
        [
            "test_frechet_distance_of_correlated_features",
            "test_frechet_distance_of_independent_features_in_closed_form",
            "test_frechet_distance_of_singular_covariances",
        ],
    ),
    "precision-recall": Exercise(
        "evaluate",
        ["squared_radius", "covered"],
        "Kynkäänniemi et al. 2019, equations 1 and 2",
        30,
        "Compute the squared distance of every member to its k-th neighbour, and the "
        "share of points that lie within the radius of a member.",
        [
            "test_precision_recall_of_points_on_a_line",
            "test_precision_recall_of_equal_distant_and_narrow_sets",
            "test_precision_recall_against_scipy_where_points_lie_on_the_edge",
        ],
    ),
    "bits-per-token": Exercise(
        "evaluate",
        ["bits_per_token"],
        "the chain rule: p(q) = p(c) p(q given c)",
        20,
        "Compute the nats of the coarse labels and of the fine labels given them (for "
        "the baseline: of the fine labels), and return bits.",
        ["test_bits_are_nats_over_ln_2_of_each_stage"],
    ),
}

# --------------------------------------------------------------------------------------
# Copies for students


def find(source, function):
    """The ast node of a function, "name" or "Class.name", in the source of a script."""
    body = ast.parse(source).body
    for name in function.split("."):
        node = next(item for item in body if getattr(item, "name", None) == name)
        body = node.body
    return node


def blank(source, exercise):
    """source with NotImplementedError(task) as the body of the exercise's functions."""
    for function in exercise.functions:
        node, lines = find(source, function), source.splitlines(keepends=True)
        first, last = node.body[1], node.body[-1]  # body[0] is the docstring
        indent = " " * first.col_offset
        words = textwrap.wrap(exercise.task, 70, drop_whitespace=False)
        said = [f"{indent}    {part!r}\n" for part in words]
        text = [f"{indent}raise NotImplementedError(\n", *said, f"{indent})\n"]
        end = node.body[0].end_lineno
        source = "".join([*lines[:end], *text, *lines[last.end_lineno :]])
    return source


def table():
    """All exercises as a Markdown table."""
    rows = ["| exercise | functions | minutes | points | source | tests |"]
    rows += ["|---" * 6 + "|"]
    for name, e in EXERCISES.items():
        functions = ", ".join(f"`{function}`" for function in e.functions)
        tests = ", ".join(f"`{test}`" for test in e.tests)
        needed = "".join(f"; {script}.py needs it too" for script in e.needed_by)
        columns = f"`{e.script}.py`: {functions}", e.minutes, e.points, e.reference
        cells = " | ".join(str(column) for column in columns)
        rows.append(f"| {name} | {cells} | {tests}{needed} |")
    return "\n".join(rows)


def sheet(names):
    """ASSIGNMENT.md: the exercises in order, for students."""
    total = sum(EXERCISES[name].points for name in names)
    text = f"# Assignment\n\n{len(names)} exercises, {total} points. Replace each "
    text += "`raise NotImplementedError` by the body of the function, as its docstring "
    text += "and the message say. Each exercise is graded alone, by the tests below "
    text += "it: solve them in any order. Only test_bad_inputs.py and test_pipeline.py "
    text += "need all.\n"
    for i, name in enumerate(names, start=1):
        e = EXERCISES[name]
        functions = " and ".join(f"`{function}`" for function in e.functions)
        points = f"{e.points} point{'s' * (e.points > 1)}"
        text += f"\n## {i}. {name} ({points}, about {e.minutes} minutes)\n\n"
        text += f"{functions} in `{e.script}.py`. {e.task}\n\n"
        text += f"Source: {e.reference}.\n\n    pytest tests/test_{e.script}.py -k "
        text += f'"{" or ".join(e.tests)}"\n'
        for later in e.needed_by:
            text += f"\nSome tests of `tests/test_{later}.py` need its solution.\n"
    text += "\n## Handing in\n\nRun the commands in this folder, after `pip install -r "
    text += (
        "requirements.txt`. Hand in the scripts above under their own names, not in a "
    )
    text += (
        "folder. Your own modules beside them come along; folders do not. The tests of "
    )
    text += (
        "an exercise share its points equally: they are ours, not those in your copy. "
    )
    text += "An exercise may take 120 seconds. You may import what requirements.txt "
    text += "installs. Do not call `input()` or `exit()`, and save as UTF-8.\n"
    return text


def students_readme(text):
    """README.md without the section "For a course", and without the columns of a table
    from "breakpoint" on: they show where the solutions stand."""
    text = re.sub(r"(?ms)^##+ For a course\n.*?(?=^##+ |\Z)", "", text)
    lines, columns = [], None
    for line in text.splitlines(keepends=True):
        cells = line.split("|")
        if not line.startswith("|"):
            columns = None
        elif columns is None:  # the head of a table
            found = (i for i, cell in enumerate(cells) if "breakpoint" in cell)
            columns = next(found, len(cells))
        if columns and columns < len(cells):
            line = "|".join(cells[:columns]) + "|\n"
        lines.append(line)
    return "".join(lines)


def write_assignment(folder, names):
    """Copy the repository to a new folder, and blank the exercises in names."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=CACHES)
    for own in ("make_assignment.py", "test_make_assignment.py"):
        (folder / "tests" / own).unlink()
    shutil.copytree(ROOT / ".github", folder / ".github")
    for name in ("requirements.txt", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    readme = students_readme((ROOT / "README.md").read_text("utf-8"))
    (folder / "README.md").write_text(readme, "utf-8")
    (folder / "ASSIGNMENT.md").write_text(sheet(names), "utf-8")
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text("utf-8")
        for exercise in (EXERCISES[name] for name in names):
            if exercise.script == script:
                source = blank(source, exercise)
        (folder / f"{script}.py").write_text(source, "utf-8")


# --------------------------------------------------------------------------------------
# Grades


def run_tests(folder, scripts, tests=(), limit=None):
    """Run the test files of scripts in folder, or only some tests, for limit seconds.

    Returns {(script, test): message}, with the message "" if the test passed; and a
    text that says why tests may be missing: the time limit, or the last printed lines.
    """
    files = [f"tests/test_{script}.py" for script in scripts]
    if tests:
        files = [f"{files[0]}::{test}" for test in tests]
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files]
        options = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        options |= {"text": True, "errors": "replace", "timeout": limit}
        try:
            done = subprocess.run(command, check=False, **options)
        except subprocess.TimeoutExpired:
            return {}, f"time limit: stopped after {limit} s. An endless loop?"
        nothing = "nothing was printed: does the script call exit()?"
        last = "\n".join(done.stdout.splitlines()[-15:]) or nothing
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
        # A submission that skips the tests of its exercise has not passed them.
        results, bad = {}, ("failure", "error", *(["skipped"] if tests else []))
        for case in cases:
            problems = [e for e in case if e.tag in bad]
            found = problems[0] if problems else {}
            message = found.get("message", "no message") if problems else ""
            script = case.get("classname").removeprefix("test_")
            key = script, case.get("name").split("[")[0]
            results[key] = results.get(key) or message
    return results, f"pytest ended with exit code {done.returncode}:\n{last}"


def grade(folder, names, limit, jobs):
    """The results of the exercises in names, in Gradescope's format; jobs at a time."""

    def grade_exercise(name):
        """Run its tests on the submitted script and our other scripts."""
        exercise = EXERCISES[name]
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary, "copy")
            shutil.copytree(ROOT / "tests", copy / "tests", ignore=CACHES)
            for path in folder.glob("*.py"):  # the student's own modules come along
                if path.is_file():
                    shutil.copy(path, copy)
            for script in SCRIPTS:
                source = folder if script == exercise.script else ROOT
                shutil.copy(source / f"{script}.py", copy)
            found, why = run_tests(copy, [exercise.script], exercise.tests, limit)
        messages = [found.get((exercise.script, t), "not run") for t in exercise.tests]
        said = zip(exercise.tests, messages)
        output = "\n".join(f"{test}: {message or 'passed'}" for test, message in said)
        if "not run" in messages:
            output += f"\n{why}"
        passed = messages.count("")
        return {
            "name": name,
            "score": round(exercise.points * passed / len(exercise.tests), 2),
            "max_score": exercise.points,
            "status": "passed" if passed == len(exercise.tests) else "failed",
            "output": output,
        }

    if not folder.is_dir():
        raise SystemExit(f"error: nothing graded: {folder} is no folder")
    needed = {f"{EXERCISES[name].script}.py" for name in names}
    missing = sorted(file for file in needed if not (folder / file).is_file())
    if missing:
        there = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
        lacks = f"{folder} lacks {', '.join(missing)}; it contains {there[:200]}"
        raise SystemExit(f"error: nothing graded: {lacks}")
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(grade_exercise, names))


def usable_cpus():
    """The number of CPUs that this process may use, by its affinity and its quota."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    count = len(affinity(0))
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no quota: "max 100000"
        return count


# --------------------------------------------------------------------------------------
# Checks of the table


def check(name):
    """Whether the tests pinpoint an exercise: (name, the lines to print).

    If only this exercise is blanked, its tests fail and say what to do. If all others
    are blanked, its tests pass: no grade depends on another exercise.
    """
    exercise, wrong = EXERCISES[name], []
    others = [other for other in EXERCISES if other != name]
    for blanked in ([name], others):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "copy")
            write_assignment(folder, blanked)
            found, why = run_tests(folder, [exercise.script], exercise.tests)
        for test in exercise.tests:
            message = found.get((exercise.script, test), f"not run: {why}")
            if blanked == [name] and exercise.task[:40] not in message:
                wrong.append(f"{test} should fail and say what to do: {message!r}")
            if blanked == others and message:
                wrong.append(f"{test} needs another exercise: {message!r}")
    return name, wrong


def check_script(script):
    """Whether the tests of later scripts pass without the exercises of a script."""
    own = {name: e for name, e in EXERCISES.items() if e.script == script}
    needed = {later for e in own.values() for later in e.needed_by}
    # No script imports a later one.
    later = [s for s in SCRIPTS[SCRIPTS.index(script) + 1 :] if s not in needed]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "copy")
        write_assignment(folder, list(own))
        found, why = run_tests(folder, later)
    wrong = [f"{s}: {t} fails too: {said!r}" for (s, t), said in found.items() if said]
    return f"{script}.py without its exercises", wrong if found else [why]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="the new folder for the copy")
    add("--exercise", nargs="+", choices=EXERCISES, metavar="NAME", help="only these")
    add("--list", action="store_true", help="print the table of exercises")
    what = "grade a submission; submitted code runs with your permissions"
    add("--grade", type=Path, metavar="DIR", help=what)
    add("--limit", type=int, default=120, help="seconds per exercise (120)")
    add("--jobs", type=int, default=usable_cpus(), help="at once (all CPUs)")
    add("--check", action="store_true", help="check that tests pinpoint each exercise")
    args = parser.parse_args(argv)
    names = args.exercise or list(EXERCISES)
    if args.list:
        print(table())
    elif args.grade:
        Path("results.json").unlink(missing_ok=True)  # of an earlier submission
        results = grade(args.grade, names, args.limit, args.jobs)
        for result in results:
            points = f"{result['score']:g} of {result['max_score']}"
            print(f"{result['name']:20}{points:>12}  {result['status']}")
        total = sum(result["score"] for result in results)
        print(f"{'all':20}{total:>6g} of {sum(r['max_score'] for r in results)}")
        Path("results.json").write_text(json.dumps({"tests": results}, indent=1) + "\n")
        print("wrote results.json")
    elif args.check:
        failed = False
        with ThreadPoolExecutor(args.jobs) as pool:
            scripts = pool.map(check_script, SCRIPTS[:-1])
            for name, wrong in chain(pool.map(check, names), scripts):
                print(f"{name}: {'pinpointed' if not wrong else 'NOT pinpointed'}")
                print("".join(f"    {line}\n" for line in wrong), end="", flush=True)
                failed = failed or bool(wrong)
        raise SystemExit(failed)
    elif args.folder is None:
        parser.error("name the new folder for the copy")
    elif args.folder.exists():
        parser.error(f"{args.folder} exists already")
    else:
        write_assignment(args.folder, names)
        print(f"wrote {args.folder}: {', '.join(names)}")


if __name__ == "__main__":
    main()
