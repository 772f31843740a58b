"""Exercises for a course: copies with functions to fill in, and marks for what comes back.

    python tests/make_assignment.py --list
    python tests/make_assignment.py ../homework --exercise guidance key-value-cache
    python tests/make_assignment.py ../homework        # all exercises at once
    python tests/make_assignment.py --grade ../homework    # a table, and results.json
    python tests/make_assignment.py --check            # that tests pinpoint each of them

An exercise keeps its signature and docstring, and raises NotImplementedError with a
sentence on what to do. The tests that the table names then fail, and those of the other
stages pass, but for those that it says cannot do without it. The copies are made from
the code itself: there is no second version of it.

--grade runs the six files of a copy with the tests of this repository, each exercise in
a process of its own with a time limit. results.json is in the form that Gradescope's
autograder reads. It is no sandbox: what is graded runs with all your rights.
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
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
STAGES = ["tokenizer", "cluster", "ar_model", "aux_model", "sample", "evaluate"]


@dataclass
class Exercise:
    stage: str  # which file, without .py
    functions: list  # in that file: "name", or "Class.name"
    reference: str  # where the method is from: paper, figure, equation
    minutes: int  # how long it takes, about
    task: str  # one sentence, which NotImplementedError says
    tests: list  # in tests/test_<stage>.py: what checks it, and fails without it
    needed_by: tuple = ()  # later stages whose tests cannot do without it

    @property
    def points(self):
        """One for each five minutes."""
        return max(1, self.minutes // 5)


EXERCISES = {
    "straight-through": Exercise(
        "tokenizer",
        ["VQVAE.quantize"],
        "VQ-VAE (van den Oord et al. 2017), equations 1 to 3",
        40,
        "Find the nearest codeword of every vector, let the gradient pass straight "
        "through, and measure the commitment loss.",
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
        "Move every code to the moving average of the vectors that chose it, make it a "
        "unit vector again, and restart dead codes.",
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
        "Draw k rows, each with a probability proportional to its squared distance to "
        "the nearest row drawn before.",
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
        "Assign every row to its nearest centroid, move the centroids to the means, and "
        "repeat until no assignment changes; no cluster may stay empty.",
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
        ["to_coarse", "codes_of_clusters"],
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
        "Replace every token by a code drawn at random from the cluster of that token.",
        ["test_swaps_stay_in_their_cluster_and_reach_all_of_it"],
    ),
    "causal-attention": Exercise(
        "ar_model",
        ["Block.forward"],
        "LlamaGen's block: RMSNorm, SwiGLU; the causal mask",
        75,
        "Attend, with a causal mask if self.causal, add that to x, and add what the "
        "gated feed-forward network makes of it.",
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
        "none: it changes the speed, and no result",
        20,
        "Append the new keys and values to those kept, and return all of them.",
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
        "Go from the logits without the class towards those with it, and beyond: scale "
        "times the whole way.",
        ["test_guidance_formula"],
    ),
    "top-k-top-p": Exercise(
        "ar_model",
        ["filter_logits"],
        "CTF, table 3 (d); top-p: Holtzman et al. 2020",
        40,
        "Set all logits to -inf but the top_k largest, and then all but the fewest "
        "largest that reach the probability top_p.",
        [
            "test_top_k_keeps_the_k_largest",
            "test_top_p_keeps_the_fewest_that_reach_p",
            "test_top_k_and_top_p_together_and_on_the_edge",
        ],
    ),
    "masked-head": Exercise(
        "aux_model",
        ["AuxModel.cluster_logits"],
        "CTF, figure 1c: q_i lies in the cluster c_i",
        40,
        "Give every token the logits of the codes of its own cluster, in the order of "
        "self.members; computing all K and picking will do.",
        ["test_logits_are_those_of_the_masked_k_way_head"],
    ),
    "fine-loss": Exercise(
        "aux_model",
        ["fine_loss"],
        "CTF, figure 1c: p(q_i given c_1 .. c_T, y)",
        20,
        "Return the mean cross-entropy of the fine labels within their clusters, and "
        "how often the likeliest one is right.",
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
        "Draw all fine labels from one pass: guide, mask to the cluster, divide by the "
        "temperature, keep the top_k.",
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
        "Draw the coarse labels, then the fine labels, and decode them; the baseline "
        "draws fine labels at once.",
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
        ["neighbour_radius", "covered"],
        "Kynkäänniemi et al. 2019, equations 1 and 2",
        30,
        "Find how far the k-th neighbour of every member is, and which points lie no "
        "farther than that from some member.",
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
        "Measure the nats of the coarse labels and of the fine ones given these (of the "
        "baseline: of the fine ones), and return bits.",
        ["test_bits_are_nats_over_ln_2_of_each_stage"],
    ),
}


def find(source, function):
    """The ast node of a function, "name" or "Class.name", in the source of its file."""
    body = ast.parse(source).body
    for name in function.split("."):
        node = next(item for item in body if getattr(item, "name", None) == name)
        body = node.body
    return node


def blank(source, exercise):
    """source, with the bodies of its functions replaced by NotImplementedError(task)."""
    for function in exercise.functions:
        node, lines = find(source, function), source.splitlines(keepends=True)
        first, last = node.body[1], node.body[-1]  # body[0] is the docstring
        indent = " " * first.col_offset
        # The sentence as string literals of one line each, which Python joins.
        words = textwrap.wrap(exercise.task, 70, drop_whitespace=False)
        said = [f"{indent}    {part!r}\n" for part in words]
        text = [f"{indent}raise NotImplementedError(\n", *said, f"{indent})\n"]
        end = node.body[0].end_lineno
        source = "".join([*lines[:end], *text, *lines[last.end_lineno :]])
    return source


def table():
    """All exercises as a Markdown table."""
    rows = [
        "| exercise | functions | minutes | points | source | tests that check it |"
    ]
    rows += ["|---|---|---|---|---|---|"]
    for name, e in EXERCISES.items():
        functions = ", ".join(f"`{function}`" for function in e.functions)
        tests = ", ".join(f"`{test}`" for test in e.tests)
        needed = "".join(f"; {stage}.py needs it as well" for stage in e.needed_by)
        columns = f"`{e.stage}.py`: {functions}", e.minutes, e.points, e.reference
        cells = " | ".join(str(column) for column in columns)
        rows.append(f"| {name} | {cells} | {tests}{needed} |")
    return "\n".join(rows)


def sheet(names):
    """ASSIGNMENT.md: what students read, the exercises in order."""
    total = sum(EXERCISES[name].points for name in names)
    text = (
        f"# Assignment\n\n{len(names)} exercises, {total} points. In each, a function "
    )
    text += (
        "raises `NotImplementedError`: write its body, as its docstring asks. Each is "
    )
    text += "marked by the tests below, alone: none needs the solution of another.\n"
    for i, name in enumerate(names, start=1):
        e = EXERCISES[name]
        functions = " and ".join(f"`{function}`" for function in e.functions)
        text += f"\n## {i}. {name} ({e.points} points, about {e.minutes} minutes)\n\n"
        text += f"{functions} in `{e.stage}.py`. {e.task}\n\n"
        text += f"Source: {e.reference}.\n\n    pytest tests/test_{e.stage}.py -k "
        text += f'"{" or ".join(e.tests)}"\n'
        for stage in e.needed_by:
            text += f"\nSome other tests of `tests/test_{stage}.py` fail until it is solved.\n"
    return text


def write_assignment(folder, names):
    """Copy the repository to folder, which is not there yet, with exercises blanked."""
    shutil.copytree(
        ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    for own in ("make_assignment.py", "test_make_assignment.py"):
        (folder / "tests" / own).unlink()
    for name in ("requirements.txt", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    readme = (ROOT / "README.md").read_text("utf-8")
    # Without the section on this script, up to the next heading; and without the two
    # columns that say what stands in the functions: where to set a breakpoint.
    breakpoints = " The last two columns say where to stop a debugger first."
    readme = readme.replace(breakpoints, "")
    readme = re.sub(r"## For a course\n.*?(?=\n## )\n", "", readme, flags=re.DOTALL)
    readme = re.sub(
        r"^(\| (?:file|`\w+\.py`) \|[^|]*\|[^|]*\|).*$",
        r"\1",
        readme,
        flags=re.MULTILINE,
    )
    readme = readme.replace(
        "|---|---|---|---|---|\n| `tokenizer.py`", "|---|---|---|\n| `tokenizer.py`"
    )
    (folder / "README.md").write_text(readme, "utf-8")
    (folder / "ASSIGNMENT.md").write_text(sheet(names), "utf-8")
    shutil.copytree(ROOT / ".github", folder / ".github")
    for stage in STAGES:
        source = (ROOT / f"{stage}.py").read_text("utf-8")
        for exercise in (EXERCISES[name] for name in names):
            if exercise.stage == stage:
                source = blank(source, exercise)
        (folder / f"{stage}.py").write_text(source, "utf-8")


def run_tests(folder, stages, tests=(), limit=None):
    """{(stage, test): message} of the test files of some stages, "" if it passed; with
    tests, of these alone. None if they take more than limit seconds."""
    files = [f"tests/test_{stage}.py" for stage in stages]
    if tests:
        files = [f"{files[0]}::{test}" for test in tests]
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            subprocess.run(
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                check=False,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return None
        if not report.exists():
            return {}
        results = {}
        for case in ElementTree.parse(report).iter("testcase"):
            problems = [e for e in case if e.tag in ("failure", "error")]
            message = (problems[0].get("message") or "error") if problems else ""
            key = case.get("classname").removeprefix("tests.test_"), case.get("name")
            key = key[0], key[1].split("[")[0]
            results[key] = results.get(key) or message
    return results


def grade(folder, limit, names):
    """The marks of a student's copy: a list of results in Gradescope's form, one for
    each exercise of names."""

    def grade_exercise(name):
        """Its tests, in a copy of this repository with the student's six files."""
        exercise = EXERCISES[name]
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary, "copy")
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "tests", copy / "tests", ignore=skip)
            for stage in STAGES:
                if (folder / f"{stage}.py").exists():
                    shutil.copy(folder / f"{stage}.py", copy / f"{stage}.py")
            found = run_tests(copy, [exercise.stage], exercise.tests, limit)
        if found is None:
            passed, output = 0, f"not done after {limit} seconds: an endless loop?"
        else:
            messages = [
                found.get((exercise.stage, t), "not run") for t in exercise.tests
            ]
            passed = messages.count("")
            said = zip(exercise.tests, messages)
            output = "\n".join(f"{t}: {m or 'passed'}" for t, m in said)
        score = round(exercise.points * passed / len(exercise.tests), 2)
        return {
            "name": name,
            "score": score,
            "max_score": exercise.points,
            "status": "passed" if passed == len(exercise.tests) else "failed",
            "output": output,
        }

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(grade_exercise, names))


def check(name):
    """Whether the tests pinpoint one exercise: (name, what is wrong, in lines).

    Blanked alone, its own tests fail and say what to do; with all others blanked, they
    pass: nobody's mark depends on another exercise.
    """
    exercise, wrong = EXERCISES[name], []
    others = [other for other in EXERCISES if other != name]
    for blanked in ([name], others):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "copy")
            write_assignment(folder, blanked)
            found = run_tests(folder, [exercise.stage], exercise.tests)
        for test in exercise.tests:
            message = found.get((exercise.stage, test), "not run")
            if blanked == [name] and exercise.task[:40] not in message:
                wrong.append(f"{test} should fail and say what to do: {message!r}")
            if blanked == others and message:
                wrong.append(f"{test} needs another exercise: {message!r}")
    return name, wrong


def check_stage(stage):
    """Whether later stages' tests do without the exercises of one stage."""
    own = {name: e for name, e in EXERCISES.items() if e.stage == stage}
    needed = {later for e in own.values() for later in e.needed_by}
    # No stage imports a later one.
    later = [s for s in STAGES[STAGES.index(stage) + 1 :] if s not in needed]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "copy")
        write_assignment(folder, list(own))
        found = run_tests(folder, later) if later else {}
    wrong = [f"{s}: {test} fails as well" for (s, test), why in found.items() if why]
    return f"{stage}.py without its exercises", wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="where to write the copy: a new folder")
    add("--exercise", nargs="+", choices=EXERCISES, default=list(EXERCISES))
    add("--list", action="store_true", help="print the table of exercises")
    add("--grade", type=Path, metavar="DIR", help="mark a student's copy; no sandbox")
    add("--limit", type=int, default=120, help="seconds for each exercise of --grade")
    add("--check", action="store_true", help="that the tests pinpoint each exercise")
    args = parser.parse_args(argv)
    if args.list:
        print(table())
    elif args.grade:
        if not args.grade.is_dir():
            parser.error(f"{args.grade}: no such folder")
        results = grade(args.grade, args.limit, args.exercise)
        for result in results:
            marks = f"{result['score']:g} of {result['max_score']}"
            print(f"{result['name']:20}{marks:>12}  {result['status']}")
        total = sum(result["score"] for result in results)
        print(f"{'all':20}{total:>6g} of {sum(r['max_score'] for r in results)}")
        Path("results.json").write_text(json.dumps({"tests": results}, indent=1) + "\n")
        print("wrote results.json")
    elif args.check:
        failed = False
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            stages = pool.map(check_stage, STAGES[:-1])
            for name, wrong in [*pool.map(check, args.exercise), *stages]:
                print(f"{name}: {'pinpointed' if not wrong else 'NOT pinpointed'}")
                print("".join(f"    {line}\n" for line in wrong), end="", flush=True)
                failed = failed or bool(wrong)
        raise SystemExit(failed)
    elif args.folder is None:
        parser.error("which folder is the copy to be written to?")
    elif args.folder.exists():
        parser.error(f"{args.folder} is there already")
    else:
        write_assignment(args.folder, args.exercise)
        print(f"wrote {args.folder}: {', '.join(args.exercise)}")


if __name__ == "__main__":
    main()
