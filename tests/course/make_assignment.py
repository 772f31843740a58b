"""Exercises for a course: write copies with blanked functions, and grade submissions.

    cd tests/course
    python make_assignment.py --list
    python make_assignment.py ~/homework --exercise guidance key-value-cache
    python make_assignment.py ~/homework            # all exercises
    python make_assignment.py --grade ~/homework    # a table, and results.json
    python make_assignment.py --check               # do the tests fit the exercises?

In an exercise, the body of a function is replaced by a NotImplementedError, which says
in one sentence what to do. Then the tests that the table names fail. Tests of later
scripts may fail too, but they give no points.

Which exercises were set is recorded in homework.exercises, beside the copy. Students
get the copy only, so they cannot change the record. --grade DIR reads the only file
called *.exercises in the folders above DIR (~/homework.exercises for
~/submissions/anna). If there are two, perhaps one from a student's archive, it grades
nothing. So keep each assignment in a folder of its own. Exactly these exercises count,
whatever the submission contains. --exercise replaces the record.

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
import signal
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["tokenizer", "cluster", "ar_model", "aux_model", "sample", "evaluate"]


@dataclass
class Exercise:
    script: str  # without .py
    functions: list  # in that script, side by side: "name", or "Class.name"
    reference: str  # where the method is from: paper, figure, equation
    minutes: int  # about how long it takes
    task: str  # the sentence of the NotImplementedError
    tests: list  # in tests/test_<script>.py: they fail without a solution

    @property
    def points(self):
        """One point for five minutes."""
        return max(1, self.minutes // 5)

    @property
    def wanted(self):
        """Its tests, as run_tests names them."""
        return [f"test_{self.script}.py::{test}" for test in self.tests]


# For each exercise: name, minutes, functions; the source; the task; its tests.
TABLE = """
straight-through, 40: VQVAE.quantize in tokenizer.py
VQ-VAE (van den Oord et al. 2017), equations 1 to 3
Find the nearest code of every vector, pass the gradient straight through, and compute
the commitment loss.
    test_quantize_picks_the_nearest_code
    test_the_gradient_of_the_codes_is_passed_straight_through
    test_commitment_pulls_the_encoder_and_not_the_codes
    test_codes_are_found_in_float32_under_autocast

codebook-update, 45: VQVAE.update_codebook in tokenizer.py
VQ-VAE, appendix A.1
Move every code to the EMA of the vectors that chose it, normalise the code, and re-
initialise dead codes.
    test_codes_are_updated_by_an_ema
    test_dead_codes_are_reinitialised_to_random_encoder_outputs

seeding, 30: kmeans_plus_plus in cluster.py
k-means++ (Arthur and Vassilvitskii 2007)
Choose k rows, each with probability proportional to its squared distance to the nearest
row chosen so far.
    test_rows_are_chosen_in_proportion_to_the_squared_distance
    test_every_distinct_row_is_chosen_before_any_twice

k-means, 75: kmeans in cluster.py
CTF, figure 1a; Lloyd's algorithm
Assign every row to its nearest centroid, move every centroid to the mean of its rows,
and repeat until no assignment changes; no cluster may stay empty.
    test_kmeans_against_scipy
    test_kmeans_ends_when_no_assignment_changes
    test_inertia_never_rises_and_no_cluster_stays_empty
    test_an_empty_cluster_takes_a_row_of_another_cluster
    test_as_many_clusters_as_rows_have_no_inertia
    test_kmeans_starts_from_k_means_plus_plus_with_seed

inverse-map, 15: invert in cluster.py
CTF, figure 1a: the map g and its inverse
List the codes of every cluster, and where each code stands in its list.
    test_invert_lists_the_codes_of_every_cluster

swap, 15: swap_within_clusters in cluster.py
CTF, figure 1b
Replace every token by a random code from the same cluster.
    test_swaps_stay_in_their_cluster_and_reach_all_of_it

causal-attention, 75: Block.forward in ar_model.py
LlamaGen's block: RMSNorm, SwiGLU; the causal mask
Add to x the output of the attention, with a causal mask if self.causal, then add the
output of the SwiGLU network.
    test_future_tokens_do_not_change_past_logits
    test_attention_against_the_formula

key-value-cache, 20: Cache.extend in ar_model.py
none: a cache changes the speed, not the results
Append the new keys and values to the cached ones, and return all of them.
    test_the_cache_returns_all_keys_and_values_so_far

coarse-loss, 10: next_token_loss in ar_model.py
CTF, figure 1c: p(c_t given c_<t, y). A warm-up
Predict every token from the class and the tokens before it, and return the mean cross-
entropy.
    test_loss_is_the_mean_of_minus_log_p

guidance, 5: guide in ar_model.py
classifier-free guidance (Ho and Salimans 2022). A warm-up
Start at the logits without the class, and add scale times the difference to the logits
with the class.
    test_guidance_formula

top-k-top-p, 40: filter_logits in ar_model.py
CTF, table 3 (d); top-p: Holtzman et al. 2020
Keep exactly the top_k largest logits, of these the smallest set whose probabilities sum
to top_p or more, and set all others to -inf.
    test_top_k_keeps_exactly_the_k_largest
    test_top_p_keeps_the_fewest_that_reach_p
    test_top_k_and_top_p_together_and_on_the_edge

masked-head, 30: AuxModel.cluster_logits, AuxModel.cluster_logits_on_cpu in aux_model.py
CTF, figure 1c: q_i lies in the cluster c_i
Return the logits of the codes of each token's cluster, and MASKED where self.members is
-1; cluster_logits_on_cpu may call cluster_logits.
    test_logits_are_those_of_the_masked_k_way_head

fine-loss, 20: fine_loss in aux_model.py
CTF, figure 1c: p(q_i given c_1 .. c_T, y)
Return the mean cross-entropy of the fine labels within their clusters, and the top-1
accuracy.
    test_loss_is_the_masked_cross_entropy

one-pass, 25: predict_fine in aux_model.py
CTF, figure 1c: the + 1 of T + 1 steps
Predict all fine labels in one pass: the logits of the model, with guidance also those
without the class; sampling.draw; the codes that it has chosen.
    test_a_fine_label_always_lies_in_its_cluster
    test_top_k_1_is_the_argmax_with_guidance
    test_fine_labels_follow_the_probabilities

sampling, 20: sample_images in sample.py
CTF, figure 1c
Sample the coarse labels, then the fine labels, and decode them; the baseline samples
the fine labels directly.
    test_from_classes_to_pixels

frechet-distance, 25: frechet_distance in evaluate.py
FID (Heusel et al. 2017), equation 6
Compute the squared distance of the means plus the trace of S1 + S2 - 2 (S1 S2)^1/2.
    test_frechet_distance_of_correlated_features
    test_frechet_distance_of_independent_features_in_closed_form
    test_frechet_distance_of_singular_covariances

precision-recall, 25: covered in evaluate.py
Kynkäänniemi et al. 2019, equations 1 and 2
Compute the distance of every member to its k-th nearest neighbour, and the share of
points that lie within the radius of a member.
    test_precision_recall_of_points_on_a_line
    test_precision_recall_by_brute_force_with_doubled_points_and_edges

bits-per-token, 20: bits_per_token in evaluate.py
the chain rule: p(q) = p(c) p(q given c)
Compute the nats of the coarse labels and of the fine labels given them (for the
baseline: of the fine labels), and return bits.
    test_bits_are_nats_over_ln_2_of_each_stage
"""


def read(table):
    """{name: Exercise} of a table as above."""
    exercises = {}
    for part in table.strip().split("\n\n"):
        first, reference, *rest = part.splitlines()
        pattern = r"(\S+), (\d+): (.+) in (\w+)\.py"
        name, minutes, functions, script = re.fullmatch(pattern, first).groups()
        task = " ".join(line for line in rest if not line.startswith(" "))
        tests = [line.strip() for line in rest if line.startswith(" ")]
        facts = functions.split(", "), reference, int(minutes), task, tests
        exercises[name] = Exercise(script, *facts)
    return exercises


EXERCISES = read(TABLE)

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


SHEET = """# Assignment

Replace each `raise NotImplementedError` by the body of the function, as its docstring
and the message say. Each exercise is graded alone, by the tests below it: solve them in
any order. Other tests in tests/ may need several of them.
{sections}
## Handing in

Run the commands in this folder, after `pip install -r requirements.txt`. Hand in the
scripts above under their own names, not in a folder. Your own modules beside them come
along; folders do not. The tests of an exercise share its points equally: they are ours,
not those in your copy. A test with several cases passes if all of them pass. An
exercise may take 120 seconds. You may import what requirements.txt installs. Remove
every `breakpoint()` and `input()` (stdin is closed), do not call `exit()`, and save as
UTF-8.
"""

SECTION = """
## {number}. {name} ({e.points} of {total} points, about {e.minutes} minutes)

{functions} in `{e.script}.py`. {e.task}

Source: {e.reference}.

    pytest tests/test_{e.script}.py -k "{tests}"
"""


def sheet(names):
    """ASSIGNMENT.md: the exercises in order, for students."""
    sections, total = [], sum(EXERCISES[name].points for name in names)
    for number, name in enumerate(names, start=1):
        e, facts = EXERCISES[name], {"number": number, "name": name, "total": total}
        facts["functions"] = " and ".join(f"`{function}`" for function in e.functions)
        sections.append(SECTION.format(e=e, tests=" or ".join(e.tests), **facts))
    return SHEET.format(sections="".join(sections))


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


def copy_files(folder, *patterns):
    """Copy files of the repository, but for caches and tests/course. The copies are
    writable, even if the repository is read-only."""
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    for path in paths:
        name = path.relative_to(ROOT)
        skipped = {"__pycache__", ".pytest_cache", "course"} & set(name.parts)
        if path.is_file() and not skipped:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def write_assignment(folder, names):
    """Copy the repository to a new folder, and blank the exercises in names."""
    # What does not exist is left out: files with a dot are easily lost.
    copy_files(folder, "tests/**/*", ".github/**/*", "requirements.txt", ".gitignore")
    readme = students_readme((ROOT / "README.md").read_text("utf-8"))
    (folder / "README.md").write_text(readme, "utf-8")
    (folder / "ASSIGNMENT.md").write_text(sheet(names), "utf-8")
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text("utf-8")
        for exercise in (EXERCISES[name] for name in names):
            if exercise.script == script:
                source = blank(source, exercise)
        (folder / f"{script}.py").write_text(source, "utf-8")


def exercises_set(folder):
    """The recorded exercises (see above) that count for the submission in folder."""
    folder = folder.resolve()
    records = [p for above in folder.parents for p in above.glob("*.exercises")]
    if len(records) != 1:
        found = ", ".join(sorted(map(str, records))) or f"no {folder}.exercises"
        which = f"which exercises were set? Found {found}: name them with --exercise"
        raise SystemExit(f"error: nothing graded: {which}")
    names = list(dict.fromkeys(records[0].read_text("utf-8").split()))
    if not names or not set(names) <= set(EXERCISES):
        raise SystemExit(f"error: nothing graded: unknown exercises in {records[0]}")
    print(f"the exercises in {records[0]}:")
    return names


# --------------------------------------------------------------------------------------
# Grades


def run_tests(folder, wanted, limit=None):
    """Run the wanted tests of folder/tests, "test_x.py::test_y", for limit seconds.

    Returns {test: message}, with the message "" if all cases of the test passed; and a
    text that says why tests may be missing: the time limit, or the last printed lines.
    """
    with tempfile.TemporaryDirectory() as temporary:
        report, printed = Path(temporary, "report.xml"), Path(temporary, "printed.txt")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
        # Without pytest's debugger, breakpoint() is an error in its test alone.
        command += ["-p", "no:debugging", *(f"tests/{test}" for test in wanted)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
        options = {"cwd": folder, "env": env, "stdin": subprocess.DEVNULL}
        options |= {"stderr": subprocess.STDOUT, "start_new_session": True}
        with printed.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, **options)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                return {}, f"time limit: stopped after {limit} s. An endless loop?"
            finally:
                end(process)
        nothing = "nothing was printed: does the script call exit()?"
        last = printed.read_text("utf-8", "replace").splitlines()[-15:]
        why = "\n".join([f"pytest ended with exit code {code}:", *(last or [nothing])])
        if code not in (0, 1) or not report.exists():  # it did not get to the end
            return {}, why
        results = {}
        for case in ElementTree.parse(report).iter("testcase"):
            test = f"{case.get('classname')}.py::{case.get('name').split('[')[0]}"
            # A submission that skips a test has not passed it.
            bad = [e for e in case if e.tag in ("failure", "error", "skipped")]
            message = (bad[0].get("message") or "no message") if bad else ""
            results[test] = results.get(test) or message
        return results, why


def end(process):
    """End a process and whatever it has started (on Windows, only the process)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # no group any more
        process.kill()
    process.wait()


def grade(folder, names, limit, jobs):
    """The results of the exercises in names, in Gradescope's format; jobs at a time."""

    def grade_exercise(name):
        """Run its tests on the submitted script and our other scripts."""
        exercise = EXERCISES[name]
        with tempfile.TemporaryDirectory() as temporary:
            for path in folder.glob("*.py"):  # the student's own modules come along
                if path.is_file():
                    shutil.copyfile(path, Path(temporary, path.name))
            copy_files(Path(temporary), "tests/**/*", "*.py")
            script = f"{exercise.script}.py"
            shutil.copyfile(folder / script, Path(temporary, script))
            found, why = run_tests(temporary, exercise.wanted, limit)
        output, passed = [], 0
        for test, wanted in zip(exercise.tests, exercise.wanted):
            message = found.get(wanted, "not run")
            passed += message == ""
            output.append(f"{test}: {message or 'passed'}")
        if len(found) < len(exercise.tests):
            output.append(why)
        if "reading from stdin" in "".join(output):
            output.append("stdin is closed: remove every breakpoint() and input()")
        return {
            "name": name,
            "score": round(exercise.points * passed / len(exercise.tests), 2),
            "max_score": exercise.points,
            "status": "passed" if passed == len(exercise.tests) else "failed",
            "output": "\n".join(output),
        }

    needed = sorted({f"{EXERCISES[name].script}.py" for name in names})
    missing = ", ".join(file for file in needed if not (folder / file).is_file())
    if missing:
        there = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
        lacks = f"{folder} lacks {missing}; it contains {there[:200]}"
        raise SystemExit(f"error: nothing graded: {lacks}")
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(grade_exercise, names))


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
            found, why = run_tests(folder, exercise.wanted)
        for test in exercise.wanted:
            message = found.get(test, f"not run: {why}")
            if blanked == [name] and exercise.task[:40] not in message:
                wrong.append(f"{test} should fail and say what to do: {message!r}")
            if blanked == others and message:
                wrong.append(f"{test} needs another exercise: {message!r}")
    return name, wrong


def at_least_1(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="the new folder for the copy")
    add("--exercise", nargs="+", choices=EXERCISES, metavar="NAME", help="only these")
    add("--list", action="store_true", help="print all exercises")
    what = "grade a submission; submitted code runs with your permissions"
    add("--grade", type=Path, metavar="DIR", help=what)
    add("--limit", type=at_least_1, default=120, help="seconds per exercise (120)")
    add("--jobs", type=at_least_1, default=min(4, os.cpu_count() or 1), help="at once")
    add("--check", action="store_true", help="check that tests pinpoint each exercise")
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(args.exercise or EXERCISES))  # none twice
    if args.list:
        for name, e in EXERCISES.items():
            what = f"{e.points:3} points {e.minutes:4} minutes"
            print(f"{name:18}{what}   {e.script}.py: {', '.join(e.functions)}")
    elif args.grade:
        if not args.grade.is_dir():
            raise SystemExit(f"error: nothing graded: {args.grade} is no folder")
        Path("results.json").unlink(missing_ok=True)  # of an earlier submission
        names = names if args.exercise else exercises_set(args.grade)
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
            for name, wrong in pool.map(check, names):
                lines = [
                    f"{name}: {'NOT pinpointed' if wrong else 'pinpointed'}",
                    *wrong,
                ]
                print(*lines, sep="\n    ", flush=True)
                failed = failed or bool(wrong)
        raise SystemExit(failed)
    elif args.folder is None:
        parser.error("name the new folder for the copy")
    elif args.folder.exists():
        parser.error(f"{args.folder} exists already")
    else:
        write_assignment(args.folder, names)
        print(f"wrote {args.folder}: {', '.join(names)}")
        record = Path(f"{args.folder.resolve()}.exercises")
        record.write_text("\n".join(names) + "\n", "utf-8")
        print(f"wrote {record}: keep it for --grade")


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:  # such as a full disk
        raise SystemExit(f"error: {str(error) or 'stopped'}") from None
